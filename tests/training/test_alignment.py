"""Context alignment against decoding, against a dense twin, and the leak of the official attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.draft_model.layers import DraftModel
from hass_core.training import attention
from hass_core.training.alignment import Alignment
from hass_core.training.batch import Batch, collate
from tests.training.conftest import HIDDEN, Talk, make_draft, make_talk
from tests.training.memory import LiveBytes

STEPS = 5


def aligned(draft: DraftModel, batch: Batch, steps: int = STEPS, detach: bool = True) -> list[Tensor]:
    return Alignment(draft, steps, detach)(batch, batch.features)


def source_of(row: int, column: int, step: int) -> str:
    """Whose keys row `row` uses at `column` in HASS's own frame (its section 3.2): 0 is the target's feature."""
    for source in range(1, step):
        if column == row - (step - 1 - source):
            return str(source)
    return "0" if column <= row - (step - 1) else "·"


def test_the_mask_table_of_the_reference():
    """HASS, figure 3: step 3, five rows."""
    table = ["".join(source_of(row, column, 3) for column in range(5)) for row in range(2, 5)]
    assert table == ["012··", "0012·", "00012"]


@pytest.mark.parametrize("length", [6, 9, 17])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_row_depends_on_just_the_features_in_the_mask_table(length, step):
    """Step j's output at row t = r + j - 1 sees the target's features up to r, and nothing later."""
    talk = make_talk("one", length, prompt=1)
    talk.features.requires_grad_()
    batch = collate([talk], step)
    outputs = aligned(make_draft(), batch, step, detach=False)[-1]
    for anchor in range(length - step):
        (gradient,) = torch.autograd.grad(outputs[anchor].sum(), talk.features, retain_graph=True)
        row = anchor + step - 1
        seen = ["0" if gradient[column].abs().sum() > 0 else "·" for column in range(row + 1)]
        table = [source_of(row, column, step) for column in range(row + 1)]
        assert seen == ["0" if source == "0" else "·" for source in table], f"anchor {anchor}"


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True, "head_dim": 16}, {"qkv_bias": True}], ids=str)
def test_training_equals_drafting_from_every_prefix(talks, overrides):
    draft = make_draft(**overrides)
    batch = collate(talks, STEPS)
    with torch.no_grad():
        outputs = aligned(draft, batch)
        worst = 0.0
        for anchor, row in enumerate(batch.anchors.tolist()):
            for step, drafted in enumerate(draft_chain(draft, *locate(talks, row))):
                worst = max(worst, float((drafted - outputs[step][anchor]).abs().max()))
    assert worst <= 1e-5


@pytest.mark.parametrize("detach", [True, False])
def test_layers_computed_again_give_the_same_gradients(talks, detach):
    draft = make_draft()
    batch, gradients = collate(talks, STEPS), []
    for recompute in (False, True):
        outputs = Alignment(draft, STEPS, detach, recompute)(batch, batch.features)
        draft.zero_grad()
        torch.stack(outputs).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in draft.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("detach", [True, False])
def test_layers_computed_again_leave_only_a_steps_estimates(talks, detach):
    """Until the backward pass a further step costs its estimates [Q, H], and in it their gradient and those of the
    step's own key and value, which it makes again: no activation of the layer."""
    draft = make_draft()
    batch, kept, most = collate(talks, STEPS), {}, {}
    for steps in (3, 5):
        alignment = Alignment(draft, steps, detach, recompute=True)
        with LiveBytes() as live:
            outputs = alignment(batch, batch.features)
            kept[steps] = live.now
            gradients = [torch.ones_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
            most[steps] = live.most
    estimates, pair = len(batch.anchors) * HIDDEN * 4, len(batch.anchors) * 2 * 2 * 8 * 4
    assert (kept[5] - kept[3]) / 2 <= estimates
    assert (most[5] - most[3]) / 2 <= 2.2 * estimates + 2.2 * pair


def locate(talks: list[Talk], row: int) -> tuple[Talk, int]:
    for talk in talks:
        if row < len(talk.token_ids):
            return talk, row
        row -= len(talk.token_ids)
    raise AssertionError(row)


def draft_chain(draft: DraftModel, talk: Talk, anchor: int) -> list[Tensor]:
    """The chain's features as a decoder makes them, one token at a time, from those of the target up to the anchor."""
    features, chain = talk.features[: anchor + 1], []
    for step in range(1, min(STEPS, len(talk.token_ids) - 1 - anchor) + 1):
        tokens = talk.token_ids[1 : anchor + step + 1]
        chain.append(draft(tokens[None], features[None], torch.arange(len(tokens))[None])[0, -1])
        features = torch.cat([features, chain[-1][None]])
    return chain


def test_packed_equals_alone(talks):
    draft = make_draft()
    packed = collate(talks, STEPS)
    outputs = aligned(draft, packed)
    first = 0
    for talk in talks:
        alone = collate([talk], STEPS)
        count = len(alone.anchors)
        for together, single in zip(outputs, aligned(draft, alone), strict=True):
            real = torch.arange(count) < count - STEPS  # the last rows of a conversation have no next token
            torch.testing.assert_close(together[first : first + count][real], single[real], rtol=1e-5, atol=1e-5)
        first += count


def test_padded_equals_unpadded():
    """Tokens behind the end of a conversation change none of its supervised rows."""
    draft, talk = make_draft(), make_talk("one", 21, prompt=4)
    filler = make_talk("filler", 10, prompt=0, seed=7)
    longer = Talk(
        "one",
        torch.cat([talk.token_ids, filler.token_ids]),
        torch.cat([talk.loss_mask, torch.zeros(10, dtype=torch.bool)]),
        torch.cat([talk.features, filler.features]),
    )
    short, long = collate([talk], STEPS), collate([longer], STEPS)
    assert torch.equal(short.targets, long.targets)
    assert torch.equal(short.supervised, long.supervised)
    for step, (a, b) in enumerate(zip(aligned(draft, short), aligned(draft, long), strict=True)):
        mask = short.supervised[step]
        ours, theirs = a[short.target_anchors[step][mask]], b[long.target_anchors[step][mask]]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def dense_twin(draft: DraftModel, talk: Talk, steps: int, detach: bool, masked: float = -math.inf) -> list[Tensor]:
    """HASS's own frame: j full L×L score matrices, masked, one softmax over the sum."""
    architecture, length = draft.architecture, len(talk.token_ids)
    groups = architecture.num_attention_heads // architecture.num_key_value_heads
    tokens, positions = torch.cat([talk.token_ids[1:], talk.token_ids[-1:]])[None], torch.arange(length)[None]
    sources, outputs = [talk.features[None]], []
    for step in range(1, steps + 1):
        us = [draft.fuse(tokens, source) for source in sources]
        query = draft.qkv(us[-1], positions)[0]
        scores, values = torch.zeros(length, length), []
        visible = torch.zeros(len(sources), length, length, dtype=torch.bool)
        parts = []
        for s, u in enumerate(us):
            _, key, value = draft.qkv(u, positions)
            for t in range(length):
                for c in range(length):
                    visible[s, t, c] = source_of(t, c, step) == str(s)
            parts.append(query @ key.repeat_interleave(groups, 1).mT / math.sqrt(architecture.head_dim))
            values.append(value.repeat_interleave(groups, 1))
        scores = sum(part.where(seen, 0.0) for part, seen in zip(parts, visible, strict=True))
        weights = scores.masked_fill(~visible.any(0), masked).softmax(-1)
        attended = sum((weights * seen) @ value for seen, value in zip(visible, values, strict=True))
        outputs.append(draft.output(us[-1], attended))
        shifted = torch.cat([talk.features[None, :1], outputs[-1][:, :-1]], dim=1)
        sources.append(shifted.detach() if detach else shifted)
    return [output[0] for output in outputs]


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "with gradient"])
def test_the_dense_twin_agrees_with_its_gradients(detach):
    talk = make_talk("one", 14, prompt=1)
    results = []
    for forward in ("dense", "ours"):
        draft = make_draft()
        if forward == "dense":
            rows = [o[j : 12 + j] for j, o in enumerate(dense_twin(draft, talk, 3, detach))]
        else:
            rows = [o[:12] for o in aligned(draft, collate([talk], 3), 3, detach)]
        rows = [row[:10] for row in rows]
        sum((row * torch.linspace(-1, 1, HIDDEN)).sum() for row in rows).backward()  # pyright: ignore
        results.append((rows, {name: p.grad for name, p in draft.named_parameters()}))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-4)


