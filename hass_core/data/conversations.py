"""One record type for conversations, from all the forms they come in.

A row is a dict in one of these forms, told by its keys:

    messages       {"messages": [{"role": "user", "content": "…"}, …]}       also as "prompt", or a bare list
    ShareGPT       {"conversations": [{"from": "human", "value": "…"}, …]}
    Alpaca         {"instruction": "…", "input": "…", "output": "…"}
    question file  {"question_id": 81, "category": "…", "turns": ["…", "…"]}
    plain          {"prompt": "…"} or {"question": "…"}
    request log    {"request": {"messages": […]}, …}, {"body": {…}} and the like

Beside them `system` (an opening system message), `history` (turns before) and `tools` are used; a column that changes
the question and has no place (an image, say) makes the row unusable. A row that is none of these is the file's fault
(BrokenRow); a well-formed conversation that cannot be used is the data's nature (Unusable) and is skipped with its
reason.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hass_core.data.messages import (
    BrokenRow,
    Unusable,
    from_json,
    message_of,
    text_message,
    tools_of,
    wrong_type,
)
from hass_core.data.rendering import Message

ID_KEYS = ("id", "question_id", "conversation_id", "task_id", "custom_id", "request_id")
FORMS = "messages, conversations, instruction, turns, prompt or question"
LIST_KEYS = ("messages", "conversations", "conversation")
FORM_KEYS = (*LIST_KEYS, "turns", "instruction", "prompt", "question")
WRAPPERS = ("request", "body", "request_body", "requestBody", "proxy_server_request", "payload", "row", "data", "input")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "instructions")
TOOL_KEYS = ("tools", "functions")
MATERIAL_KEYS = ("input", "context")  # stand behind the question
NO_PLACE_KEYS = ("image", "images", "audio", "audios", "video", "videos", "documents")
PLACEHOLDER = "An answer."


@dataclass(frozen=True)
class Record:
    """A conversation with its origin. Roles are system, user, assistant and tool."""

    id: str
    category: str
    source: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def parse_row(row: Any, source: str, number: int) -> Record:
    """A row of a file or dataset as a Record; `number` names it when it has no id. Raises BrokenRow or Unusable."""
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise BrokenRow(f"wrong type: expected an object with {FORMS}, found {type(row).__name__}")
    inner = request_in(row)
    if inner is not row and not any(inner.get(key) is not None for key in FORM_KEYS):
        raise Unusable("not a chat request")
    messages = _whole(inner)
    _check_questions(messages)
    tools = next((found for key in TOOL_KEYS if (found := tools_of(inner.get(key)))), ())
    category = row.get("category")
    name = f"{source}/{name_of(row, number)}"
    return _storable(Record(name, str(category) if category else "general", source, tuple(messages), tools))


def name_of(row: Any, number: int) -> str:
    """A row's id, of the request it holds else; its number when it has none that can be stored."""
    if isinstance(row, dict):
        for part in (row, request_in(row)):
            for key in ID_KEYS:
                if (name := _name(part.get(key))) is not None:
                    return name
    return str(number)


