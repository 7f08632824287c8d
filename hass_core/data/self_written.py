"""Prompts the target writes itself.

An instruct model that is given only its chat template's opening, up to where the user's text would begin, continues
with a plausible request of a user (the idea of Magpie, arXiv 2406.08464). Cut at the end of the user's turn, it is a
prompt from the very distribution the model was tuned on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hass_core.config import SamplingShare
from hass_core.data.engines.base import Engine, Request, RequestQueue
from hass_core.data.rendering import decode, render, special_token_ids, tokenize
from hass_core.errors import TemplateError
from hass_core.json_files import write_whole

SENTINEL = "\u2042sentinel\u2042"  # no template writes this, none changes it
ROUND = 4096  # texts, the unit of resumption
SAMPLING = SamplingShare(temperature=1.0, top_p=0.95)


def user_opening(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Token ids up to where the user's text begins, and the text that ends the user's turn. Raises TemplateError."""
    text = render(tokenizer, [{"role": "user", "content": SENTINEL}])
    before, found, after = text.partition(SENTINEL)
    if not found:
        raise TemplateError("the target's chat template does not show the user's text as it is; set self_written = 0")
    # a space at the end would be cut off the first word's token
    return tokenize(tokenizer, before.rstrip(" ")), after.strip()


def rounds_of_texts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, seed: int, folder: Path, first: int
) -> Iterator[list[str | None]]:
    """`count` texts in rounds of ROUND, from round number `first` on; None for a text that never came to an end.

    A finished round is kept in `folder` and not sampled again. The engine never waits for the end of a round: rows that
    are free take texts of the next ones, so a caller that has enough should stop asking.
    """
    sizes = {first + i: min(ROUND, count - i * ROUND) for i in range(-(-count // ROUND))}
    paths = {number: folder / f"self-written-{number:05d}.json" for number in sizes}
    open_rounds: dict[int, list[str | None]] = {n: [None] * sizes[n] for n in sizes if not paths[n].exists()}
    keys = [(number, i) for number, texts in open_rounds.items() for i in range(len(texts))]
    written = write_prompts(engine, tokenizer, keys, max_tokens, seed << 32)
    left = Counter(number for number, _ in keys)
    done: dict[int, list[str | None]] = {}
    for number in sizes:
        while left[number]:
            (own, place), text = next(written)
            open_rounds[own][place] = text
            left[own] -= 1
            if not left[own]:
                done[own] = open_rounds.pop(own)
                with suppress(FileNotFoundError):  # another process has finished the stage: its scratch is gone
                    write_whole(paths[own], done[own])
        yield done.pop(number) if number in done else json.loads(paths[number].read_text(encoding="utf-8"))


def write_prompts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, keys: list[tuple[int, int]], max_tokens: int, seed: int
) -> Iterator[tuple[tuple[int, int], str | None]]:
    """A text in the user's place for each (round, place), as they end; None for one that never came to an end.

    Short ones end first: a caller who took them in that order and stopped early would keep only those.
    """
    opening, closing = user_opening(tokenizer)
    requests = (Request(f"{n} {i}", opening, SAMPLING, max_tokens, seed + n * ROUND + i) for n, i in keys)
    for completion in engine.complete(RequestQueue(requests)):
        number, place = map(int, completion.key.split())
        yield (number, place), _user_text(tokenizer, completion.token_ids, completion.finished, closing)


def _user_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], finished: bool, closing: str) -> str | None:
    special = special_token_ids(tokenizer)
    end = next((i for i, token in enumerate(token_ids) if token in special), None)
    text = decode(tokenizer, token_ids[:end])
    marker = next(iter(closing.split()), "")  # "[/INST]" and its like are plain text
    if marker and marker in text:
        return text.partition(marker)[0].strip()
    return text.strip() if finished or end is not None else None
