"""The features stage: run the target over its own answers and store its hidden states.

In: the responses artifact. Out: one part-NNNNN.parquet for each part of the responses and skipped.parquet (id, reason).
A part is the unit of resumption. Four things go on at once: the next parts are tokenised, a batch is computed, the
batches before it are encoded and written, and the parts before that are hashed and put in place.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hass_core.config import FeaturesConfig, RunConfig
from hass_core.errors import HassError, StoreError
from hass_core.features.checks import AUDIT, audit_masks
from hass_core.features.reader import shard_names
from hass_core.features.schema import SKIPPED, Encoding, FeatureInfo, encode
from hass_core.features.served import ServedStates
from hass_core.features.tokenise import Encoded, Part, encode_part, tokenising
from hass_core.features.writer import Computed, PartsWriter
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, FileRecord, StageFolder, Store
from hass_core.target_model.capture import Capture, TokenIds, batches_for
from hass_core.target_model.embeddings import MadeWith
from hass_core.target_model.loader import Target
from hass_core.target_model.taps import check_taps
from hass_core.units import size_words

STEP_VERSION = 4  # 4: the target by its identity, row groups by their size
SAMPLE_CONVERSATIONS, SAMPLE_PARTS = 64, 8
TIMED_SHARE = 1 / 20  # of all conversations at most: what is timed is computed for that alone, and twice
OTHER_BYTES_PER_TOKEN = 6  # token ids, mask and the rest, before compression
RESERVE = 1.05
TIMED_BATCHES = 2
MADE_WITH = "target.json"  # which target made them: training may do without its layers
SPEED_ONLY = {"max_tokens_per_batch"}  # row groups decide in which order conversations are trained on
SERVERS = {"engine", "server_urls", "server_folder", "server_model", "server_concurrency"}  # where, not what

States = Callable[[Sequence[TokenIds], Sequence[str]], Callable[[], list[Tensor]]]
"""Rows of token ids and their names → what waits for their features, [L, S·H] each, bfloat16 on the CPU."""
Spread = Callable[[list[str]], Iterable[str]]
"""Has `extract_part` run for each of these parts, anywhere, and gives each name once its part is in the store."""


def extract_features(
    config: RunConfig,
    responses: Artifact,
    store: Store,
    target: Target,
    progress: Progress = no_progress,
    spread: Spread | None = None,
) -> Artifact:
    """Store the features of all conversations, here or by `spread`.

    Raises StoreError before any work when the disk will not hold them, HassError when the counts do not reconcile.
    """
    folder = store.stage("features", _key(config, responses, target))
    if done := folder.artifact():
        return done
    taps = check_states(config, target)
    source = store.open(responses)
    rows = {name: source.record(name).rows or 0 for name in shard_names(source)}
    finished = folder.finished().keys()
    unfinished = [name for name in rows if name not in finished]
    with states_of(config.features, target, taps) as states:
        run = _Extraction(config, source, folder, target, progress, rows, states)
        if spread:
            run.forecast(run.sample(unfinished), unfinished)
            speed = run.follow(unfinished, spread)
        else:
            with tokenising(target.tokenizer, config.features, sum(rows[name] for name in unfinished)) as parts_of:
                sample = run.sample(unfinished)
                # begun now: the forecast is a GPU's first pass, which loads its kernels and takes seconds
                parts = parts_of(unfinished, source.local_path)
                run.forecast(sample, unfinished)
                speed = run.complete(unfinished, parts)
    summary = _finish(folder, sum(rows.values()), speed)
    audit = audit_masks(folder, [name for name in rows if folder.record(name).rows], target.tokenizer)
    folder.write_text(AUDIT, audit.model_dump_json(indent=1))
    folder.write_text(MADE_WITH, MadeWith.of(target).model_dump_json(indent=1))
    return folder.finish(summary)


def check_states(config: RunConfig, target: Target) -> tuple[int, ...]:
    """The layers after which the draft reads states. Raises TargetError where they cannot be had."""
    taps = config.draft.tapped(target.num_layers)
    check_taps(target, taps)
    return taps


def extract_part(config: RunConfig, responses: Artifact, store: Store, target: Target, name: str) -> str:
    """Store the features of one part of the responses and return its name; `extract_features` finishes the stage.

    Parts may be extracted by any number of processes at once. A part done twice is stored once.
    """
    folder, source = store.stage("features", _key(config, responses, target)), store.open(responses)
    rows = {name: source.record(name).rows or 0}
    with (
        states_of(config.features, target, config.draft.tapped(target.num_layers)) as states,
        tokenising(target.tokenizer, config.features, rows[name]) as parts_of,
    ):
        parts = parts_of([name], source.local_path)
        _Extraction(config, source, folder, target, no_progress, rows, states).complete([name], parts)
    return name


@dataclass(frozen=True)
class Forecast:
    """Expected size of the work to come."""

    tokens: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {size_words(self.bytes)}, {self.seconds:,.0f} s"


@dataclass(frozen=True)
class Measured:
    """What one token costs here."""

    bytes_per_token: float
    tokens_per_second: float


def measure(
    target: Target, sample: Sequence[TokenIds], max_tokens: int, encoding: Encoding, states: States
) -> Measured:
    """Make by `states` and encode a few batches of the sample's token ids; the first, which warms up, is not timed."""
    batches = list(batches_for(target, [len(ids) for ids in sample], max_tokens))[:TIMED_BATCHES]
    size, tokens, hidden = 0, 0, target.embedding.shape[1]

    def rows(batch: list[int]) -> list[Tensor]:
        return states([sample[i] for i in batch], [f"{i} of the sample" for i in batch])()

    for batch in batches[:1]:
        for row in rows(batch):
            size += len(encode(row.reshape(-1, hidden), encoding))
            tokens += len(row)
    started = time.perf_counter()
    timed = sum(len(row) for batch in batches for row in rows(batch))
    return Measured(size / tokens + OTHER_BYTES_PER_TOKEN, timed / (time.perf_counter() - started))


