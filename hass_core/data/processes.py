"""Other processes that work with a target's tokenizer: it is Python's work, which threads do one after the other."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ARGUMENTS = "arguments.pickle"
CORES_FOR_OTHERS, CORES_PER_PROCESS, MOST_PROCESSES = 2, 2, 8


def spare_processes(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many this machine has room for; 0 also where the tokenizer is not one that a file holds whole."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return 0
    return max(0, min(MOST_PROCESSES, ((os.cpu_count() or 1) - CORES_FOR_OTHERS) // CORES_PER_PROCESS))


@contextmanager
def tokenizer_processes(
    count: int, tokenizer: PreTrainedTokenizerBase, begin: Callable[..., None], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """`count` processes that each call `begin(tokenizer, *arguments)` first. What begins and works must load no torch,
    so that they are up soon. Unfinished work is dropped at the end.

    They take the arguments from a file: through the pipe that starts a process, more than its 64 KiB would keep this
    one waiting until that one is up, and then start the next."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, ARGUMENTS).write_bytes(pickle.dumps(arguments))
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA and locks
        processes = ProcessPoolExecutor(count, context, _begin, (folder, begin))
        try:
            yield processes
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


def _begin(folder: str, begin: Callable[..., None]) -> None:
    """What a process does first. It ends with its parent, however that ends, and takes the tokenizer by its file as it
    is: a model's own class may build the splitting of text anew."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # written by the process that started this one, in a folder that only its user may open
    arguments = pickle.loads(Path(folder, ARGUMENTS).read_bytes())
    begin(PreTrainedTokenizerFast.from_pretrained(folder), *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
