"""The prompts of one call while they are answered, as the host sees them: checked, with their answers and traces."""

import torch

from hass_core.decoding.generation import CycleTrace, Generation, Timing
from hass_core.decoding.prefill import padded
from hass_core.decoding.report import RowReport
from hass_core.decoding.stop import Answer, StopRule
from hass_core.errors import BadInput, ContextTooLong, NonFinite


class Batch:
    """B prompts. An answer may be shorter than asked for where the context ends."""

    def __init__(self, prompts: list[list[int]], max_new_tokens: int, stop: StopRule, context_tokens: int, seed: int):
        check_prompts(prompts, context_tokens)
        self.prompts, self.seed = prompts, seed
        self.lengths = [len(prompt) for prompt in prompts]
        limits = [min(max_new_tokens, context_tokens - length) for length in self.lengths]
        self.answers = [Answer(stop, limit) for limit in limits]
        self.traces: list[list[CycleTrace]] = [[] for _ in prompts]
        self.max_tokens = max(length + limit for length, limit in zip(self.lengths, limits, strict=True))

    @property
    def open_rows(self) -> list[bool]:
        """Which answers have not ended."""
        return [answer.finished is None for answer in self.answers]

    def token_ids(self, device: torch.device) -> torch.Tensor:
        """Right-padded prompts [B, L]."""
        return padded(self.prompts, device)

    def take(self, reports: list[RowReport], drafted_depth: int, first: bool = False) -> list[int]:
        """Hand each open answer its new tokens; returns how many it took. Raises NonFinite."""
        taken = []
        for row, (answer, report) in enumerate(zip(self.answers, reports, strict=True)):
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
            for answer, traces in zip(self.answers, self.traces, strict=True)
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
    """Raise NonFinite unless the logits behind `position` new tokens were sound."""
    if not sound:
        raise NonFinite(
            f"the target's logits for prompt {row} are NaN or infinite after {position} new tokens; "
            "load the target in float32 or bfloat16, and check its weights"
        )
