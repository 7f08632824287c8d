"""A whole run on one GPU against the clock: the stages, and how busy the GPU is in each.

    python infra/evidence/timeline.py OUT -c smollm2-gpu [-s section.key=value …]

Runs prompts to evaluation in this process, as `hass run` does, and reads the GPU's utilisation four times a second
beside it; the store should be empty. OUT.json gets the seconds of each stage, what it counted and the utilisation;
OUT.png shows them.

    python infra/evidence/timeline.py OUT --draw      the picture again, of an OUT.json on record
"""

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer

from hass_core.config import Stage, load_config, stages_until
from hass_core.progress import Progress

EVERY_MILLISECONDS = 250
LAST: Stage = "evaluation"


class Clock:
    """Seconds since the start at which each stage first told of its progress, and last."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.spans: dict[str, list[float]] = {}
        self.told: dict[str, list[tuple[float, int, int, str]]] = {}

    def now(self) -> float:
        return round(time.perf_counter() - self._started, 2)

    def progress_for(self, stage: Stage) -> Progress:
        # a stage begins when it asks for its progress: the one before it has ended then
        self.spans[stage] = [self.now(), self.now()]
        print(f"{self.now():8.1f} s  {stage}", flush=True)

        def tell(done: int, total: int, note: str = "") -> None:
            self.told.setdefault(stage, []).append((self.now(), done, total, note))

        return cast(Progress, tell)

    def end(self) -> None:
        begins = [span[0] for span in self.spans.values()] + [self.now()]
        for span, end in zip(self.spans.values(), begins[1:], strict=True):
            span[1] = end


def watched(clock: Clock, into: list[tuple[float, int]], stream: IO[str]) -> None:
    """Take utilisations (per cent of the first GPU) as the driver prints them."""
    for line in stream:
        if (value := line.strip().split(",")[0]).isdigit():
            into.append((clock.now(), int(value)))


def measured(config: str, changes: list[str]) -> dict[str, Any]:
    """The record of one run."""
    clock, busy = Clock(), []
    command = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    watcher = None
    if shutil.which("nvidia-smi"):
        watcher = subprocess.Popen(
            [*command, f"--loop-ms={EVERY_MILLISECONDS}"], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        threading.Thread(target=watched, args=(clock, busy, watcher.stdout), daemon=True).start()
    try:
        import torch  # what a run's start costs belongs to it

        from hass_core.stages import run_until
        from hass_core.store.provenance import provenance

        made = run_until(LAST, load_config(config, changes), clock.progress_for)
        clock.end()
    finally:
        if watcher:
            watcher.terminate()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device, "settings": {"config": config, "changes": changes},
        "seconds": clock.now(), "stages": clock.spans,
        "summaries": {stage: dict(made[stage].summary) for stage in stages_until(LAST)},
        "busy_percent": {stage: mean(busy, *span) for stage, span in clock.spans.items()},
        "told": clock.told, "utilisation": busy, **provenance(),
    }  # fmt: skip


def mean(busy: list[tuple[float, int]], start: float, end: float) -> float | None:
    """Of the readings between two times."""
    values = [value for at, value in busy if start <= at < end]
    return round(sum(values) / len(values), 1) if values else None


def draw(record: dict[str, Any], file: Path) -> None:
    """Utilisation against time, a band for each stage."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    for number, (stage, (start, end)) in enumerate(record["stages"].items()):
        axes.axvspan(start, end, color=f"C{number}", alpha=0.18, lw=0)
        axes.text((start + end) / 2, 103, f"{stage}\n{end - start:.0f} s", ha="center", va="bottom", fontsize=8)
    if record["utilisation"]:
        times, percents = zip(*record["utilisation"], strict=True)
        axes.fill_between(times, percents, color="0.3", lw=0, step="post")
    axes.set(xlim=(0, record["seconds"]), ylim=(0, 100), xlabel="seconds", ylabel="GPU busy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main(
    out: Path,
    config: Annotated[str, typer.Option("--config", "-c")] = "smollm2-gpu",
    changes: Annotated[list[str] | None, typer.Option("--set", "-s")] = None,
    only_draw: Annotated[bool, typer.Option("--draw")] = False,
) -> None:
    written = out.with_suffix(".json")
    if not only_draw:
        written.write_text(json.dumps(measured(config, changes or [])) + "\n", encoding="utf-8")
    record = json.loads(written.read_text(encoding="utf-8"))
    draw(record, out.with_suffix(".png"))
    print(json.dumps({name: record[name] for name in ("seconds", "stages", "busy_percent")}))


if __name__ == "__main__":
    typer.run(main)
