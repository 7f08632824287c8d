"""Conversations of one's own files count in a forecast where lines tell their number."""

from hass_core.config import parse_config
from hass_core.forecast.ready import announcement
from hass_core.forecast.rows import counted


def test_lines_of_local_jsonl_files_are_counted_and_nothing_else_is_opened(tmp_path):
    for name, lines in (("a.jsonl", 3), ("b.jsonl", 4), ("c.parquet", 5)):
        (tmp_path / name).write_text("{}\n" * lines)
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.parquet"))
    assert counted([a, b]) == 7
    assert counted([a, c]) is counted([a, "s3://bucket/b.jsonl"]) is counted([]) is None


def test_patterns_and_folders_count_as_the_files_they_lead_to(tmp_path):
    inside = tmp_path / "logs" / "june"
    inside.mkdir(parents=True)
    for name, lines in (("a.jsonl", 3), ("b.jsonl", 4), ("_done.jsonl", 9), ("notes.txt", 9)):
        (inside / name).write_text("{}\n" * lines)
    assert counted([f"{inside}/[ab].jsonl"]) == counted([str(tmp_path / "logs")]) == counted([f"{tmp_path}/l*"]) == 7
    assert counted([f"{tmp_path}/nothing-*.jsonl"]) is None
    (inside / "c.parquet").touch()
    assert counted([str(tmp_path / "logs")]) is None


def test_what_is_not_counted_is_said(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n" * 50)
    for prompts, says in (
        ({"files": [str(tmp_path / "mine.jsonl")]}, None),
        ({"files": ["s3://bucket/logs"]}, "prompts.files"),
        ({"files": [str(tmp_path / "mine.jsonl")], "datasets": ["org/talks"]}, "prompts.datasets"),
    ):
        told = [line for line in announcement(parse_config({"prompts": prompts})) if line.startswith("not counted")]
        assert says in told[0] if says else not told


def test_a_forecast_tells_the_users_own_number(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n" * 5000)
    config = parse_config({"prompts": {"builtin": False, "files": [str(tmp_path / "mine.jsonl")]}})
    (told,) = [line for line in announcement(config) if " conversations, " in line]
    assert 4000 < int(told.split()[0].replace(",", "")) <= 5000  # not every prompt gives an answer that is kept
