"""Which numbers of a stage become metrics, and their names. docs/mlflow.md lists every name; a test compares."""

from hass_core.store import Artifact

BEST = {"val/tau": "best_tau", "val/tree_tau": "best_tree_tau"}  # the curve's value at the draft that is kept
ELSEWHERE = {"loss", "self_written_wanted"}  # the end of the curve train/loss; the setting prompts.self_written


def stage_metrics(artifact: Artifact) -> dict[str, float]:
    """The numbers of a stage's summary as `<stage>/<name>`, with four decimals: tables of the UI show what fits.

    Numbers with open names stay in manifest.json: prompts by source, what was skipped by reason. So do the last points
    of curves, which MLflow has from metrics.jsonl.
    """
    named = {BEST.get(name, name): value for name, value in artifact.summary.items()}
    return {
        f"{artifact.stage}/{name}": round(float(value), 4)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not (name in ELSEWHERE or "/" in name or name.startswith("from_"))
    }
