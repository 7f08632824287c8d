"""What a server's reply says: an answer, a refusal, or nothing that makes sense.

A reply with status 200 is not always an answer: gateways send pages of HTML, and servers send error objects or empty
lists when what is behind them fails. Such a reply is an `OddReply`, worth asking again.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from hass_core.data.messages import BrokenRow, Unusable, reasoning_of, text_message

QUOTE_CHARACTERS = 300
FINISHED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
FAILED = ("error", "abort")
OPTIONAL_FIELDS = ("return_token_ids", "seed")  # an answer is as good without them


class OddReply(Exception):
    """No answer and no error status; the text is a short fixed reason, `said` a quotation."""

    def __init__(self, reason: str, said: str):
        super().__init__(reason)
        self.reason, self.said = reason, said


@dataclass(frozen=True)
class Reply:
    """One answer as the server gives it."""

    content: str
    reasoning: str
    finished: bool
    token_ids: list[int]  # empty where the server tells none
    problem: str | None = None  # why it is no answer to learn from


def read_reply(data: bytes) -> Reply:
    """The answer in a reply with status 200. Raises OddReply when there is none."""
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        raise OddReply("the server's reply is not JSON", quoted(data)) from None
    choice = _first_choice(reply)
    message = choice.get("message") if choice else None
    if choice is None or not isinstance(message, dict) or choice.get("finish_reason") in FAILED:
        reason = "the server's reply is an error" if _error_of(reply) else "the server's reply holds no answer"
        raise OddReply(reason, quoted(data))
    content, problem = _content(message, data)
    if choice.get("finish_reason") == "content_filter":
        problem = "the server filtered the answer"
    token_ids = choice.get("token_ids")
    is_list = isinstance(token_ids, list) and all(type(token) is int and token >= 0 for token in token_ids)
    return Reply(
        content,
        "" if problem else reasoning_of(message),
        finished=choice.get("finish_reason") in FINISHED,
        token_ids=token_ids if is_list and token_ids else [],
        problem=problem,
    )


def says(text: str, reply: Reply) -> bool:
    """Whether a text ends with a reply's answer and holds its reasoning.

    White space, half a character, and what a server leaves out of its reply before the answer do not matter.
    """
    shown, content, thought = map(_letters, (text, reply.content, reply.reasoning))
    return shown.endswith(content) and thought in shown


def _letters(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.split())).strip("\N{REPLACEMENT CHARACTER}")


def models_in(data: bytes) -> list[str]:
    """The names in a server's list of models."""
    try:
        names = [entry["id"] for entry in json.loads(data)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and name]


def quoted(data: bytes) -> str:
    """The server's own words, shortened: the message of an error object, else the text without its tags."""
    text = data.decode(errors="replace")
    try:
        text = _error_of(json.loads(text)) or text
    except (ValueError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", text)
    text = " ".join(text.split()).encode(errors="replace").decode()
    return repr(text if len(text) <= QUOTE_CHARACTERS else text[:QUOTE_CHARACTERS] + "…")


def without_refused(body: dict[str, Any], said: str) -> dict[str, Any] | None:
    """The request without the field that the server does not know; None when its refusal is about something else."""
    if "max_completion_tokens" in said and "max_tokens" in body:
        renamed = {key: value for key, value in body.items() if key != "max_tokens"}
        return renamed | {"max_completion_tokens": body["max_tokens"]}
    refused = next((field for field in OPTIONAL_FIELDS if field in body and re.search(rf"\b{field}\b", said)), None)
    return {key: value for key, value in body.items() if key != refused} if refused else None


def _first_choice(reply: Any) -> dict[str, Any] | None:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _content(message: dict[str, Any], data: bytes) -> tuple[str, str | None]:
    """The text of an answer, and why it is none to learn from. Raises OddReply for content of another type."""
    if message.get("tool_calls") or message.get("function_call"):
        return "", "tool call in the answer"
    content = message.get("content")
    try:
        text = text_message("assistant", "" if content is None else content)["content"]
    except Unusable as problem:
        return "", f"answer: {problem}"
    except BrokenRow:
        raise OddReply("the server's reply holds no answer", quoted(data)) from None
    try:
        (text + reasoning_of(message)).encode()
    except UnicodeEncodeError:
        return "", "lone surrogate in the answer"
    return text, None


def _error_of(reply: Any) -> str | None:
    """The message in an error object, in the forms of OpenAI, FastAPI and others."""
    if not isinstance(reply, dict):
        return None
    for key in ("error", "message", "detail", "errors"):
        found = reply.get(key)
        if isinstance(found, dict) and isinstance(found.get("message"), str):
            return found["message"]
        if found:
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return None
