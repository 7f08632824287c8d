"""Answers in another language are skipped on request, and counted by language."""

import json
import sys

import pytest

from hass_core.config import parse_config
from hass_core.data import responses
from hass_core.data.language import language_gate
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.errors import ConfigError
from tests.data.test_responses import Script, answer_with

ENGLISH = "The river rises in the mountains and flows for many miles before it reaches the sea."
FRENCH = "Le fleuve prend sa source dans les montagnes et coule longtemps avant de rejoindre la mer."


def test_a_text_is_judged_by_its_language():
    pytest.importorskip("py3langid")
    gate = language_gate(("en", "de"))
    assert gate(ENGLISH) is None
    assert gate("Der Fluss entspringt in den Bergen und fließt viele Meilen weit bis zum Meer.") is None
    assert gate(FRENCH) == "answer in another language (fr)"
    assert gate("17 + 4 = 21, n = 3") is None  # too few letters to tell
    assert language_gate(())(FRENCH) is None


def test_an_unknown_code_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(ConfigError, match=r"responses.languages: unknown english; give ISO 639-1 codes"):
        language_gate(("english",))
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language_gate.cache_clear()
    with pytest.raises(ConfigError, match=r"needs the package py3langid; install it with pip install"):
        language_gate(("en",))
    language_gate.cache_clear()


def test_the_stage_counts_what_it_drops(store, tiny_target, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": name, "prompt": f"Tell me about {name}."}) + "\n" for name in ("a", "b")))
    config = parse_config(
        {"prompts": {"builtin": False, "files": [str(file)]}, "responses": {"languages": ["en"], "max_new_tokens": 99}}
    )

    def answer(request):
        text = FRENCH if request.key == "rows/b" else ENGLISH
        return answer_with(text, tiny_target.tokenizer)

    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(answer))
    artifact = generate_responses(config, collect_prompts(config, store, tiny_target), store, tiny_target)
    assert artifact.summary["conversations"] == 1
    assert artifact.summary["skipped/answer in another language fr"] == 1
