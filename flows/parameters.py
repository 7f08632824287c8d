"""The parameter of the flows: a preset and what differs from it. Prefect's form is drawn from this model.

Every setting of `RunConfig` appears with its type, bounds and description; left empty, the preset's value counts.
"""

from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, create_model

from hass_core.config import Engine, RunConfig, Settings, load_config, parse_config


def optional(model: type[BaseModel], base: type[BaseModel] = Settings) -> Any:
    """A subclass of `base` with all of the model's fields made optional, their bounds and descriptions kept."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if settings := _settings(kind):
            section = optional(settings)
            empty = None if field.default is None else section()
            about = field.description or settings.__doc__
            fields[name] = (section | None, Field(default=empty, title=name, description=about))
        else:
            bounded: Any = Annotated[kind, *field.metadata] if field.metadata else kind
            fields[name] = (bounded | None, Field(default=None, title=name, description=field.description))
    return create_model(model.__name__.replace("Config", "Changes"), __base__=base, __doc__=model.__doc__, **fields)


def _settings(kind: Any) -> type[BaseModel] | None:
    """The section's class where the annotation is one, or one that may be left out."""
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with the leaves of `changes` put in."""
    result = dict(values)
    for name, change in changes.items():
        result[name] = merged(values[name] or {}, change) if isinstance(change, dict) else change
    return result


RemoteStage = Literal["responses", "features", "draft", "evaluation"]


class _Preset(Settings):
    preset: str = Field(default="smollm2-cpu", description="Name of a preset, or path of a .toml file on the worker")
    overrides: list[str] = Field(default=[], description="More changes, as section.key=value; `none` clears a setting")
    deployments: dict[RemoteStage, str] = Field(
        default={},
        description='Stages to run as deployments of their own, such as {"draft": "train-draft/gpu"}; others run here',
    )
    continues: str | None = Field(default=None, description="MLflow run to record into; set by the flow that asks")


_Changes: Any = optional(RunConfig, base=_Preset)


class RunParameters(_Changes):
    """A preset, and the settings that differ from it. An empty field takes the preset's value."""

    def config(self, overridden: str = "overrides") -> RunConfig:
        """The whole settings. Raises ConfigError naming a wrong one; `overridden`: where the overrides were given."""
        changes = self.model_dump(mode="json", exclude_none=True, include=set(RunConfig.model_fields))
        preset = load_config(self.preset, self.overrides, overridden).model_dump(mode="json")
        return parse_config(merged(preset, changes), where=self.preset)

    def for_sub_flow(self, run_id: str) -> dict[str, Any]:
        """The same for a flow run of another deployment, which runs all of its stages itself, into the same record."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"deployments"}) | {"continues": run_id}


class ExportParameters(RunParameters):
    """Which draft, for which engine, and where to."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, a version's number, or a folder (STORE/draft/DIGEST); "
        "empty = the champion",
    )
    engine: Engine = Field(default="vllm", description="The engine that will serve it")
    folder: str | None = Field(
        default=None, pattern=r"^\w[\w.-]*$", description="Its name below exports/; empty = DRAFT-ENGINE"
    )
    served_as: str | None = Field(default=None, description="The target's name at the engine, for the command")


class PromotionParameters(RunParameters):
    """The settings it is measured with, and which version."""

    version: int | None = Field(default=None, ge=1, description="Registered version; empty = the challenger")


class RejectionParameters(RunParameters):
    """Which version, and why."""

    version: int | None = Field(default=None, ge=1, description="Registered version; empty = the challenger")
    reason: str = Field(default="a person refused it", min_length=1, description="Why, for the record")
