"""One answer of an evaluation as an MLflow trace: a span for every cycle, with what of its guesses was accepted."""

import time

import mlflow

from hass_core.config import RunConfig
from hass_core.evaluation.examples import Cycle, Example
from tasks.tracking.client import as_default, connect, experiment_id, tracking_uri

TRACE = "hass.trace"  # tag of a run: the trace of one of its answers
NANOSECONDS = 1e9


def record_trace(config: RunConfig, run_id: str, example: Example) -> None:
    """Log the answer as a trace of the run, once. Its seconds are measured, those of a cycle are an even share."""
    client = connect(config)
    if TRACE in client.get_run(run_id).data.tags:
        return
    cycles = [cycle for turn in example.turns for cycle in turn.cycles]
    start = time.time_ns() - int(example.seconds * NANOSECONDS)
    ends = [start + int(example.seconds * NANOSECONDS * (n + 1) / len(cycles)) for n in range(len(cycles))]
    asked = [turn.asked for turn in example.turns]
    about = {"tau": f"{example.tau:.2f}", "question": example.name, "times": "divided evenly among the cycles"}
    with as_default(tracking_uri(config)):  # traces go where the process's default is
        root = client.start_trace(
            "speculative answer", inputs={"asked": asked}, attributes=about, run_id=run_id, start_time_ns=start,
            experiment_id=experiment_id(client, config),
        )  # fmt: skip
        for cycle, began, ended in zip(cycles, [start, *ends], ends, strict=False):
            span = client.start_span(
                _name(cycle), root.trace_id, root.span_id, start_time_ns=began,
                inputs={"drafted levels": cycle.offered}, attributes={"accepted": cycle.accepted},
            )  # fmt: skip
            told = {"accepted text": cycle.drafted, "the target's own": cycle.own}
            client.end_span(root.trace_id, span.span_id, outputs=told, end_time_ns=ended)
        answer = "".join(cycle.drafted + cycle.own for cycle in cycles)
        client.end_trace(root.trace_id, outputs=answer, end_time_ns=ends[-1])
        mlflow.flush_trace_async_logging()
    client.set_tag(run_id, TRACE, root.trace_id)


def _name(cycle: Cycle) -> str:
    return f"cycle {cycle.number}: {cycle.accepted} accepted" if cycle.number else "the prompt's own token"
