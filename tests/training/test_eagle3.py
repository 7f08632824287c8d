"""The second architecture in training: it equals drafting, its head is trained, and a whole stage leaves a draft."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig, parse_config
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.tree import TreeShape
from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import Draft, draft_info, load_draft, save_draft, warm_start
from hass_core.draft_model.eagle3 import Eagle3Architecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import Eagle3Model, build_draft
from hass_core.errors import DraftMismatch
from hass_core.features.reader import FeatureDataset
from hass_core.target_model.runner import make_runner
from hass_core.training import train
from hass_core.training.alignment import Alignment
from hass_core.training.batch import collate
from hass_core.training.losses import Objective, distill
from hass_core.training.train import train_draft
from tests.training.conftest import HIDDEN, VOCABULARY, make_draft, store_features
from tests.training.test_alignment import STEPS, draft_chain, locate


def make_eagle3(size: int = VOCABULARY, norm_output: bool = False, seed: int = 0, **of_taps: Any) -> Eagle3Model:
    """A random draft whose norms matter too."""
    shape = Eagle3Architecture.of(make_draft().architecture, size, norm_output, **of_taps)
    torch.manual_seed(seed)
    draft = Eagle3Model(shape, torch.randn(VOCABULARY, HIDDEN))
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7 / parameter.shape[1] ** 0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return draft


def trimmed(size: int) -> tuple[torch.Tensor, DraftHead]:
    """The target's head [V, H], and its rows of `size` tokens."""
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return head, DraftHead.from_target(head, torch.randperm(VOCABULARY, generator=generator)[:size].sort().values)


@pytest.mark.parametrize("norm_output", [False, True])
def test_training_equals_drafting_from_every_prefix(talks, norm_output):
    draft, batch = make_eagle3(norm_output=norm_output), collate(talks, STEPS)
    with torch.no_grad():
        outputs, worst = Alignment(draft, STEPS)(batch, batch.features), 0.0
        for anchor, row in enumerate(batch.anchors.tolist()):
            for step, drafted in enumerate(draft_chain(draft, *locate(talks, row))):
                worst = max(worst, float((draft.read(drafted) - outputs[step][anchor]).abs().max()))
    assert worst <= 1e-5


@pytest.mark.parametrize("norm_output", [False, True])
def test_training_equals_drafting_over_a_cache(talks, norm_output):
    """The chain that a decoder grows after each prefix, and what the head reads of it in training."""
    draft, talk = make_eagle3(40, norm_output), talks[2]
    head = draft.head(trimmed(40)[1])
    batch = collate([talk], STEPS)
    drafter = Drafter(Draft(draft, head, {}), TreeShape(depth=STEPS, top_k=1, nodes=STEPS + 1, static=False))
    runner = drafter._runner
    with torch.no_grad():
        outputs = Alignment(draft, STEPS)(batch, batch.features)
        for anchor, row in list(enumerate(batch.anchors.tolist()))[: len(talk.token_ids) - batch.anchors[0] - STEPS]:
            cache = drafter.new_cache(1, 64)
            states = drafter.extend(
                cache, talk.features[None, : row + 1], talk.token_ids[None, 1 : row + 2], torch.tensor([row + 1])
            )
            for step in range(STEPS):
                torch.testing.assert_close(runner.read(states)[0], outputs[step][anchor], rtol=0, atol=1e-5)
                token, position = talk.token_ids[row + 2 + step].view(1, 1), cache.lengths[:, None]
                rows = runner.inputs(token, states[:, None])
                states = runner.forward(rows, runner.rope.at(position), cache)[:, 0]
                cache.lengthen(torch.ones(1, dtype=torch.long))
                if row + 3 + step >= len(talk.token_ids):
                    break


