"""A real server on loopback, in a thread of this process, over the tiny target and a random draft."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from hass_core.config import TreeConfig
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.serving.app import make_app
from hass_core.serving.service import Limits, Service
from hass_core.target_model.runner import make_runner
from tests.decoding.conftest import random_draft
from tests.flows.stack import free_port

TREE = TreeConfig(kind="dynamic", depth=3, top_k=3, nodes=8)
LIMITS = Limits(max_new_tokens=200, max_running=3, max_waiting=64, max_body_bytes=20_000)


@contextmanager
def serving(target, limits: Limits = LIMITS, key: str | None = None, hosts: list[str] | None = None):
    """(base URL, service) of a running server."""
    decoder = SpeculativeDecoder(make_runner(target), random_draft(target), TREE)
    service = Service(target, decoder, "tiny", limits)
    port = free_port()
    config = uvicorn.Config(make_app(service, key, hosts), host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def server(tiny_target) -> Iterator[tuple[str, Service]]:
    with serving(tiny_target) as running:
        yield running
