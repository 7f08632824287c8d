"""`hass` commands as processes of their own that need not import anything first: forks of one that has.

    python forks.py [torch]     reads a line of JSON a command, and answers with one

A fork begins with `hass_core.cli` loaded, as every command does, and with `torch` also what commands load after it.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

HEAVY = ("torch", "transformers", "hass_core.stages", "hass_core.cli.decoders", "hass_core.decoding.planner",
         "hass_core.export.exporter", "hass_core.export.importer", "hass_core.evaluation.steps")  # fmt: skip


def answer(arguments: list[str], stdin: str) -> dict[str, object]:
    """Run `hass` with these arguments; its status, what it printed, and whether it loaded torch."""
    with tempfile.TemporaryDirectory() as name:
        files = {number: Path(name, text) for number, text in enumerate(("in", "out", "err"))}
        files[0].write_text(stdin)
        note = Path(name, "torch")
        child = os.fork()
        if child == 0:
            os._exit(_run(arguments, files, note))
        _, status = os.waitpid(child, 0)
        printed = {"out": files[1].read_text(), "error": files[2].read_text()}
        return {"status": os.waitstatus_to_exitcode(status), **printed, "loaded_torch": note.exists()}


def _run(arguments: list[str], files: dict[int, Path], note: Path) -> int:
    """The command, in the fork; its exit status."""
    for number, file in files.items():
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["hass", *arguments]
    try:
        importlib.import_module("hass_core.cli").main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if "torch" in sys.modules:
        note.touch()
    return status


def main() -> None:
    """Answer until the input ends."""
    for module in ("hass_core.cli", *(HEAVY if "torch" in sys.argv else ())):
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
