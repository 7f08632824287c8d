"""Temporary folders: their owner keeps them, nobody else's work disturbs them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hass_core.store.scratch import PREFIX, temporary_folder


def test_many_writers_come_and_go_beside_each_other(tmp_path):
    def write(i: int) -> bool:
        with temporary_folder(tmp_path) as folder:
            (folder / "file").write_text(f"{i}")
            return (folder / "file").read_text() == f"{i}"

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write, range(400)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_owner_ended_goes_and_one_in_use_stays(tmp_path):
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    with temporary_folder(tmp_path) as mine, temporary_folder(tmp_path) as other:
        assert {Path(path).name for path in tmp_path.iterdir()} == {mine.name, other.name}
