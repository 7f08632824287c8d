"""The chain acceptance of validation against a slow walk through decoding."""

import pytest
import torch

from hass_core.draft_model.head import DraftHead
from hass_core.training.alignment import Alignment
from hass_core.training.losses import Objective
from hass_core.training.validation import DEPTH, held_out, validate
from tests.training.conftest import HIDDEN, VOCABULARY, make_draft
from tests.training.test_alignment import draft_chain


def test_the_chain_is_counted_as_a_decoder_would_walk_it(talks):
    draft, head = make_draft(), torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(5))
    head[7:] = head[:1] * 0.1  # few likely tokens, so that guesses are often right
    record = validate(
        Alignment(draft, 3), DraftHead(head), held_out(talks, head, 40, 3), Objective(), dtype=torch.float32
    )
    anchors, right = 0, torch.zeros(DEPTH)
    with torch.no_grad():
        for talk in talks:
            answer, length = talk.loss_mask.tolist(), len(talk.token_ids)
            for r in range(length - 2):
                if not (answer[r + 1] and answer[r + 2]):
                    continue
                anchors += 1
                for j, feature in enumerate(draft_chain(draft, talk, r), 1):
                    inside = r + j + 1 < length
                    if not inside or (head @ feature).argmax() != (head @ talk.features[r + j]).argmax():
                        break
                    right[j - 1] += 1
    assert right[1] > 0, "the case would test nothing"
    chain = [record[f"val/chain_{j}"] for j in range(1, DEPTH + 1)]
    torch.testing.assert_close(torch.tensor(chain), right / anchors)
    assert abs(record["val/tau"] - 1 - float(right.sum()) / anchors) < 1e-6


def test_a_trimmed_head_is_judged_by_the_targets_full_choice(talks):
    draft, head = make_draft(), torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(5))
    held = held_out(talks, head, 1000, 3)
    chosen = held[0].choices
    without = torch.tensor([t for t in range(VOCABULARY) if t not in set(chosen.tolist())])
    record = validate(Alignment(draft, 3), DraftHead.from_target(head, without), held, Objective(), torch.float32)
    assert record["val/tau"] == 1.0


@pytest.mark.parametrize("align_steps", [6, 8])
def test_more_alignment_steps_than_the_chain_has_change_only_the_loss(talks, align_steps):
    draft, head = make_draft(), torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(5))
    records = []
    for steps in (3, align_steps):
        objective = Objective(step_weights=(1.0,) * steps)
        held = held_out(talks, head, 1000, steps)
        records.append(validate(Alignment(draft, steps), DraftHead(head), held, objective, torch.float32))
    few, many = records
    assert {name: many[name] for name in few if name != "val/loss"} == {k: v for k, v in few.items() if k != "val/loss"}
    assert many["val/loss"] > few["val/loss"]
    assert f"val/accuracy_step_{align_steps}" in many
