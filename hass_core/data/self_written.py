"""Prompts the target writes itself.

An instruct model that is given only its chat template's opening, up to where the user's text would begin, continues
with a plausible request of a user (the idea of Magpie, arXiv 2406.08464). Cut at the end of the user's turn, it is a
prompt from the very distribution the model was tuned on.
"""

from transformers import PreTrainedTokenizerBase

from hass_core.config import SamplingShare
from hass_core.data.engines.base import Engine, Request, RequestQueue
from hass_core.data.templates import decode, render, special_token_ids, tokenize
from hass_core.errors import TemplateError

SENTINEL = "\u2042sentinel\u2042"  # no template writes this, none changes it
SAMPLING = SamplingShare(temperature=1.0, top_p=0.95)


def user_opening(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Token ids up to where the user's text begins, and the text that ends the user's turn. Raises TemplateError."""
    text = render(tokenizer, [{"role": "user", "content": SENTINEL}])
    before, found, after = text.partition(SENTINEL)
    if not found:
        raise TemplateError("the target's chat template does not show the user's text as it is; set self_written = 0")
    # a space at the end would be cut off the first word's token
    return tokenize(tokenizer, before.rstrip(" ")), after.strip()


def write_prompts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, seed: int
) -> list[str | None]:
    """`count` texts in the user's place, in the order of their seeds; None for one that never came to an end.

    The order matters: completions arrive short ones first, and a caller who stops early would keep only those.
    """
    opening, closing = user_opening(tokenizer)
    requests = (Request(str(i), opening, SAMPLING, max_tokens, seed + i) for i in range(count))
    texts: list[str | None] = [None] * count
    for completion in engine.complete(RequestQueue(requests)):
        text = _user_text(tokenizer, completion.token_ids, completion.finished, closing)
        texts[int(completion.key)] = text
    return texts


def _user_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], finished: bool, closing: str) -> str | None:
    special = special_token_ids(tokenizer)
    end = next((i for i, token in enumerate(token_ids) if token in special), None)
    text = decode(tokenizer, token_ids[:end])
    marker = next(iter(closing.split()), "")  # "[/INST]" and its like are plain text
    if marker and marker in text:
        return text.partition(marker)[0].strip()
    return text.strip() if finished or end is not None else None
