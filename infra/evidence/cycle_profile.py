"""Where the time of a decoding cycle goes on a GPU: its kernels by total time, for a target of a given shape.

    python -m infra.evidence.cycle_profile llama3-8b [--of plain verify_60 tree …]

The kinds of cycle are those of `infra/evidence/cycle.py`. Prints a table for each kind, and last one JSON line: for
each kind the microseconds of a cycle from its first kernel's start to its last one's end, the sum of its kernels'
times, and the kernels' names, counts and microseconds. From Hopper on a kernel may begin while the one before still
runs, and waits for it; that is in its time too.
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hass_core.config import SamplingConfig
from hass_core.decoding.session import Session
from hass_core.store.provenance import provenance
from hass_core.target_model.runner import Runner, make_runner
from infra.evidence.cycle import LAYERS, drafters_of, random_target

WARM, TIMED, SHOWN = 5, 4, 24


def kernels_of(runner: Runner, drafter: Any, context: int = 200) -> dict[str, Any]:
    """A cycle's kernels, averaged over TIMED cycles of one row of `context` tokens."""
    capacity = (WARM + TIMED + 1) * (drafter.shape.depth + 1) + 1
    session = Session(runner, drafter, SamplingConfig(), 1, context + capacity)
    session.start([[7 * i % runner.vocab_size for i in range(context)]], seed=0)
    for _ in range(WARM):
        session.step([True])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(TIMED):
            session.step([True])
        torch.cuda.synchronize()
    events = [e for e in profiled.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        total = totals[event.name]
        total[0] += 1 / TIMED
        total[1] += (event.time_range.end - event.time_range.start) / TIMED
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    by_time = sorted(totals.items(), key=lambda item: -item[1][1])[:SHOWN]
    return {
        "us": round(span / TIMED),
        "busy_us": round(sum(us for _, us in totals.values())),
        "kernels": [[name[:90], round(count, 1), round(us, 1)] for name, (count, us) in by_time],
    }


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=LAYERS)
    parser.add_argument("--of", nargs="+", default=["plain", "verify_60", "tree"], help="kinds of cycle")
    options = parser.parse_args()
    target = random_target(options.shape, torch.device("cuda"))
    runner, drafters = make_runner(target), drafters_of(target)
    record: dict[str, Any] = {"shape": options.shape, "device": torch.cuda.get_device_name(), "cycles": {}}
    for kind in options.of:
        cycle = record["cycles"][kind] = kernels_of(runner, drafters[kind])
        print(f"{options.shape}, {kind}: {cycle['us']} us, {cycle['busy_us']} us of kernels")
        for name, count, us in cycle["kernels"]:
            print(f"{us:9.1f} us {count:6.1f} x {us / count:7.2f}  {name}")
    print(json.dumps(record | provenance()))


if __name__ == "__main__":
    main()
