"""Write parts in threads while the target computes the next ones."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType

from torch import Tensor

from hass_core.features.schema import FeatureInfo
from hass_core.features.tokenised import Encoded, Part
from hass_core.features.writer import FeatureWriter
from hass_core.store import StageFolder

WRITERS = 6  # parts at once
BATCHES_HELD = 4  # computed but not yet written, of all parts together

Batch = tuple[list[Encoded], Callable[[], list[Tensor]]]  # conversations, and what waits for their features
_Batches = queue.SimpleQueue[Batch | BaseException | None]


class PartsWriter:
    """A context manager; leaving it waits until all parts are in place. After an exception, the unfinished are not."""

    def __init__(self, folder: StageFolder, info: FeatureInfo, row_group_mb: int):
        self._folder, self._info, self._row_group_mb = folder, info, row_group_mb
        self._threads = ThreadPoolExecutor(WRITERS)
        self._room = threading.Semaphore(BATCHES_HELD)
        self._writing: deque[Future[None]] = deque()

    @contextmanager
    def part(self, part: Part) -> Iterator[Callable[[Batch], None]]:
        """Hand a part's batches over one by one. Raises the error of whichever part could not be written."""
        while len(self._writing) >= WRITERS:
            self._writing.popleft().result()
        batches = _Batches()
        self._writing.append(self._threads.submit(self._write, part, batches))

        def hand_over(batch: Batch) -> None:
            self._raise_failure()
            while not self._room.acquire(timeout=0.2):
                self._raise_failure()
            batches.put(batch)

        try:
            yield hand_over
        except BaseException as error:
            batches.put(error)
            raise
        batches.put(None)

    def _write(self, part: Part, batches: _Batches) -> None:
        """Runs in a thread."""
        notes = {"skipped": part.skipped, "tokens": part.tokens, "supervised_tokens": part.supervised_tokens}
        with self._folder.writing(part.name, **notes) as file:
            with FeatureWriter(file.path, self._info, self._row_group_mb) as writer:
                while (item := batches.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    conversations, features_of = item
                    for c, features in zip(conversations, features_of(), strict=True):
                        writer.add(c.id, c.split, c.token_ids, c.loss_mask, features)
                    self._room.release()
            file.rows = writer.num_rows

    def _raise_failure(self) -> None:
        for written in self._writing:
            if written.done():
                written.result()

    def __enter__(self) -> "PartsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait(self._writing)
        self._threads.shutdown()
        if kind is None:
            self._raise_failure()
