"""The prompts stage: gather, filter and de-duplicate what the target will be asked.

In: the project's own prompts, the user's files and datasets, and prompts the target writes itself.
Out: prompts.parquet (id, category, source, messages, sha256) and skipped.parquet (id, source, reason).
Every file is read to its end before anything slow begins, so a broken line is reported at once.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.config import RunConfig
from hass_core.data.conversations import Record, as_stored, from_stored, user_text
from hass_core.data.engines.local import LocalEngine
from hass_core.data.examine import Examination
from hass_core.data.holdout import (
    TRAINING_FILE,
    assert_no_leak,
    forbidden_questions,
    normalized_hash,
    packaged_prompts,
    user_turns,
)
from hass_core.data.live import BUILTIN, Sources, conversations_of, newest_of, resolve
from hass_core.data.masking import Mask
from hass_core.data.quality import diversity, metric_name, prompt_problem
from hass_core.data.rendering import template_date
from hass_core.data.selection import Selection
from hass_core.data.self_written import rounds_of_texts
from hass_core.data.sources import Skipped
from hass_core.data.templates import check_template
from hass_core.errors import BadInput, HassError
from hass_core.progress import Progress, no_progress
from hass_core.sampling import DRAWS_VERSION
from hass_core.store import Artifact, StageFolder, Store, digest_of
from hass_core.target_model.loader import Target

STEP_VERSION = 4  # 2: the target by its identity; 3: roles, system, history and tools are read, answers to come have
# stand-ins; 4: an id counts as used by conversations alone, and files and data sets have names of their own in it
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PROMPTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("source", pa.string()),
        ("messages", MESSAGES),
        ("extras", pa.string()),  # JSON of tools and tool calls; null where a conversation has none
        ("sha256", pa.string()),
    ]
)
SKIPPED_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])

RESOLVED = {"files", "datasets", "newest", "last_days", "time_field"}  # count by what they lead to
SELF_WRITTEN_MAX_TOKENS = 256
MIN_YIELD = 0.05  # give up when fewer texts than this are usable


def collect_prompts(config: RunConfig, store: Store, target: Target, progress: Progress = no_progress) -> Artifact:
    """Collect the training prompts. Raises BadInput, TemplateError or LeakedBenchmark before any long work."""
    forbidden = forbidden_questions(config.evaluation)
    sources = resolve(config.prompts)
    window = _window(config, sources)
    folder = store.stage("prompts", _key(config, target, sorted(forbidden.hashes), sources, window))
    if done := folder.artifact():
        return done
    check_template(target.tokenizer, target.eos_token_ids)
    selection = Selection(config.prompts, target.tokenizer, forbidden)
    with Examination(target.tokenizer, config.prompts, forbidden) as examination:
        for candidate, examined in examination.of(_given(config, sources, window)):
            if selection.full:
                break
            selection.consider(candidate, examined)
        given = len(selection.kept)
        wanted = _wanted(config, given)
        if wanted and not selection.full:
            _add_self_written(config, target, _Judge(selection, examination, wanted), folder, progress)
    if not selection.kept:
        raise BadInput(f"no prompt is left: {_counted(selection.reasons())}; add prompts.files or prompts.self_written")
    assert_no_leak((text for record in selection.kept for text in user_turns(record)), forbidden.hashes)
    _write(folder, selection)
    return folder.finish(
        _summary(selection, given, wanted)
        | _unused(selection, sources, config.prompts.max_prompts)
        | _resolved(sources, window)
    )


def read_prompts(store: Store, artifact: Artifact) -> list[Record]:
    """The records of a finished prompts stage."""
    rows = pq.read_table(store.open(artifact).local_path("prompts.parquet")).to_pylist()
    return [_record(row) for row in rows]


def _record(row: dict[str, Any]) -> Record:
    messages, tools = from_stored(row)
    return Record(row["id"], row["category"], row["source"], tuple(messages), tools)


def _key(
    config: RunConfig,
    target: Target,
    forbidden_hashes: list[str],
    sources: Sources,
    window: list[Record | Skipped] | None,
) -> dict[str, Any]:
    writes = config.prompts.self_written or config.prompts.self_written_share  # only then is the target asked
    return {
        "prompts": config.prompts.model_dump(exclude=RESOLVED),
        "sources": sources.key() if window is None else digest_of([_content_of(item) for item in window]),
        "mask": Mask.of(config.prompts).key(),
        "builtin": digest_of([r.messages for r in packaged_prompts(TRAINING_FILE)]) if config.prompts.builtin else None,
        "forbidden": digest_of(forbidden_hashes),
        "target": target.identity.parts(*(() if writes else ("tokenizer", "template"))),
        "dtype": str(target.dtype) if writes else None,
        "seed": config.seed if writes else None,
        **({"draws": DRAWS_VERSION} if writes else {}),
        **template_date(target.tokenizer),  # and so in the keys of all that comes of these prompts
        "version": STEP_VERSION,
    }


def _window(config: RunConfig, sources: Sources) -> list[Record | Skipped] | None:
    """The newest conversations, masked; None where all are taken and need not be read to know what they are."""
    if not config.prompts.has_window:
        return None
    return list(Mask.of(config.prompts).masked(newest_of(sources, config.prompts)))


def _content_of(item: Record | Skipped) -> list[Any]:
    if isinstance(item, Skipped):
        return [item.id, item.reason]
    return [item.id, item.category, item.messages, item.tools]


def _given(config: RunConfig, sources: Sources, window: list[Record | Skipped] | None) -> Iterator[Record | Skipped]:
    if config.prompts.builtin:
        yield from packaged_prompts(TRAINING_FILE, source=BUILTIN)
    yield from window if window is not None else Mask.of(config.prompts).masked(conversations_of(sources))


def _wanted(config: RunConfig, given: int) -> int:
    """How many prompts the target writes, beside those given."""
    share = config.prompts.self_written_share
    return config.prompts.self_written or round(given * share / (1 - share))


def _unused(selection: Selection, sources: Sources, limit: int | None) -> dict[str, str]:
    """The user's own files and data sets of which nothing was taken, each with what became of its conversations."""
    own = dict.fromkeys([*(file.source for file in sources.files), *(dataset.source for dataset in sources.datasets)])
    taken = {record.source for record in selection.kept}
    told = []
    for name in own.keys() - taken if own else ():
        reasons = Counter(item.reason for item in selection.skipped if item.source == name)
        unread = f"prompts.max_prompts = {limit} was reached before it was read" if selection.full else "it holds none"
        told.append(f"{name} ({_counted(reasons) if reasons else unread})")
    return {"unused": ", ".join(sorted(told))} if told else {}


