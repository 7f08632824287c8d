"""Decoders: the loop on the host around `hass_core.decoding.session`, plain or speculative.

Same target, sampling and seed: the same tokens, whichever decoder.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.answers import CycleTrace, Finished, Generation, Step, StopRule, Timing
from hass_core.decoding.drafter import Drafter, NoDraft, TreeDrafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.session import Session
from hass_core.decoding.tree import RowReport, TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.errors import BadInput, ContextTooLong, DraftMismatch, NonFinite
from hass_core.target_model.runner import Runner


class Decoder(Protocol):
    """A way of decoding."""

    name: str

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        """Answer one prompt, a step per cycle. The first step holds the token drawn after the prompt.

        Raises ContextTooLong when the prompt leaves no room, NonFinite when the target's logits are not numbers.
        """
        ...

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        """Answer all prompts as one batch. `seed` replaces `sampling.seed`; prompt i draws with its own noise."""
        ...


class TreeDecoder:
    """Decodes with any drafter's trees; see `Decoder`.

    Each call takes a session out of the decoder's keeping and gives it back, so interleaved calls do not meet.
    """

    def __init__(self, runner: Runner, drafter: TreeDrafter, name: str, sampler: type[Sampler] = Sampler):
        self.name = name
        self.shape = drafter.shape
        self._runner, self._drafter, self._sampler = runner, drafter, sampler
        self._idle: Session | None = None

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        prompts = [prompt_token_ids]
        answers = Answers(prompts, max_new_tokens, stop, self._runner.context_tokens)
        for taken, timing in self._cycles(prompts, answers, sampling, sampling.seed):
            answer = answers.rows[0]
            trace = answers.traces[0][-1] if answers.traces[0] else CycleTrace(0, 0)
            yield Step(answer.token_ids[-taken[0] :], trace, timing, answer.finished)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        answers = Answers(prompts, max_new_tokens, stop, self._runner.context_tokens)
        cycles = self._cycles(prompts, answers, sampling, sampling.seed if seed is None else seed)
        return answers.generations([timing for _, timing in cycles])

    def _cycles(
        self, prompts: list[list[int]], answers: "Answers", sampling: SamplingConfig, seed: int
    ) -> Iterator[tuple[list[int], Timing]]:
        """Yields after the prefill and after each cycle how many tokens each row took."""
        started = time.perf_counter()
        session = self._take_session(len(prompts), answers.max_tokens, sampling)
        taken = answers.take(session.start(prompts, seed), self.shape.depth, first=True)
        now = time.perf_counter()
        yield taken, Timing(0.0, now - started, now - started)
        while any(answers.open_rows):
            started = time.perf_counter()
            reports = session.step(answers.open_rows)
            verified = time.perf_counter()
            taken = answers.take(reports, self.shape.depth)
            now = time.perf_counter()
            draft = session.draft_seconds
            yield taken, Timing(draft, verified - started - draft, now - started)
        self._idle = session

    def _take_session(self, rows: int, slots: int, sampling: SamplingConfig) -> Session:
        session, self._idle = self._idle, None
        if session is not None and session.holds(rows, slots, sampling):
            return session
        return Session(self._runner, self._drafter, sampling, rows, slots, self._sampler)


class PlainDecoder(TreeDecoder):
    """One token a forward pass: the yardstick of speed and of exactness.

    It is tree decoding with a tree of one node, the root: the same memory, graphs, draws and stop rules.
    """

    def __init__(self, runner: Runner):
        super().__init__(runner, NoDraft(), name="plain")


class SpeculativeDecoder(TreeDecoder):
    """With a trained draft: HASS and EAGLE-2 (dynamic tree), EAGLE (static tree), or a chain.

    Raises DraftMismatch when draft and target differ in size.
    """

    def __init__(self, runner: Runner, draft: Draft, tree: TreeConfig, name: str = "hass"):
        _check_sizes(runner, draft)
        draft = draft.narrowed(tree.vocabulary).set_by(tree)
        super().__init__(runner, Drafter(draft, TreeShape.of(tree, draft.head.size)), name)


def _check_sizes(runner: Runner, draft: Draft) -> None:
    architecture = draft.model.architecture
    for name, ours in (("hidden_size", architecture.hidden_size), ("vocab_size", architecture.vocab_size)):
        theirs = getattr(runner, name)
        if ours != theirs:
            raise DraftMismatch(
                f"the draft has {name} {ours}, the target has {theirs}; use the target it was trained for"
            )


class Answer:
    """The tokens of one answer so far. `finished` tells why it ended, None while it has not."""

    def __init__(self, rule: StopRule, max_new_tokens: int):
        self._rule, self._max = rule, max_new_tokens
        self.token_ids: list[int] = []
        self.finished: Finished | None = None
        # a stop string is found in the text of the last tokens; no token is shorter than a quarter of a character
        self._tail = 4 * max(map(len, rule.strings), default=0) + 8

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Append tokens up to and including the one that ends the answer; returns those taken."""
        taken: list[int] = []
        for token_id in token_ids if self.finished is None else ():
            self.token_ids.append(token_id)
            taken.append(token_id)
            self.finished = self._reason(token_id)
            if self.finished:
                break
        return taken

    def _reason(self, token_id: int) -> Finished | None:
        if token_id in self._rule.eos_token_ids:
            return "eos"
        if self._rule.strings:
            text = self._rule.decode(self.token_ids[-self._tail :])
            if any(string in text for string in self._rule.strings):
                return "stop"
        return "length" if len(self.token_ids) >= self._max else None


