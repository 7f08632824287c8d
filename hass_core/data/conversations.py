"""One record type for conversations, from all the forms they come in.

A row is a dict in one of five forms, told by its keys:

    messages       {"messages": [{"role": "user", "content": "…"}, …]}
    ShareGPT       {"conversations": [{"from": "human", "value": "…"}, …]}
    Alpaca         {"instruction": "…", "input": "…", "output": "…"}
    question file  {"question_id": 81, "category": "…", "turns": ["…", "…"]}
    plain          {"prompt": "…"}

A row that is none of these is the file's fault (BrokenRow); a well-formed conversation that cannot be used (no user
turn, an image) is the data's nature (Unusable) and is skipped with its reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hass_core.data.templates import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ID_KEYS = ("id", "question_id", "conversation_id", "task_id")
FORMS = "messages, conversations, instruction, turns or prompt"


class BrokenRow(Exception):
    """The row has none of the known forms, or a part of it has the wrong type."""


class Unusable(Exception):
    """The conversation is well-formed, but nothing can be learned from it; the text is a short fixed reason."""


@dataclass(frozen=True)
class Record:
    """A conversation with its origin. Roles are system, user, assistant and tool."""

    id: str
    category: str
    source: str
    messages: tuple[Message, ...]


def parse_row(row: Any, source: str, number: int) -> Record:
    """A row of a file or dataset as a Record; `number` names it when it has no id. Raises BrokenRow or Unusable."""
    if not isinstance(row, dict):
        raise BrokenRow(f"expected an object with {FORMS}, found {type(row).__name__}")
    messages = _messages(row)
    if not any(message["role"] == "user" for message in messages):
        raise Unusable("no user turn")
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        raise Unusable("empty user turn")
    name = next((row[key] for key in ID_KEYS if row.get(key) is not None), number)
    category = row.get("category")
    return Record(f"{source}/{name}", str(category) if category else "general", source, tuple(messages))


def as_prompt(record: Record) -> Record:
    """What the target is asked: answers are removed, except a tool call, whose result would have no cause without it.

    The conversation ends with its last user or tool turn. Raises Unusable when nothing is left to answer.
    """
    kept = []
    for i, message in enumerate(record.messages):
        is_tool_call = i + 1 < len(record.messages) and record.messages[i + 1]["role"] == "tool"
        if message["role"] != "assistant" or (is_tool_call and any(m["role"] == "user" for m in kept)):
            kept.append(message)
    while kept and kept[-1]["role"] not in ("user", "tool"):
        kept.pop()
    if not any(message["role"] == "user" for message in kept):
        raise Unusable("no user turn")
    return Record(record.id, record.category, record.source, tuple(kept))


def user_text(messages: Sequence[Message]) -> str:
    """What the user says, all turns: the part that hashes and duplicates are judged by."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def _messages(row: dict[str, Any]) -> list[Message]:
    for key in ("messages", "conversations", "conversation"):
        if isinstance(row.get(key), list):
            return [_message(turn) for turn in row[key]]
    if isinstance(row.get("turns"), list):
        return [_turn("user", text) for text in row["turns"]]
    if isinstance(row.get("instruction"), str):
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        answer = [_turn("assistant", row["output"])] if row.get("output") else []
        return [_turn("user", question), *answer]
    if isinstance(row.get("prompt"), str):
        return [_turn("user", row["prompt"])]
    raise BrokenRow(f"expected one of the keys {FORMS}, found {', '.join(map(str, row)) or 'an empty object'}")


def _message(turn: Any) -> Message:
    if isinstance(turn, str):  # user turns only, as in a question file
        return _turn("user", turn)
    if not isinstance(turn, dict):
        raise BrokenRow(f"a message must be an object, found {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise BrokenRow(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    return _turn(ROLES[role], turn.get("content", turn.get("value")))


def _turn(role: str, content: Any) -> Message:
    if isinstance(content, list):
        content = _joined_parts(content)
    if content is None:
        raise Unusable("a message without text")
    if not isinstance(content, str):
        raise BrokenRow(f"the content of a message must be text, found {type(content).__name__}")
    return {"role": role, "content": content}


def _joined_parts(parts: list[Any]) -> str:
    """Text of OpenAI's content parts. Raises Unusable for images and sound."""
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise Unusable("not only text")
    return "\n".join(str(part["text"]) for part in parts)
