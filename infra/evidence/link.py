"""Read features from an S3 server on this machine over links of given rates, beside what those links give.

    python -m infra.evidence.link [--megabytes-per-second 62.5 125] [--hidden-size 4096] [--gigabytes 1.5]

Prints the records of `hass bench features --store`, one a line: first of the server itself, then through a forwarder
that lets its answers pass at each rate. Server and reader share the processor.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hass_core.store.provenance import provenance
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, free_port, seaweedfs

SLACK_SECONDS = 0.02  # how far behind its rate a link may catch up


class Link:
    """Forwards connections to a port; the answers of all of them share a number of bytes a second."""

    def __init__(self, port: int, bytes_per_second: float):
        self.port, self._goal, self._rate, self._free_at = free_port(), port, bytes_per_second, 0.0
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._forward, "127.0.0.1", self.port) as server:
            await server.serve_forever()

    async def _forward(self, asking: asyncio.StreamReader, asked: asyncio.StreamWriter) -> None:
        answers, goal = await asyncio.open_connection("127.0.0.1", self._goal)
        await asyncio.gather(self._pump(asking, goal, False), self._pump(answers, asked, True), return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, goal: asyncio.StreamWriter, slowly: bool) -> None:
        while data := await source.read(1 << 16):
            if slowly:
                now = time.monotonic()
                self._free_at = max(self._free_at, now - SLACK_SECONDS) + len(data) / self._rate
                await asyncio.sleep(max(0.0, self._free_at - now))
            goal.write(data)
            await goal.drain()
        goal.close()


def measured(port: int, options: list[str]) -> dict:
    """The record of `hass bench features --store` for the server behind that port."""
    server = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1",
              "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}  # fmt: skip
    command = [sys.executable, "-m", "hass_core.bench.features", "--store", f"s3://{BUCKET}/bench", *options]
    done = subprocess.run(command, env={**os.environ, **server}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse the command line, measure, print the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes-per-second", type=float, nargs="*", default=[62.5, 125.0])
    parser.add_argument("--hidden-size", default="4096")
    parser.add_argument("--gigabytes", default="1.5")
    options = parser.parse_args()
    passed = ["--hidden-size", options.hidden_size, "--gigabytes", options.gigabytes]
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.exists() else None) as folder,
        seaweedfs(Path(folder)) as port,
    ):
        import s3fs

        client = s3fs.S3FileSystem(key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=f"http://127.0.0.1:{port}")
        client.mkdir(BUCKET)
        for rate in (None, *options.megabytes_per_second):
            record = measured(Link(port, rate * 1e6).port if rate else port, passed)
            print(json.dumps({"megabytes_per_second": rate, **record, **provenance()}), flush=True)


if __name__ == "__main__":
    main()
