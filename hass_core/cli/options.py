"""Options that several verbs take. What they name is looked for while the command line is read, before torch loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hass_core.errors import BadInput
from hass_core.json_files import read_object
from hass_core.target_model.source import check_source


def draft_folder(folder: Path) -> Path:
    """`folder`, when it can be a draft. Raises BadInput."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise BadInput(f"the draft {folder} is {what}: a draft is a folder with config.json and its weights")
    read_object(folder / "config.json", BadInput, "a draft is a folder with config.json and its weights")
    return folder


def out_folder(folder: Path) -> Path:
    """`folder`, when files can be written into it, or it can be made. Raises BadInput."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name a folder to write")
    return folder


def out_file(file: Path | None) -> Path | None:
    """`file`, when it can be written. Raises BadInput."""
    if file is not None and file.is_dir():
        raise BadInput(f"{file} is a folder; name a file to write")
    if file is not None and not file.parent.is_dir():
        raise BadInput(f"{file} cannot be written: there is no folder {file.parent}")
    return file


def _if_given(check: Callable[[Path], Path]) -> Callable[[Path | None], Path | None]:
    """The check as a callback of an option that may be left out."""
    return lambda path: None if path is None else check(path)


def folder_there(folder: Path | None) -> Path | None:
    """`folder`, when it exists. Raises BadInput."""
    if folder is not None and not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    return folder


def target_there(source: str | None) -> str | None:
    """`source`, when it leads to a target or may be on the hub. Raises TargetError."""
    if source is not None:
        check_source(source)
    return source


ConfigName = Annotated[str, typer.Option("--config", "-c", help="Preset name or path of a .toml file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a setting: section.key=value", metavar="KEY=VALUE")
]
DraftFolder = Annotated[
    Path, typer.Argument(help="Folder with config.json and model.safetensors", callback=_if_given(draft_folder))
]
DraftOption = Annotated[
    Path | None, typer.Option(help="Draft folder; without one, plain decoding", callback=_if_given(draft_folder))
]
TargetSource = Annotated[
    str, typer.Option("--target", "-t", help="Hugging Face id, folder, GGUF or package:NAME", callback=target_there)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write", callback=_if_given(out_folder))]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout")]
