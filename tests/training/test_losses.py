"""The objective against slow loops in float64, and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hass_core.draft_model.head import DraftHead
from hass_core.training import losses
from hass_core.training.batch import Batch, collate
from hass_core.training.losses import Objective, distill
from hass_core.training.sampling_losses import agreeing, sampling_terms
from tests.training.conftest import HIDDEN, VOCABULARY

OBJECTIVES = {
    "hass": Objective(),
    "eagle2": Objective(top_k=0.0),
    "full vocabulary only": Objective(regression=0.0, top_k=0.0, soft_ce=1.0),
    "fewer tokens": Objective(k=5),
    "no regression": Objective(regression=0.0),
    "top-k only": Objective(regression=0.0, soft_ce=0.0),
    "acceptance": Objective(acceptance=0.5),
    "hybrid": Objective(hybrid=0.7, top_k=0.0),
    "agreement": Objective(regression=0.0, soft_ce=0.0, top_k=0.0, agreement=1.0),
    "agreement of 4, beside acceptance": Objective(agreement=0.3, candidates=4, acceptance=0.2),
    "weighted steps": Objective(step_weights=(1.0, 0.5, 0.25)),
}
STEPS = 3


def make_case(talks, tokens: int | None = None) -> tuple[Batch, DraftHead, list[torch.Tensor]]:
    batch = collate(talks, STEPS)
    batch = Batch(**{**batch.__dict__, "features": batch.features.double()})
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).double()
    token_ids = None if tokens is None else torch.randperm(VOCABULARY, generator=generator)[:tokens].sort().values
    outputs = [torch.randn(len(batch.anchors), HIDDEN, generator=generator).double() for _ in range(STEPS)]
    return batch, DraftHead.from_target(weight, token_ids), outputs


def slow_parts(outputs, talks, head: DraftHead, objective: Objective) -> torch.Tensor:
    """Token by token from the formulas; anchors are numbered as the batch lays them out."""
    batch = collate(talks, STEPS)
    anchor_of = {int(row): i for i, row in enumerate(batch.anchors)}
    sums, counts = torch.zeros(STEPS, 5).double(), torch.zeros(STEPS)
    start = 0
    for talk in talks:
        answer, length = talk.loss_mask.tolist(), len(talk.token_ids)
        for r in range(length):
            for j in range(1, STEPS + 1):
                if r + j + 1 >= length or not (answer[r + 1] and answer[r + j] and answer[r + j + 1]):
                    continue
                counts[j - 1] += 1
                f, guess = talk.features[r + j].double(), outputs[j - 1][anchor_of[start + r]]
                sums[j - 1] += torch.tensor(slow_row(f, guess, int(talk.token_ids[r + j + 1]), head, objective))
        start += length
    return sums / counts[:, None]


def slow_row(f, guess, next_token: int, head: DraftHead, objective: Objective) -> list[float]:
    regression = sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (guess - f).tolist()) / len(f)
    if head.token_ids is not None and next_token not in head.token_ids.tolist():
        return [regression, 0.0, 0.0, 0.0, 0.0]
    q, p = ([math.exp(z) for z in (head.weight @ x).tolist()] for x in (f, guess))
    q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
    top = sorted(range(len(q)), key=lambda v: -q[v])[: objective.k]
    soft = -sum(a * math.log(b) for a, b in zip(q, p, strict=True)) if objective.soft_ce else 0.0
    right = float(max(range(len(p)), key=lambda v: p[v]) == top[0])
    return [regression, soft, -sum(q[v] * math.log(p[v]) for v in top), slow_sampling(q, p, objective), right]


def slow_sampling(q: list[float], p: list[float], objective: Objective) -> float:
    alpha = sum(map(min, q, p))
    share = math.exp(-3 * alpha)
    kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    both = list(zip(q, p, strict=True))
    ahead = [sum(max(0.0, a / b * y - x) for x, y in both) for a, b in both] if objective.agreement else [0.0] * len(q)
    agreed = sum(a * (1 - (x / (1 + x)) ** objective.candidates) for a, x in zip(q, ahead, strict=True))
    hybrid = share * kl + (1 - share) * (1 - alpha)
    return -objective.acceptance * math.log(alpha) + objective.hybrid * hybrid - objective.agreement * math.log(agreed)


@pytest.mark.parametrize("tokens", [None, 60], ids=["full vocabulary", "trimmed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_parts_equal_slow_loops_in_float64(talks, name, tokens):
    batch, head, outputs = make_case(talks, tokens)
    parts, _ = distill(outputs, batch, head, OBJECTIVES[name], batch.counts)
    expected = slow_parts(outputs, talks, head, OBJECTIVES[name])
    torch.testing.assert_close(parts.double(), expected, rtol=1e-6, atol=1e-6)  # the sums are kept in float32


@pytest.mark.parametrize("tokens", [None, 60], ids=["full vocabulary", "trimmed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_loss(talks, name, tokens):
    batch, head, outputs = make_case(talks, tokens)
    objective = OBJECTIVES[name]
    leaves = [output.clone().requires_grad_() for output in outputs]
    autograd_loss(leaves, batch, head, objective).backward()
    _, gradients = distill(outputs, batch, head, objective, batch.counts)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=1e-9)


def autograd_loss(outputs, batch: Batch, head: DraftHead, objective: Objective) -> torch.Tensor:
    """The same loss as one expression over [tokens × vocabulary]."""
    f = batch.features[batch.targets]
    q = (f @ head.weight.T).softmax(-1)
    top, indices = q.topk(objective.k)
    known = head.contains(batch.token_ids[batch.targets + 1])
    total = torch.zeros(()).double()
    for j, output in enumerate(outputs):
        guess, mask = output[batch.target_anchors[j]], batch.supervised[j]
        logp = (guess @ head.weight.T).log_softmax(-1)
        rows = objective.regression * F.smooth_l1_loss(guess, f, reduction="none").mean(-1)
        rows = rows - known * objective.soft_ce * (q * logp).sum(-1)
        rows = rows - known * objective.top_k * (top * logp.gather(1, indices)).sum(-1)
        rows = rows + known * dense_sampling(q, logp.exp(), objective)
        total = total + objective.step_weights[j] * rows[mask].sum() / mask.sum()
    return total


def dense_sampling(q: torch.Tensor, p: torch.Tensor, objective: Objective) -> torch.Tensor:
    alpha = torch.minimum(q, p).sum(-1)
    share = (-3 * alpha.detach()).exp()
    hybrid = share * (q * (q / p).log()).sum(-1) + (1 - share) * (1 - alpha)
    ahead = ((q / p)[:, :, None] * p[:, None] - q[:, None]).clamp(min=0).sum(-1)
    agreed = (q * (1 - (ahead / (1 + ahead)) ** objective.candidates)).sum(-1)
    return -objective.acceptance * alpha.log() + objective.hybrid * hybrid - objective.agreement * agreed.log()


def test_agreement_with_one_candidate_is_how_often_coupled_draws_agree():
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 9, generator=generator).mul(2).double().softmax(-1)
    noise = -torch.rand(200_000, 9, generator=generator).double().log_().neg_().log_()
    drawn = (q.log() + noise).argmax(-1) == (p.log() + noise).argmax(-1)
    agreed, _ = agreeing(q[None], p[None, None], 1)
    assert float(agreed) == pytest.approx(float(drawn.double().mean()), abs=5e-3)
    closed = (1 / torch.maximum(q / q[:, None], p / p[:, None]).sum(-1)).sum()  # of the paper
    assert float(agreed) == pytest.approx(float(closed))


def test_terms_for_sampling_stay_finite_where_the_draft_gives_the_targets_tokens_nothing():
    teacher = torch.tensor([[80.0, 0.0, -80.0], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[[-80.0, 0.0, 80.0], [0.0, -90.0, 90.0]]])
    value, gradient = sampling_terms(teacher, logits, 1.0, 1.0, 1.0, 4)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_chunks_do_not_change_the_result(talks, monkeypatch):
    batch, head, outputs = make_case(talks)
    whole = distill(outputs, batch, head, Objective(), batch.counts)
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 1)
    assert len(batch.targets) > 32
    parts, gradients = distill(outputs, batch, head, Objective(), batch.counts)
    torch.testing.assert_close(parts, whole[0])
    for ours, theirs in zip(gradients, whole[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_micro_batches_add_up_to_the_whole_batch(talks):
    """The mean runs over the optimizer step's tokens, however they are divided."""
    batch, head, outputs = make_case(talks)
    whole, _ = distill(outputs, batch, head, Objective(), batch.counts)
    parts, first = torch.zeros_like(whole), 0
    for talk in talks:
        part, _, _ = make_case([talk])
        own = [output[first : first + len(part.anchors)] for output in outputs]
        first += len(part.anchors)
        parts += distill(own, part, head, Objective(), batch.counts)[0]
    torch.testing.assert_close(parts, whole)


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: operations whose result's shape or value the host has to wait for."""

    WAITS = ("isin", "_unique2", "nonzero", "masked_select", "_local_scalar_dense")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [None, 60], ids=["full vocabulary", "trimmed"])
def test_nothing_in_the_loss_waits_for_the_gpu(talks, tokens):
    batch, head, outputs = make_case(talks, tokens)
    with NoWaiting():
        distill(outputs, batch, head, Objective(), batch.counts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_path_on_a_gpu_agrees_with_the_plain_one(talks):
    batch, head, outputs = make_case(talks)
    batch = Batch(**{**batch.__dict__, "features": batch.features.bfloat16()})
    head, outputs = DraftHead(head.weight.bfloat16()), [output.bfloat16() for output in outputs]
    plain = distill(outputs, batch, head, Objective(), batch.counts)
    gpu = torch.device("cuda")
    moved = batch.to(gpu)
    fused = distill([o.to(gpu) for o in outputs], moved, head.to(gpu), Objective(), moved.counts)
    torch.testing.assert_close(fused[0].cpu()[:, :3], plain[0][:, :3], rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(fused[1], plain[1], strict=True):
        difference = (ours.cpu().float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 2e-2, float(difference)
