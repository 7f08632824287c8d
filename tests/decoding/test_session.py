"""The cycle as a GPU runs it, checked without one: fixed widths give the same tokens, nothing in it asks the host."""

import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding import session as session_module
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.drafter import Drafter, NoDraft
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.session import Session
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.target_model.identity import TargetIdentity
from hass_core.target_model.kv_cache import FixedShapes, KVCache
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import FusedRunner, make_runner
from tests.conftest import byte_tokenizer, tiny_llama
from tests.decoding.conftest import ENDLESS, random_draft

TREE = TreeConfig(depth=3, top_k=3, nodes=9)
WARM = SamplingConfig(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2)


class FixedWidths:
    """Stands in for `GraphCache`: the same fixed shapes, without a capture."""

    def __init__(self):
        self.widths = set()

    def run(self, width, cycle):
        self.widths.add(width)
        return cycle()


@pytest.mark.parametrize("ahead", [False, True], ids=["one cycle at a time", "the next cycle under way"])
@pytest.mark.parametrize("sampling", [SamplingConfig(), WARM])
@pytest.mark.parametrize("batch", [1, 4])
def test_cycles_of_fixed_width_give_the_same_tokens(monkeypatch, tiny_target, prompts, batch, sampling, ahead):
    runner, prompts = make_runner(tiny_target), prompts[:batch]
    expected = [g.token_ids for g in PlainDecoder(runner).generate(prompts, sampling, 60, ENDLESS)]
    monkeypatch.setattr(session_module, "WIDTH_STEP", 32)
    graphs, start = FixedWidths(), Session.start

    def start_with_fixed_widths(self, prompts, seed):
        reports = start(self, prompts, seed)
        self._graphs, self._ahead = graphs, ahead
        for cache in {id(c): c for c in (self._cache, self._draft_cache) if isinstance(c, KVCache)}.values():
            cache.lengths = cache.lengths.clone()  # as on a GPU, the host has a copy of its own
        return reports

    monkeypatch.setattr(Session, "start", start_with_fixed_widths)
    for decoder in (PlainDecoder(runner), SpeculativeDecoder(runner, random_draft(tiny_target), TREE)):
        assert [g.token_ids for g in decoder.generate(prompts, sampling, 60, ENDLESS)] == expected
    assert len(graphs.widths) >= 2 - ahead


@pytest.mark.parametrize("sampling", [SamplingConfig(), WARM])
def test_a_draft_that_skips_the_begin_of_prompts_guesses_at_the_same_places(
    monkeypatch, tiny_target, prompts, sampling
):
    runner, draft, guess = make_runner(tiny_target), random_draft(tiny_target), Sampler.guess
    places: dict[int | None, list[list[int]]] = {}

    def answered(last: int | None) -> list[list[int]]:
        def noting(self, proposal):
            places.setdefault(last, []).append(proposal.positions.tolist())
            return guess(self, proposal)

        monkeypatch.setattr(Sampler, "guess", noting)
        tree = TREE.model_copy(update={"prompt_tokens": last})
        return [g.token_ids for g in SpeculativeDecoder(runner, draft, tree).generate(prompts, sampling, 20, ENDLESS)]

    expected = [g.token_ids for g in PlainDecoder(runner).generate(prompts, sampling, 20, ENDLESS)]
    assert answered(None) == answered(max(map(len, prompts)) - 1) == answered(2) == expected
    first = {last: of_calls[0] for last, of_calls in places.items()}
    assert len(first) == 3
    assert all(found == [len(prompt) for prompt in prompts] for found in first.values())


class RowNoise(NamedTuple):
    """As in `hass_core.kernels.top_k`, which imports Triton."""

    streams: Tensor
    positions: Tensor
    ahead: int
    sharpness: float
    width: float = 1.0
    lowest: Tensor | None = None


