"""Answers from the loaded target, many at once.

A fixed number of rows is decoded together (continuous batching): when answers end, their rows take the next prompts.
The host looks at the drawn tokens every few steps only; in between, nothing leaves the device.

What is reproducible: an answer's random numbers depend on its own seed and positions alone. Logits in 16-bit types
can differ in the last digit with the number of rows computed together, so exact repetition needs the same settings.
"""

from collections.abc import Iterator

from torch import Tensor

from hass_core import kernels
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.engines.batch import MIN_ROWS, RunningAnswer, RunningBatch
from hass_core.data.rendering import special_token_ids
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

REFILL_SHARE = 1 / 8  # read new prompts when this share of the rows is free: reading one alone wastes a pass
STEPS_BETWEEN_LOOKS = {"cpu": 2, "cuda": 16}
PREFILL_TOKENS = {"cpu": 2048, "cuda": 65_536}  # of one pass over prompts, padding included
WIDTH_STEP = {"cpu": 16, "cuda": 128}  # the attended width grows in such steps; on a GPU each is a graph of its own
SLOT_STEP = 256


class LocalEngine:
    """See `Engine`. `max_rows` answers are decoded at once; memory grows with it."""

    def __init__(self, target: Target, max_rows: int):
        self._runner = make_runner(target)
        self._max_rows = max_rows
        self._ends = special_token_ids(target.tokenizer) | frozenset(target.eos_token_ids)
        self._eos = frozenset(target.eos_token_ids)
        kind = target.device.type
        self._look = STEPS_BETWEEN_LOOKS[kind]
        self._prefill_tokens = PREFILL_TOKENS[kind]
        self._width_step = WIDTH_STEP[kind]

    def complete(self, queue: RequestQueue) -> Iterator[Completion]:
        """See `Engine`."""
        batch, ended = RunningBatch(self._runner, 0, 0), []
        while True:
            batch = self._refilled(batch, queue)
            drawn = self._started(batch) if batch.answers else None
            yield from ended  # what is done with these is done while the device draws
            if drawn is None and not ended:
                return
            ended = [] if drawn is None else self._ended(batch, drawn.tolist())

    def _refilled(self, batch: RunningBatch, queue: RequestQueue) -> RunningBatch:
        """Give free rows the next prompts; let the batch grow to what they need, and shrink when none are left."""
        running = len(batch.answers)
        free = self._max_rows - running
        if running and free < REFILL_SHARE * self._max_rows:
            return batch
        new = queue.take(free)
        if new:
            longest = max(a.final_length for a in [*batch.answers.values(), *map(RunningAnswer, new)])
            slots = max(batch.slots, rounded_up(longest + self._look, SLOT_STEP))
            rows = max(batch.rows, running + len(new))
            if (rows, slots) != (batch.rows, batch.slots):
                batch = batch.resized(rows, slots, lasting=rows == self._max_rows)
            for part in self._parts(new):
                batch.start(part)
        elif running <= batch.rows // 2 and batch.rows > MIN_ROWS:
            batch = batch.resized(running, batch.slots)
        return batch

    def _parts(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Prompts of similar length together, so that little of a pass is padding."""
        part: list[Request] = []
        for request in sorted(requests, key=lambda r: len(r.prompt_token_ids)):
            if part and (len(part) + 1) * len(request.prompt_token_ids) > self._prefill_tokens:
                yield part
                part = []
            part.append(request)
        if part:
            yield part

    def _started(self, batch: RunningBatch) -> Tensor:
        """Some more tokens of every row [B, n], being drawn."""
        width = batch.slots  # the kernels read live slots only, whatever the width
        if not kernels.usable(batch.lengths):
            longest = max(answer.length for answer in batch.answers.values())
            width = min(width, rounded_up(longest + self._look, self._width_step))
        return batch.steps(self._look, width)

    def _ended(self, batch: RunningBatch, drawn: list[list[int]]) -> list[Completion]:
        """Give the answers the tokens drawn for them, up to their ends; take those that have ended out of the batch."""
        ended = []
        for row, answer in list(batch.answers.items()):
            for token in drawn[row][: answer.request.max_new_tokens - len(answer.token_ids)]:
                if answer.token_ids[-1] in self._ends:
                    break
                answer.token_ids.append(token)
            last = answer.token_ids[-1]
            if last in self._ends or len(answer.token_ids) == answer.request.max_new_tokens:
                del batch.answers[row]
                ended.append(Completion(answer.request.key, answer.token_ids, finished=last in self._eos))
        return ended


def rounded_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step
