"""A real server on loopback, in a thread of this process, over the tiny target and a random draft."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from hass_core.config import TreeConfig
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.serving.app import make_app
from hass_core.serving.connection import make_server
from hass_core.serving.service import Limits, Service
from hass_core.target_model.loader import Target, freeze
from hass_core.target_model.runner import make_runner
from tests.conftest import byte_tokenizer, tiny_llama
from tests.decoding.conftest import random_draft
from tests.flows.stack import free_port

TREE = TreeConfig(kind="dynamic", depth=3, top_k=3, nodes=8)
JSON_TYPE = {"content-type": "application/json"}
LIMITS = Limits(max_new_tokens=200, max_running=3, max_waiting=64, max_body_bytes=20_000)

TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def serving(target, limits: Limits = LIMITS, key: str | None = None, hosts: list[str] | None = None):
    """(base URL, service) of a running server."""
    decoder = SpeculativeDecoder(make_runner(target), random_draft(target), TREE)
    service = Service(target, decoder, "tiny", limits)
    port = free_port()
    server = make_server(make_app(service, key, hosts), host="127.0.0.1", port=port)
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


@pytest.fixture(scope="module")
def tool_server() -> Iterator[tuple[str, Target]]:
    """A server whose chat template writes tool calls; with its target."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    target = freeze(tiny_llama(), tokenizer, name="tiny")
    with serving(target) as (url, _):
        yield url, target


def post(server: tuple, body: object, kind: str = "chat/completions") -> httpx.Response:
    """Send JSON as it is, halves of surrogate pairs and NaN included."""
    content = json.dumps(body).encode()
    return httpx.post(f"{server[0]}/v1/{kind}", content=content, headers=JSON_TYPE, timeout=60)
