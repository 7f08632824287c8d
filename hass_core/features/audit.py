"""The mask audit: what is supervised, shown on real text, and the masks that cannot be right.

It reads ids, tokens and masks, never a feature, so it is cheap at any size. Extraction stores it beside its shards as
audit.json; `hass doctor data` shows it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from hass_core.data.templates import decode
from hass_core.features.lists import from_lists
from hass_core.store import StageFolder

AUDIT = "audit.json"
SAMPLES = 4  # conversations shown
DECODED = 2000  # conversations whose mask borders are checked by decoding
KEPT_PROBLEMS = 100
QUANTILES = (0, 25, 50, 75, 100)
AROUND = 8  # tokens on each side of a border; a character is of four bytes at most
CUT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class Piece(BaseModel):
    """A run of tokens that are all supervised or all not."""

    model_config = ConfigDict(frozen=True)
    text: str
    supervised: bool


class Sample(BaseModel):
    """One conversation as training sees it."""

    model_config = ConfigDict(frozen=True)
    id: str
    pieces: tuple[Piece, ...]


class Audit(BaseModel):
    """What the masks of a features stage say."""

    model_config = ConfigDict(frozen=True)
    conversations: int
    tokens: int
    supervised_tokens: int
    supervised_share_percentiles: dict[int, float]  # of the conversations' supervised shares
    problem_count: int
    problems: tuple[str, ...]  # the first ones: conversation and reason
    samples: tuple[Sample, ...]


Row = tuple[str, np.ndarray, np.ndarray]  # id, token ids, mask


def audit_masks(folder: StageFolder, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Audit:
    """Audit the shards `names` of a features stage. Raises StoreError when a shard cannot be read."""
    total = sum(folder.record(name).rows or 0 for name in names)
    shown = set(np.linspace(0, max(0, total - 1), SAMPLES, dtype=int).tolist())
    stride = max(1, total // DECODED)
    problems, samples, shares = [], [], []
    tokens = supervised = 0
    for i, (name, ids, mask) in enumerate(_rows(folder, names)):
        asked = int(np.count_nonzero(mask))
        tokens, supervised = tokens + len(ids), supervised + asked
        shares.append(asked / max(1, len(mask)))
        problem = mask_problem(ids, mask, tokenizer if i % stride == 0 else None)
        if problem:
            problems.append(f"{name}: {problem}")
        if i in shown:
            samples.append(Sample(id=name, pieces=tuple(pieces(ids, mask, tokenizer))))
    return Audit(
        conversations=len(shares),
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share_percentiles={q: round(float(np.percentile(shares or [0.0], q)), 4) for q in QUANTILES},
        problem_count=len(problems),
        problems=tuple(problems[:KEPT_PROBLEMS]),
        samples=tuple(samples),
    )


def mask_problem(token_ids: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Why this mask cannot be right, or None. Borders are checked where a tokenizer is given."""
    if len(token_ids) != len(mask):
        return f"{len(token_ids)} tokens but {len(mask)} mask values"
    asked = np.count_nonzero(mask)
    if not asked:
        return "no token is supervised"
    if asked == len(mask):
        return "every token is supervised, the prompt too"
    if tokenizer is not None and any(_cuts(token_ids, border, tokenizer) for border in _borders(mask)):
        return "the mask begins or ends inside a character"
    return None


def _borders(mask: np.ndarray) -> list[int]:
    """Where unbroken runs begin, except the first."""
    return (np.flatnonzero(np.diff(mask != 0)) + 1).tolist()


def _cuts(token_ids: np.ndarray, border: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens around the border, decoded apart, give more halves of characters than together."""
    before, after = token_ids[max(0, border - AROUND) : border].tolist(), token_ids[border : border + AROUND].tolist()
    apart = sum(decode(tokenizer, half).count(CUT) for half in (before, after))
    return apart > 0 and apart > decode(tokenizer, before + after).count(CUT)


def pieces(token_ids: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The text of each unbroken run."""
    for start, end in pairwise([0, *_borders(mask), len(token_ids)]):
        yield Piece(text=decode(tokenizer, token_ids[start:end].tolist()), supervised=bool(mask[start:end].any()))


def _rows(folder: StageFolder, names: Sequence[str]) -> Iterator[Row]:
    for name in names:
        with folder.open(name) as source, pq.ParquetFile(source) as shard:
            for batch in shard.iter_batches(columns=["id", "token_ids", "loss_mask"]):
                ids, tokens, masks = (batch[column] for column in batch.schema.names)
                yield from zip(ids.to_pylist(), from_lists(tokens), from_lists(masks), strict=True)
