"""Which files hold conversations, by their names alone. Imports nothing, so that a forecast is told at once."""

from pathlib import PurePosixPath

LINES = (".jsonl", ".ndjson")  # one conversation a line
FORMATS = (*LINES, ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zstd")


def plain_name(path: str) -> str:
    """A file's path without the endings of its compression."""
    while path.endswith(COMPRESSIONS):
        path = path.rpartition(".")[0]
    return path


def is_readable(relative: str) -> bool:
    """Whether a name in a folder is one of conversations; what begins with a dot or underline is someone's mark."""
    parts = PurePosixPath(relative.strip("/")).parts
    return plain_name(relative).endswith(FORMATS) and not any(part.startswith((".", "_")) for part in parts)
