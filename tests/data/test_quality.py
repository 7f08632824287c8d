"""Which texts are unfit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hass_core.data.quality import _letters_and_spaces, diversity, is_loop, metric_name, prompt_problem

UNFIT = {
    "Why?": "too short",
    "1234567 + 89101112 = 131415?": "mostly not letters",
    "I would like to know how to": "breaks off",
    "What is a tree?\nAssistant: A plant.": "contains a role marker",
    "I am an AI language model and cannot do that.": "speaks as the assistant",
    "Sure, here is the list you wanted.": "speaks as the assistant",
    "How can I help you with your garden today?": "speaks as the assistant",
    "go on and go on and go on and go on and go on and go on and go on.": "repetitive",
}


@pytest.mark.parametrize(("text", "problem"), UNFIT.items())
def test_an_unfit_prompt_has_its_reason(text, problem):
    assert prompt_problem(text) == problem


@pytest.mark.parametrize(
    "text",
    [
        "What are the main causes of the French Revolution?",
        "Write a poem about a virtual garden.",
        "Explain how an AI language model is trained.",
        "¿Cuál es la capital de Francia y cuántos habitantes tiene?",
    ],
)
def test_a_plausible_request_is_fit(text):
    assert prompt_problem(text) is None


def test_a_loop_is_told_from_varied_text():
    assert is_loop([1, 2, 3, 4, 5] * 20)
    assert is_loop([*range(40), *([7, 8] * 40)])
    assert not is_loop(list(range(100)))
    assert not is_loop([1, 2] * 10)  # too short to judge


def test_diversity_counts_pairs_and_openings():
    report = diversity(["what is a tree", "what is a house"])
    assert report == {"distinct_2": pytest.approx(4 / 6, abs=1e-4), "distinct_openings": 0.5, "mean_words": 4.0}


def test_reasons_become_names_that_trackers_accept():
    assert (
        metric_name("skipped", "the template refuses: roles (a/b) must…")
        == "skipped/the template refuses roles ab must"
    )


@given(st.text(st.characters(max_codepoint=127)) | st.text())
def test_letters_and_spaces_are_those_that_unicode_names(text):
    assert _letters_and_spaces(text) == sum(c.isalpha() or c.isspace() for c in text)
