"""`hass store`: what the store holds, what it takes, and what can go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from hass_core.cli.common import console, show, show_json
from hass_core.cli.options import AsJson, ConfigName, Overrides
from hass_core.config import Stage, load_config
from hass_core.errors import FINDINGS, StoreError
from hass_core.units import size_words

if TYPE_CHECKING:
    from hass_core.store import Store
    from hass_core.store.housekeeping import Entry

app = typer.Typer(no_args_is_help=True)
STAGES: tuple[str, ...] = (*get_args(Stage), "duel")  # in order


@app.command()
def ls(config: ConfigName = "smollm2-cpu", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the stages, the newest first.

    Example: hass store ls
    """
    _, held = _open(config, overrides)
    if as_json:
        return show_json([vars(entry) for entry in held])
    _table(held)


@app.command()
def size(config: ConfigName = "smollm2-cpu", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what each kind of stage takes.

    Example: hass store size -s store=s3://BUCKET/FOLDER
    """
    _, held = _open(config, overrides)
    if as_json:
        return show_json({stage: sum(entry.bytes for entry in held if entry.stage == stage) for stage in STAGES})
    for stage in STAGES:
        own = [entry for entry in held if entry.stage == stage]
        show(f"{stage:<12}{len(own):>5}  {size_words(sum(entry.bytes for entry in own)):>10}")
    show(f"{'all':<12}{len(held):>5}  {size_words(sum(entry.bytes for entry in held)):>10}")


@app.command()
def check(config: ConfigName = "smollm2-cpu", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare the files of every finished stage with its manifest, by name and size; none is read.

    Example: hass store check -s store=s3://BUCKET/FOLDER
    """
    from hass_core.store.housekeeping import problems

    store, held = _open(config, overrides)
    finished = [entry for entry in held if entry.finished]
    found = {entry.name: told for entry in finished if (told := problems(store, entry))}
    if as_json:
        show_json(found)
    else:
        for name, told in found.items():
            show(f"{name}: {'; '.join(told)}; remove this folder and run the stage again")
        show(f"{len(finished) - len(found)} of {len(finished)} finished stages hold what their manifests say")
    if found:
        raise typer.Exit(FINDINGS)


@app.command()
def prune(
    config: ConfigName = "smollm2-cpu",
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(min=0, help="Newest drafts kept with all they came from")] = 3,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would go")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no registered draft, no recent run and nothing under way needs.

    Example: hass store prune --keep 3 --yes
    """
    from hass_core.store.housekeeping import removable, remove

    store, held = _open(config, overrides)
    going = removable(store, held, keep)
    for entry in going if yes else []:
        remove(store, entry)
    if as_json:
        return show_json([vars(entry) for entry in going])
    _table(going)
    total = size_words(sum(entry.bytes for entry in going))
    show(
        f"{len(going)} stages removed, {total}"
        if yes
        else f"{len(going)} stages with {total} would go; --yes removes them"
    )


def _open(config: str, overrides: list[str] | None) -> "tuple[Store, list[Entry]]":
    from hass_core.store import Store
    from hass_core.store.housekeeping import entries

    store = Store(load_config(config, overrides or []).store)  # its target need not be here
    if store.is_local and not Path(store.root).is_dir():
        raise StoreError(f"there is no store at {store.root}; name it with HASS_STORE or -s store=FOLDER")
    return store, entries(store, STAGES)


def _table(held: "list[Entry]") -> None:
    table = Table("stage", "digest", "size", "")
    for entry in held:
        table.add_row(entry.stage, entry.digest, size_words(entry.bytes), "" if entry.finished else "unfinished")
    console.print(table)
