"""metrics.jsonl: one JSON object a line, appended while training runs, so that anyone can follow the file.

Every record has `step` (optimizer steps done) and `tokens_seen` (conversation tokens, all passes). Training records add

    train/loss, train/regression, train/soft_ce, train/top_k     means over supervised tokens; the parts unweighted
    train/accuracy_step_1 …                                      share of tokens where draft and target agree
    train/lr, train/grad_norm, train/tokens_per_second, train/waiting_for_data, train/epoch

and validation records `val/loss`, `val/accuracy_step_1 …`, `val/chain_1 …` and `val/tau` (see validation.py), and
`val/tree_tau` (see tree_validation.py).
"""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, float | int]


class MetricsFile:
    """Appends records; on resumption what lies beyond the checkpoint is dropped."""

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        kept = [line for line in read_records(path) if line["step"] <= resume_step] if resume_step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and flush it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete records; a half-written last line is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _plain(value: float | int) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")
