"""Proof that the draft changes no output: answers with and without it, compared token by token.

A sampled answer is a function of the target and the seed, so it must be the same too.

In float32 the answers must be identical. In half precision the target itself is not exact: a tree of tokens in one
pass rounds differently from one token at a time. A difference is then a near-tie when the gap between the two tokens'
float32 logits is no larger than twice the error that half precision makes on the logits at that place.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import Decoder
from hass_core.progress import Progress, no_progress
from hass_core.sampling import gumbel, stream
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import Runner, make_runner

Prompt = tuple[str, list[int]]  # question, token ids


class Difference(BaseModel, frozen=True):
    """The first place where two answers part."""

    question: str
    position: int  # within the answer, from 0
    plain_token: int | None  # None: this answer ended before
    draft_token: int | None
    logit_gap: float  # between the two tokens, in float32; of a sampled answer with their noise
    rounding: float  # largest error of the compared precision on the logits there; 0 in float32
    near_tie: bool


class Certificate(BaseModel, frozen=True):
    """What was compared and what came of it."""

    dtype: str
    questions: int
    tokens: int
    identical: bool
    differences: list[Difference] = []

    @property
    def only_near_ties(self) -> bool:
        """Whether rounding explains every difference."""
        return all(difference.near_tie for difference in self.differences)


def in_float32(target: Target) -> Target:
    """The target itself when it is in float32, else a copy with the same weights in float32."""
    if target.dtype == torch.float32:
        return target
    return replace(target, model=copy.deepcopy(target.model).float())


def certify(
    target: Target,
    exact: Target,
    plain: Decoder,
    drafted: Decoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0,),
    progress: Progress = no_progress,
) -> Certificate:
    """Compare answers of two decoders of `target` at each of `temperatures`; `exact` is the same target in float32."""
    tokens, differences = 0, []
    compared = [(question, prompt, SamplingConfig(temperature=t)) for t in temperatures for question, prompt in prompts]
    for done, (question, prompt, sampling) in enumerate(compared):
        progress(done, len(compared), f"comparing outputs in {dtype_name(target)}")
        ours, theirs = (
            d.generate([prompt], sampling, max_new_tokens, StopRule.of(target))[0].token_ids for d in (plain, drafted)
        )
        place = first_difference(ours, theirs)
        tokens += len(ours) if place is None else place
        if place is not None:
            differences.append(_explain(target, exact, question, prompt, ours, theirs, place, sampling))
    return Certificate(
        dtype=dtype_name(target),
        questions=len(prompts),
        tokens=tokens,
        identical=not differences,
        differences=differences,
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place where two sequences part, one ending before the other included; None when they are equal."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def dtype_name(target: Target) -> str:
    """`bfloat16` and the like."""
    return str(target.dtype).removeprefix("torch.")


def _explain(
    target: Target,
    exact: Target,
    question: str,
    prompt: list[int],
    ours: list[int],
    theirs: list[int],
    place: int,
    sampling: SamplingConfig,
) -> Difference:
    prefix = prompt + ours[:place]
    logits = reference_logits(exact, prefix)
    rounding = 0.0
    if target is not exact:
        rounding = float((last_logits(make_runner(target), prefix) - logits).abs().max())
    tokens = [answer[place] if place < len(answer) else None for answer in (ours, theirs)]
    known = [token for token in tokens if token is not None]
    if sampling.temperature:  # what decides is the logits with the noise of this place, here in units of a logit
        noise = gumbel(stream(sampling.seed, 0), len(prefix), np.array(known, np.uint32))
        logits = logits.clone()
        logits[known] += sampling.temperature * torch.from_numpy(noise).to(logits.device)
    gap = float((logits[known[0]] - logits[known[-1]]).abs()) if len(known) == 2 else float("inf")
    return Difference(
        question=question,
        position=place,
        plain_token=tokens[0],
        draft_token=tokens[1],
        logit_gap=gap,
        rounding=rounding,
        near_tie=gap <= 2 * rounding,
    )


def reference_logits(exact: Target, token_ids: list[int]) -> Tensor:
    """The model's own float32 logits [V]; a runner would hold a second copy of the float32 weights."""
    with torch.inference_mode():
        rows = torch.tensor([token_ids], device=exact.device)
        return exact.model(input_ids=rows, logits_to_keep=1).logits[0, -1].float()


def last_logits(runner: Runner, token_ids: list[int]) -> Tensor:
    """float32 logits [V] of the token after `token_ids`."""
    rows = torch.tensor([token_ids], device=runner.device)
    cache = runner.new_cache(1, len(token_ids))
    positions = torch.arange(len(token_ids), device=runner.device)[None]
    return runner.logits(runner.forward(rows, positions, cache)[0, -1]).float()
