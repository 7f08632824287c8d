"""Speculative sampling with a small language model (SPS; Leviathan et al. arXiv 2211.17192, Chen et al. 2302.01318).

The small model draws a chain of tokens x ~ q. The target's p at every position comes from one pass. Token x is accepted
with probability min(1, p(x) / q(x)); the first rejected one is replaced by a draw from max(0, p − q), renormalised;
when all are accepted, one more token is drawn from p. Each token's distribution is the target's own p. Greedy
decoding is the same with p and q point masses.

Unlike the tree decoders, two coins decide a token, so sampled answers differ from plain decoding's with the same seed.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import CycleTrace, Generation, Step, StopRule, Timing
from hass_core.decoding.decoder import Answer, check_prompts, check_sound
from hass_core.decoding.session import prefill
from hass_core.errors import ConfigError, TargetError
from hass_core.sampling import probabilities
from hass_core.target_model.kv_cache import KVCache
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import Runner

DRAFT_TOKENS = 4
SHARE_OF_LAYERS = 8  # the target's first eighth of layers drafts when no small model is given


class SpeculativeSamplingDecoder:
    """See `hass_core.decoding.decoder.Decoder`. Prompts of a batch are answered one after the other."""

    name = "sps"

    def __init__(self, runner: Runner, small: Runner, draft_tokens: int = DRAFT_TOKENS):
        self._runner, self._small, self._draft_tokens = runner, small, draft_tokens

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        return self._steps(prompt_token_ids, sampling, max_new_tokens, stop, sampling.seed)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        first = sampling.seed if seed is None else seed
        return [
            _collect(list(self._steps(prompt, sampling, max_new_tokens, stop, first + row)))
            for row, prompt in enumerate(prompts)
        ]

    def _steps(
        self, prompt: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule, seed: int
    ) -> Iterator[Step]:
        if sampling.repetition_penalty != 1:
            raise ConfigError("speculative sampling (sps) takes no repetition_penalty; use another method or 1.0")
        check_prompts([prompt], self._runner.context_tokens)
        answer = Answer(stop, min(max_new_tokens, self._runner.context_tokens - len(prompt)))
        chain = Chain(self._runner, self._small, sampling, seed, len(prompt) + max_new_tokens + self._draft_tokens + 1)
        started = time.perf_counter()
        new, trace = chain.start(prompt), CycleTrace(0, 0)
        while True:
            taken = answer.take(new)
            now = time.perf_counter()
            yield Step(taken, trace, Timing(total_seconds=now - started), answer.finished)
            if answer.finished:
                return
            started = time.perf_counter()
            new, trace = chain.cycle(self._draft_tokens)


def _collect(steps: list[Step]) -> Generation:
    """The first step is the prefill with the first token."""
    timings = [step.timing for step in steps]
    return Generation(
        token_ids=[token for step in steps for token in step.token_ids],
        finished=steps[-1].finished or "length",
        cycles=[step.trace for step in steps[1:]],
        timings=timings[1:],
        prefill_seconds=timings[0].total_seconds,
        decode_seconds=sum(timing.total_seconds for timing in timings[1:]),
    )


@dataclass
class Reader:
    """A model, its cache, and how far it has read."""

    runner: Runner
    cache: KVCache

    def start(self, prompt: list[int]) -> Tensor:
        """Logits [V] after the prompt."""
        rows = torch.tensor([prompt], device=self.runner.device)
        return self.runner.logits(prefill(self.runner, rows, [len(prompt)], self.cache)[0][0, -1])

    def read(self, token_ids: list[int]) -> Tensor:
        """Logits [n, V] after each of n new tokens, which are then in the cache."""
        rows = torch.tensor([token_ids], device=self.runner.device)
        positions = self.length + torch.arange(len(token_ids), device=self.runner.device)[None]
        limit = self.runner.context_tokens - 1
        features = self.runner.forward(rows, positions.clamp(max=limit), self.cache)
        self.cache.advance(len(token_ids))
        return self.runner.logits(features[0])

    @property
    def length(self) -> int:
        return self.cache.longest

    def forget_after(self, length: int) -> None:
        """Drop all tokens past the first `length`."""
        self.cache.advance(length - self.length)


class Chain:
    """One sequence that grows by verified tokens."""

    def __init__(self, runner: Runner, small: Runner, sampling: SamplingConfig, seed: int, max_tokens: int):
        self._target = Reader(runner, runner.new_cache(1, max_tokens))
        self._small = Reader(small, small.new_cache(1, max_tokens))
        self._sampling = sampling
        self._coins = torch.Generator(runner.device).manual_seed(seed % 2**63)
        self._tokens: list[int] = []  # all that are certain; the last one is not yet in the target's cache
        self._first_new = 0

    @torch.inference_mode()
    def start(self, prompt: list[int]) -> list[int]:
        """Read the prompt and draw the first token."""
        self._small.start(prompt)
        self._first_new = len(prompt)
        first = self._draw(self._distribution(self._target.start(prompt)))
        self._tokens = [*prompt, first]
        return [first]

    @torch.inference_mode()
    def cycle(self, count: int) -> tuple[list[int], CycleTrace]:
        """Draft `count` tokens and verify them: the new tokens and what was accepted."""
        drafts, proposed = self._draft(count)
        certain = len(self._tokens)
        logits = self._target.read([self._tokens[-1], *drafts])
        accepted, token = self._verify(self._distribution(logits), proposed, drafts)
        new = [*drafts[:accepted], token]
        self._tokens += new
        self._target.forget_after(certain + accepted)
        self._small.forget_after(min(self._small.length, certain + accepted))
        return new, CycleTrace(accepted, count, (0,) * accepted, (1,) * min(count, accepted + 1))

    def _draft(self, count: int) -> tuple[list[int], Tensor]:
        """Tokens drawn from the small model and the distributions [count, V] they were drawn from."""
        drafts: list[int] = []
        proposed = []
        unread = self._tokens[self._small.length :]
        for _ in range(count):
            q = probabilities(self._small.read(unread)[-1], self._sampling)
            unread = [self._draw(q)]
            drafts += unread
            proposed.append(q)
        return drafts, torch.stack(proposed)

    def _verify(self, p: Tensor, q: Tensor, drafts: list[int]) -> tuple[int, int]:
        """How many drafts stand, and the token after them; p [n + 1, V], q [n, V]."""
        coins = torch.rand(len(drafts), device=p.device, generator=self._coins)
        chosen = torch.tensor(drafts, device=p.device)[:, None]
        ratios = (p[:-1].gather(1, chosen) / q.gather(1, chosen))[:, 0]
        accepted = int((coins < ratios).int().cumprod(0).sum())
        if accepted == len(drafts):
            return accepted, self._draw(p[accepted])
        return accepted, self._draw((p[accepted] - q[accepted]).clamp(min=0))

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._coins))

    def _distribution(self, logits: Tensor) -> Tensor:
        check_sound(bool(logits.isfinite().all()), 0, max(0, len(self._tokens) - self._first_new))
        return probabilities(logits, self._sampling)


def first_layers(target: Target) -> Target:
    """The target cut down to its first eighth of layers, with its own final norm and head; no weight is copied.

    Raises TargetError for a model that does not keep its layers in one list.
    """
    layers = getattr(cast(Any, target.model.base_model), "layers", None)
    if layers is None:
        raise TargetError(
            f"{target.name} does not keep its layers in one list, so its first ones cannot draft; "
            "name a small model with --draft sps=DIR"
        )
    count = max(1, len(layers) // SHARE_OF_LAYERS)
    weights = {id(tensor): tensor for tensor in (*target.model.parameters(), *target.model.buffers())}
    small = cast(Any, copy.deepcopy(target.model, weights))  # the memo makes the copy share every tensor
    small.base_model.layers = small.base_model.layers[:count]
    small.config.num_hidden_layers = count
    return replace(target, name=f"{target.name}, first {count} layers", model=small)
