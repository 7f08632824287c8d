"""The prompts of one call while they are answered: checked, with their coins, answers and traces.

Shapes: B rows, N tree nodes, R tokens emitted, V vocabulary.
"""

import torch
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.generation import CycleTrace, Generation
from hass_core.decoding.prefill import padded
from hass_core.decoding.sampling import draw, position_coins
from hass_core.decoding.stop import Answer, StopRule
from hass_core.decoding.tree import Tree
from hass_core.errors import BadInput, ContextTooLong, NonFinite
from hass_core.target.runner import Runner


class Batch:
    """B prompts under one sampling setting."""

    def __init__(
        self,
        runner: Runner,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
        depth: int = 0,
    ):
        check_prompts(prompts, runner.context_tokens)
        self.sampling, self.device = sampling, runner.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.token_ids = padded(prompts, runner.device)
        limits = [min(max_new_tokens, runner.context_tokens - length) for length in self.lengths]
        self.answers = [Answer(stop, limit) for limit in limits]
        self.traces: list[list[CycleTrace]] = [[] for _ in prompts]
        self.max_tokens = max(length + limit for length, limit in zip(self.lengths, limits, strict=True))
        seed = sampling.seed if seed is None else seed
        # the draw behind the deepest node of a tree whose root is the last token asked for
        count = max_new_tokens + depth + 1
        self._coins = torch.stack([position_coins(seed, row, count) for row in range(len(prompts))]).to(self.device)
        self._first_position = torch.tensor(self.lengths, device=self.device)
        self._seen = self._prompt_tokens(runner.vocab_size) if sampling.repetition_penalty != 1 else None

    @property
    def active(self) -> bool:
        """Whether any answer is still open."""
        return any(answer.finished is None for answer in self.answers)

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] for sequence `positions` [B, n] and whether they are sound, from logits [B, n, V]."""
        coins = self._coins.gather(1, (positions - self._first_position[:, None]).clamp(0, self._coins.shape[1] - 1))
        return draw(logits, self.sampling, coins, self._seen_at(tree))

    def note(self, token_ids: Tensor, counts: Tensor) -> None:
        """Remember emitted tokens [B, R], the first `counts` [B] of each row, for the repetition penalty."""
        if self._seen is not None:
            live = torch.arange(token_ids.shape[1], device=self.device) < counts[:, None]
            self._seen.scatter_(1, torch.where(live, token_ids, token_ids[:, :1]), True)

    def take(self, emitted: list[list[int]], sound: list[bool], traces: list[CycleTrace] | None = None) -> list[int]:
        """Hand each open answer its new tokens; returns how many it took. Raises NonFinite."""
        taken = []
        for row, answer in enumerate(self.answers):
            if answer.finished is None:
                check_sound(sound[row], row, len(answer.token_ids))
                if traces is not None:
                    self.traces[row].append(traces[row])
            taken.append(len(answer.take(emitted[row])))
        return taken

    def generations(self) -> list[Generation]:
        """The answers so far."""
        return [
            Generation(answer.token_ids, answer.finished or "length", traces)
            for answer, traces in zip(self.answers, self.traces, strict=True)
        ]

    def _seen_at(self, tree: Tree | None) -> Tensor | None:
        """[B, n, V]: tokens of the sequence before each draw; at a tree's node those of its path too."""
        if self._seen is None or tree is None:
            return None if self._seen is None else self._seen[:, None]
        path = torch.where(tree.visible, tree.token_ids[:, None, :], tree.token_ids[:, :, None])
        return self._seen[:, None].repeat(1, path.shape[1], 1).scatter_(2, path, True)

    def _prompt_tokens(self, vocab_size: int) -> Tensor:
        live = torch.arange(self.token_ids.shape[1], device=self.device) < self._first_position[:, None]
        seen = torch.zeros(len(self.lengths), vocab_size, dtype=torch.bool, device=self.device)
        return seen.scatter_(1, torch.where(live, self.token_ids, self.token_ids[:, :1]), True)


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
    """Raise NonFinite unless the logits behind `position` new tokens of prompt `row` are sound."""
    if not sound:
        raise NonFinite(
            f"the target's logits for prompt {row} are NaN or infinite after {position} new tokens; "
            "load the target in float32 or bfloat16, and check its weights"
        )
