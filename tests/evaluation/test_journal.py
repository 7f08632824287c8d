"""What a crash leaves of a journal."""

import pytest

from hass_core.evaluation.journal import Journal


def test_results_are_found_again(tmp_path):
    Journal(tmp_path / "j")["a"] = {"x": [1, 2]}
    assert Journal(tmp_path / "j")["a"] == {"x": [1, 2]}


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_a_line_cut_off_by_a_crash_is_measured_again_and_the_rest_kept(tmp_path, kept):
    path = tmp_path / "j"
    journal = Journal(path)
    journal["first"] = 1
    journal["second"] = 2
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:kept])
    again = Journal(path)
    assert "first" in again
    assert "second" not in again
    again["second"] = 3
    assert Journal(path)["second"] == 3
