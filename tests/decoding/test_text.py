"""The visible text: whole characters, nothing of a stop string, and all of it in the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hass_core.decoding.text import AnswerText
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


def decode(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(st.text(min_size=1, max_size=40), st.integers(1, 5))
def test_pieces_join_to_the_text_and_never_show_half_a_character(text, size):
    ids, answer, pieces = tokens(text), AnswerText(decode), []
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        pieces.append(answer.add(ids[start : start + size], "length" if last else None))
        assert last or decode(ids).startswith(answer.shown)
    assert "".join(pieces) == decode(ids)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_what_may_begin_a_stop_string_is_held_back(size):
    ids, answer = tokens("ab ENTER abEND of it"), AnswerText(decode, ["END"])
    seen = ""
    for start in range(0, len(ids), size):
        ended = "END" in decode(ids[: start + size])
        seen += answer.add(ids[start : start + size], "stop" if ended else None)
        assert "END" not in seen
        if ended:
            break
    assert seen == "ab ENTER ab"
