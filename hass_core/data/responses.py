"""The responses stage: the target answers every prompt.

In: the prompts artifact. Out: part-NNNNN.parquet (finished conversations with the exact token ids of each answer) and
skipped.parquet (id, reason). A part holds the conversations of one slice of the prompts; a finished conversation is
also noted in a journal in scratch, so that an interrupted run loses only the answers in flight.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.config import ResponsesConfig, RunConfig
from hass_core.data.conversations import Record
from hass_core.data.dialogue import Dialogue
from hass_core.data.engines.base import Engine, Request, RequestQueue
from hass_core.data.engines.local import LocalEngine
from hass_core.data.engines.openai import OpenAIEngine
from hass_core.data.language import language_gate
from hass_core.data.prompts import MESSAGES, read_prompts
from hass_core.data.quality import metric_name
from hass_core.data.rendering import next_role_token
from hass_core.data.templates import check_template
from hass_core.errors import HassError
from hass_core.progress import Progress, no_progress
from hass_core.sampling import DRAWS_VERSION
from hass_core.store import Artifact, FileRecord, StageFolder, Store
from hass_core.store.journal import Journal
from hass_core.target_model.loader import Target

STEP_VERSION = 3  # 2: the target by its identity, and its type; 3: tools and tool calls go to the template
RESPONSES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("source", pa.string()),
        ("messages", MESSAGES),
        ("extras", pa.string()),  # JSON of tools and tool calls; null where a conversation has none
        ("answer_token_ids", pa.list_(pa.list_(pa.int32()))),  # one list per assistant message; empty = not generated
        ("finished", pa.bool_()),  # every answer ended by itself
        ("num_new_tokens", pa.int32()),
        ("temperature", pa.float32()),
    ]
)
SKIPPED_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
JOURNAL = "outcomes.jsonl"
SPEED_ONLY = {
    "max_sequences_per_batch",
    "server_concurrency",
    "server_url",
    "more_servers",
}  # do not change what is answered


def generate_responses(
    config: RunConfig, prompts: Artifact, store: Store, target: Target, progress: Progress = no_progress
) -> Artifact:
    """Answer all prompts. Raises TemplateError before any long work; HassError when the counts do not reconcile."""
    folder = store.stage("responses", _key(config, prompts, target))
    if done := folder.artifact():
        return done
    check_template(target.tokenizer, target.eos_token_ids)
    language_gate(config.responses.languages)
    records = read_prompts(store, prompts)[: config.responses.max_conversations]
    run = _Run(config, records, folder, target, progress)
    run.complete()
    return folder.finish(_finish(folder, len(records), run.tokens_per_second, _note(target)))


def make_engine(config: RunConfig, target: Target) -> Engine:
    """The engine named in the settings."""
    settings = config.responses
    if settings.engine == "openai":
        return OpenAIEngine(settings, target.tokenizer)
    return LocalEngine(target, settings.max_sequences_per_batch)


def _key(config: RunConfig, prompts: Artifact, target: Target) -> dict[str, Any]:
    return {
        "prompts": prompts.digest,
        "responses": config.responses.model_dump(exclude=SPEED_ONLY | {"server_model"}),
        "target": target.identity.parts(),
        **_decided_by_engine(config.responses, target),
        "seed": config.seed,
        "version": STEP_VERSION,
    }


def _decided_by_engine(settings: ResponsesConfig, target: Target) -> dict[str, Any]:
    """A local target answers in its own type and by our draws; a server as the model does that it is asked for."""
    if settings.engine == "transformers":
        drawn = any(share.temperature for share in settings.sampling)
        return {"dtype": str(target.dtype), **({"draws": DRAWS_VERSION} if drawn else {})}
    return {"server_model": settings.server_model}


class _Run:
    """Feeds the engine shard after shard and writes each part when its last conversation has ended."""

    def __init__(
        self, config: RunConfig, records: list[Record], folder: StageFolder, target: Target, progress: Progress
    ):
        self._config, self._folder, self._target, self._progress = config, folder, target, progress
        size = config.responses.conversations_per_shard
        self._shards = {part_name(i): records[at : at + size] for i, at in enumerate(range(0, len(records), size))}
        for name in folder.finished():
            self._shards.pop(name, None)
        self._shard_of = {record.id: name for name, shard in self._shards.items() for record in shard}
        self._journal = Journal(folder.scratch() / JOURNAL)
        self._open = {name: {r.id for r in shard} for name, shard in self._shards.items()}
        self._running: dict[str, Dialogue] = {}
        self._total, self._new_tokens, self._started = len(records), 0, time.perf_counter()
        self._done = len(records) - len(self._shard_of)

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens generated by this process, per second."""
        return self._new_tokens / (time.perf_counter() - self._started)

    def complete(self) -> None:
        """Answer what is not answered yet."""
        for name in self._shard_of.keys() & self._journal.keys():
            self._close(name)
        if not self._shards:
            return
        queue = RequestQueue(self._requests())
        for completion in make_engine(self._config, self._target).complete(queue):
            dialogue = self._running[completion.key]
            dialogue.accept(completion, self._target.tokenizer)
            self._new_tokens += len(completion.token_ids)
            if (request := self._next_request(dialogue)) is not None:
                queue.put_first(request)
        if self._shards:
            raise HassError(f"{len(self._open)} shards of answers were left open by the engine; please report this")

    def _requests(self) -> Iterator[Request]:
        for record in [r for shard in self._shards.values() for r in shard if r.id not in self._journal]:
            dialogue = self._running[record.id] = Dialogue(record, self._config.responses, self._config.seed)
            if (request := self._next_request(dialogue)) is not None:
                yield request

    def _next_request(self, dialogue: Dialogue) -> Request | None:
        """The dialogue's next request; a dialogue without one has ended and is put on record."""
        request = dialogue.next_request(self._target.tokenizer, self._target.context_tokens)
        if request is None:
            name = dialogue.record.id
            skipped = {"skip": dialogue.problem, "detail": dialogue.detail}
            self._journal[name] = skipped if dialogue.problem else {"row": dialogue.row()}
            del self._running[name]
            self._close(name)
        return request

    def _close(self, name: str) -> None:
        """Count a conversation that has ended; the last one of a shard lets the shard be written."""
        shard = self._shard_of[name]
        self._open[shard].discard(name)
        self._done += 1
        self._progress(self._done, self._total, f"{self.tokens_per_second:,.0f} tokens/s")
        if not self._open[shard]:
            self._write(shard)

    def _write(self, name: str) -> None:
        outcomes = [(record.id, self._journal.pop(record.id)) for record in self._shards.pop(name)]
        del self._open[name]
        rows = [outcome["row"] for _, outcome in outcomes if "row" in outcome]
        notes = {
            "skipped": [
                [key, outcome["skip"], outcome.get("detail")] for key, outcome in outcomes if "skip" in outcome
            ],
            "response_tokens": sum(row["num_new_tokens"] for row in rows),
            "finished": sum(row["finished"] for row in rows),
        }
        with self._folder.writing(name, **notes) as file:
            pq.write_table(pa.Table.from_pylist(rows, RESPONSES_SCHEMA), file.path, compression="zstd")
            file.rows = len(rows)


