"""The loss kernel beside PyTorch, on a GPU or in Triton's interpreter; run by test_kernels.py as a program."""

import torch

from hass_core.kernels import distill
from hass_core.training.losses import distribution_terms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # steps, rows, vocabulary, K, soft CE weight, Top-K weight
    "as the paper": (3, 5, 5000, 10, 0.1, 1.0),
    "one step, no Top-K": (1, 3, 4096, 10, 0.1, 0.0),
    "five steps, no soft CE": (5, 2, 2500, 7, 0.0, 1.0),
    "a vocabulary of K tokens": (2, 3, 10, 10, 0.3, 0.7),
}


def check(name: str, steps: int, rows: int, size: int, *settings) -> None:
    teacher = 3 * torch.randn(rows, size, device=DEVICE)
    logits = 3 * torch.randn(steps, rows, size, device=DEVICE)
    logits[0, 0] = teacher[0]  # both favour the same token
    teacher[1, : size // 2] = teacher[1, 0]  # ties
    expected = distribution_terms(teacher.double(), logits.double(), *settings)
    got = distill.distribution_terms(teacher.clone(), logits.clone(), *settings)
    names = ("weighted sum", "Top-K", "right", "gradient")
    for part, ours, theirs in zip(names, got, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, atol=2e-5, rtol=1e-4, msg=lambda text, part=part: f"{name}, {part}: {text}"
        )


def check_no_number(spoiled: str) -> None:
    """A logit that is no number shows in its row's loss, and in no other row's."""
    tensors = {"teacher": torch.randn(2, 5000, device=DEVICE), "logits": torch.randn(1, 2, 5000, device=DEVICE)}
    tensors[spoiled][..., 1, 2500] = torch.nan
    total, *_ = distill.distribution_terms(**tensors, k=10, soft_ce=0.1, top_k=1.0)
    assert total.isnan().tolist() == [[False, True]], spoiled


torch.manual_seed(0)
for case, (steps, rows, size, k, *weights) in CASES.items():
    check(case, steps, rows, size, k, *weights)
for name in ("teacher", "logits"):
    check_no_number(name)
