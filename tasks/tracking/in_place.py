"""Artifacts stay beside the database in use, also after the project's folder moved.

MLflow writes whole paths into its database: of an experiment, a run, a model. Where the folder `mlartifacts` that they
name is not the one beside the database, they are from before a move, or from the folder this one is a copy of: unless
it is where they say, and none of their runs has its artifacts beside the database. The store that our tags name lies
in the same folder, and moved with it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy

ARTIFACTS = "mlartifacts"
PATHS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Tables and columns of MLflow's database that hold paths of artifacts."""
OURS = {
    "model_version_tags": ("value", "key LIKE 'hass.%'"),
    "tags": ("value", "key LIKE 'hass.%'"),
    "datasets": ("dataset_source", "dataset_source_type = 'hass'"),
}
"""Table, column and rows that hold addresses in the store: alone, or as the root of an artifact in JSON."""


def follow_the_folder(uri: str, folder: Path) -> list[str]:
    """Let the SQLite database at `uri`, which lies in `folder`, name `folder`/mlartifacts wherever it names another;
    the places replaced."""
    here = (folder / ARTIFACTS).as_uri()
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.begin() as connection:
            found = {table: _columns(connection, table) for table in PATHS}
            named = _places(connection, found) - {here}
            elsewhere = {place for place in named if _has_moved(connection, place, folder / ARTIFACTS)}
            for place in elsewhere:
                for table, columns in found.items():
                    for column in columns:
                        _replace(connection, table, column, place, here)
                _move_store(connection, _folder_of(place).parent, folder)
    finally:
        engine.dispose()
    return sorted(elsewhere)


def _has_moved(connection: sqlalchemy.Connection, place: str, here: Path) -> bool:
    """Whether `place` is gone, or some run that the database has there is found `here` as well: in a copy."""
    if not _folder_of(place).is_dir():
        return True
    named = connection.execute(sqlalchemy.text("SELECT artifact_uri FROM runs")).scalars()
    inside = (str(uri).removeprefix(f"{place}/") for uri in named if str(uri).startswith(f"{place}/"))
    return any((here / unquote(run)).exists() for run in inside)


def _folder_of(place: str) -> Path:
    return Path(unquote(urlsplit(place).path))


def _columns(connection: sqlalchemy.Connection, table: str) -> list[str]:
    """The columns with paths that the table has in this version of MLflow; none where there is no such table."""
    inspector = sqlalchemy.inspect(connection)
    if not inspector.has_table(table):
        return []
    there = {column["name"] for column in inspector.get_columns(table)}
    return [column for column in PATHS[table] if column in there]


def _places(connection: sqlalchemy.Connection, found: dict[str, list[str]]) -> set[str]:
    """The folders of local artifacts that the experiments name."""
    if not found["experiments"]:
        return set()
    rows = connection.execute(sqlalchemy.text("SELECT artifact_location FROM experiments"))
    named = {str(location) for (location,) in rows}
    return {path for path in named if path.startswith("file:///") and path.endswith(f"/{ARTIFACTS}")}


def _replace(connection: sqlalchemy.Connection, table: str, column: str, place: str, here: str) -> None:
    """Names of the table come from `PATHS`, never from outside."""
    change = f"UPDATE {table} SET {column} = :here || substr({column}, :length) WHERE {_BEGINS.format(column)}"
    values = {"here": here, "place": place, "length": len(place) + 1, "inside": f"{place}/"}
    connection.execute(sqlalchemy.text(change), values)


def _move_store(connection: sqlalchemy.Connection, before: Path, now: Path) -> None:
    """Let our own tags name what lies in the folder `now`, the store, where they name it in `before`."""
    inspector = sqlalchemy.inspect(connection)
    there = [path.name for path in now.iterdir() if path.is_dir()] if now.is_dir() else []
    for table, (column, ours) in OURS.items():
        for old, new in _renamed(before, now, there) if inspector.has_table(table) else ():
            named = f"instr({column}, :old) = 1 OR (:old LIKE '\"root\"%' AND instr({column}, :old) > 0)"
            change = f"UPDATE {table} SET {column} = replace({column}, :old, :new) WHERE {ours} AND ({named})"
            connection.execute(sqlalchemy.text(change), {"old": old, "new": new})


def _renamed(before: Path, now: Path, folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """How an address begins, and how an artifact's JSON names its store, then and now."""
    for folder in folders:
        old, new = str(before / folder), str(now / folder)
        yield f"{old}/", f"{new}/"
        old, new = (json.dumps(path, ensure_ascii=False)[1:-1] for path in (old, new))
        for end in ('"', "/"):
            yield f'"root":"{old}{end}', f'"root":"{new}{end}'


_BEGINS = "({0} = :place OR substr({0}, 1, length(:inside)) = :inside)"
