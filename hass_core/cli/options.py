"""Options that several verbs take. What they name is looked for while the command line is read, before torch loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.draft_address import PLAIN, find_draft
from hass_core.errors import BadInput
from hass_core.target_model.source import check_source


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


PRESET = "smollm2-cpu"
FileOrPreset = Annotated[str | None, typer.Option("--config", "-c", help="Preset name or path of a .toml file")]
ConfigName = Annotated[str, typer.Option("--config", "-c", help="Preset name or path of a .toml file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a setting: section.key=value", metavar="KEY=VALUE")
]
DRAFT = "a folder, a store's address (STORE/draft/DIGEST) or models:/NAME@champion"
Draft = Annotated[Path, typer.Argument(metavar="DRAFT", help=f"The draft: {DRAFT}", parser=find_draft)]
DraftDefault = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DRAFT]",
        help=f"The draft: {DRAFT}; {PLAIN} = plain decoding; left out, the champion found here",
        parser=lambda address: Path(PLAIN) if address == PLAIN else find_draft(address),
    ),
]
TargetSource = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="Hugging Face id, folder, GGUF or package:NAME; left out, the one in the draft's record",
        callback=target_there,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write", callback=_if_given(out_folder))]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout")]
PromptTokens = Annotated[
    int | None, typer.Option(min=16, help="Draft from the last so many tokens of a prompt; 512 helps in long ones")
]
