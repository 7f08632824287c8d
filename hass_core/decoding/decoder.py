"""Decoders: the loop on the host around `hass_core.decoding.session`, plain or speculative.

Same target, sampling and seed: the same tokens, whichever decoder.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.answers import Answers, CycleTrace, Generation, Step, StopRule, Timing
from hass_core.decoding.drafter import Drafter, NoDraft, TreeDrafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.session import Session
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.errors import DraftMismatch
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
        self, prompts: list[list[int]], answers: Answers, sampling: SamplingConfig, seed: int
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
        draft = replace(draft.narrowed(tree.vocabulary), eight_bits=tree.eight_bits)
        super().__init__(runner, Drafter(draft, TreeShape.of(tree, draft.head.size)), name)


def _check_sizes(runner: Runner, draft: Draft) -> None:
    architecture = draft.model.architecture
    for name, ours in (("hidden_size", architecture.hidden_size), ("vocab_size", architecture.vocab_size)):
        theirs = getattr(runner, name)
        if ours != theirs:
            raise DraftMismatch(
                f"the draft has {name} {ours}, the target has {theirs}; use the target it was trained for"
            )
