"""One message, out of the ways it is written by OpenAI's protocol, ShareGPT and the older function calls.

A message is a dict with `role` (system, user, assistant or tool) and `content` (text). Where the row has them it also
holds `tool_calls`, `tool_call_id`, `name` and `reasoning_content`, in the form that chat templates read: the arguments
of a call are an object, not the text of one.
"""

import json
from collections.abc import Mapping
from typing import Any

from hass_core.data.rendering import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
TOOL_PARTS = ("tool_use", "tool_result")
TOOL_CALL = "tool call"


class BrokenRow(Exception):
    """The row has none of the known forms, or a part of it has the wrong type."""


class Unusable(Exception):
    """The conversation is well-formed, but nothing can be learned from it; the text is a short fixed reason."""


def wrong_type(what: str, expected: str, found: Any) -> BrokenRow:
    """The error for a value of another type than its place needs."""
    return BrokenRow(f"wrong type: {what} must be {expected}, found {type(found).__name__}")


def message_of(turn: Any) -> Message:
    """A message of a row. Raises BrokenRow for a wrong type, Unusable for a role nobody knows and the like."""
    if isinstance(turn, str):  # user turns only, as in a question file
        return {"role": "user", "content": turn}
    if not isinstance(turn, dict):
        raise wrong_type("a message", "an object", turn)
    given = _either(turn, "role", "from")
    if not isinstance(given, str):
        raise wrong_type("the role of a message", "text", given)
    role = ROLES.get(given.strip().lower())
    if role is None:
        raise Unusable("unknown role")
    content = _either(turn, "content", "value")
    if given.strip().lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": [_call(content)]}
    if turn.get("images"):
        raise Unusable("not only text")
    return text_message(role, content, calls_of(turn) if role == "assistant" else None) | _details(role, turn)


def _either(turn: Mapping[str, Any], key: str, other: str) -> Any:
    """What a message says under one name or the other; a table's column holds null where a row has none."""
    return turn[key] if turn.get(key) is not None else turn.get(other)


def text_message(role: str, content: Any, calls: list[dict[str, Any]] | None = None) -> Message:
    """A message with this text and these tool calls. Raises BrokenRow or Unusable where it is no text."""
    if isinstance(content, list):
        content = _joined_parts([part for part in content if role != "assistant" or not _is_thought(part)])
    if content is None and not calls:
        raise Unusable("a message without text")
    if content is not None and not isinstance(content, str):
        raise wrong_type("the content of a message", "text", content)
    return {"role": role, "content": content or ""} | ({"tool_calls": calls} if calls else {})


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message. Raises Unusable when they cannot be read."""
    calls = turn.get("tool_calls")
    if not calls and turn.get("function_call"):
        calls = [turn["function_call"]]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise Unusable(TOOL_CALL)
    return [_call(call) for call in calls]


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools a conversation offers, each as {"type": "function", "function": {…}}. Raises Unusable."""
    value = from_json(value)
    found = [value] if isinstance(value, dict) else value
    if not found:
        return ()
    if not isinstance(found, list):
        raise Unusable("the column tools cannot be read")
    return tuple(_tool(tool) for tool in found)


def from_json(value: Any) -> Any:
    """The list or object that a text holds; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def as_sent(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as OpenAI's protocol wants them: the arguments of a call as text."""
    return [_sent(message) for message in messages]


def _sent(message: Message) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        calls.append({"id": f"call_{number}", **call, "function": function})
    return message | {"tool_calls": calls}


def _details(role: str, turn: Mapping[str, Any]) -> dict[str, str]:
    """What a message says beside its text."""
    if role == "tool":
        return {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    thought = reasoning_of(turn) if role == "assistant" else ""
    return {"reasoning_content": thought} if thought else {}


def reasoning_of(message: Mapping[str, Any]) -> str:
    """What an assistant thought before its answer: DeepSeek's name for it, that of newer servers, or a part of it."""
    found = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(found, str):
        return found
    content = _either(message, "content", "value")
    parts = content if isinstance(content, list) else ()
    return "\n".join(part["thinking"] for part in parts if _is_thought(part))


def _call(call: Any) -> dict[str, Any]:
    call = from_json(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(TOOL_CALL)
    arguments = from_json(function.get("arguments", function.get("parameters"))) or {}
    if not isinstance(arguments, dict):
        raise Unusable(TOOL_CALL)
    name = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return name | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("the column tools cannot be read")
    return {"type": "function", "function": function}


def _joined_parts(parts: list[Any]) -> str:
    """Text of OpenAI's content parts. Raises Unusable for images and sound."""
    texts = [part if isinstance(part, str) else _part(part) for part in parts]
    return "\n".join(texts)


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "thinking" and isinstance(part.get("thinking"), str)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise wrong_type("a part of a message's content", "an object", part)
    if part.get("type") in TOOL_PARTS:
        raise Unusable(TOOL_CALL)
    if part.get("type") not in TEXT_PARTS:
        raise Unusable("not only text")
    if not isinstance(part.get("text"), str):
        raise wrong_type("the text of a message's part", "text", part.get("text"))
    return part["text"]
