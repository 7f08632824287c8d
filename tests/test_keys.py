"""Every setting, and every part of a target: what it changes is made anew, and nothing else is.

A new setting fails the first test until it stands in the table, with the first stage that it can influence.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from hass_core.config import RunConfig
from hass_core.data import prompts, responses
from hass_core.data.holdout import forbidden_questions
from hass_core.data.live import resolve
from hass_core.evaluation import evaluate
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.features import extract
from hass_core.store import Artifact, Store
from hass_core.target_model.identity import identify
from hass_core.target_model.loader import Target, choose_dtype, freeze
from hass_core.training.train import draft_folder
from tests.conftest import byte_tokenizer, tiny_llama
from tests.evaluation.conftest import random_draft

STAGES = ("prompts", "responses", "features", "draft", "evaluation")
NONE = "none"  # how fast it goes, where it lies, what is told on the way
LOCAL: dict[str, Any] = {"evaluation": {"benchmarks": ["MINE/questions.jsonl"]}, "prompts": {"files": ["MINE/a.jsonl"]}}
SERVER = LOCAL | {"responses": {"engine": "openai", "server_url": "http://127.0.0.1:1/v1", "server_model": "m"}}
WRITING = LOCAL | {"prompts": {"files": ["MINE/a.jsonl"], "self_written": 5}}
PRETRAINED = LOCAL | {"pretraining": {}}
NO_TREE = LOCAL | {"training": {"tree_answers": 0}}
BY_ITSELF = choose_dtype("auto", torch.device("cpu"))  # to name what this machine would choose changes nothing
OTHER_DTYPE = "float32" if BY_ITSELF is torch.bfloat16 else "bfloat16"

TRAINING: dict[str, tuple[Any, str]] = {
    "align_steps": (2, "draft"),
    "step_weights": ((1.0, 0.5, 0.5), "draft"),
    "detach_features": (False, "draft"),
    "top_k": (20, "draft"),
    "top_k_weight": (0.5, "draft"),
    "soft_ce_weight": (0.5, "draft"),
    "regression_weight": (0.5, "draft"),
    "acceptance_weight": (0.5, "draft"),
    "hybrid_weight": (0.5, "draft"),
    "agreement_weight": (0.5, "draft"),
    "agreement_candidates": (2, "draft"),
    "feature_noise": (0.1, "draft"),
    "passes": (3, "draft"),
    "max_steps": (9, "draft"),
    "tokens_per_pack": (512, "draft"),
    "packs_per_step": (2, "draft"),
    "packs_per_micro_batch": (1, NONE),
    "optimizer": ("muon", "draft"),
    "lr_peak": (1e-4, "draft"),
    "warmup_fraction": (0.2, "draft"),
    "schedule": ("cosine", "draft"),
    "betas": ((0.8, 0.9), "draft"),
    "weight_decay": (0.2, "draft"),
    "clip_norm": (0.5, "draft"),
    "clip_value": (0.5, "draft"),
    "ema_decay": (0.9, "draft"),
    "dtype": (OTHER_DTYPE, "draft"),
    "compile": (True, "draft"),
    "validate_every_steps": (7, "draft"),
    "tree_answers": (5, "draft"),
    "early_stop_validations": (3, "draft"),
    "recompute": (True, NONE),
    "log_every_steps": (3, NONE),
    "checkpoint_every_steps": (3, NONE),
    "keep_checkpoints": (5, NONE),
}
TABLE: dict[str, tuple[Any, str]] = {
    "name": ("other", NONE),
    "seed": (7, "responses"),
    "store": ("elsewhere", NONE),
    # the target itself counts by its identity, below; these say where it is, and how it is held
    "target.source": ("elsewhere", NONE),
    "target.revision": ("main", NONE),
    "target.dtype": ("bfloat16", "responses"),
    "target.device": ("cuda", NONE),
    "target.trust_remote_code": (True, NONE),
    "target.license": ("mit", NONE),
    "prompts.builtin": (False, "prompts"),
    "prompts.files": (("MINE/b.jsonl",), "prompts"),
    "prompts.datasets": (("MINE/set",), "prompts"),
    "prompts.newest": (1, "prompts"),
    "prompts.last_days": (9, "prompts"),
    "prompts.time_field": ("when", NONE),  # without a window no time is read
    "prompts.mask_patterns": (("[0-9]{9}",), "prompts"),
    "prompts.mask_command": ("cat", "prompts"),
    "prompts.self_written_share": (0.5, "prompts"),
    "prompts.self_written": (3, "prompts"),
    "prompts.max_prompts": (3, "prompts"),
    "prompts.max_prompt_tokens": (99, "prompts"),
    "prompts.near_duplicate_similarity": (0.5, "prompts"),
    "responses.engine": ("openai", "responses"),
    "responses.sampling": (({"temperature": 0.1},), "responses"),
    "responses.max_new_tokens": (9, "responses"),
    "responses.max_sequences_per_batch": (9, NONE),
    "responses.conversations_per_shard": (9, "responses"),
    "responses.max_conversations": (9, "responses"),
    "responses.drop_repetitive": (False, "responses"),
    "responses.languages": (("en",), "responses"),
    "responses.server_url": ("http://127.0.0.1:2/v1", NONE),
    "responses.more_servers": (("http://127.0.0.1:3/v1",), NONE),
    "responses.server_model": ("other", NONE),  # of a local engine; see SPECIAL
    "responses.server_concurrency": (9, NONE),
    "features.engine": ("vllm", "features"),
    "features.server_urls": (("http://127.0.0.1:2/v1",), NONE),  # where, not what
    "features.server_folder": ("/elsewhere", NONE),
    "features.server_model": ("other", NONE),  # what it serves is held against the target
    "features.server_concurrency": (9, NONE),
    "features.max_tokens_per_conversation": (99, "features"),
    "features.max_tokens_per_batch": (99, NONE),
    "features.encoding": ("int8", "features"),
    "features.row_group_mb": (9, "features"),
    "features.validation_fraction": (0.2, "features"),
    "draft.architecture": ("eagle3", "draft"),
    "draft.norm_output": (NONE, NONE),  # of eagle3 alone; see SPECIAL
    "draft.taps": (NONE, NONE),
    "draft.fc_norm": (NONE, NONE),
    "draft.vocab_size": (99, "draft"),
    "draft.family": ("llama", NONE),  # the shape of a Llama target's draft by itself
    "draft.start": ("random", "draft"),
    "draft.warm_start": ("MINE/warm", "draft"),
    **{f"training.{name}": entry for name, entry in TRAINING.items()},
    "pretraining": ({}, "draft"),
    "tree.kind": ("static", "draft"),  # of val/tree_tau
    "tree.depth": (3, "draft"),
    "tree.top_k": (3, "draft"),
    "tree.nodes": (9, "draft"),
    "tree.vocabulary": (99, "evaluation"),
    "tree.eight_bits": (True, "evaluation"),
    "tree.prompt_tokens": (99, "evaluation"),
    "tree.plan": (True, "evaluation"),
    "evaluation.benchmarks": (("MINE/others.jsonl",), "prompts"),  # no prompt may be one of its questions
    "evaluation.methods": (("plain",), "evaluation"),
    "evaluation.temperatures": ((1.0,), "evaluation"),
    "evaluation.max_questions": (1, "evaluation"),
    "evaluation.max_new_tokens": (9, "evaluation"),
    "evaluation.repeats": (3, "evaluation"),
    "evaluation.bootstrap_resamples": (101, "evaluation"),
    "evaluation.lossless_questions": (1, "evaluation"),
    "evaluation.seed": (7, "evaluation"),
    "promotion": (NONE, NONE),  # these sections decide what becomes of results
    "tracking": (NONE, NONE),
    "watch": (NONE, NONE),
    "execution": (NONE, NONE),
}
SPECIAL: list[tuple[dict[str, Any], str, Any, str]] = [
    (LOCAL | {"draft": {"architecture": "eagle3"}}, "draft.norm_output", True, "draft"),
    (LOCAL | {"draft": {"architecture": "eagle3"}}, "draft.taps", (1,), "features"),
    (LOCAL | {"draft": {"architecture": "eagle3", "taps": (1,)}}, "draft.fc_norm", True, "draft"),
    (SERVER, "responses.server_model", "other", "responses"),
    (SERVER, "responses.server_url", "http://127.0.0.1:2/v1", NONE),  # where, not what
    (SERVER, "responses.more_servers", ("http://127.0.0.1:3/v1",), NONE),
    (SERVER, "target.dtype", "bfloat16", "features"),
    (WRITING, "seed", 7, "prompts"),
    (WRITING, "target.dtype", "bfloat16", "prompts"),
    (NO_TREE, "tree.depth", 3, "evaluation"),
    *((PRETRAINED, f"pretraining.{name}", value, stage) for name, (value, stage) in TRAINING.items()),
]


@pytest.fixture
def mine(tmp_path, tiny_target) -> Path:
    folder = tmp_path / "mine"
    random_draft(tiny_target, folder / "warm")
    (folder / "set").mkdir()
    (folder / "set" / "rows.jsonl").write_text(json.dumps({"prompt": "Tell me about sets."}) + "\n")
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": f"Tell me about {name}."}) + "\n")
    for name in ("questions", "others"):
        rows = [{"question_id": i, "category": "x", "turns": [f"What is {name} {i}?"]} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def placed(value: Any, mine: Path) -> Any:
    """`value` with MINE for the folder of files."""
    if isinstance(value, str):
        return value.replace("MINE", str(mine))
    if isinstance(value, dict):
        return {key: placed(item, mine) for key, item in value.items()}
    return [placed(item, mine) for item in value] if isinstance(value, (list, tuple)) else value


def with_setting(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return base | {first: with_setting(base.get(first, {}), rest, value) if rest else value}


def settings(values: dict[str, Any], mine: Path) -> RunConfig:
    if values.get("features", {}).get("engine") == "vllm":
        values = with_setting(values, "features.server_urls", ("http://h/v1",))
        values = with_setting(values, "features.server_folder", "/states")
    if values.get("responses", {}).get("engine") == "openai":
        values = with_setting(values, "responses.server_url", values["responses"].get("server_url", "http://h/v1"))
    return RunConfig.model_validate(placed(values, mine))


def digests(config: RunConfig, target: Target, store: Store) -> dict[str, str]:
    """The digest of each stage, as a run with these settings would name it."""

    def artifact(stage: str, digest: str) -> Artifact:
        return Artifact(stage=stage, digest=digest, root=store.root)

    if config.target.dtype == "bfloat16":
        target = bfloat16(target)
    hashes = sorted(forbidden_questions(config.evaluation).hashes)
    sources = resolve(config.prompts)
    key = prompts._key(config, target, hashes, sources, prompts._window(config, sources))
    made = {"prompts": store.stage("prompts", key).digest}
    for stage, key in (("responses", responses._key), ("features", extract._key)):
        source = artifact(*list(made.items())[-1])
        made[stage] = store.stage(stage, key(config, source, target)).digest
    made["draft"] = draft_folder(config, artifact("features", made["features"]), store, target).digest
    questions = load_benchmarks(config.evaluation)
    key = evaluate._key(config, artifact("draft", made["draft"]), target, questions)
    return made | {"evaluation": store.stage("evaluation", key).digest}


def bfloat16(target: Target) -> Target:
    return dataclasses.replace(target, model=tiny_llama().bfloat16())


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [stage for stage in STAGES if before[stage] != after[stage]]


def from_stage(stage: str) -> list[str]:
    return [] if stage == NONE else list(STAGES[STAGES.index(stage) :])


def paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting, as section.key; an optional section is one setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and prefix + name not in TABLE:
            yield from paths(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_setting_has_its_stage():
    known = set(paths(RunConfig))
    assert known - TABLE.keys() == set(), "new settings: say in TABLE which stage they can influence first"
    assert TABLE.keys() - known == set(), "settings that are gone"
    (section,) = [kind for kind in get_args(RunConfig.model_fields["pretraining"].annotation) if kind is not type(None)]
    assert set(section.model_fields) == set(TRAINING)


@pytest.mark.parametrize("path", [path for path, (value, _) in TABLE.items() if value is not NONE])
def test_a_setting_changes_the_stages_that_it_can_influence_and_no_others(path, mine, store, tiny_target):
    value, stage = TABLE[path]
    before = digests(settings(LOCAL, mine), tiny_target, store)
    after = digests(settings(with_setting(LOCAL, path, value), mine), tiny_target, store)
    assert changed(before, after) == from_stage(stage)


@pytest.mark.parametrize(
    ("base", "path", "value", "stage"), SPECIAL, ids=[f"{s[1]}-{i}" for i, s in enumerate(SPECIAL)]
)
def test_a_setting_counts_only_where_it_is_used(base, path, value, stage, mine, store, tiny_target):
    before = digests(settings(base, mine), tiny_target, store)
    after = digests(settings(with_setting(base, path, value), mine), tiny_target, store)
    assert changed(before, after) == from_stage(stage)


@pytest.mark.parametrize(
    ("name", "old", "new", "base", "stage"),
    [
        ("a.jsonl", "about a", "about c", LOCAL, "prompts"),
        (
            "set/rows.jsonl",
            "about sets",
            "about rows",
            LOCAL | {"prompts": {"datasets": ["MINE/set"]}},
            "prompts",
        ),
        ("questions.jsonl", "What is questions 1", "What was questions 1", LOCAL, "prompts"),
        ("questions.jsonl", '"category": "x"', '"category": "y"', LOCAL, "evaluation"),
    ],
)
def test_files_count_by_their_content(name, old, new, base, stage, mine, store, tiny_target):
    before = digests(settings(base, mine), tiny_target, store)
    file = mine / name
    file.write_text(file.read_text().replace(old, new))
    assert changed(before, digests(settings(base, mine), tiny_target, store)) == from_stage(stage)


def test_a_warm_start_counts_by_its_content(mine, store, tiny_target):
    base = with_setting(LOCAL, "draft.warm_start", "MINE/warm")
    before = digests(settings(base, mine), tiny_target, store)
    weights = load_file(mine / "warm" / "model.safetensors")
    weights["fc.weight"][7, 5] += 1e-6
    save_file(weights, mine / "warm" / "model.safetensors", metadata={"format": "pt"})
    assert changed(before, digests(settings(base, mine), tiny_target, store)) == from_stage("draft")


def test_files_do_not_count_by_their_place(mine, store, tiny_target, tmp_path):
    base = with_setting(LOCAL, "draft.warm_start", "MINE/warm")
    before = digests(settings(base, mine), tiny_target, store)
    assert digests(settings(base, mine.rename(tmp_path / "elsewhere")), tiny_target, store) == before


@pytest.mark.parametrize(
    ("base", "part", "stage"),
    [
        *((LOCAL, part, "prompts") for part in ("tokenizer", "template")),
        *((LOCAL, part, "responses") for part in ("weights", "config", "ends")),
        *((WRITING, part, "prompts") for part in ("weights", "config", "ends", "tokenizer", "template")),
    ],
)
def test_a_part_of_the_target_changes_the_stages_that_depend_on_it(base, part, stage, mine, store, tiny_target):
    before = digests(settings(base, mine), tiny_target, store)
    other = dataclasses.replace(tiny_target, identity=dataclasses.replace(tiny_target.identity, **{part: "other"}))
    assert changed(before, digests(settings(base, mine), other, store)) == from_stage(stage)


INERT = (  # fields of a Llama's configuration that decide nothing …
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "id2label", "label2id"),
    *("problem_type", "initializer_range", "use_cache", "pad_token_id", "pretraining_tp", "attention_dropout"),
    *("_name_or_path", "output_attentions", "chunk_size_feed_forward"),
)
DECIDING = (  # … and those that decide what is computed
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "tie_word_embeddings"),
    *("rope_parameters", "attention_bias", "mlp_bias", "head_dim", "model_type", "is_encoder_decoder"),
)
CONFIG_PARTS = {**{n: [] for n in INERT}, **{n: ["config"] for n in DECIDING}, "eos_token_id": ["ends"]}


def other_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, dict):
        return {**value, "more": 1.0}
    return [*value, "more"] if isinstance(value, list) else value + ("x" if isinstance(value, str) else 1)


def test_every_field_of_a_targets_configuration_counts_or_is_known_not_to():
    fields = tiny_llama().config.to_dict()
    assert fields.keys() == CONFIG_PARTS.keys()
    before = freeze(tiny_llama(), byte_tokenizer(), "tiny").identity
    for name, value in fields.items():
        target = freeze(tiny_llama(), byte_tokenizer(), "tiny")
        changed_fields = fields | {name: other_value(value)}
        target.model.config.to_dict = lambda told=changed_fields: told
        target.model.config.eos_token_id = changed_fields["eos_token_id"]
        after = identify(target.model, target.tokenizer, target.eos_token_ids)
        assert after.differing(before.parts()) == CONFIG_PARTS[name], name
