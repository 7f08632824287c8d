"""A folder of things that are not what they should be, and commands run in it as processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import byte_tokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
NOTE_TORCH = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["TORCH_NOTE"], "w").write(str("torch" in sys.modules)))
"""


@pytest.fixture(scope="session")
def bad(tmp_path_factory) -> Path:
    """The folder that commands run in."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_llama().save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    for name in ("config.json", "model.safetensors"):
        (folder / "notokens").mkdir(exist_ok=True)
        shutil.copy(folder / "target" / name, folder / "notokens")
    (folder / "file").write_text("no folder")
    (folder / "empty").mkdir()
    (folder / "folder.toml").mkdir()
    texts = {
        "broken.toml": "name = ",
        "none.toml": '[draft]\nvocab_size = "none"\n',
        "deep.toml": "x = " + "[" * 10_000,
        "list.json": "[]",
        "garbage.gguf": "GGUFgarbage",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "asked.jsonl").write_text(json.dumps({"id": "a", "messages": [{"role": "user", "content": "Hi"}]}))
    (folder / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    (folder / "key").write_text("schlüssel")
    config = {"hidden_size": 48, "vocab_size": 259, "num_hidden_layers": 1}
    for name, text in (("half", "{"), ("list", "[]"), ("draft", json.dumps(config)), ("noweights", json.dumps(config))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "draft" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NOTE_TORCH)
    return folder


@dataclass(frozen=True)
class Told:
    """What a command left behind."""

    status: int
    out: str
    error: str
    loaded_torch: bool


def command(folder: Path, line: str, stdin: str = "", with_torch: bool = False) -> Told:
    """Run `hass …` or `flows.NAME …` as a user would, in `folder`; `with_torch`: it may find torch loaded already."""
    program, *arguments = line.split()
    if program == "hass":
        return Told(**forks(folder, with_torch).ask(arguments, stdin))
    environment = environment_in(folder) | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    environment["TORCH_NOTE"] = str(folder / "torch")
    (folder / "torch").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=folder, env=environment, input=stdin, capture_output=True, text=True,
    )  # fmt: skip
    return Told(done.returncode, done.stdout, done.stderr, (folder / "torch").read_text() == "True")


class Forks:
    """A process that has loaded `hass` and forks for each command; it ends when this one does."""

    def __init__(self, folder: Path, with_torch: bool):
        program = [sys.executable, str(Path(__file__).with_name("forks.py")), *(["torch"] if with_torch else [])]
        environment = environment_in(folder) | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            program, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, arguments: list[str], stdin: str) -> dict[str, Any]:
        """What a command with these arguments left behind."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"arguments": arguments, "stdin": stdin}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@cache
def forks(folder: Path, with_torch: bool) -> Forks:
    """One for all commands in a folder."""
    return Forks(folder, with_torch)


def environment_in(folder: Path) -> dict[str, str]:
    """What a command finds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment = kept | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HASS_CACHE": str(folder / "cache"),
        "PREFECT_HOME": str(folder / "prefect"),
    }
    environment.pop("HASS_API_KEY", None)
    return environment
