"""The decoders that an evaluation compares, by name, and which draft each takes: known before torch is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hass_core.errors import ConfigError

PLAIN, HASS, EAGLE, EAGLE2, SPS, PLD = "plain", "hass", "eagle", "eagle2", "sps", "pld"
TAKES_DRAFT = (HASS, EAGLE, EAGLE2, SPS)


def check_methods(methods: Sequence[str], drafts: Mapping[str, Path]) -> None:
    """Raise ConfigError when a method lacks its draft, or a draft is given for no method."""
    for name in drafts:
        if name not in TAKES_DRAFT:
            raise ConfigError(f"no method {name!r} takes a draft; those that do are {', '.join(TAKES_DRAFT)}")
    if EAGLE2 in methods and EAGLE2 not in drafts:
        raise ConfigError(
            "the method eagle2 needs a draft of its own, trained on the same data with training.align_steps = 1 and "
            "training.top_k_weight = 0; train one with `hass run draft -s training.align_steps=1 "
            "-s training.top_k_weight=0` and name its folder as eagle2=DIR, or leave the method out"
        )
    for method in {HASS, EAGLE}.intersection(methods):
        draft_folder(method, drafts)


def draft_folder(method: str, drafts: Mapping[str, Path]) -> Path:
    """The draft a method decodes with: its own; EAGLE falls back on EAGLE-2's, which is trained alike, then HASS's."""
    for name in (method, EAGLE2, HASS):
        if name in drafts:
            return drafts[name]
    raise ConfigError(f"the method {method} needs a draft; name its folder as {method}=DIR")