def forecast(sample_lengths: Sequence[int], conversations: int, measured: Measured) -> Forecast:
    """For `conversations` conversations, from the lengths in tokens of some of them and the cost of a token."""
    tokens = round(sum(sample_lengths) / len(sample_lengths) * conversations)
    return Forecast(tokens, round(tokens * measured.bytes_per_token), tokens / measured.tokens_per_second)


def refuse_if_too_large(expected: Forecast, store: Store) -> None:
    """Raise StoreError, saying by how much, when a local store has no room for the forecast."""
    free = store.free_bytes()
    if free is None or expected.bytes * RESERVE <= free:
        return
    missing = expected.bytes * RESERVE - free
    raise StoreError(
        f"the features need {expected}, but {store.root} has only {size_words(free)} free: {size_words(missing)} too "
        'little; free space, set features.encoding to "int8" or "none", or lower responses.max_conversations'
    )


class _Extraction:
    """Extracts parts one after the other; see the module's docstring for what overlaps."""

    def __init__(
        self,
        config: RunConfig,
        source: StageFolder,
        folder: StageFolder,
        target: Target,
        progress: Progress,
        rows: dict[str, int],
        states: States,
    ):
        self._config, self._source, self._folder, self._target = config, source, folder, target
        self._states = states
        self._progress, self._rows = progress, rows
        self._tokens = 0
        self._info = FeatureInfo(
            hidden_size=target.embedding.shape[1],
            encoding=config.features.encoding,
            target_identity=target.fingerprint,
            taps=config.draft.tapped(target.num_layers),
        )

    def complete(self, names: list[str], parts: Iterator[Part]) -> float:
        """Extract these parts, tokenised; tokens per second."""
        if not names:
            return 0.0
        self._start(names)
        with PartsWriter(self._folder, self._info, self._config.features.row_group_mb) as writers:
            for part in parts:
                self._capture(part, writers)
        return self._speed()

    def follow(self, names: list[str], spread: Spread) -> float:
        """Have these parts extracted elsewhere; tokens per second."""
        if not names:
            return 0.0
        self._start(names)
        for name in spread(names):
            self._done += self._rows[name]
            self._tokens += self._folder.record(name).notes["tokens"]
            self._progress(self._done, self._total, f"{self._speed():,.0f} tokens/s")
        return self._speed()

    def sample(self, names: list[str]) -> list[np.ndarray]:
        """Token ids of some conversations from all over these parts."""
        chosen, settings = names[:: -(-len(names) // SAMPLE_PARTS) or 1], self._config.features
        limit, tokenizer = SAMPLE_CONVERSATIONS // (len(chosen) or 1), self._target.tokenizer
        parts = [encode_part(name, self._source.local_path(name), tokenizer, settings, limit) for name in chosen]
        return [c.token_ids for part in parts for c in part.conversations]

    def forecast(self, sample: list[np.ndarray], names: list[str]) -> None:
        """Refuse what the disk will not hold, judged by these conversations."""
        settings = self._config.features
        if not sample or settings.encoding == "none":
            return  # there is nothing to store, or next to nothing
        conversations = sum(self._rows[name] for name in names)
        timed = sample[: max(1, int(TIMED_SHARE * conversations))]
        measured = measure(self._target, timed, settings.max_tokens_per_batch, settings.encoding, self._states)
        expected = forecast([len(ids) for ids in sample], conversations, measured)
        refuse_if_too_large(expected, self._folder.store)
        self._progress(0, sum(self._rows.values()), f"expecting {expected}")

    def _capture(self, part: Part, writers: PartsWriter) -> None:
        """Compute a part's features while a thread writes them; the thread still has to put the file in place."""
        with writers.part(part) as hand_over:
            for batch in _captured(part.conversations, self._target, self._config.features, self._states):
                hand_over(batch)
                self._report(batch[0])
        self._done += len(part.skipped)

    def _report(self, batch: list[Encoded]) -> None:
        self._done += len(batch)
        self._tokens += sum(len(c.token_ids) for c in batch)
        self._progress(self._done, self._total, f"{self._speed():,.0f} tokens/s")

    def _start(self, names: list[str]) -> None:
        self._total = sum(self._rows.values())
        self._done = self._total - sum(self._rows[name] for name in names)
        self._started = time.perf_counter()

    def _speed(self) -> float:
        return self._tokens / (time.perf_counter() - self._started)


def _key(config: RunConfig, responses: Artifact, target: Target) -> dict[str, Any]:
    taps = config.draft.tapped(target.num_layers)
    return {
        "responses": responses.digest,
        "features": config.features.model_dump(exclude=SPEED_ONLY | SERVERS) | _decided_by_engine(config.features),
        "target": target.identity.parts(),
        "dtype": str(target.dtype),
        "version": STEP_VERSION,
    } | ({"taps": taps} if taps else {})


def _decided_by_engine(settings: FeaturesConfig) -> dict[str, str]:
    """Another engine rounds otherwise. The target's own pass is not named, as before there was a choice."""
    return {} if settings.engine == "transformers" else {"engine": settings.engine}


@contextmanager
def states_of(settings: FeaturesConfig, target: Target, taps: tuple[int, ...] = ()) -> Iterator[States]:
    """The target's own pass, or the servers of the settings; `taps` are layers whose states are wanted, too."""
    if settings.engine == "vllm":
        with ServedStates(settings, target, taps) as served:
            yield served
    else:
        yield lambda token_ids, names: Capture(target, token_ids, names, taps).rows


def _captured(encoded: list[Encoded], target: Target, settings: FeaturesConfig, states: States) -> Iterator[Computed]:
    nothing = target.embedding.new_zeros(1, target.embedding.shape[1])
    for indices in batches_for(target, [len(c.token_ids) for c in encoded], settings.max_tokens_per_batch):
        batch = [encoded[i] for i in indices]
        if settings.encoding == "none":
            yield batch, partial(_nothing, nothing, batch)
        else:
            yield batch, states([c.token_ids for c in batch], [c.id for c in batch])


def _nothing(row: Tensor, batch: list[Encoded]) -> list[Tensor]:
    return [row.expand(len(c.token_ids), -1) for c in batch]


def _finish(folder: StageFolder, conversations: int, speed: float) -> dict[str, Any]:
    parts = [record for name, record in folder.finished().items() if name.startswith("part-")]
    skipped = [{"id": key, "reason": reason} for part in parts for key, reason in part.notes["skipped"]]
    rows = sum(part.rows or 0 for part in parts)
    if rows + len(skipped) != conversations:
        raise HassError(
            f"{conversations} conversations went in, but {rows} stored + {len(skipped)} skipped came out; "
            f"remove {folder.url} and run the stage 'features' again"
        )
    if not rows:
        reasons = Counter(item["reason"] for item in skipped).most_common()
        raise HassError(f"no conversation gave features: {reasons}; check the target's chat template")
    with folder.writing("skipped.parquet") as file:
        pq.write_table(pa.Table.from_pylist(skipped, SKIPPED), file.path)
        file.rows = len(skipped)
    return _summary(parts, rows, len(skipped), speed)


def _summary(parts: list[FileRecord], rows: int, skipped: int, speed: float) -> dict[str, Any]:
    return {
        "conversations": rows,
        "skipped": skipped,
        "tokens": sum(part.notes["tokens"] for part in parts),
        "supervised_tokens": sum(part.notes["supervised_tokens"] for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "tokens_per_second": round(speed, 1),
    }
