"""`hass serve`: an OpenAI-compatible server, to try a draft before it goes to an engine."""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.common import show
from hass_core.cli.draft_address import default_draft, target_of
from hass_core.cli.options import DraftDefault, PromptTokens, TargetSource
from hass_core.config import TreeConfig
from hass_core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    draft: DraftDefault = None,
    target: TargetSource = None,
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must give; else HASS_API_KEY, else none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens one answer may have")] = 1024,
    max_running: Annotated[int, typer.Option(min=1, help="Requests decoded in turn")] = 4,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in line before others are sent away")] = 256,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Kilobytes one request may have")] = 1024,
    max_wait: Annotated[float, typer.Option(min=0.1, help="Seconds a request may be in line")] = 120.0,
    max_body_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds a request's body may take to arrive")
    ] = 30.0,
    prompt_tokens: PromptTokens = None,
    plan: Annotated[bool, typer.Option(help="Choose the tree by measuring this machine first")] = True,
) -> None:
    """Serve the target through a draft at http://HOST:PORT/v1, as OpenAI's clients expect it.

    Example: HASS_API_KEY=… hass serve .hass/store/draft/DIGEST --port 8000
    """
    key = read_key(api_key_file)
    if key is None and host not in LOOPBACK:
        raise ConfigError(f"{host} is reachable by others: set HASS_API_KEY or --api-key-file, or stay on 127.0.0.1")
    listening = listen(host, port)
    try:
        from hass_core.serving.app import make_app
        from hass_core.serving.connection import make_server
    except ImportError as error:
        raise ConfigError(f"hass serve needs {error.name}; pip install 'hass-pipeline[serve]'") from None
    from hass_core.cli.decoders import build_decoder
    from hass_core.serving.service import Limits, Service
    from hass_core.target_model.loader import load_target

    chosen = default_draft(draft, target)
    loaded = load_target(target_of(chosen, target))
    tree = None if plan else TreeConfig(depth=3, top_k=4, nodes=12)
    decoder = build_decoder(loaded, chosen, tree, prompt_tokens)
    limits = Limits(max_new_tokens, max_running, max_waiting, max_body_kb * 1024, max_body_seconds, max_wait)
    service = Service(loaded, decoder, loaded.name, limits)
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else None
    show(f"serving {loaded.name} at http://{host}:{listening.getsockname()[1]}/v1")
    make_server(make_app(service, key, hosts)).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before a minute goes into loading. Raises ConfigError where it is not free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}; give another --host or --port") from None
    return bound


def read_key(file: Path | None) -> str | None:
    """The key of a file, else of the environment. Raises ConfigError for a file that is missing or holds no key."""
    if file is None:
        key = os.environ.get("HASS_API_KEY", "")
        return _sendable(key, "HASS_API_KEY") if key else None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        key = ""
    if not key:
        raise ConfigError(f"--api-key-file: {file} is missing, empty or not a text")
    return _sendable(key, str(file))


def _sendable(key: str, origin: str) -> str:
    """The key, when a header can carry it."""
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key of {origin} cannot be sent in a header: use letters, digits and signs of ASCII")
    return key