@pytest.mark.parametrize("objective", [Objective(0.0), Objective(0.0, acceptance=0.5, top_k=0.0)], ids=["hass", "lk"])
def test_the_heads_gradient_is_autograds_and_no_chunk_changes_it(talks, objective, monkeypatch):
    draft, batch = make_eagle3(40).double(), collate(talks, 3)
    head = trimmed(40)[1].double()
    found = {}
    for chunk in (1 << 21, 40 * 4 * 16):
        monkeypatch.setattr("hass_core.training.losses.LOGITS_PER_CHUNK", {"cpu": chunk})
        draft.zero_grad()
        outputs = Alignment(draft, 3, False)(batch, batch.features.double(), with_head=True)
        parts, gradients = distill(outputs, batch, head, objective, batch.counts)
        torch.autograd.backward(outputs, gradients)
        found[chunk] = {name: p.grad.clone() for name, p in draft.named_parameters()}
    draft.zero_grad()
    outputs = Alignment(draft, 3, False)(batch, batch.features.double())
    loss = by_definition(draft, outputs, batch, head, objective)
    loss.backward()
    torch.testing.assert_close(objective.combine(parts).double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in draft.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
        for gradients in found.values():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def by_definition(draft, outputs, batch, head, objective):
    """The loss from whole log-softmaxes; see losses.py."""
    q = head.logits(batch.features[batch.targets].double()).softmax(-1)
    known, loss = head.contains(batch.token_ids[batch.targets + 1]), 0.0
    top = torch.zeros_like(q).scatter_(1, q.topk(objective.k).indices, 1.0)
    for step, output in enumerate(outputs):
        log_p = draft.lm_head(output)[batch.target_anchors[step]].log_softmax(-1)
        value = -((objective.soft_ce + objective.top_k * top) * q * log_p).sum(-1)
        if objective.acceptance:
            value = value - objective.acceptance * torch.minimum(log_p.exp(), q).sum(-1).log()
        loss = loss + (value * known * batch.supervised[step]).sum() / batch.counts[step]
    return loss


SETTINGS = {
    "draft": {"architecture": "eagle3", "vocab_size": 64, "norm_output": True},
    "training": {"tokens_per_pack": 64, "passes": 8, "lr_peak": 2e-3, "dtype": "float32", "validate_every_steps": 5},
}


def test_a_stage_leaves_a_draft_that_decodes_losslessly_and_is_continued(store, tiny_target, tmp_path):
    features = store_features(store, tiny_target)
    artifact = train_draft(parse_config(SETTINGS), features, store, tiny_target)
    assert artifact.summary["draft_vocab_size"] == 64
    files = store.open(artifact)
    records = [json.loads(line) for line in files.read_text("metrics.jsonl").splitlines()]
    best = max(records, key=lambda record: record.get("val/tau", 0))
    assert artifact.summary["val/tree_tau"] == best["val/tree_tau"]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < 0.99 * losses[0]
    assert not any("train/regression" in record for record in records)
    folder = Path(files.local_path("config.json")).parent
    stored, draft = read_draft(folder, tiny_target), load_draft(folder, tiny_target)
    assert isinstance(stored.architecture, Eagle3Architecture)
    assert stored.architecture.norm_output
    assert not torch.equal(stored.weights["lm_head.weight"], tiny_target.head[stored.vocabulary])

    runner = make_runner(tiny_target)
    prompts = [[5, 9, 30, 8], [7, 7, 11], [100, 30, 20, 10, 60]]
    plain = PlainDecoder(runner).generate(prompts, SamplingConfig(), 24, StopRule())
    for tree in (TreeConfig(depth=3, top_k=3, nodes=8), TreeConfig(kind="chain", depth=4, top_k=1, nodes=5)):
        answers = SpeculativeDecoder(runner, draft, tree).generate(prompts, SamplingConfig(), 24, StopRule())
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]

    continuing = parse_config({**SETTINGS, "draft": SETTINGS["draft"] | {"warm_start": str(folder)}})
    head = train.make_head(continuing, FeatureDataset(store, features), tiny_target)
    again = train.make_draft(continuing, FeatureDataset(store, features), tiny_target, head)
    assert torch.equal(head.token_ids, stored.vocabulary)
    assert all(torch.equal(value, stored.weights[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"architecture": "eagle"}, 'is of draft.architecture = "eagle3", the settings say "eagle"'),
        ({"architecture": "eagle3", "vocab_size": 50}, "drafts 40 tokens by a head of its own"),
        ({"architecture": "eagle3", "norm_output": True}, "was trained without draft.norm_output"),
    ],
    ids=str,
)
def test_a_warm_start_of_another_kind_is_refused(tiny_target, tmp_path, wanted, says):
    shape = Eagle3Architecture.of(DraftArchitecture.from_target_config(tiny_target.model.config), 40)
    head = DraftHead.from_target(tiny_target.head, torch.arange(3, 43))
    save_draft(tmp_path, build_draft(shape, tiny_target.embedding), head, draft_info(tiny_target))
    with pytest.raises(DraftMismatch, match=re.escape(says)):
        warm_start(tmp_path, tiny_target, DraftConfig(**wanted))
