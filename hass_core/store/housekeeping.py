"""What a store holds, what it takes, and what of it can go.

Needed are: registered drafts with what they came from, their features excepted (only training reads those); the newest
drafts whole, features included; whatever is younger than a day, or began to be trained on within one; and everything
unfinished, which may be under way.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ValidationError

from hass_core.errors import CorruptFile, StoreError
from hass_core.store.artifacts import Artifact, Manifest
from hass_core.store.store import MANIFEST, Store

REGISTERED = "registered"  # ROOT/registered/NAME/VERSION.json
SETTLED_SECONDS = 86_400.0
AT_WORK_SECONDS = 3600.0
REMADE = "features"  # what is made again from the target when it is wanted


class Registered(BaseModel, frozen=True):
    """A note that the model registry holds a version made of these stages."""

    digests: list[str]


@dataclass(frozen=True)
class Entry:
    """One stage's folder."""

    stage: str
    digest: str
    bytes: int
    changed: float  # Unix time of the newest file
    sources: frozenset[str] = frozenset()  # digests in its key
    finished: bool = True

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.digest}"


def note_registered(store: Store, name: str, version: str, stages: Iterable[Artifact]) -> None:
    """Let the store know which stages a registered version needs."""
    note = Registered(digests=[stage.digest for stage in stages])
    path = f"{_base(store)}/{REGISTERED}/{name}/{version}.json"
    with store.named_failures("write to"):
        if store.is_local:
            store.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.fs.pipe_file(path, note.model_dump_json().encode())


def entries(store: Store, stages: Iterable[str]) -> list[Entry]:
    """The folders of these stages, the newest first. Raises CorruptFile for a manifest that is none."""
    found: list[Entry] = []
    with store.named_failures("read from"):
        store.fs.invalidate_cache()
        for stage in stages:
            base = f"{_base(store)}/{stage}"
            files = store.fs.find(base, detail=True)
            folders: dict[str, list[tuple[str, dict[str, object]]]] = {}
            for path, info in files.items():
                digest, _, name = path.removeprefix(f"{base}/").partition("/")
                folders.setdefault(digest, []).append((name, info))
            finished = [digest for digest, content in folders.items() if MANIFEST in dict(content)]
            manifests = {digest: f"{base}/{digest}/{MANIFEST}" for digest in finished}
            texts = store.fs.cat(list(manifests.values())) if manifests else {}  # S3 is asked for many at once
            for digest, content in folders.items():
                try:
                    found.append(_entry(stage, digest, content, texts.get(manifests.get(digest))))
                except ValidationError as error:
                    raise CorruptFile(
                        f"{store.root}/{stage}/{digest}/{MANIFEST}: not a manifest; remove this folder; the stage is "
                        "made again when it is wanted"
                    ) from error
    return sorted(found, key=lambda entry: entry.changed, reverse=True)


def removable(store: Store, held: list[Entry], newest: int) -> list[Entry]:
    """What of the finished entries nobody needs, `newest` drafts being kept whole.

    Raises StoreError while a stage seems to be under way: it may read what looks unneeded.
    """
    now = time.time()
    for entry in held:
        if not entry.finished and now - entry.changed < AT_WORK_SECONDS:
            raise StoreError(
                f"{store.root}/{entry.name} is being made, it seems: it changed less than an hour ago; try again later"
            )
    drafts = [entry for entry in held if entry.stage == "draft" and entry.finished]
    young = {entry.digest for entry in held if now - entry.changed < SETTLED_SECONDS}
    whole = _upstream(held, young | {entry.digest for entry in drafts[:newest]})
    registered = _upstream(held, _registered(store))
    by_digest = {entry.digest: entry for entry in held}
    kept = whole | {digest for digest in registered if by_digest[digest].stage != REMADE}
    kept_drafts = {digest for digest in kept if by_digest[digest].stage == "draft"}
    measured = {entry.digest for entry in held if entry.sources & kept_drafts}  # evaluations and duels of kept drafts
    return [e for e in held if e.finished and e.digest not in kept | measured]


def problems(store: Store, entry: Entry) -> list[str]:
    """What the files of a finished stage lack; see `StageFolder.problems`."""
    return store.open(Artifact(stage=entry.stage, digest=entry.digest, root=store.root)).problems()


def remove(store: Store, entry: Entry) -> None:
    """Remove a finished stage: the manifest first, so that what is left of it is unfinished at any moment."""
    base = f"{_base(store)}/{entry.name}"
    with store.named_failures("write to"):
        store.fs.rm_file(f"{base}/{MANIFEST}")
        store.fs.rm(base, recursive=True)


def _upstream(held: list[Entry], digests: set[str]) -> set[str]:
    """These entries and all that they were made of."""
    by_digest = {entry.digest: entry for entry in held}
    wanted, found = [digest for digest in digests if digest in by_digest], set[str]()
    while wanted:
        digest = wanted.pop()
        if digest not in found:
            found.add(digest)
            wanted += [source for source in by_digest[digest].sources if source in by_digest]
    return found


def _registered(store: Store) -> set[str]:
    with store.named_failures("read from"):
        paths = store.fs.find(f"{_base(store)}/{REGISTERED}")
        texts = store.fs.cat(paths) if paths else {}
    try:
        return {digest for text in texts.values() for digest in Registered.model_validate_json(text).digests}
    except ValidationError as error:
        raise StoreError(f"a note in {store.root}/{REGISTERED} is broken: {error}; mend it before you prune") from error


def _entry(stage: str, digest: str, content: list[tuple[str, dict[str, object]]], manifest_text: bytes | None) -> Entry:
    size = sum(int(str(info["size"])) for _, info in content)
    changed = max(_time_of(info) for _, info in content)
    if manifest_text is None:
        return Entry(stage, digest, size, changed, finished=False)
    manifest = Manifest.model_validate_json(manifest_text)
    sources = frozenset(value for value in manifest.key.values() if isinstance(value, str))
    return Entry(stage, digest, size, changed, sources)


def _time_of(info: dict[str, object]) -> float:
    """When a file changed, as local disks and S3 tell it."""
    told = info.get("mtime", info.get("LastModified"))
    if isinstance(told, datetime):
        return told.timestamp()
    return float(told) if isinstance(told, (int, float)) else time.time()


def _base(store: Store) -> str:
    return str(store.fs._strip_protocol(store.root))
