"""Plain decoding: one token a forward pass. The yardstick of speed and of exactness."""

import time
from collections.abc import Iterator

import torch

from hass_core.config import SamplingConfig
from hass_core.decoding.batch import Batch
from hass_core.decoding.generation import CycleTrace, Generation, Step, Timing
from hass_core.decoding.prefill import last_of, prefill
from hass_core.decoding.stop import StopRule
from hass_core.target.runner import Runner


class PlainDecoder:
    """See `hass_core.decoding.generation.Decoder`."""

    name = "plain"

    def __init__(self, runner: Runner):
        self._runner = runner

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        batch = Batch(self._runner, [prompt_token_ids], sampling, max_new_tokens, stop)
        for taken, timing in self._run(batch):
            answer = batch.answers[0]
            yield Step(answer.token_ids[-taken[0] :], CycleTrace(0, 0), timing, answer.finished)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        batch = Batch(self._runner, prompts, sampling, max_new_tokens, stop, seed)
        timings = [timing for _, timing in self._run(batch)]
        return timed(batch.generations(), timings)

    def _run(self, batch: Batch) -> Iterator[tuple[list[int], Timing]]:
        """One token a row and step; yields how many tokens each row took."""
        runner, started = self._runner, time.perf_counter()
        cache = runner.new_cache(len(batch.lengths), batch.max_tokens)
        with torch.inference_mode():
            ends = torch.tensor(batch.lengths, device=runner.device)
            features = last_of(prefill(runner, batch.token_ids, batch.lengths, cache), ends)[:, None]
        while True:
            with torch.inference_mode():
                token_ids, sound = batch.draw(runner.logits(features), cache.lengths[:, None])
                batch.note(token_ids, torch.ones_like(cache.lengths))
                taken = batch.take(token_ids.tolist(), sound[:, 0].tolist())
            now = time.perf_counter()
            yield taken, Timing(verify_seconds=now - started, total_seconds=now - started)
            if not batch.active:
                return
            started = time.perf_counter()
            with torch.inference_mode():
                features = runner.forward(token_ids, cache.lengths[:, None], cache)
                cache.advance([int(answer.finished is None) for answer in batch.answers])


def timed(generations: list[Generation], timings: list[Timing]) -> list[Generation]:
    """Give each generation its batch's timings; the first is the prefill with the first token."""
    for generation in generations:
        generation.timings = timings[1:]
        generation.prefill_seconds = timings[0].total_seconds
        generation.decode_seconds = sum(timing.total_seconds for timing in timings[1:])
    return generations
