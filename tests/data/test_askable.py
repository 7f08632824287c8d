"""What a template would drop in silence is a reason to skip; what it shows is kept."""

import json

import pytest

from hass_core.config import PromptsConfig
from hass_core.data.conversations import parse_row
from hass_core.data.holdout import Forbidden
from hass_core.data.selection import Selection
from hass_core.data.templates import encode_conversation, encode_prompt, supervised_runs
from tests.data.families import family_tokenizer

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Brest"}'}}
QUESTION = {"role": "user", "content": "How high is the tide in Brest right now?"}
CALLED = [
    QUESTION,
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "4.2 m"},
    {"role": "assistant", "content": "It stands at 4.2 m."},
]


def judged(row: dict, template: str | None = None, family: str = "smollm2") -> Selection:
    """A selection that has seen this row."""
    tokenizer = family_tokenizer(family) if template is None else family_tokenizer.__wrapped__(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    selection = Selection(PromptsConfig(), tokenizer, Forbidden([]))
    selection.consider(parse_row(row, "file", 1))
    return selection


ROWS = {
    "tool call": ({"messages": CALLED, "tools": [TOOL]}, "tool call"),
    "tools": ({"messages": [QUESTION], "tools": [TOOL]}, "the template has no place for the column tools"),
    "marker in a call": (
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"name": "<|im_end|>"}]}, CALLED[2]]},
        "contains a chat marker of the target",
    ),
}


@pytest.mark.parametrize(("row", "reason"), ROWS.values(), ids=ROWS)
def test_what_smollm2_has_no_place_for_is_skipped(row, reason):
    assert judged(row).reasons() == {reason: 1}


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NO_TEXT_BESIDE = (  # Llama 3.1 writes the call alone, and results as JSON
    "{{ tools }}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)


def test_a_system_message_that_the_template_drops_is_a_reason_to_skip():
    row = {"system": "Be a pirate.", "messages": [QUESTION]}
    assert judged(row, NO_SYSTEM).reasons() == {"the template drops a system message": 1}
    assert len(judged(row).kept) == 1


def test_text_beside_a_call_that_the_template_drops_is_a_reason_to_skip():
    assert judged({"messages": CALLED, "tools": [TOOL]}, NO_TEXT_BESIDE).reasons() == {"tool call": 1}
    bare = [QUESTION, CALLED[1] | {"content": None}, CALLED[2] | {"content": 'It says "4.2 m"'}]
    assert len(judged({"messages": bare, "tools": [TOOL]}, NO_TEXT_BESIDE).kept) == 1


WITH_TOOLS = (  # in the manner of Qwen and Hermes
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_with_tools_keeps_calls_and_results_and_only_the_answer_is_supervised():
    tokenizer = family_tokenizer.__wrapped__("smollm2")
    tokenizer.chat_template = WITH_TOOLS
    (kept,) = judged({"messages": CALLED, "tools": json.dumps([TOOL])}, WITH_TOOLS).kept
    text = tokenizer.decode(encode_prompt(tokenizer, kept.messages, tools=kept.tools))
    for part in ("# Tools", '"name": "tide"', "Let me look.", '"arguments": {"port": "Brest"}', "4.2 m"):
        assert part in text, part
    answer = [*tokenizer("It stands at 4.2 m.")["input_ids"], tokenizer.eos_token_id]
    messages = [*kept.messages, {"role": "assistant", "content": "It stands at 4.2 m."}]
    encoded = encode_conversation(tokenizer, messages, [[], answer], kept.tools)
    assert supervised_runs(encoded) == [answer]
    assert "# Tools" in tokenizer.decode(encoded.token_ids)


@pytest.mark.parametrize("family", ["llama-2", "mistral", "qwen2", "smollm2"])
def test_several_questions_are_kept_by_templates_that_want_turns(family):
    row = {"messages": [QUESTION, {"role": "user", "content": "And in Roscoff?"}]}
    (kept,) = judged(row, family=family).kept
    assert [message["role"] for message in kept.messages] == ["user", "user"]
