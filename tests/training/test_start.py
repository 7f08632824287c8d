"""The closed-form start and the draft vocabulary."""

import torch

from hass_core.training.alignment import Alignment
from hass_core.training.batch import collate
from hass_core.training.start import ranked_tokens, start_least_squares
from tests.training.conftest import HIDDEN, Talk, make_draft, make_talk


def linear_talk(draft, weight, number: int) -> Talk:
    """A conversation whose next feature is exactly linear in [embedding(x_{t+1}); f_t]."""
    talk = make_talk(f"talk-{number}", 40, prompt=0, seed=number)
    features = [torch.randn(HIDDEN, generator=torch.Generator().manual_seed(number))]
    for t in range(39):
        features.append(weight @ torch.cat([draft.embedding[talk.token_ids[t + 1]], features[-1]]))
    return Talk(talk.id, talk.token_ids, talk.loss_mask, torch.stack(features))


def test_a_linear_target_is_found_exactly_and_the_untrained_draft_predicts_it():
    draft = make_draft()
    weight = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.12
    talks = [linear_talk(draft, weight, number) for number in range(20)]
    start_least_squares(draft, talks, ridge=1e-9)
    torch.testing.assert_close(draft.fc.weight.detach(), weight, rtol=1e-3, atol=1e-3)
    batch = collate(talks[:2], 1)
    (guesses,) = Alignment(draft, 1)(batch, batch.features)
    torch.testing.assert_close(guesses[batch.target_anchors[0]], batch.features[batch.targets], rtol=1e-2, atol=1e-2)


def test_few_rows_are_enough_to_start_and_none_leave_the_draft_alone():
    draft = make_draft()
    before = draft.fc.weight.detach().clone()
    start_least_squares(draft, [])
    assert torch.equal(draft.fc.weight, before)
    start_least_squares(draft, [make_talk("short", 8, prompt=2)])
    assert bool(draft.fc.weight.isfinite().all())


def test_the_start_does_not_depend_on_how_rows_are_grouped(monkeypatch):
    talks = [make_talk(f"t{i}", 30, prompt=3, seed=i) for i in range(12)]
    weights = []
    for rows in (8, 10_000):
        monkeypatch.setattr("hass_core.training.start.ROWS_PER_BLOCK", rows)
        draft = make_draft()
        start_least_squares(draft, talks)
        weights.append(draft.fc.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_most_frequent_answer_tokens_are_kept_with_the_end_token():
    mask = torch.tensor([False, False, True, True, True, True, True, True])
    talk = Talk("one", torch.tensor([9, 9, 4, 4, 4, 7, 7, 2]), mask, torch.zeros(8, HIDDEN))
    assert ranked_tokens([talk], 20, always=(11,))[:4].tolist() == [11, 4, 7, 2], "9 is only in the prompt"
    after = ranked_tokens([talk], 20, (11,), before=torch.tensor([9, 2, 7, 15, 4]))
    assert after.tolist()[:7] == [11, 4, 7, 2, 9, 15, 0], "what these answers do not tell, others told before"
    assert sorted(after.tolist()) == list(range(20))
