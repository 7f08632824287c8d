"""Decode with any drafter's trees: the loop on the host around `Session`.

Each call takes a session out of the decoder's keeping and gives it back, so interleaved calls do not meet.
"""

import time
from collections.abc import Iterator

from hass_core.config import SamplingConfig
from hass_core.decoding.batch import Batch
from hass_core.decoding.generation import CycleTrace, Generation, Step, Timing
from hass_core.decoding.session import Session, TreeDrafter
from hass_core.decoding.stop import StopRule
from hass_core.target_model.runner import Runner


class TreeDecoder:
    """See `hass_core.decoding.generation.Decoder`."""

    def __init__(self, runner: Runner, drafter: TreeDrafter, name: str):
        self.name = name
        self.shape = drafter.shape
        self._runner, self._drafter = runner, drafter
        self._idle: Session | None = None

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        batch = Batch([prompt_token_ids], max_new_tokens, stop, self._runner.context_tokens, sampling.seed)
        for taken, timing in self._run(batch, sampling):
            answer = batch.answers[0]
            trace = batch.traces[0][-1] if batch.traces[0] else CycleTrace(0, 0)
            yield Step(answer.token_ids[-taken[0] :], trace, timing, answer.finished)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        seed = sampling.seed if seed is None else seed
        batch = Batch(prompts, max_new_tokens, stop, self._runner.context_tokens, seed)
        return batch.generations([timing for _, timing in self._run(batch, sampling)])

    def _run(self, batch: Batch, sampling: SamplingConfig) -> Iterator[tuple[list[int], Timing]]:
        """Yields after the prefill and after each cycle how many tokens each row took."""
        started = time.perf_counter()
        session = self._take_session(len(batch.prompts), batch.max_tokens, sampling)
        taken = batch.take(session.start(batch), self.shape.depth, first=True)
        now = time.perf_counter()
        yield taken, Timing(0.0, now - started, now - started)
        while any(batch.open_rows):
            started = time.perf_counter()
            reports = session.step(batch.open_rows)
            verified = time.perf_counter()
            taken = batch.take(reports, self.shape.depth)
            now = time.perf_counter()
            draft = session.draft_seconds
            yield taken, Timing(draft, verified - started - draft, now - started)
        self._idle = session

    def _take_session(self, rows: int, slots: int, sampling: SamplingConfig) -> Session:
        session, self._idle = self._idle, None
        if session is not None and session.holds(rows, slots, sampling):
            return session
        return Session(self._runner, self._drafter, sampling, rows, slots)
