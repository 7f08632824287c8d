"""A flow with next to nothing in it, and a shard that only takes time: what is left is the orchestration."""

import sys
import time

from prefect import flow, task

from flows.prefect_server import check_server
from hass_core.config import ExecutionConfig
from infra.mistakes import in_one_sentence
from tasks.shards import mapped


@flow(name="small")
def small(number: int) -> int:
    """Return the number."""
    return number


@task(name="shard")
def shard(seconds: float, name: str) -> str:
    """Wait, as for a store or a GPU."""
    time.sleep(seconds)
    return name


@flow(name="shards")
def shards(count: int, seconds: float) -> float:
    """As many shards at once; seconds from the first submission to the last result."""
    started = time.perf_counter()
    names = [f"part-{n:05d}.parquet" for n in range(count)]
    done = list(mapped(shard, ExecutionConfig(workers=count), seconds=seconds)(names))
    assert sorted(done) == names
    return time.perf_counter() - started


def main() -> None:
    """Ask the server of PREFECT_API_URL, or one that lives with the run: `small_flow COUNT SECONDS`."""
    check_server()
    print(f"seconds={shards(int(sys.argv[1]), float(sys.argv[2])):.3f}")


if __name__ == "__main__":
    in_one_sentence(main)
