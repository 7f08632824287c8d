"""What a crash leaves of a journal."""

import pytest

from hass_core.store.journal import Journal


def test_results_are_found_again(tmp_path):
    journal = Journal(tmp_path / "new" / "j")
    assert not (tmp_path / "new").exists()
    journal["a"] = {"x": [1, 2], "text": "ein\u2028Satz"}
    assert Journal(tmp_path / "new" / "j") == {"a": {"x": [1, 2], "text": "ein\u2028Satz"}}


def test_what_is_taken_out_of_memory_stays_on_disk(tmp_path):
    journal = Journal(tmp_path / "j")
    journal["a"] = 1
    journal["b"] = 2
    assert journal.pop("a") == 1
    assert journal == {"b": 2}
    assert Journal(tmp_path / "j") == {"a": 1, "b": 2}


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("kept", [1, 5, 11])
def test_a_line_cut_off_by_a_crash_is_done_again_and_the_rest_kept(tmp_path, kept, synced):
    path = tmp_path / "j"
    journal = Journal(path, synced)
    journal["first"] = 1
    journal["second"] = 2
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:kept])
    again = Journal(path, synced)
    assert "first" in again
    assert "second" not in again
    again["second"] = 3
    assert Journal(path) == {"first": 1, "second": 3}
