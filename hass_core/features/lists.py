"""Lists of numbers as Arrow columns and back; no number becomes an object of Python's on the way."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

Numbers = Sequence[int] | np.ndarray


def to_lists(values: Sequence[Numbers], dtype: type) -> pa.ListArray:
    """One list for each value, laid end to end."""
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(value, dtype) for value in values)])
    return pa.ListArray.from_arrays(offsets, flat)


def from_lists(lists: pa.ListArray) -> Iterable[np.ndarray]:
    """Each list as a view of the values."""
    offsets, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
    return (flat[start:end] for start, end in pairwise(offsets))
