"""From the messages of a request to the prompt's token ids, with nothing of them lost on the way.

Chat templates write what they know and pass over the rest in silence. So each request is rendered a second time with
a mark in place of everything that was said: a mark that does not come out would have been dropped, and is refused.
"""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.data.rendering import Message, SkippedConversation, render, tokenize
from hass_core.errors import BadInput


def prompt_of_messages(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids with the opening of the answer to come. Raises BadInput where the template refuses or drops a part."""
    text = _rendered(tokenizer, messages)
    places: dict[str, str] = {}

    def mark(place: str) -> str:
        places[f"mark{len(places)}x"] = place
        return f"mark{len(places) - 1}x"

    seen = _rendered(tokenizer, [_marked(message, f"messages.{i}", mark) for i, message in enumerate(messages)])
    lost = [place for letters, place in places.items() if letters not in seen]
    lost += _lost_reasoning(tokenizer, messages)
    if lost:
        raise BadInput(f"{', '.join(lost)}: this model's chat template does not write that; leave it out")
    return tokenize(tokenizer, text)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    try:
        return render(tokenizer, messages, add_generation_prompt=True, day=datetime.now())
    except SkippedConversation as problem:
        raise BadInput(f"the chat template cannot render these messages: {problem.reason}") from None


def _marked(message: Message, where: str, mark: Callable[[str], str]) -> Message:
    """The message with marks for what must be written. Which call a tool's message answers, its place tells too."""
    marked = dict(message)
    if message["content"]:
        marked["content"] = mark(f"{where}.content")
    if "name" in message and message["role"] != "tool":
        marked["name"] = mark(f"{where}.name")
    if "tool_calls" in message:
        marked["tool_calls"] = list(_marked_calls(message["tool_calls"], f"{where}.tool_calls", mark))
    return marked


def _marked_calls(calls: list[dict[str, Any]], where: str, mark: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    for i, call in enumerate(calls):
        called = call["function"]
        arguments = {mark(f"{where}.{i}.arguments"): mark(f"{where}.{i}.arguments")} if called["arguments"] else {}
        yield call | {"function": {"name": mark(f"{where}.{i}.name"), "arguments": arguments}}


def _lost_reasoning(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """Reasoning that the template has no place for; of earlier turns, those that have one leave it out themselves."""
    if "reasoning_content" in str(tokenizer.chat_template):
        return []
    return [f"messages.{i}.reasoning_content" for i, message in enumerate(messages) if "reasoning_content" in message]
