"""The README's commands, as a reader types them, in order: on a tiny model, with a plain file of prompts.

What only fetches or waits is told apart: `make` recipes are asked for with `make -n` and run with the Python at hand,
servers are asked for their help, and what needs a stack is checked against the files that deploy it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import forks
from tests.conftest import byte_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
SMALL = (
    "responses.max_new_tokens=24 responses.drop_repetitive=false prompts.self_written=0 training.passes=1 "
    "tree.plan=false training.tokens_per_pack=128 evaluation.benchmarks=['mine=questions.jsonl'] "
    "evaluation.max_questions=2 evaluation.max_new_tokens=8 evaluation.lossless_questions=1 promotion.beat_plain=false "
    "prompts.builtin=false prompts.near_duplicate_similarity=1.0"
)


def blocks() -> list[tuple[str, str]]:
    """The fenced blocks of the README: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The lines of its blocks that are commands."""
    lines = [line for kind, text in blocks() if not kind for line in text.splitlines()]
    return [line for line in lines if re.match(r"(make|hass|prefect|\.) ", line)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"messages": [{"role": "user", "content": f"Tell me of number {n}, and {n * 7}."}]} for n in range(12)]
    (folder / "logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"id": "1", "messages": [{"role": "user", "content": "Why?"}]}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


def hass(place: Path, *arguments: str) -> str:
    """What `hass` printed in that folder: a process of its own, which finds torch imported."""
    told = forks(place, with_torch=True).ask(list(arguments), stdin="")
    assert told["status"] == 0, f"{arguments}\n{told['out']}{told['error']}"
    return told["out"]


def run(place: Path, *arguments: str) -> str:
    """What a program behind Python's -m printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    own = {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(place / "prefect"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=place, env=kept | own, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    return done.stdout


def recipe(line: str) -> list[str]:
    """What `make` would run for a target that installs nothing: the arguments behind Python's -m."""
    assert shutil.which("make")
    typed = [*shlex.split(line), "--dry-run", "--no-print-directory", "--assume-old", ".venv/.installed"]
    reader = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    asked = subprocess.run(typed, cwd=ROOT, env=reader, capture_output=True, text=True)  # as if no make ran this test
    assert asked.returncode == 0, asked.stderr
    last = asked.stdout.strip().splitlines()[-1]
    return shlex.split(last.partition("python -m ")[2])


def test_every_command_has_a_test():
    known = ("make retrain", "make ui", "make stack", ". .", "hass ", "prefect deployment run")
    assert len(commands()) >= 14
    assert [line for line in commands() if not line.startswith(known)] == []


def test_the_settings_by_hand_are_settings(tmp_path):
    from hass_core.config import load_config

    ((_, text),) = [block for block in blocks() if block[0] == "toml"]
    (tmp_path / "mine.toml").write_text(text)
    assert load_config(tmp_path / "mine.toml").target.source == "Qwen/Qwen3-8B"


def test_deployments_are_those_of_prefect_yaml():
    named = [re.findall(r"'([\w-]+)/([\w-]+)'", line)[0] for line in commands() if line.startswith("prefect ")]
    text = (ROOT / "prefect.yaml").read_text()
    for flow, deployment in named:
        assert f"name: {deployment}" in text
        assert f"flows/{flow.replace('-', '_')}.py" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reader_gets_from_a_model_to_a_served_draft(place):
    typed = [line.replace("Qwen/Qwen3-8B", "model").replace("smollm2-135m", "model") for line in commands()]
    mine = [line for line in typed if line.startswith(("hass init", "hass forecast", "make retrain PRESET"))]
    assert len(mine) == 3
    hass(place, *shlex.split(mine[0])[1:])
    assert "trained parameters" in hass(place, *shlex.split(mine[1])[1:])
    printed = run(place, *recipe(mine[2]), *shlex.split(SMALL, posix=False))
    assert "champion" in printed
    assert recipe(typed[0])[:2] == ["flows.retrain", "smollm2-cpu"]
    for line in [line for line in typed if line.startswith("hass ") and line not in mine]:
        verb, *rest = shlex.split(line)[1:]
        small = {"evaluate": ["-c", "mine.toml", *[word for s in SMALL.split() for word in ("-s", s)]]}.get(verb, [])
        small = ["--limit", "2", "--max-new-tokens", "8"] if verb == "doctor" else small
        answered = hass(place, verb, *rest, *(["--help"] if verb in ("serve", "chat") else small))
        assert answered
    assert (place / "out/report.html").is_file()
    assert (place / "served/config.json").is_file()
