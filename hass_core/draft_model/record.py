"""What a draft's config.json tells of its making: the `hass` section, looked at before anybody trusts it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hass_core.errors import CorruptFile

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DraftRecord(BaseModel):
    """The entries that decide something later on; all others are for people."""

    model_config = ConfigDict(strict=True)

    target: str | None = None
    target_identity: dict[str, str] = {}
    target_model_type: str | None = None
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None
    trained_tokens: Annotated[int, Field(gt=0)] | None = None
    calibration: dict[str, Annotated[list[Positive], Field(min_length=2, max_length=2)]] | None = None


def check_record(config: dict[str, Any]) -> DraftRecord:
    """The `hass` section of config.json; empty for a draft from elsewhere. Raises CorruptFile for one of senseless
    entries."""
    try:
        record = DraftRecord.model_validate(config.get("hass") or {})
        for temperature in record.calibration or ():
            float(temperature)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("hass", *first["loc"])))
        raise CorruptFile(f"{place} in the draft's config.json makes no sense: {first['msg']}") from None
    except ValueError as error:
        raise CorruptFile(f"hass.calibration in the draft's config.json makes no sense: {error}") from None
    return record