def request_in(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a logged request that holds the conversation; any other row itself."""
    inner = row
    for _ in range(4):
        if any(inner.get(key) is not None for key in FORM_KEYS):
            break
        wrapped = (from_json(inner.get(key)) for key in WRAPPERS)
        part = next((part for part in wrapped if isinstance(part, dict)), None)
        if part is None:
            break
        inner = part
    return inner


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
    _check_questions(kept)
    return Record(record.id, record.category, record.source, tuple(kept), record.tools)


def _check_questions(messages: Sequence[Message]) -> None:
    """Raise Unusable where nothing is asked; masks may have left nothing of a question."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise Unusable("no user turn")
    if not all(question.strip() for question in questions):
        raise Unusable("empty user turn")


def with_answers_due(messages: Sequence[Message]) -> Iterator[tuple[Message, bool]]:
    """Each message, and whether the target answers after it: behind every user or tool turn that no answer follows."""
    for i, message in enumerate(messages):
        followed = i + 1 < len(messages) and messages[i + 1]["role"] in ("assistant", "tool")
        yield message, message["role"] in ("user", "tool") and not followed


def with_placeholders(messages: Sequence[Message]) -> list[Message]:
    """A prompt with a stand-in for each answer to come but the last: some templates want the roles to take turns."""
    found: list[Message] = []
    for i, (message, due) in enumerate(with_answers_due(messages), start=1):
        found.append(message)
        if due and i < len(messages):
            found.append({"role": "assistant", "content": PLACEHOLDER})
    return found


def user_text(messages: Sequence[Message]) -> str:
    """What the user says, all turns: the part that hashes and duplicates are judged by."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def as_stored(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A conversation as columns of a table: its plain messages, and as JSON what only some conversations have."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    details = {
        str(i): {key: value for key, value in message.items() if key not in ("role", "content")}
        for i, message in enumerate(messages)
        if len(message) > 2
    }
    extras = {key: value for key, value in (("tools", list(tools)), ("messages", details)) if value}
    return {"messages": plain, "extras": json.dumps(extras, default=str) if extras else None}


def from_stored(row: Mapping[str, Any]) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Messages and tools of a row written with `as_stored`."""
    extras = json.loads(row.get("extras") or "{}")
    details = extras.get("messages", {})
    messages = [message | details.get(str(i), {}) for i, message in enumerate(row["messages"])]
    return messages, tuple(extras.get("tools", ()))


def _whole(row: dict[str, Any]) -> list[Message]:
    """The conversation with what other columns say of it."""
    for key in NO_PLACE_KEYS:
        if row.get(key):
            raise Unusable(f"the column {key} cannot be used")
    messages = [*_history(row.get("history")), *_messages(row)]
    system = next((row[key] for key in SYSTEM_KEYS if row.get(key)), None)
    if system is None:
        return messages
    opening = text_message("system", system)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != opening["content"]:
            raise Unusable("the column system contradicts the system message")
        return messages
    return [opening, *messages] if opening["content"].strip() else messages


def _messages(row: dict[str, Any]) -> list[Message]:
    for key in LIST_KEYS:
        if row.get(key) is not None:
            return _listed(key, row[key])
    if row.get("turns") is not None:
        return _listed("turns", row["turns"])
    if row.get("instruction") is not None:
        return _asked(row, "instruction")
    if (turns := _turns_in(row.get("prompt"))) is not None:
        return _listed("prompt", turns)
    for key in ("prompt", "question"):
        if row.get(key) is not None:
            return _asked(row, key)
    raise BrokenRow(f"expected one of the keys {FORMS}, found {', '.join(map(str, row)) or 'an empty object'}")


def _turns_in(prompt: Any) -> list[Any] | None:
    """The messages in the column `prompt`; None where it holds a question, be it one that looks like a list.

    Raises Unusable for the other lists that a completion request may hold: token ids, and prompts of their own.
    """
    if isinstance(prompt, str):
        turns = from_json(prompt)
        return turns if isinstance(turns, list) and is_conversation(turns) else None
    if not isinstance(prompt, list):
        return None
    if prompt and all(isinstance(part, (int, list)) for part in prompt):
        raise Unusable("a prompt of token ids")
    if len(prompt) > 1 and all(isinstance(part, str) for part in prompt):
        raise Unusable("several prompts in one request")
    return prompt


def is_conversation(value: list[Any]) -> bool:
    """Whether a list holds messages, not rows or anything else."""
    return bool(value) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _listed(key: str, value: Any) -> list[Message]:
    turns = from_json(value)
    if not isinstance(turns, list):
        raise wrong_type(key, "a list of messages", value)
    return [message_of(turn) for turn in turns]


def _asked(row: dict[str, Any], key: str) -> list[Message]:
    """A question of one turn, with the material it speaks of behind it."""
    parts = [(key, row[key]), *((name, row.get(name)) for name in MATERIAL_KEYS)]
    for name, part in parts:
        if part is not None and not isinstance(part, str):
            raise wrong_type(name, "text", part)
    answer = [text_message("assistant", row["output"])] if row.get("output") else []
    return [{"role": "user", "content": "\n\n".join(part for _, part in parts if part)}, *answer]


def _history(value: Any) -> list[Message]:
    """Turns before the question: messages, or pairs of a question and its answer."""
    turns = from_json(value)
    if not turns:
        return []
    if not isinstance(turns, list):
        raise wrong_type("history", "a list of turns", value)
    messages: list[Message] = []
    for turn in turns:
        if isinstance(turn, list):
            pair = zip(("user", "assistant"), turn, strict=False)
            messages += [text_message(role, content) for role, content in pair if content is not None]
        else:
            messages.append(message_of(turn))
    return messages


def _name(value: Any) -> str | None:
    """An id that names a row and can be stored; None for one that is empty or no id."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    name = str(value)
    return name if name.strip() and is_storable(name) else None


def _storable(record: Record) -> Record:
    """The record itself. Raises Unusable for half a surrogate pair, which no file of UTF-8 can hold."""
    texts = json.dumps([record.category, record.messages, record.tools], ensure_ascii=False, default=str)
    if not is_storable(texts):
        raise Unusable("lone surrogate in the text")
    return record


def is_storable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
