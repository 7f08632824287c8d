"""What a template makes of messages depends on nothing but its inputs: not on the day either."""

from datetime import datetime

import pytest

from hass_core.data.rendering import TODAY, render, template_date
from hass_core.serving.messages import prompt_of_messages
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

ASKED = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def dated():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
    return tokenizer


def test_a_template_that_asks_for_the_day_is_told_the_same_one_ever(dated):
    assert render(dated, ASKED).startswith("Today: 26 Jul 2024\n")
    assert render(dated, ASKED, day=datetime(2031, 2, 1)).startswith("Today: 01 Feb 2031\n")


def test_the_day_is_part_of_a_key_where_the_template_asks_for_it(dated):
    assert template_date(dated) == {"today": TODAY.date().isoformat()}
    assert template_date(byte_tokenizer()) == {}


def test_people_are_told_their_day(dated):
    told = dated.decode(prompt_of_messages(dated, ASKED))
    assert told.startswith(f"Today: {datetime.now():%d %b %Y}\n")
