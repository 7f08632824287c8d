"""What may be named as a benchmark: known, and looked for on this machine, before torch is loaded."""

from collections.abc import Iterable
from pathlib import Path

from hass_core.errors import BadInput

HELDOUT = "heldout"
ON_HUB = ("mt_bench", "humaneval", "gsm8k")


def check_benchmarks(given: Iterable[str]) -> None:
    """Raise BadInput for a benchmark that is neither known nor a file."""
    for name in given:
        benchmark_file(name)


def benchmark_file(given: str) -> Path | None:
    """The file that a benchmark is read from, None for the held-out prompts and those of the hub. Raises BadInput."""
    name, equals, file = given.partition("=")
    if not equals and given in (HELDOUT, *ON_HUB):
        return None
    path = Path(file if equals else name)
    if not path.is_file():
        known = ", ".join((HELDOUT, *ON_HUB))
        raise BadInput(f"no benchmark {given!r}: neither a file nor one of {known}; give a file or NAME=FILE")
    return path
