"""What can be told of a candidate prompt by itself, without the others: the part of judging that other processes do.

A look is cheap; a closer look renders the prompt, tokenises it and signs its text for the search of near-duplicates.
What depends on the prompts before, `Selection` does, in order: the result is the same bit for bit.
"""

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from hass_core.config import PromptsConfig
from hass_core.data.askable import check_askable
from hass_core.data.conversations import Record, as_prompt, user_text, with_placeholders
from hass_core.data.dedupe import Signature, Signer
from hass_core.data.holdout import Forbidden, normalized_hash, user_turns
from hass_core.data.messages import Unusable
from hass_core.data.processes import spare_processes, tokenizer_processes
from hass_core.data.rendering import SkippedConversation, special_tokens
from hass_core.data.sources import Skipped
from hass_core.data.templates import is_prompt_longer

MANY = 4096  # candidates below which one process is done before others are up
CHUNK, CHUNKS_AHEAD = 128, 3  # for each process

log = logging.getLogger(__name__)
Candidate = Record | Skipped


@dataclass(frozen=True)
class Look:
    """A candidate as a prompt, or why it is none. `marked`: it holds a chat marker."""

    prompt: Record | None
    problem: str = ""
    marked: bool = False
    digest: str = ""


@dataclass(frozen=True)
class CloserLook:
    """Why a prompt cannot be asked, or the signature of its text."""

    problem: str | None
    signature: Signature | None = None


Examined = tuple[Look, CloserLook | None]


class Examiner:
    """Looks at candidates one by one; equal settings give equal looks in every process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, forbidden: Forbidden):
        self._tokenizer, self._config, self._forbidden = tokenizer, config, forbidden
        self._markers = tuple(special_tokens(tokenizer))
        self._signer = Signer(config.near_duplicate_similarity)

    def look(self, candidate: Candidate) -> Look:
        """The first look."""
        if isinstance(candidate, Skipped):
            return Look(None, candidate.reason)
        try:
            prompt = as_prompt(candidate)
        except (Unusable, SkippedConversation) as problem:
            return Look(None, str(problem))
        marked = any(marker in part for part in _texts(prompt) for marker in self._markers)
        return Look(prompt, marked=marked, digest=normalized_hash(user_text(prompt.messages)))

    def look_closer(self, prompt: Record) -> CloserLook:
        """The second look; its cheap checks come first."""
        try:
            self._check(prompt)
        except (Unusable, SkippedConversation) as problem:
            return CloserLook(str(problem))
        return CloserLook(None, self._signer.sign(user_text(prompt.messages)))

    def _check(self, prompt: Record) -> None:
        for part in user_turns(prompt):
            if leak := self._forbidden.leak(part):
                raise Unusable(leak)
        check_askable(self._tokenizer, prompt)
        asked = with_placeholders(prompt.messages)
        if is_prompt_longer(self._tokenizer, asked, self._config.max_prompt_tokens, prompt.tools):
            raise Unusable("longer than prompts.max_prompt_tokens")


class Examination:
    """Examines candidates in order, ahead of whoever takes them: by other processes as soon as there are many, where
    the machine has room for them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, forbidden: Forbidden):
        self._examiner = Examiner(tokenizer, config, forbidden)
        self._tokenizer, self._settings = tokenizer, (config, forbidden)
        self._count, self._seen = spare_processes(tokenizer), 0
        self._processes: ProcessPoolExecutor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Examination":
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def of(self, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Examined]]:
        """Each candidate with what was told of it; what is examined here leaves the closer look to be taken.

        An error of the source is raised in its place, behind the candidates before it.
        """
        coming = _Coming(candidates)
        first = coming.take(MANY)
        self._seen += len(first)
        if self._count and self._seen >= MANY:
            yield from self._elsewhere(chain(_chunks(first), iter(lambda: coming.take(CHUNK), [])))
        else:
            while first:
                yield from ((candidate, (self._examiner.look(candidate), None)) for candidate in first)
                first = coming.take(CHUNK)
        if coming.error:
            raise coming.error

    def _elsewhere(self, chunks: Iterator[list[Candidate]]) -> Iterator[tuple[Candidate, Examined]]:
        if self._processes is None:
            started = tokenizer_processes(self._count, self._tokenizer, _begin, *self._settings)
            self._processes = self._stack.enter_context(started)
        waiting: deque[tuple[list[Candidate], Future[list[Examined]]]] = deque()
        while True:
            for chunk in islice(chunks, CHUNKS_AHEAD * self._count - len(waiting)):
                waiting.append((chunk, _submitted(self._processes, chunk)))
            if not waiting:
                return
            chunk, examined = waiting.popleft()
            yield from zip(chunk, self._result(chunk, examined), strict=True)

    def _result(self, chunk: list[Candidate], examined: "Future[list[Examined]]") -> list[Examined]:
        try:
            return examined.result()
        except Exception as error:  # a process that died: the work is done here
            log.warning("a process could not examine prompts, this one does: %s", error)
            return [(self._examiner.look(candidate), None) for candidate in chunk]


class _Coming:
    """Candidates of a source that may end with an error."""

    def __init__(self, candidates: Iterable[Candidate]):
        self._candidates = iter(candidates)
        self.error: Exception | None = None

    def take(self, count: int) -> list[Candidate]:
        """So many, or as many as there are before the end or the error."""
        taken: list[Candidate] = []
        try:
            taken.extend(islice(self._candidates, count))
        except Exception as error:
            self.error = error
        return taken


def _chunks(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    return (candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK))


def _submitted(processes: ProcessPoolExecutor, chunk: list[Candidate]) -> "Future[list[Examined]]":
    try:
        return processes.submit(_examine, chunk)
    except RuntimeError as error:  # broken
        failed: Future[list[Examined]] = Future()
        failed.set_exception(error)
        return failed


_examiner: Examiner  # in a process that examines


def _begin(tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, forbidden: Forbidden) -> None:
    global _examiner
    _examiner = Examiner(tokenizer, config, forbidden)


def _examine(candidates: list[Candidate]) -> list[Examined]:
    looks = [_examiner.look(candidate) for candidate in candidates]
    return [
        (look, None if look.prompt is None or look.marked else _examiner.look_closer(look.prompt)) for look in looks
    ]


def _texts(prompt: Record) -> list[str]:
    """All that the template would write of a prompt."""
    found = [message["content"] for message in prompt.messages]
    rest = [[value for key, value in m.items() if key not in ("role", "content")] for m in prompt.messages]
    return (
        [*found, json.dumps([rest, prompt.tools], ensure_ascii=False, default=str)]
        if any(rest) or prompt.tools
        else found
    )
