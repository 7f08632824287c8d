"""metrics.jsonl: one JSON object a line, appended while training runs, so that anyone can follow the file.

Every record has `step` (optimizer steps done) and `tokens_seen` (conversation tokens, all passes). Training records add

    train/loss, train/regression, train/soft_ce, train/top_k     means over supervised tokens; the parts unweighted
    train/sampling                                               the terms for decoding that samples, if there are any
    train/accuracy_step_1 …                                      share of tokens where draft and target agree
    train/lr, train/grad_norm, train/tokens_per_second, train/waiting_for_data, train/epoch

and validation records `val/loss`, `val/accuracy_step_1 …`, `val/chain_1 …` and `val/tau` (see validation.py), and
`val/tree_tau`.
"""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, float | int]


class MetricsFile:
    """The curves so far, in memory and in the file, which begins with the `records` of the checkpoint: they travel with
    it, so that training continued on another machine keeps them."""

    def __init__(self, path: Path, records: list[dict[str, Any]]):
        self.path, self.records = path, list(records)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(partial, path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and flush it."""
        self.records.append({name: _plain(value) for name, value in record.items()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.records[-1]) + "\n")


def read_metrics(text: str) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a last line without its end is left for later."""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def _plain(value: float | int) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")