def shapes_of_top_k(
    logits: Tensor, k: int, token_ids: Tensor | None = None, noise: RowNoise | None = None
) -> tuple[Tensor, Tensor]:
    """What the kernel of that name takes and gives, without its values: PyTorch cannot run Triton on meta tensors."""
    rows, size = logits.shape
    given = [logits, token_ids, *([noise.streams, noise.positions, noise.lowest] if noise else [])]
    assert all(tensor.is_meta for tensor in given if tensor is not None)
    assert token_ids is None or token_ids.shape == (size,)
    if noise:
        assert rows % len(noise.streams) == 0
        assert rows % noise.positions.numel() == 0
        assert noise.lowest is None or noise.lowest.numel() == rows
    return logits.new_empty(rows, k, dtype=torch.float32), logits.new_empty(rows, k, dtype=torch.long)


@pytest.mark.parametrize("sampling", [SamplingConfig(), WARM])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static", "chain", "plain"])
def test_nothing_in_a_cycle_on_a_gpu_reads_back_or_mixes_devices(monkeypatch, rows, kind, sampling):
    # meta tensors have shapes but no values: to read one, or to add a CPU tensor to it, raises
    monkeypatch.setattr("hass_core.target_model.block.packable", lambda weight: False)
    # tokens are chosen by the kernel, as on a GPU: PyTorch's way to draw is a CPU's, and reads positions back
    for module in ("hass_core.decoding.sampler", "hass_core.sampling"):
        monkeypatch.setattr(f"{module}.kernels", SimpleNamespace(usable=lambda x: x.is_meta))
    kernel = SimpleNamespace(RowNoise=RowNoise, row_top_k=shapes_of_top_k)
    monkeypatch.setitem(sys.modules, "hass_core.kernels.top_k", kernel)
    with torch.device("meta"), torch.inference_mode():
        model = tiny_llama()
        target = Target("meta", "", model.eval(), byte_tokenizer(), TargetIdentity("", "", "", "", ""))
        runner, drafter = FusedRunner(target), NoDraft()
        if kind != "plain":
            draft_model = DraftModel(DraftArchitecture.from_target_config(model.config), target.embedding)
            draft = Draft(draft_model, DraftHead.from_target(target.head, torch.arange(50)), {})
            drafter = Drafter(draft, TreeShape.of(TREE.model_copy(update={"kind": kind}), 50))
        session = Session(runner, drafter, sampling, rows, 40)
    assert session._sampler.capturable
    with torch.inference_mode():  # without the default device: what a cycle makes, it must make where it belongs
        report = session._cycle(session.shape.longest_path, FixedShapes(session.slots))
    assert report.device.type == "meta"
    assert report.shape == (rows, 2 + 3 * session.shape.longest_path)


def test_a_decoder_keeps_one_session_and_uses_it_again(tiny_target, prompts):
    decoder = PlainDecoder(make_runner(tiny_target))
    first = decoder.generate(prompts[:1], SamplingConfig(), 30, ENDLESS)
    kept = decoder._idle
    assert decoder.generate(prompts[:1], SamplingConfig(), 30, ENDLESS)[0].token_ids == first[0].token_ids
    assert decoder._idle is kept
    decoder.generate(prompts[:2], SamplingConfig(), 30, StopRule())
    assert decoder._idle is not kept  # another number of rows


def test_long_prompts_are_read_in_pieces(monkeypatch, tiny_target):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    prompts = [[(5 * i) % 200 + 3 for i in range(n)] for n in (50, 7, 33)]
    whole = SpeculativeDecoder(runner, draft, TREE).generate(prompts, SamplingConfig(), 30, ENDLESS)
    monkeypatch.setattr("hass_core.decoding.session.TOKENS_PER_PIECE", 16)
    parts = SpeculativeDecoder(runner, draft, TREE).generate(prompts, SamplingConfig(), 30, ENDLESS)
    assert [g.token_ids for g in parts] == [g.token_ids for g in whole]
    assert [g.cycles for g in parts] == [g.cycles for g in whole]
