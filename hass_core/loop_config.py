"""Settings of what surrounds a retraining: record, gate, release, watch, workers. None changes a result."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hass_core.settings import Address, Settings

NOT_IN_NAMES = re.compile(r"""[/:'"?#%*\[\]\\\x00-\x1f\x7f]""")
"""What a registry's name may not hold: MLflow refuses it, or its searches, its addresses (models:/NAME@champion) or the
folder of a release would read it as something else."""
LONGEST_NAME = 250
"""Characters; MLflow's databases have room for 256, which our lock's name `NAME.lock` needs too. PostgreSQL would say
so of a model only when the trained draft is registered."""


class TrackingConfig(Settings):
    """Where runs are recorded."""

    uri: str | None = Field(default=None, description="MLflow tracking server; None = SQLite beside the store")
    experiment: str = Field(default="hass", min_length=1, max_length=LONGEST_NAME, description="MLflow experiment")
    registered_model: str | None = Field(
        default=None,
        min_length=1,
        max_length=LONGEST_NAME,
        description="Registry name, without / and : and other signs that have a meaning; None = hass-draft-<target>",
    )

    @field_validator("registered_model")
    @classmethod
    def _that_mlflow_takes(cls, name: str | None) -> str | None:
        if name is None:
            return None
        shown = f"tracking.registered_model = {name!r}"
        if found := NOT_IN_NAMES.search(name):
            raise ValueError(f"{shown}: MLflow takes no {found[0]!r} in a model's name, or reads it as something else")
        if name.strip() != name or name in ("", ".", ".."):
            raise ValueError(f"{shown}: MLflow takes no such name; write letters and digits, no blanks around them")
        return name


Engine = Literal["vllm", "sglang", "eagle"]


class PromotionConfig(Settings):
    """When a new draft (challenger) replaces the one in use (champion)."""

    automatic: bool = Field(default=True, description="Decide at the end of a retraining; off = wait for promote-draft")
    approval: bool = Field(
        default=False,
        description="A draft that passed the gate waits for a person, its flow run suspended",
    )
    margin: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Gain in tokens/s over the champion that the interval's lower end must exceed",
    )
    tolerance: float = Field(
        default=0.02, ge=0, le=1, description="Loss of tokens/s that one benchmark or one temperature may show"
    )
    rounds: int = Field(
        default=3, ge=2, le=100, description="Times champion and challenger answer all questions, in turns"
    )
    beat_plain: bool = Field(
        default=True, description="Without a champion to beat, a draft must beat plain decoding by the margin"
    )
    engines: tuple[Engine, ...] = Field(
        default=("vllm", "sglang"),
        description="Engines whose export check a new champion must pass; what one has no place for is told before a "
        "retraining begins",
    )
    judge: Literal["here", "server"] = Field(
        default="here", description="Who decodes: this process, or two servers that serve the two drafts"
    )
    champion_url: Address | None = Field(default=None, description="Server with the champion, for judge = server")
    challenger_url: Address | None = Field(default=None, description="Server with the challenger, for judge = server")
    server_command: str | None = Field(
        default=None,
        description="For judge = server, in place of running ones: a shell command that serves HASS_TARGET with "
        "HASS_DRAFT, HASS_DEPTH tokens at a time, at HASS_PORT; both drafts are served at once",
    )
    server_engine: Engine = Field(default="vllm", description="Layout of HASS_DRAFT for promotion.server_command")
    release: tuple[Engine, ...] = Field(
        default=(), description="Engines a new champion is exported for, into STORE/releases; empty = no release"
    )
    release_command: str | None = Field(
        default=None, description="Shell command after a release, such as a reload of the servers; it gets HASS_RELEASE"
    )
    release_webhook: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_]\w*$",
        description="Environment variable that holds the address to post a release to; an address may be a secret",
    )

    @model_validator(mode="after")
    def _check(self) -> "PromotionConfig":
        if self.judge == "server" and not (self.server_command or (self.champion_url and self.challenger_url)):
            raise ValueError(
                'promotion.judge = "server" needs promotion.server_command, or promotion.champion_url and '
                "promotion.challenger_url"
            )
        return self


class WatchConfig(Settings):
    """How the draft in use is watched where it serves."""

    endpoints: tuple[Address, ...] = Field(
        default=(), description="Addresses of the engines' metrics, such as http://host:8000/metrics"
    )
    prometheus: Address | None = Field(
        default=None, description="A Prometheus server that reads them, such as http://prometheus:9090"
    )
    selector: str = Field(
        default="", description='Label matchers that pick this draft\'s engines there, such as model_name="org/model"'
    )
    traffic: tuple[str, ...] = Field(
        default=(),
        description="Logs of what people ask now, as in prompts.files: has it drifted from what was trained on",
    )
    newest: int = Field(default=1000, ge=50, description="Conversations at the end of watch.traffic that are compared")
    drift: float = Field(
        default=1.5, ge=1, description="Times the distance that chance gives at which traffic counts as drifted"
    )
    tolerance: float = Field(
        default=0.1, gt=0, lt=1, description="Share by which tau may lie below what the evaluation lets expect"
    )
    readings: int = Field(default=3, ge=1, le=100, description="Readings in a row below that before an alarm")
    min_drafts: int = Field(default=200, ge=1, description="Drafts between two readings for them to count")
    quiet_hours: float = Field(default=168, ge=0, description="Hours after an alarm without another")


class ExecutionConfig(Settings):
    """Who does the work of a stage that can be divided, by shards or by packs; the result is the same."""

    workers: int = Field(
        default=1, ge=1, le=4096, description="Shards extracted at once; 1 = one after the other in this process"
    )
    runner: Literal["threads", "ray"] = Field(
        default="threads", description="threads = this machine, one process for each of several GPUs; ray = a cluster"
    )
    gpus: int = Field(
        default=1, ge=1, le=4096, description="Processes of this host that train the draft, each with a GPU of its own"
    )
    accelerate: str | None = Field(
        default=None,
        description="A configuration of accelerate for them, such as infra/accelerate/fsdp2.yaml, or one over several "
        "hosts; each host runs this stage with its own",
    )
    ray_address: str | None = Field(
        default=None, description="A running cluster, as ray://HOST:10001; None = one started on this machine"
    )
