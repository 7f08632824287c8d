"""Whether a target's template shows all that a prompt says: what it would drop in silence is a reason to skip.

A template is asked with words that no template holds. What it does with them is told from its text, never from its
source.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.data.conversations import Record, with_placeholders
from hass_core.data.messages import TOOL_CALL
from hass_core.data.rendering import Message, SkippedConversation, render

WORD = "quartzsphinx"
USER: Message = {"role": "user", "content": "How high is the tide?"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": f"{WORD}1",
        "description": "A height",
        "parameters": {"type": "object", "properties": {f"{WORD}2": {"type": "string", "description": "Where"}}},
    },
}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "a1b2c3d4e", "type": "function", "function": {"name": f"{WORD}1", "arguments": {f"{WORD}2": f"{WORD}3"}}}
    ],
}
RESULT: Message = {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": f"{WORD}1", "content": f"{WORD}4"}
THOUGHT: Message = {"role": "assistant", "content": "Four metres.", "reasoning_content": f"{WORD}5"}


def check_askable(tokenizer: PreTrainedTokenizerBase, prompt: Record) -> None:
    """Raise SkippedConversation with the reason when the template drops a part of the prompt."""
    calls = [call for message in prompt.messages for call in message.get("tool_calls", ())]
    if calls and not shows_calls(tokenizer):
        raise SkippedConversation(TOOL_CALL)
    if prompt.tools and not shows_tools(tokenizer):
        raise SkippedConversation("the template has no place for the column tools")
    if any("reasoning_content" in message for message in prompt.messages) and not shows_reasoning(tokenizer):
        raise SkippedConversation("the template has no place for reasoning_content")
    if calls or any(message["role"] not in ("user", "assistant") for message in prompt.messages):
        _check_text(render(tokenizer, with_placeholders(prompt.messages), True, prompt.tools), prompt.messages)


@lru_cache(maxsize=16)
def shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the tools a conversation offers."""
    return _shows(tokenizer, [USER], [TOOL], (1, 2))


@lru_cache(maxsize=16)
def shows_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a tool call with its arguments, and the result."""
    return _shows(tokenizer, [USER, CALL, RESULT], [TOOL] if shows_tools(tokenizer) else [], (1, 2, 3, 4))


@lru_cache(maxsize=16)
def shows_reasoning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes what an assistant thought before its last answer."""
    return _shows(tokenizer, [USER, THOUGHT], [], (5,))


def _shows(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[dict[str, Any]], words: Iterable[int]
) -> bool:
    try:
        text = render(tokenizer, messages, tools=tools)
    except SkippedConversation:
        return False
    return all(f"{WORD}{number}" in text for number in words)


def _check_text(text: str, messages: tuple[Message, ...]) -> None:
    shown = _squeezed(text)
    for message in messages:
        content = message["content"]
        in_json = json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]
        if not any(_squeezed(form) in shown for form in (content, *in_json)):
            raise SkippedConversation(
                TOOL_CALL if message["role"] != "system" else "the template drops a system message"
            )


def _squeezed(text: str) -> str:
    return "".join(text.split())
