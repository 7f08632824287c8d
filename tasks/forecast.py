"""What a run will cost, told before it begins, and what this machine lacks for it."""

from collections.abc import Iterator

from hass_core.config import RunConfig
from hass_core.forecast.ready import announcement, check_ready


def announce(config: RunConfig) -> Iterator[str]:
    """Lines for the terminal; then raises TargetError or StoreError where this machine cannot do it."""
    yield from announcement(config)
    check_ready(config)
