"""Drafts that fuse several states of the target: trained as they draft, fed alike from disk and from the target."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig, parse_config
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.layers import Eagle3Model
from hass_core.errors import ConfigError, DraftMismatch, TargetError
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset
from hass_core.store import Artifact
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner
from hass_core.training.alignment import Alignment
from hass_core.training.batch import add_noise, collate, rounded_up
from hass_core.training.losses import Objective, distill
from hass_core.training.start import start_fusion
from hass_core.training.train import train_draft
from tests.features.conftest import conversation, responses_artifact
from tests.target_model.conftest import tiny_model
from tests.training.conftest import HIDDEN, VOCABULARY, Talk
from tests.training.test_alignment import STEPS, draft_chain, locate
from tests.training.test_eagle3 import by_definition, make_eagle3, trimmed

TAPS = (1, 3, 4)
LAYERS = 7
NORMS = [(False, False), (True, True)]  # norm_output, fc_norm


def make_tapping(size: int = VOCABULARY, norm_output: bool = False, fc_norm: bool = False) -> Eagle3Model:
    """A random draft over three states."""
    return make_eagle3(size, norm_output, taps=TAPS, fc_norm=fc_norm)


@pytest.fixture
def tapped(talks) -> list[Talk]:
    """Conversations with three states a token, of scales as far apart as a residual stream's."""
    generator = torch.Generator().manual_seed(9)
    scales = torch.tensor([0.3, 1.0, 4.0]).repeat_interleave(HIDDEN)
    states = [scales * torch.randn(len(t.token_ids), 3 * HIDDEN, generator=generator) for t in talks]
    return [replace(talk, taps=taps) for talk, taps in zip(talks, states, strict=True)]


@pytest.mark.parametrize(("norm_output", "fc_norm"), NORMS)
def test_training_equals_drafting_over_a_cache(tapped, norm_output, fc_norm):
    """The chain that a decoder grows after each prefix, from states that it fuses, and what training's head reads."""
    draft, talk = make_tapping(40, norm_output, fc_norm), tapped[2]
    batch = collate([talk], STEPS)
    drafter = Drafter(Draft(draft, draft.head(trimmed(40)[1]), {}), TreeShape(STEPS, 1, STEPS + 1, static=False))
    assert drafter.taps == TAPS
    runner, worst = drafter._runner, 0.0
    with torch.no_grad():
        fused = drafter.features_from(talk.taps)
        assert fused.shape == (len(talk.token_ids), HIDDEN)
        outputs = Alignment(draft, STEPS)(batch, batch.inputs)
        for anchor, row in list(enumerate(batch.anchors.tolist()))[: len(talk.token_ids) - batch.anchors[0] - STEPS]:
            cache = drafter.new_cache(1, 64)
            states = drafter.extend(
                cache, fused[None, : row + 1], talk.token_ids[None, 1 : row + 2], torch.tensor([row + 1])
            )
            for step in range(STEPS):
                worst = max(worst, float((runner.read(states)[0] - outputs[step][anchor]).abs().max()))
                token, position = talk.token_ids[row + 2 + step].view(1, 1), cache.lengths[:, None]
                rows = runner.inputs(token, states[:, None])
                states = runner.forward(rows, runner.rope.at(position), cache)[:, 0]
                cache.lengthen(torch.ones(1, dtype=torch.long))
                if row + 3 + step >= len(talk.token_ids):
                    break
    assert 0 < worst <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("norm_output", "fc_norm"), NORMS)
def test_the_gradient_reaches_the_fusion_and_is_autograds(tapped, norm_output, fc_norm, recompute):
    draft, batch = make_tapping(40, norm_output, fc_norm).double(), collate(tapped, 3)
    head, objective = trimmed(40)[1].double(), Objective(0.0)
    outputs = Alignment(draft, 3, False, recompute)(batch, batch.inputs.double(), with_head=True)
    _, gradients = distill(outputs, batch, head, objective, batch.counts)
    torch.autograd.backward(outputs, gradients)
    found = {name: p.grad.clone() for name, p in draft.named_parameters()}
    draft.zero_grad()
    by_definition(draft, Alignment(draft, 3, False)(batch, batch.inputs.double()), batch, head, objective).backward()
    for name, parameter in draft.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)
    assert {"fc.weight", *(f"fc_norm.{i}.weight" for i in range(3 if fc_norm else 0))} <= found.keys()


