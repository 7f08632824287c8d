"""The Prefect server is away in the middle of a run: one sentence with its address, for httpx names none."""

from urllib.parse import urlsplit

import httpx
from prefect.settings import get_current_settings

from hass_core.errors import Unreachable, causes_of


def prefect_outage_in(error: BaseException) -> Unreachable | None:
    """The sentence where Prefect's client has given up asking its server; None for any other error."""
    url = get_current_settings().api.url
    if not url or not any(_asked(cause).startswith(url) for cause in causes_of(error)):
        return None
    parts = urlsplit(url)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return Unreachable(
        f"Prefect at {shown} does not answer any more: start it, or change or unset PREFECT_API_URL, and run the same "
        "command again; what is done is kept"
    )


def _asked(error: BaseException) -> str:
    """What could not be reached, where the error says so; Prefect's client is the only one here that asks its API."""
    try:
        return str(error.request.url) if isinstance(error, httpx.TransportError) else ""
    except RuntimeError:  # raised without a request
        return ""
