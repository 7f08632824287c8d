"""Checks of a features stage.

`audit_masks` says what is supervised, shown on real text, and which masks cannot be right. It reads ids, tokens and
masks, never a feature, so it is cheap at any size. Extraction stores it beside its shards as audit.json; `hass doctor
data` shows it. `validate_features` reads every row and names every finding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from hass_core.config import TargetConfig
from hass_core.data.templates import decode
from hass_core.errors import CorruptFile
from hass_core.features.reader import FeatureDataset, shard_names
from hass_core.features.schema import from_lists
from hass_core.store import Artifact, StageFolder, Store
from hass_core.target_model.loader import load_target

AUDIT = "audit.json"
SAMPLES = 4  # conversations shown
DECODED = 2000  # conversations whose mask borders are checked by decoding
KEPT_PROBLEMS = 100
QUANTILES = (0, 25, 50, 75, 100)
AROUND = 8  # tokens on each side of a border; a character is of four bytes at most
LEAST_SUPERVISED, MOST_SUPERVISED = 0.01, 0.99  # shares outside of which a mask is likely wrong for all conversations
CUT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class Piece(BaseModel, frozen=True):
    """A run of tokens that are all supervised or all not."""

    text: str
    supervised: bool


class Sample(BaseModel, frozen=True):
    """One conversation as training sees it."""

    id: str
    pieces: tuple[Piece, ...]


class Audit(BaseModel, frozen=True):
    """What the masks of a features stage say."""

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


@dataclass
class FeaturesReport:
    """What a features stage holds, and what is wrong with it."""

    conversations: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def supervised_fraction(self) -> float:
        return self.supervised_tokens / max(1, self.tokens)


def validate_features(store: Store, artifact: Artifact) -> FeaturesReport:
    """Read and check all rows. Raises CorruptFile when the stage as a whole cannot be read."""
    dataset = FeatureDataset(store, artifact)
    report = FeaturesReport(conversations=len(dataset))
    names: set[str] = set()
    for index in range(len(dataset)):
        try:
            row = dataset[index]
        except CorruptFile as error:
            report.problems.append(str(error))
            continue
        report.tokens += len(row.token_ids)
        report.supervised_tokens += int(row.loss_mask.sum())
        if row.id in names:
            report.problems.append(f"{artifact.url}: the id {row.id} stands there twice")
        names.add(row.id)
    if report.tokens and not LEAST_SUPERVISED < report.supervised_fraction < MOST_SUPERVISED:
        report.problems.append(f"{artifact.url}: {report.supervised_fraction:.1%} of the tokens are supervised")
    return report


def find_audit(store: Store, artifact: Artifact, target_source: str) -> Audit:
    """The audit stored with the features; made now, with the target's tokenizer, for features from before it was."""
    folder = store.open(artifact)
    manifest = folder.manifest()
    if manifest and AUDIT in manifest.files:
        return Audit.model_validate_json(folder.read_text(AUDIT))
    target = load_target(TargetConfig(source=target_source, device="cpu"))
    return audit_masks(folder, shard_names(folder), target.tokenizer)
