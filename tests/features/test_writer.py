"""Parts are written in threads: few batches are held, and a part that fails neither hangs nor appears."""

import threading
import time

import numpy as np
import pytest
import torch

from hass_core.features.schema import FeatureInfo
from hass_core.features.tokenise import Encoded, Part
from hass_core.features.writer import BATCHES_HELD, WRITERS, PartsWriter

INFO = FeatureInfo(hidden_size=4, encoding="bf16", target_identity="t")


def part(number: int) -> Part:
    one = Encoded(f"c{number}", "train", np.array([1, 2, 3], np.int32), np.array([0, 1, 1], np.uint8))
    return Part(f"part-{number:05d}.parquet", [one], [])


def features() -> list[torch.Tensor]:
    return [torch.ones(3, 4)]


@pytest.fixture
def folder(store):
    return store.stage("features", {"of": "parts"})


@pytest.mark.timeout(60)
def test_a_batch_waits_until_another_is_written(folder):
    go, computed = threading.Event(), []

    def held_back() -> list[torch.Tensor]:
        go.wait()
        return features()

    def compute() -> None:
        with PartsWriter(folder, INFO, row_group_mb=1) as writer, writer.part(part(0)) as hand_over:
            for i in range(BATCHES_HELD + 2):
                hand_over((part(0).conversations, held_back))
                computed.append(i)

    computing = threading.Thread(target=compute)
    computing.start()
    time.sleep(1)
    assert len(computed) == BATCHES_HELD
    go.set()
    computing.join()
    assert folder.record("part-00000.parquet").rows == BATCHES_HELD + 2


@pytest.mark.timeout(60)
def test_a_part_that_cannot_be_written_stops_the_rest_and_the_others_stand(folder):
    def broken() -> list[torch.Tensor]:
        raise RuntimeError("the copy failed")

    def write_all() -> None:
        with PartsWriter(folder, INFO, row_group_mb=1) as writer:
            for number in range(3 * WRITERS):
                with writer.part(part(number)) as hand_over:
                    for _ in range(2 * BATCHES_HELD):
                        hand_over((part(number).conversations, broken if number == 2 else features))

    with pytest.raises(RuntimeError, match="the copy failed"):
        write_all()
    finished = folder.finished()
    assert {"part-00000.parquet", "part-00001.parquet"} <= finished.keys()
    assert "part-00002.parquet" not in finished
    assert len(finished) < 3 * WRITERS - 1


@pytest.mark.timeout(60)
def test_an_error_while_a_part_is_computed_leaves_nothing_of_it(folder):
    def write_until_interrupted() -> None:
        with PartsWriter(folder, INFO, row_group_mb=1) as writer:
            with writer.part(part(0)) as hand_over:
                hand_over((part(0).conversations, features))
            with writer.part(part(1)) as hand_over:
                hand_over((part(1).conversations, features))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert list(folder.finished()) == ["part-00000.parquet"]
