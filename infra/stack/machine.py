"""What the machine offers: programs, ports, files that only their owner reads, a GPU."""

import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from hass_core.errors import HassError

SEAWEEDFS_OFFSET = 10_000  # its gRPC side listens so far above the port it is given


class StackError(HassError):
    """The stack cannot start; the message says which part, why, and what to do."""


def program(name: str, hint: str, *folders: str) -> str:
    """The path of a program in `folders`, beside this Python, or on PATH. Raises StackError with the hint."""
    places = [*folders, str(Path(sys.executable).parent)]
    found = shutil.which(name, path=":".join(places)) or shutil.which(name)
    if found is None:
        raise StackError(f"{name} is not installed: {hint}")
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A random port that is free, and free 10,000 above."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        if is_free(port) and is_free(port + SEAWEEDFS_OFFSET):
            return port


def claim_ports(asked: dict[str, int]) -> dict[str, int]:
    """By name the port asked for, any free one for 0. Raises StackError where somebody uses it, or two parts would."""
    claimed: dict[str, int] = {}
    for name, port in asked.items():
        if port in claimed.values():
            raise StackError(f"--{name}-port is {port}, which another part has: give each its own, or 0 for a free one")
        claimed[name] = _claimed(port, name)
    return claimed


def _claimed(port: int, name: str) -> int:
    if port == 0:
        return free_port()
    if not 0 < port < 65_536:
        raise StackError(f"--{name}-port is {port}, and ports go from 1 to 65535 (0 takes any free one)")
    if not is_free(port):
        raise StackError(
            f"port {port} of 127.0.0.1 is in use, and {name} needs it: stop what listens there, or choose another "
            f"with --{name}-port N (0 takes any free one)"
        )
    return port


def answers(url: str) -> bool:
    """Whether a server answers there, and well."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(text)


def has_gpu() -> bool:
    """Whether nvidia-smi answers."""
    found = shutil.which("nvidia-smi")
    return found is not None and subprocess.run([found], capture_output=True).returncode == 0
