"""The licence of a target: as set, or as its own model card or GGUF states it."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils.hub import cached_file

from hass_core.config import TargetConfig
from hass_core.store.content import remembered
from hass_core.target_model.source import gguf_of

NOT_STATED = "not stated"


def target_licence(config: TargetConfig) -> str:
    """An identifier such as `apache-2.0`, or `not stated`. A card that cannot be fetched states nothing."""
    if config.license:
        return config.license
    gguf = gguf_of(config.source)
    return (remembered(gguf, "licence", _of_gguf) if gguf else _of_card(config)) or NOT_STATED


def _of_gguf(path: Path) -> str | None:
    """Takes seconds: the vocabulary is read as well."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field else None


def _of_card(config: TargetConfig) -> str | None:
    path = cached_file(
        config.source,
        "README.md",
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    about = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    stated = about.get("license_name" if about.get("license") == "other" else "license")
    return str(stated) if stated else None
