"""One conversation while the target answers it, turn by turn, each with the history it produced itself."""

import hashlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.config import ResponsesConfig, SamplingShare
from hass_core.data.conversations import Record, as_stored
from hass_core.data.engines.base import Completion, Request
from hass_core.data.language import language_gate
from hass_core.data.quality import is_loop
from hass_core.data.rendering import Message, SkippedConversation, decode, next_role_token, special_token_ids
from hass_core.data.templates import encode_prompt

MIN_ANSWER_TOKENS = 8  # room for less is not worth a request


class Dialogue:
    """Takes a prompt's messages in order; stops before each answer to be generated."""

    def __init__(self, record: Record, config: ResponsesConfig, seed: int):
        self.record = record
        self.sampling = choose_sampling(record.id, config.sampling)
        self.problem: str | None = None  # why the conversation is skipped
        self.detail: str | None = None  # what a server said of it
        self._max_new_tokens = config.max_new_tokens
        self._drop_repetitive = config.drop_repetitive
        self._language_problem = language_gate(config.languages)
        self._seed = stable_hash(record.id, seed)
        self._context_left = 0  # tokens that the answer under way may have
        self._messages: list[Message] = []
        self._rest = list(record.messages)
        self._answers: list[list[int]] = []  # one list per assistant message; empty for one given by the prompt
        self._finished: list[bool] = []

    def next_request(self, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> Request | None:
        """The request for the next answer; None when the conversation is complete or cannot go on."""
        while self._rest and not self._awaits_answer():
            self._take(self._rest.pop(0))
        if self.problem or not self._awaits_answer():
            return None
        try:
            prompt = encode_prompt(tokenizer, self._messages, self._answers, self.record.tools)
        except SkippedConversation as problem:
            return self._stop(problem.reason)
        self._context_left = context_tokens - len(prompt)
        room = min(self._max_new_tokens, self._context_left)
        if room < min(MIN_ANSWER_TOKENS, self._max_new_tokens):
            return self._stop("longer than the target's context")
        return Request(
            key=self.record.id,
            prompt_token_ids=prompt,
            sampling=self.sampling,
            max_new_tokens=room,
            seed=self._seed + len(self._answers),
            messages=tuple(self._messages),
            tools=self.record.tools,
        )

    def accept(self, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add the generated answer, or note why the conversation is skipped."""
        if completion.error:
            self.problem, self.detail = completion.error, completion.detail
            return
        body = completion.token_ids[:-1] if completion.finished else completion.token_ids
        text = decode(tokenizer, body)
        self.problem = self._answer_problem(body, text, special_token_ids(tokenizer))
        if self.problem is None and (end := _end_problem(completion, tokenizer)):
            self._stop(end)
        elif self.problem is None:
            self._messages.append({"role": "assistant", "content": text})
            self._answers.append(completion.token_ids)
            self._finished.append(completion.finished)

    def row(self) -> dict[str, Any]:
        """The finished conversation as a row of the responses table."""
        return {
            "id": self.record.id,
            "category": self.record.category,
            "source": self.record.source,
            **as_stored(self._messages, self.record.tools),
            "answer_token_ids": self._answers,
            "finished": all(self._finished),
            "num_new_tokens": sum(map(len, self._answers)),
            "temperature": self.sampling.temperature,
        }

    def _awaits_answer(self) -> bool:
        if not self._messages or self._messages[-1]["role"] not in ("user", "tool"):
            return False
        return not self._rest or self._rest[0]["role"] in ("user", "system")

    def _take(self, message: Message) -> None:
        self._messages.append(message)
        if message["role"] == "assistant":
            self._answers.append([])

    def _stop(self, reason: str) -> None:
        """End the conversation with what was answered so far; without any answer it is skipped."""
        if not any(self._answers):
            self.problem = reason
        while self._messages and self._messages[-1]["role"] != "assistant":
            self._messages.pop()
        self._rest = []

    def _answer_problem(self, body: list[int], text: str, special: frozenset[int]) -> str | None:
        if not text.strip():
            return "empty answer"
        if len(body) > self._context_left:  # a server has a context of its own
            return "longer than the target's context"
        if not special.isdisjoint(body):
            return "chat marker inside the answer"
        if self._drop_repetitive and is_loop(body):
            return "repetitive answer"
        return self._language_problem(text)


def _end_problem(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why nothing can follow an answer where the next role's token ends it: that token opens the next turn as well.

    An answer that breaks off has not handed over to the user, and another role's token asks for another speaker.
    """
    expected = next_role_token(tokenizer)
    if expected is None:
        return None
    if not completion.finished:
        return f"the answer breaks off before {expected}"
    found = decode(tokenizer, completion.token_ids[-1:])
    return None if found == expected else f"the answer ends with {found}, not with {expected}"


def choose_sampling(name: str, mix: Sequence[SamplingShare]) -> SamplingShare:
    """The sampling setting of a conversation, by its id: the same on every run, the shares kept on average."""
    position = stable_hash(name, 0) / 2**64
    for share in mix:
        position -= share.share
        if position < 0:
            return share
    return mix[-1]


def stable_hash(name: str, seed: int) -> int:
    """64 bits from a name and a seed, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
