"""What happens to a draft, told to Prefect as events: automations send messages or retrain when one comes."""

from collections.abc import Mapping
from typing import Any

from prefect.events import emit_event

from tasks.tracking import DraftVersion

PROMOTED, REFUSED, ROLLED_BACK = "hass.promoted", "hass.refused", "hass.rolled-back"
ACCEPTANCE_FELL, TRAFFIC_DRIFTED = "hass.acceptance-fell", "hass.traffic-drifted"


def emit(event: str, version: DraftVersion, message: str, payload: Mapping[str, Any] | None = None) -> None:
    """Emit `event` of the resource hass.draft.NAME; `message` is what a notification says."""
    emit_event(
        event=event,
        resource={
            "prefect.resource.id": f"hass.draft.{version.model}",
            "prefect.resource.name": f"{version.model} version {version.version}",
            "hass.message": message,
        },
        payload={"version": version.version, "message": message, **(payload or {})},
    )