class Answers:
    """The prompts of one call while they are answered. An answer may be shorter than asked for where the context ends.

    Raises as `check_prompts`.
    """

    def __init__(self, prompts: list[list[int]], max_new_tokens: int, stop: StopRule, context_tokens: int):
        check_prompts(prompts, context_tokens)
        limits = [min(max_new_tokens, context_tokens - len(prompt)) for prompt in prompts]
        self.rows = [Answer(stop, limit) for limit in limits]
        self.traces: list[list[CycleTrace]] = [[] for _ in prompts]
        self.max_tokens = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))

    @property
    def open_rows(self) -> list[bool]:
        """Which answers have not ended."""
        return [answer.finished is None for answer in self.rows]

    def take(self, reports: list[RowReport], drafted_depth: int, first: bool = False) -> list[int]:
        """Hand each open answer its new tokens; returns how many it took. Raises NonFinite."""
        taken = []
        for row, (answer, report) in enumerate(zip(self.rows, reports, strict=True)):
            if answer.finished is None:
                check_sound(report.sound, row, len(answer.token_ids))
                if not first:
                    accepted = len(report.token_ids) - 1
                    self.traces[row].append(CycleTrace(accepted, drafted_depth, report.ranks, report.offered))
            taken.append(len(answer.take(report.token_ids)))
        return taken

    def generations(self, timings: list[Timing]) -> list[Generation]:
        """The answers so far; the first timing is the prefill with the first token."""
        return [
            Generation(
                token_ids=answer.token_ids,
                finished=answer.finished or "length",
                cycles=traces,
                timings=timings[1:],
                prefill_seconds=timings[0].total_seconds,
                decode_seconds=sum(timing.total_seconds for timing in timings[1:]),
            )
            for answer, traces in zip(self.rows, self.traces, strict=True)
        ]


def check_prompts(prompts: list[list[int]], context_tokens: int) -> None:
    """Raise BadInput for an empty prompt, ContextTooLong for one that leaves no room for an answer."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise BadInput(f"prompt {row} has no tokens; give at least one")
        if len(prompt) >= context_tokens:
            raise ContextTooLong(
                f"prompt {row} has {len(prompt)} tokens, the target's context holds {context_tokens} with the answer; "
                "shorten the prompt or choose a target with a longer context"
            )


def check_sound(sound: bool, row: int, position: int) -> None:
    """Raise NonFinite unless the logits after `position` new tokens were sound."""
    if not sound:
        raise NonFinite(
            f"the target's logits for prompt {row} are NaN or infinite after {position} new tokens; "
            "load the target in float32 or bfloat16, and check its weights"
        )
