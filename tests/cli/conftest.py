"""A folder of things that are not what they should be, and commands run in it as processes of their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    (folder / "file").write_text("no folder")
    (folder / "empty").mkdir()
    (folder / "folder.toml").mkdir()
    texts = {
        "broken.toml": "name = ",
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


def command(folder: Path, line: str, stdin: str = "") -> Told:
    """Run `hass …` or `flows.NAME …` as a user would, in `folder`."""
    program, *arguments = line.split()
    module = ["-m", program] if program.startswith("flows.") else ["-m", "hass_core.cli"]
    environment = os.environ | {
        "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
        "TORCH_NOTE": str(folder / "torch"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HASS_CACHE": str(folder / "cache"),
        "PREFECT_HOME": str(folder / "prefect"),
    }
    environment.pop("HASS_API_KEY", None)
    (folder / "torch").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, *module, *arguments], cwd=folder, env=environment, input=stdin, capture_output=True, text=True
    )
    return Told(done.returncode, done.stdout, done.stderr, (folder / "torch").read_text() == "True")