def _resolved(sources: Sources, window: list[Record | Skipped] | None) -> dict[str, Any]:
    """What the sources were when the run began; the key holds all of it."""
    found: dict[str, Any] = {f"revision/{dataset.name}": dataset.revision for dataset in sources.datasets}
    if sources.files:
        newest = datetime.fromtimestamp(max(file.modified for file in sources.files), UTC)
        found |= {"files": len(sources.files), "newest_file": newest.isoformat(timespec="seconds")}
    return found if window is None else found | {"in_window": len(window)}


def _add_self_written(
    config: RunConfig, target: Target, judge: "_Judge", folder: StageFolder, progress: Progress
) -> None:
    """Sample until enough texts are usable. While a thread judges one round, the next ones are sampled."""
    engine = LocalEngine(target, config.responses.max_sequences_per_batch)
    max_tokens = min(config.prompts.max_prompt_tokens, SELF_WRITTEN_MAX_TOKENS)
    number = 0
    with ThreadPoolExecutor(1) as thread:
        while judge.open:
            count, judged = max(64, int(1.5 * judge.missing)), thread.submit(judge.judge, [], number)
            sampled = count, max_tokens, config.seed
            for texts in rounds_of_texts(engine, target.tokenizer, *sampled, folder.scratch(), number):
                judged.result()
                progress(judge.kept, judge.wanted, "prompts written by the target")
                if not judge.open:
                    break
                judged, number = thread.submit(judge.judge, texts, number), number + 1
            judged.result()
    progress(judge.kept, judge.wanted, "prompts written by the target")


class _Judge:
    """Puts self-written texts, round after round, before the selection, until `wanted` are kept."""

    def __init__(self, selection: Selection, examination: Examination, wanted: int):
        self.kept, self.wanted = 0, wanted
        self._selection, self._examination, self._hopeless = selection, examination, False

    @property
    def missing(self) -> int:
        return self.wanted - self.kept

    @property
    def open(self) -> bool:
        """Whether more texts are wanted."""
        return self.missing > 0 and not self._selection.full and not self._hopeless

    def judge(self, texts: list[str | None], number: int) -> None:
        """Round `number`, in order."""
        before = self.kept
        candidates = (_self_written(text, f"self-written/{number:05d}-{i:04d}") for i, text in enumerate(texts))
        for candidate, examined in self._examination.of(candidates):
            if not self.open:
                return
            self.kept += self._selection.consider(candidate, examined)
        self._hopeless = self.kept - before < MIN_YIELD * len(texts)


def _self_written(text: str | None, name: str) -> Record | Skipped:
    problem = "breaks off" if text is None else prompt_problem(text)
    if problem:
        return Skipped(name, "self-written", problem)
    return Record(name, "self-written", "self-written", ({"role": "user", "content": text or ""},))


def _write(folder: StageFolder, selection: Selection) -> None:
    rows = [
        {
            "id": record.id,
            "category": record.category,
            "source": record.source,
            **as_stored(record.messages, record.tools),
            "sha256": normalized_hash(user_text(record.messages)),
        }
        for record in selection.kept
    ]
    skipped = [{"id": s.id, "source": s.source, "reason": s.reason} for s in selection.skipped]
    if len(rows) + len(skipped) != selection.seen:
        raise HassError(f"{selection.seen} prompts went in, {len(rows)} + {len(skipped)} came out; please report this")
    for name, content, schema in (
        ("prompts.parquet", rows, PROMPTS_SCHEMA),
        ("skipped.parquet", skipped, SKIPPED_SCHEMA),
    ):
        with folder.writing(name) as file:
            pq.write_table(pa.Table.from_pylist(content, schema), file.path)
            file.rows = len(content)


def _summary(selection: Selection, given: int, wanted: int) -> dict[str, Any]:
    by_source = Counter(record.source for record in selection.kept)
    return {
        "prompts": len(selection.kept),
        "skipped": len(selection.skipped),
        "self_written": len(selection.kept) - given,
        "self_written_wanted": wanted,
        **{f"from_{source}": count for source, count in sorted(by_source.items())},
        **{metric_name("skipped", reason): count for reason, count in sorted(selection.reasons().items())},
        **diversity([user_text(record.messages) for record in selection.kept]),
    }


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common()) or "there was no candidate"
