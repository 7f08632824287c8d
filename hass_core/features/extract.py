"""The features stage: run the target over its own answers and store its hidden states.

In: the responses artifact. Out: one part-NNNNN.parquet for each part of the responses and skipped.parquet (id, reason).
A part is the unit of resumption. While one batch is computed, the one before is encoded and written by a thread.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hass_core.config import RunConfig
from hass_core.data.templates import SkippedConversation, encode_conversation
from hass_core.errors import HassError, NonFinite
from hass_core.features.forecast import forecast, refuse_if_too_large
from hass_core.features.reader import shard_names
from hass_core.features.schema import SKIPPED, FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, FileRecord, StageFolder, Store
from hass_core.target.capture import batches_by_tokens, capture_features
from hass_core.target.loader import Target

STEP_VERSION = 1
SAMPLE = 64
SPEED_ONLY = {"max_tokens_per_batch", "row_group_mb"}


@dataclass(frozen=True)
class Encoded:
    """One conversation, ready for the target."""

    id: str
    split: str
    token_ids: list[int]
    loss_mask: list[int]


def extract_features(
    config: RunConfig, responses: Artifact, store: Store, target: Target, progress: Progress = no_progress
) -> Artifact:
    """Store the features of all conversations.

    Raises StoreError before any work when the disk will not hold them, HassError when the counts do not reconcile.
    """
    folder = store.stage("features", _key(config, responses, target))
    if done := folder.artifact():
        return done
    source = store.open(responses)
    parts = shard_names(source)
    conversations = sum(source.record(name).rows or 0 for name in parts)
    _check_room(config, source, parts, conversations, store, target)
    started, done_before = time.perf_counter(), sum(r.rows or 0 for r in folder.finished().values())
    tokens = 0
    counted = done_before
    for name in parts:
        if name in folder.finished():
            continue

        def report(rows: int, new_tokens: int) -> None:
            nonlocal counted, tokens
            counted, tokens = counted + rows, tokens + new_tokens
            progress(counted, conversations, f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")

        _extract_part(config, source, name, folder, target, report)
    speed = tokens / (time.perf_counter() - started)
    return folder.finish(_finish(folder, conversations, speed))


def _key(config: RunConfig, responses: Artifact, target: Target) -> dict[str, Any]:
    return {
        "responses": responses.digest,
        "features": config.features.model_dump(exclude=SPEED_ONLY),
        "target": target.fingerprint,
        "dtype": str(target.dtype),
        "version": STEP_VERSION,
    }


def _check_room(
    config: RunConfig, source: StageFolder, parts: list[str], conversations: int, store: Store, target: Target
) -> None:
    encoded, _ = _encode_part(config, source, parts[0], target, limit=SAMPLE)
    lengths = [len(conversation.token_ids) for conversation in encoded]
    hidden = target.embedding.shape[1]
    refuse_if_too_large(forecast(lengths, conversations, hidden, config.features.encoding), store)


def _extract_part(
    config: RunConfig, source: StageFolder, name: str, folder: StageFolder, target: Target, report: Any
) -> None:
    encoded, skipped = _encode_part(config, source, name, target)
    info = FeatureInfo(
        hidden_size=target.embedding.shape[1],
        encoding=config.features.encoding,
        target_fingerprint=target.fingerprint,
        template_hash=target.template_hash,
    )
    notes = {
        "skipped": skipped,
        "tokens": sum(len(c.token_ids) for c in encoded),
        "supervised_tokens": sum(sum(c.loss_mask) for c in encoded),
    }
    with (
        folder.writing(name, **notes) as file,
        FeatureWriter(file.path, info, config.features.row_group_mb) as writer,
        ThreadPoolExecutor(1) as thread,
    ):
        writing: Future[None] | None = None
        for batch, features in _captured(encoded, target, config.features.max_tokens_per_batch):
            if writing is not None:
                writing.result()
            writing = thread.submit(_write, writer, batch, features)
            report(len(batch), sum(len(c.token_ids) for c in batch))
        if writing is not None:
            writing.result()
        file.rows = writer.num_rows


def _captured(encoded: list[Encoded], target: Target, max_tokens: int) -> Iterator[tuple[list[Encoded], list[Tensor]]]:
    for indices in batches_by_tokens([len(c.token_ids) for c in encoded], max_tokens):
        batch = [encoded[i] for i in indices]
        try:
            yield batch, capture_features(target, [c.token_ids for c in batch])
        except NonFinite as error:
            raise NonFinite(f"{error} (conversations {', '.join(c.id for c in batch[:8])} …)") from error


def _write(writer: FeatureWriter, batch: list[Encoded], features: list[Tensor]) -> None:
    for conversation, rows in zip(batch, features, strict=True):
        writer.add(conversation.id, conversation.split, conversation.token_ids, conversation.loss_mask, rows)


def _encode_part(
    config: RunConfig, source: StageFolder, name: str, target: Target, limit: int | None = None
) -> tuple[list[Encoded], list[list[str]]]:
    """Token ids and masks of one part of the responses, and the skipped conversations with their reasons."""
    settings = config.features
    encoded: list[Encoded] = []
    skipped: list[list[str]] = []
    for row in pq.read_table(source.local_path(name)).slice(0, limit).to_pylist():
        try:
            found = encode_conversation(target.tokenizer, row["messages"], row["answer_token_ids"])
        except SkippedConversation as problem:
            skipped.append([row["id"], problem.reason])
            continue
        ids, mask = (x[: settings.max_tokens_per_conversation] for x in (found.token_ids, found.loss_mask))
        if not any(mask):
            skipped.append([row["id"], "no answer within max_tokens_per_conversation"])
        else:
            encoded.append(Encoded(row["id"], split_of(row["id"], settings.validation_fraction), ids, mask))
    return encoded, skipped


def split_of(name: str, validation_fraction: float) -> str:
    """`validation` for that fraction of the ids, the same on every run."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


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
