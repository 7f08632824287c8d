"""A draft that is right now and then, made in seconds from a handful of the target's own answers.

It is fitted to the very text it is judged on, so its acceptance says nothing of a draft's quality: it is there so that
every tensor of the draft matters and every depth accepts something.
"""

from typing import Any

import torch
import torch.nn.functional as F

from hass_core.draft_config import DraftConfig
from hass_core.draft_model.family import draft_architecture, new_architecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel, Eagle3Model, build_draft
from hass_core.target_model.capture import capture_features
from hass_core.target_model.loader import Target
from hass_core.training.alignment import Alignment
from hass_core.training.batch import collate
from hass_core.training.losses import Objective, distill
from hass_core.training.start import ranked_tokens, start_from_target, start_fusion, start_least_squares
from tests.training.conftest import Talk


def fitted_draft(target: Target, prompts: list[list[int]], answers: list[list[int]], steps: int) -> DraftModel:
    """The least-squares start, then `steps` steps of feature regression on the answers, three alignment steps each."""
    torch.manual_seed(0)
    draft = DraftModel(draft_architecture(target.model.config), target.embedding).float()
    talks = _talks(target, prompts, answers)
    start_least_squares(draft, talks)
    torch.nn.init.normal_(draft.layer.self_attn.o_proj.weight, std=0.02)
    torch.nn.init.normal_(draft.layer.mlp.down_proj.weight, std=0.02)
    for name, parameter in draft.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    batch, alignment = collate(talks, 3), Alignment(draft, 3)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-3)
    for _ in range(steps):
        wanted = batch.features[batch.targets]
        guesses = zip(alignment(batch, batch.features), batch.target_anchors, batch.supervised, strict=True)
        loss = sum(F.mse_loss(guess[anchors[on]], wanted[on]) for guess, anchors, on in guesses)
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return draft.eval().requires_grad_(False)


def fitted_eagle3(
    target: Target, prompts: list[list[int]], answers: list[list[int]], steps: int, **settings: Any
) -> tuple[DraftModel, DraftHead]:
    """An eagle3 draft by `settings` over half of the tokens, the answers' most frequent, after `steps` steps of HASS's
    objective."""
    torch.manual_seed(0)
    wanted = DraftConfig(architecture="eagle3", **settings)
    rows, talks = target.head.shape[0], _talks(target, prompts, answers, wanted.tapped(target.num_layers))
    head = DraftHead.from_target(target.head.float(), ranked_tokens(talks, rows)[: rows // 2].sort().values)
    draft = build_draft(new_architecture(target.model.config, wanted, head.size), target.embedding).float()
    assert isinstance(draft, Eagle3Model)
    start_from_target(draft, head, talks)
    for name, parameter in draft.named_parameters():
        if parameter.dim() == 1 and name != "norm.weight":  # not at the values they begin with
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    if draft.taps:
        start_fusion(draft, talks)
    batch, alignment = collate(talks, 3), Alignment(draft, 3, detach_features=False)
    optimizer = torch.optim.Adam(draft.parameters(), lr=2e-3)
    for _ in range(steps):
        outputs = alignment(batch, batch.inputs, with_head=True)
        torch.autograd.backward(outputs, distill(outputs, batch, head, Objective(regression=0.0), batch.counts)[1])
        optimizer.step()
        optimizer.zero_grad()
    return draft.eval().requires_grad_(False), head


def _talks(
    target: Target, prompts: list[list[int]], answers: list[list[int]], taps: tuple[int, ...] = ()
) -> list[Talk]:
    talks, hidden = [], target.head.shape[1]
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        token_ids = torch.tensor(prompt + answer)
        (states,) = capture_features(target, [prompt + answer], taps=taps)
        mask = torch.arange(len(token_ids)) >= len(prompt)
        read = states[:, hidden:].float() if taps else None
        talks.append(Talk(f"talk-{number}", token_ids, mask, states[:, :hidden].float(), read))
    return talks
