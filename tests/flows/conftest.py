"""A retraining small enough for a test: the tiny target in a folder, a dozen prompts, a settings file."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.stack import PREFECT, answers, end, free_port, wait_for

PROMPTS = ["Name a colour.", "Add two and three.", "Say hello.", "What is rain?", "Count to four.", "Spell cat."]
SETTINGS = """
name = "tiny"
store = "{folder}/.hass/store"
[target]
source = "{folder}/tiny-instruct"
dtype = "float32"
[prompts]
builtin = false
files = ["{folder}/prompts.jsonl"]
[responses]
max_new_tokens = 24
drop_repetitive = false
conversations_per_shard = 8
[features]
max_tokens_per_conversation = 128
validation_fraction = 0.2
[training]
align_steps = 2
passes = 4
tokens_per_pack = 128
log_every_steps = 1
validate_every_steps = 10
checkpoint_every_steps = 5
[tree]
depth = 2
top_k = 2
nodes = 5
[promotion]
beat_plain = false
[evaluation]
benchmarks = ["tiny={folder}/questions.jsonl"]
max_new_tokens = 12
bootstrap_resamples = 100
lossless_questions = 2
"""


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory) -> Path:
    """One Prefect database for all flows that run without a server: making its tables takes seconds."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory) -> Iterator[str]:
    """The address of a Prefect server for commands that need none of their own, which takes seconds each time."""
    home, port = tmp_path_factory.mktemp("server"), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment = kept | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"), "the Prefect server", 120)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        end(server)


@pytest.fixture
def tiny_preset(tiny_target, tmp_path) -> Path:
    """A settings file; everything it names lies beside it."""
    tiny_target.model.save_pretrained(tmp_path / "tiny-instruct")
    tiny_target.tokenizer.save_pretrained(tmp_path / "tiny-instruct")
    write_prompts(tmp_path / "prompts.jsonl", [f"{text} ({n})" for text in PROMPTS for n in range(4)])
    write_prompts(tmp_path / "questions.jsonl", ["Who are you?", "Why is the sky blue?", "Name a river."])
    preset = tmp_path / "tiny.toml"
    preset.write_text(SETTINGS.format(folder=tmp_path))
    return preset


def write_prompts(path: Path, texts: list[str]) -> None:
    """A JSONL file in messages form."""
    rows = [{"id": f"{path.stem}-{n}", "messages": [{"role": "user", "content": t}]} for n, t in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