def test_training_from_prefixes_equals_the_chain_of_the_layers_own_forward(tapped):
    draft, batch = make_tapping(), collate(tapped, STEPS)
    as_features = [Talk(t.id, t.token_ids, t.loss_mask, draft.features_from(t.taps).detach()) for t in tapped]
    with torch.no_grad():
        outputs, worst = Alignment(draft, STEPS)(batch, batch.inputs), 0.0
        for anchor, row in enumerate(batch.anchors.tolist()):
            for step, drafted in enumerate(draft_chain(draft, *locate(as_features, row))):
                worst = max(worst, float((draft.read(drafted) - outputs[step][anchor]).abs().max()))
    assert worst <= 1e-5


def test_rows_added_for_a_graph_change_nothing_and_noise_comes_on_what_is_fused(tapped):
    head, gradients = trimmed(40)[1].double(), []
    batch = collate(tapped, 3)
    for given in (batch, rounded_up(batch, 16 * 100)):
        draft = make_tapping(40, fc_norm=True).double()
        outputs = Alignment(draft, 3, False)(given, given.inputs.double(), with_head=True)
        torch.autograd.backward(outputs, distill(outputs, given, head, Objective(0.0), given.counts)[1])
        gradients.append({name: p.grad for name, p in draft.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
    noisy = add_noise(batch, 0.1, 0, 0, torch.float32)
    assert noisy.inputs.shape == batch.taps.shape
    assert 0 < float((noisy.inputs - batch.taps).abs().max()) <= 0.1001
    assert torch.equal(noisy.features, batch.features)


def test_the_start_makes_the_last_state_where_a_linear_map_can(tapped):
    """Of states that the last one is a linear map of, with numbers a thousand times others among them."""
    draft = make_tapping()
    made = torch.randn(HIDDEN, 3 * HIDDEN, generator=torch.Generator().manual_seed(3))
    scales = torch.logspace(-1, 2, 3 * HIDDEN)
    many = [
        Talk("t", t.token_ids.repeat(9), t.loss_mask.repeat(9), x @ made.T, x * scales)
        for t in tapped
        for x in [torch.randn(9 * len(t.token_ids), 3 * HIDDEN)]
    ]
    start_fusion(draft, many, ridge=1e-6)
    error = draft.features_from(many[0].taps).detach() - many[0].features
    assert float(error.norm() / many[0].features.norm()) < 1e-3


def target_of(family: str) -> Target:
    return tiny_model(family, num_hidden_layers=LAYERS)


def settings(**changes):
    return {
        "draft": {"architecture": "eagle3", "taps": "three", "vocab_size": 64, "fc_norm": True, "norm_output": True},
        "features": {"validation_fraction": 0.2, "max_tokens_per_batch": 128},
        "training": {"tokens_per_pack": 64, "passes": 6, "lr_peak": 2e-3, "dtype": "float32"},
        "tree": {"depth": 3, "top_k": 3, "nodes": 8},
        **changes,
    }  # fmt: skip


def answers(store):
    return responses_artifact(store, [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(30)])


def losses_of(store, draft: Artifact) -> list[float]:
    """Each logged step's loss of a trained draft."""
    rows = map(json.loads, store.open(draft).read_text("metrics.jsonl").splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_draft_over_three_states_goes_from_answers_to_lossless_decoding(store, family):
    target, config = target_of(family), parse_config(settings())
    features = extract_features(config, answers(store), store, target)
    stored = FeatureDataset(store, features)
    assert stored.info.taps == (2, 3, 4)
    row = stored[3]
    with torch.no_grad():
        states = target.model(row.token_ids[None], output_hidden_states=True).hidden_states
    wanted = torch.cat([states[layer][0] for layer in (2, 3, 4)], -1)
    torch.testing.assert_close(row.taps.float(), wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(row.features.float(), states[-1][0], rtol=0.02, atol=0.02)

    artifact = train_draft(config, features, store, target)
    files, losses = store.open(artifact), losses_of(store, artifact)
    assert losses[-1] < 0.9 * losses[0]
    assert artifact.summary["val/tree_tau"] >= 1
    folder = Path(files.local_path("config.json")).parent
    shape, draft = read_draft(folder, target).architecture, load_draft(folder, target)
    assert isinstance(shape, Eagle3Architecture)
    assert (shape.taps, shape.fc_norm, shape.norm_output) == ((2, 3, 4), True, True)

    prompts = [[5, 9, 30, 8], [7, 7, 11], [100, 30, 20, 10, 60]]
    for runner in (make_runner(target), HFRunner(target)):
        for sampling in (SamplingConfig(), SamplingConfig(temperature=0.9, seed=4)):
            plain = PlainDecoder(runner).generate(prompts, sampling, 24, StopRule())
            for tree in (config.tree, TreeConfig(kind="chain", depth=4, top_k=1, nodes=5)):
                found = SpeculativeDecoder(runner, draft, tree).generate(prompts, sampling, 24, StopRule())
                assert [answer.token_ids for answer in found] == [answer.token_ids for answer in plain]
                alone = SpeculativeDecoder(runner, draft, tree).generate(prompts[:1], sampling, 24, StopRule())
                assert alone[0].token_ids == plain[0].token_ids


def test_features_made_while_training_give_the_same_losses_as_stored_ones(store):
    target, source, curves = target_of("llama"), answers(store), []
    for encoding in ("bf16", "none"):
        config = parse_config(settings(), [f"features.encoding={encoding}", "training.log_every_steps=1"])
        features = extract_features(config, source, store, target)
        curves.append(losses_of(store, train_draft(config, features, store, target)))
    stored, live = curves
    assert len(stored) > 5
    # a row's states may round differently to bfloat16 beside other rows
    assert live[0] == pytest.approx(stored[0], rel=1e-3)
    assert live == pytest.approx(stored, rel=1e-2)


def test_eight_bits_round_each_state_by_a_scale_of_its_own(store):
    target, source, read = target_of("llama"), answers(store), {}
    target.model.model.layers[2].mlp.down_proj.weight.data *= 100  # from layer 3 on, states are much larger
    for encoding in ("bf16", "int8"):
        features = extract_features(parse_config(settings(), [f"features.encoding={encoding}"]), source, store, target)
        row = FeatureDataset(store, features)[3]
        read[encoding] = [row.features.float(), *row.taps.float().chunk(3, 1)]
    sizes = [state.norm() for state in read["bf16"]]
    assert sizes[2] > 20 * sizes[1]
    for exact, rounded in zip(read["bf16"], read["int8"], strict=True):
        assert float((exact - rounded).norm() / exact.norm()) < 0.02


def test_features_with_other_states_are_never_trained_on(store):
    target, source = target_of("llama"), answers(store)
    three = extract_features(parse_config(settings()), source, store, target)
    for wanted in ("last", [1, 2, 3]):
        other = parse_config(settings(draft={"architecture": "eagle3", "taps": wanted}))
        assert extract_features(other, source, store, target).digest != three.digest
        with pytest.raises(DraftMismatch, match=re.escape("hold the states after layers [2, 3, 4]")):
            train_draft(other, three, store, target)


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ({"taps": "three"}, 'draft.taps is a setting of draft.architecture = "eagle3"'),
        ({"architecture": "eagle3", "taps": [3, 1]}, "each once, ascending"),
        ({"architecture": "eagle3", "taps": [0, 1]}, "layers from 1 on"),
        ({"architecture": "eagle3", "taps": []}, "give layers from 1 on"),
        ({"architecture": "eagle3", "fc_norm": True}, 'it needs draft.taps = "three"'),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(draft, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config({"draft": draft})


@pytest.mark.parametrize(
    ("taps", "says"),
    [("three", "of 2 layers those after 2, N/2 and N-3"), ([1, 2], "the state after the last of them")],
)
def test_a_target_with_too_few_layers_is_refused_before_any_work(store, tiny_target, taps, says):
    config = parse_config({"draft": {"architecture": "eagle3", "taps": taps}})
    with pytest.raises(TargetError, match=re.escape(says)):
        extract_features(config, answers(store), store, tiny_target)


def test_layers_that_hand_on_no_state_are_refused(store, monkeypatch):
    target = target_of("gemma3_text")
    config = parse_config(settings())
    monkeypatch.setattr("hass_core.target_model.taps.Taps.see", lambda self, layer, state: None)
    with pytest.raises(TargetError, match="do not hand on one state of"):
        extract_features(config, answers(store), store, target)
