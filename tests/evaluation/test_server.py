"""What a judge's server says is read, or refused in one sentence."""

import pytest

from hass_core.config import SamplingConfig
from hass_core.errors import BadInput
from hass_core.evaluation.server import Server
from tests.loopback import replying

MODELS = '{"data": [{"id": "m"}]}'
MESSAGES = ({"role": "user", "content": "Why?"},)


@pytest.mark.parametrize("models", ["<html>", "[]", "{}", '{"data": []}', '{"data": [{"id": 5}]}', '{"data": 3}'])
def test_a_list_of_models_that_names_none_is_refused(models):
    refused = pytest.raises(BadInput, match="does not answer as an OpenAI server: ")
    with replying(models, lambda: "{}") as address, refused:
        Server(address)


@pytest.mark.parametrize(
    "answer", ["<html>", "[]", "{}", '{"usage": null}', '{"usage": {"prompt_tokens": "5"}}', "NaN"]
)
def test_an_answer_without_its_counts_is_refused(answer):
    refused = pytest.raises(BadInput, match="does not answer as an OpenAI server: ")
    with replying(MODELS, lambda: answer) as address, refused:
        Server(address).answer(MESSAGES, SamplingConfig(), 8)


def test_an_answer_is_timed_and_counted():
    answer = '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'
    with replying(MODELS, lambda: answer) as address:
        found = Server(address).answer(MESSAGES, SamplingConfig(), 8)
    assert (found.prompt_tokens, found.new_tokens) == (5, 7)
