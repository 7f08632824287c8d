"""Take personal data out of conversations before anything of them is stored.

Patterns replace what they match, by [NAME] where the group (?P<NAME>…) matched, else by [MASKED]. A command reads the
texts, each a JSON string on a line of its own, and writes as many lines in the same order. Roles, names of tools and of
their arguments stay; an id that holds personal data is replaced by a hash of itself.
"""

import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import regex

from hass_core.config import PromptsConfig
from hass_core.data.conversations import Record, is_storable
from hass_core.data.sources import Skipped
from hass_core.errors import ConfigError
from hass_core.store import sha256_of

BATCH = 4096  # conversations handed to one run of the command
TIMEOUT_SECONDS = 600
MATCH_SECONDS = 10.0  # one pattern on one text: nested repetitions can take longer than the world is old

Texts = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Mask:
    """What is applied to every text."""

    patterns: tuple[str, ...]
    command: str | None

    @classmethod
    def of(cls, config: PromptsConfig) -> "Mask":
        """The mask of the settings."""
        return cls(config.mask_patterns, config.mask_command)

    def key(self) -> list[str]:
        """The content of the command's own files: the settings name them only."""
        words = shlex.split(self.command or "")
        return [sha256_of(Path(word)) for word in words if Path(word).is_file()]

    def masked(self, items: Iterable[Record | Skipped]) -> Iterator[Record | Skipped]:
        """The conversations with their texts masked. Raises ConfigError when the command fails."""
        if not self.patterns and not self.command:
            yield from items
            return
        remaining = iter(items)
        while batch := list(islice(remaining, BATCH)):
            texts = [text for item in batch for text in _texts(item)]
            new = iter(self._commanded([self._matched(text) for text in texts]))
            yield from [_with(item, new) for item in batch]

    def _matched(self, text: str) -> str:
        for pattern in self.patterns:
            try:
                text = regex.sub(pattern, lambda found: f"[{found.lastgroup or 'MASKED'}]", text, timeout=MATCH_SECONDS)
            except TimeoutError:
                raise ConfigError(
                    f"prompts.mask_patterns: {pattern!r} takes more than {MATCH_SECONDS:g} seconds on a text of "
                    f"{len(text)} characters; a repetition inside a repetition is the usual cause"
                ) from None
        return text

    def _commanded(self, texts: list[str]) -> list[str]:
        if not self.command or not texts:
            return texts
        lines = "".join(json.dumps(text) + "\n" for text in texts)
        try:
            done = subprocess.run(
                shlex.split(self.command), input=lines.encode(), capture_output=True, timeout=TIMEOUT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"prompts.mask_command cannot be run: {error}") from error
        said = done.stderr.decode(errors="replace").strip()[-300:]
        if done.returncode:
            raise ConfigError(f"prompts.mask_command ended with status {done.returncode}: {said}")
        return _strings(done.stdout, len(texts))


def _strings(output: bytes, number: int) -> list[str]:
    """The command's lines. Raises ConfigError unless each text came back."""
    try:
        found = [json.loads(line) for line in output.decode().split("\n") if line.strip()]
    except (ValueError, RecursionError):
        found = []
    if len(found) != number or not all(isinstance(text, str) for text in found):
        raise ConfigError(
            f"prompts.mask_command must write a JSON string for each of the {number} it reads, one on each line; it "
            f"wrote {len(found)}"
        )
    if not is_storable("".join(found)):
        raise ConfigError("prompts.mask_command wrote half of a surrogate pair, which is no text")
    return found


def _texts(item: Record | Skipped) -> Iterator[str]:
    """All texts that may hold personal data, in the order in which `_with` takes them back."""
    yield item.id
    if isinstance(item, Record):
        yield item.category
        for message in item.messages:
            for key in ("content", "reasoning_content"):
                if key in message:
                    yield message[key]
            for call in message.get("tool_calls", ()):
                yield from _values(call["function"]["arguments"])


def _with(item: Record | Skipped, new: Iterator[str]) -> Record | Skipped:
    """The item with new texts."""
    name = next(new)
    hidden = f"{item.source}/{hashlib.sha256(item.id.encode()).hexdigest()[:16]}"
    name = item.id if name == item.id else hidden
    if isinstance(item, Skipped):
        return replace(item, id=name)
    category = next(new)
    return replace(item, id=name, category=category, messages=tuple(_message(m, new) for m in item.messages))


def _message(message: dict[str, Any], new: Iterator[str]) -> dict[str, Any]:
    texts = {key: next(new) for key in ("content", "reasoning_content") if key in message}
    if "tool_calls" not in message:
        return message | texts
    calls = [
        call | {"function": call["function"] | {"arguments": _renewed(call["function"]["arguments"], new)}}
        for call in message["tool_calls"]
    ]
    return message | texts | {"tool_calls": calls}


def _values(value: Any) -> Iterator[str]:
    """The texts in an argument of a call."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _values(inner)


def _renewed(value: Any, new: Iterator[str]) -> Any:
    """The same value with new texts."""
    if isinstance(value, str):
        return next(new)
    if isinstance(value, list):
        return [_renewed(inner, new) for inner in value]
    return {key: _renewed(inner, new) for key, inner in value.items()} if isinstance(value, dict) else value