def test_the_official_attention_leaks_to_masked_keys():
    """The official code sets masked scores to 0 before the softmax: rows lose attention to keys they must not see."""
    talk, draft = make_talk("one", 40, prompt=1), make_draft()
    with torch.no_grad():
        exact, leaking = (dense_twin(draft, talk, 1, True, masked)[0] for masked in (-math.inf, 0.0))
        ours = aligned(draft, collate([talk], 1), 1)[0]
    error = (leaking - exact).abs().amax(-1)
    assert error[0] > 0.1  # the first row sees one key and shares the softmax with 39 masked ones
    assert error[-1] < 1e-6  # the last row has no masked key
    torch.testing.assert_close(ours[:38], exact[:38], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_leak_takes_most_of_an_early_rows_attention(seed):
    """With N(0, 1) scores and 2048 keys, row 100 keeps less than a tenth of its attention."""
    scores = torch.randn(2048, generator=torch.Generator().manual_seed(seed))
    seen = torch.arange(2048) <= 100
    kept = scores.where(seen, 0.0).softmax(-1)[seen].sum()
    assert 0.05 < kept < 0.11


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_flash_kernel_agrees_with_the_plain_one_in_values_and_gradients(talks, steps, monkeypatch):
    results = []
    for kernel, dtype in ((attention.PlainKernel(), torch.float64), (attention.CpuFlashKernel(), torch.float32)):
        monkeypatch.setattr(attention, "kernel_for", lambda queries, kernel=kernel: kernel)
        results.append(forward_backward(make_draft().to(dtype), collate(talks, steps), steps, dtype))
    assert_same(*results, tolerance=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("steps", [1, 3])
def test_the_gpu_kernel_agrees_with_the_plain_one_in_values_and_gradients(talks, steps, monkeypatch):
    results = []
    for kernel, dtype in ((attention.PlainKernel(), torch.float32), (attention.CudaFlashKernel(), torch.bfloat16)):
        monkeypatch.setattr(attention, "kernel_for", lambda queries, kernel=kernel: kernel)
        batch = collate(talks, steps).to(torch.device("cuda"))
        results.append(forward_backward(make_draft().to("cuda", dtype), batch, steps, dtype))
    assert_same(*results, tolerance=3e-2)


def forward_backward(draft: DraftModel, batch: Batch, steps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    outputs = Alignment(draft, steps)(batch, batch.features.to(dtype))
    weights = torch.linspace(-1, 1, HIDDEN, device=outputs[0].device, dtype=dtype)
    sum(F.mse_loss(output, weights.expand_as(output)) for output in outputs).backward()  # pyright: ignore
    gradients = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    return {f"step {j}": output.detach() for j, output in enumerate(outputs)} | gradients


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in first.items():
        error = (second[name].double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
        assert error < tolerance, f"{name}: {float(error):.2e}"