def part_name(number: int) -> str:
    """File name of one part."""
    return f"part-{number:05d}.parquet"


def _finish(folder: StageFolder, given: int, tokens_per_second: float, note: str) -> dict[str, Any]:
    """Write the table of skipped conversations, reconcile the counts and sum up; `note` is told when all failed."""
    parts = [record for name, record in folder.finished().items() if name.startswith("part-")]
    skipped = [dict(zip(SKIPPED_SCHEMA.names, note, strict=True)) for part in parts for note in part.notes["skipped"]]
    rows = sum(part.rows or 0 for part in parts)
    if rows + len(skipped) != given:
        raise HassError(
            f"{given} prompts went in, but {rows} answered + {len(skipped)} skipped came out; "
            f"remove {folder.url} and run the stage 'responses' again"
        )
    if not rows:
        _forget(folder, parts)
        raise HassError(
            f"no prompt was answered: {_counted(skipped)}; check the target and the responses settings{note}"
        )
    with folder.writing("skipped.parquet") as file:
        pq.write_table(pa.Table.from_pylist(skipped, SKIPPED_SCHEMA), file.path)
        file.rows = len(skipped)
    return _summary(parts, rows, skipped, tokens_per_second)


def _note(target: Target) -> str:
    """What is unusual about the target's template."""
    token = next_role_token(target.tokenizer)
    if token is None:
        return ""
    return (
        f" (its template closes no turn: an answer ends with {token}, which opens the next one, and is kept only where "
        "the target wrote that; a larger responses.max_new_tokens lets more answers end)"
    )


def _forget(folder: StageFolder, parts: list[FileRecord]) -> None:
    """Leave nothing that a later run, perhaps with another server, would take for done."""
    for part in parts:
        folder.remove(part.name)
    (folder.scratch() / JOURNAL).unlink(missing_ok=True)


def _summary(
    parts: list[FileRecord], rows: int, skipped: list[dict[str, str]], tokens_per_second: float
) -> dict[str, Any]:
    reasons = Counter(metric_name("skipped", item["reason"]) for item in skipped)
    return {
        "conversations": rows,
        "skipped": len(skipped),
        "response_tokens": sum(part.notes["response_tokens"] for part in parts),
        "finished_fraction": round(sum(part.notes["finished"] for part in parts) / rows, 4),
        "tokens_per_second": round(tokens_per_second, 1),
        **dict(sorted(reasons.items())),
    }


def _counted(skipped: list[dict[str, str]]) -> str:
    """Reasons with their counts, each with an example of what the server said."""
    details = {item["reason"]: item["detail"] for item in reversed(skipped) if item["detail"]}
    counts = Counter(item["reason"] for item in skipped).most_common()
    return ", ".join(
        f"{n} × {reason}" + (f" (it said: {details[reason]})" if reason in details else "") for reason, n in counts
    )
