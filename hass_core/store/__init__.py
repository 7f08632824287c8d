"""Results by the digest of what decides them, on a local disk or S3; see `hass_core.store.store`."""

from hass_core.store.artifacts import Artifact, FileRecord, digest_of
from hass_core.store.file_cache import sha256_of
from hass_core.store.finished import FinishedStore, Unfinished
from hass_core.store.releases import Release, Releases
from hass_core.store.store import MANIFEST, StageFolder, Store, origin_of, store_at
