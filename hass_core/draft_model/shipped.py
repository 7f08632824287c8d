"""The draft that comes with the package: a start for short trainings, and what decodes before there is another."""

from importlib import resources
from pathlib import Path

SHIPPED = "shipped"  # as a setting's value


def shipped_draft() -> Path:
    """The folder of the draft for SmolLM2-135M-Instruct."""
    return Path(str(resources.files("hass_core.presets") / "drafts" / "smollm2-135m-instruct"))


def draft_at(name: str) -> Path:
    """The folder that `draft.warm_start` names."""
    return shipped_draft() if name == SHIPPED else Path(name)
