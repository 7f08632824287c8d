"""Batched answers are the answers the model gives one by one."""

import pytest
import torch

from hass_core.config import SamplingConfig, SamplingShare
from hass_core.data.engines.base import Request, RequestQueue
from hass_core.data.engines.local import LocalEngine
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

GREEDY = SamplingShare(temperature=0.0)
WARM = SamplingShare(temperature=1.5, top_p=0.95, top_k=40)


def requests(count: int, sampling: SamplingShare = GREEDY, max_new_tokens: int = 20) -> list[Request]:
    """Prompts of 3 to 30 tokens; every third may be answered in a few tokens only."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = int(torch.randint(3, 30, (1,), generator=generator))
        prompt = torch.randint(3, 259, (length,), generator=generator).tolist()
        made.append(Request(f"r{i}", prompt, sampling, 4 if i % 3 == 0 else max_new_tokens, seed=1000 + i))
    return made


def answers(target: Target, given: list[Request], rows: int) -> dict[str, list[int]]:
    completions = list(LocalEngine(target, rows).complete(RequestQueue(given)))
    assert sorted(c.key for c in completions) == sorted(r.key for r in given)
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] in target.eos_token_ids)
    return {completion.key: completion.token_ids for completion in completions}


@torch.inference_mode()
def greedy_one_by_one(target: Target, request: Request) -> list[int]:
    """The obvious loop: the whole text again for every token."""
    ids = list(request.prompt_token_ids)
    while len(ids) < len(request.prompt_token_ids) + request.max_new_tokens:
        logits = target.model(torch.tensor([ids], device=target.device)).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in (0, 1, 2):  # the special tokens of the test tokenizer
            break
    return ids[len(request.prompt_token_ids) :]


def test_batched_greedy_answers_equal_the_model_one_by_one(tiny_target):
    given = requests(17)
    found = answers(tiny_target, given, rows=5)  # fewer rows than requests: rows are refilled
    assert found == {request.key: greedy_one_by_one(tiny_target, request) for request in given}


def test_a_sampled_answer_does_not_depend_on_its_company(tiny_target):
    given = requests(9, WARM)
    together = answers(tiny_target, given, rows=9)
    assert together == answers(tiny_target, given, rows=2)
    assert together["r4"] == answers(tiny_target, [given[4]], rows=1)["r4"]


def test_a_sampled_answer_is_that_of_plain_decoding_with_its_seed(tiny_target):
    for request in requests(3, WARM):
        sampling = SamplingConfig(temperature=1.5, top_p=0.95, top_k=40)
        plain = PlainDecoder(make_runner(tiny_target)).generate(
            [request.prompt_token_ids], sampling, request.max_new_tokens, StopRule(), request.seed
        )
        found = answers(tiny_target, [request], rows=1)[request.key]
        assert found == plain[0].token_ids[: len(found)]


def test_another_seed_gives_another_answer(tiny_target):
    first, second = requests(2, WARM)
    other = Request("other", second.prompt_token_ids, WARM, second.max_new_tokens, seed=5)
    found = answers(tiny_target, [first, second, other], rows=4)
    assert found["other"] != found["r1"]


def test_a_request_put_in_front_while_running_is_answered(tiny_target):
    given = requests(3)
    queue = RequestQueue(given)
    keys = []
    for completion in LocalEngine(tiny_target, 2).complete(queue):
        keys.append(completion.key)
        if completion.key == "r1":
            queue.put_first(Request("next turn", [5, 6, 7], GREEDY, 6, seed=0))
    assert sorted(keys) == ["next turn", "r0", "r1", "r2"]


def test_answers_longer_than_the_first_slots_are_exact(tiny_target):
    request = Request("long", list(range(3, 203)), GREEDY, 150, seed=0)  # 350 tokens: the batch must grow
    short = requests(3)
    found = answers(tiny_target, [*short, request], rows=2)
    assert found["long"] == greedy_one_by_one(tiny_target, request)


def test_an_empty_queue_ends_at_once(tiny_target):
    assert list(LocalEngine(tiny_target, 4).complete(RequestQueue([]))) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_captured_steps_give_the_same_answers_on_a_gpu():
    from hass_core.target_model.loader import freeze
    from tests.conftest import byte_tokenizer, tiny_llama

    target = freeze(tiny_llama().cuda(), byte_tokenizer(), name="tiny")
    given = requests(17, max_new_tokens=100)
    assert answers(target, given, rows=5) == {r.key: greedy_one_by_one(target, r) for r in given}
