"""Sources that grow: what is found, what a window keeps, and when a run has something new."""

import gzip
import json
import os
import time
from datetime import UTC, datetime

import pytest

from hass_core.config import PromptsConfig, RunConfig, parse_config
from hass_core.data.live import newest_of, resolve, seconds_of
from hass_core.data.prompts import collect_prompts, read_prompts
from hass_core.data.sources import Skipped
from hass_core.errors import BadInput, ConfigError

TOPICS = ["rivers", "stars", "bread", "violins", "glass", "volcanoes", "chess", "honey", "trains", "ink", "sleep"]
DAY = 86_400
NOW = datetime(2026, 11, 28, tzinfo=UTC)


def log(path, numbers, days_ago: float = 0.0) -> None:
    """A gateway's log of requests, one a number, with their times; the file is as old as its first request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = NOW.timestamp() - days_ago * DAY
    lines = [
        {
            "custom_id": f"r{number}",
            "meta": {"at": datetime.fromtimestamp(seconds + number, UTC).isoformat()},
            "body": {
                "model": "m",
                "messages": [
                    {"role": "user", "content": f"Tell me something surprising about {TOPICS[number]} please."}
                ],
            },
            "response": {"choices": [{"message": {"role": "assistant", "content": "An old answer."}}]},
        }
        for number in numbers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (seconds, seconds))


@pytest.fixture
def traffic(tmp_path):
    """Three days of logs, and what is none."""
    folder = tmp_path / "traffic"
    log(folder / "2026-11-01" / "part-0.jsonl", [0, 1], days_ago=27)
    log(folder / "2026-11-20" / "part-0.jsonl", [2, 3], days_ago=8)
    log(folder / "2026-11-27" / "part-0.jsonl", [4, 5, 6], days_ago=1)
    for name in ("_SUCCESS", "_temporary.jsonl", ".part-1.jsonl", "README.md"):
        (folder / "2026-11-27" / name).write_text("half a li")
    return folder


def run(*files: str, **prompts: object) -> RunConfig:
    return parse_config({"prompts": {"builtin": False, "files": files, **prompts}})


def asked(store, artifact) -> list[int]:
    """The topics of the prompts, by number."""
    texts = [record.messages[0]["content"] for record in read_prompts(store, artifact)]
    return [next(i for i, topic in enumerate(TOPICS) if topic in text) for text in texts]


@pytest.mark.parametrize("pattern", ["", "/", "/*/", "/2026-*", "/2026-*/part-*.jsonl", "/**/part-0.jsonl"])
def test_a_folder_and_patterns_are_all_files_of_conversations_in_them(traffic, store, tiny_target, pattern):
    artifact = collect_prompts(run(f"{traffic}{pattern}"), store, tiny_target)
    assert asked(store, artifact) == list(range(7))
    assert read_prompts(store, artifact)[0].id == "traffic/2026-11-01/part-0/r0"
    assert artifact.summary["files"] == 3
    assert artifact.summary["from_traffic"] == 7
    assert artifact.summary["newest_file"] == "2026-11-27T00:00:00+00:00"


def test_a_new_file_is_something_new_and_an_equal_folder_is_not(traffic, store, tiny_target):
    first = collect_prompts(run(str(traffic)), store, tiny_target)
    os.utime(traffic / "2026-11-01" / "part-0.jsonl")  # touched, not changed
    assert collect_prompts(run(str(traffic)), store, tiny_target).digest == first.digest
    (traffic / "2026-11-28").mkdir()
    (traffic / "2026-11-28" / "part-0.jsonl").touch()  # nobody asked anything yet
    assert collect_prompts(run(str(traffic)), store, tiny_target).digest == first.digest
    log(traffic / "2026-11-28" / "part-0.jsonl", [7])
    grown = collect_prompts(run(str(traffic)), store, tiny_target)
    assert grown.digest != first.digest
    assert asked(store, grown) == list(range(8))


def test_files_that_differ_in_the_middle_of_their_names_do_not_share_ids(tmp_path, store, tiny_target):
    for number, name in enumerate(["log.2026-11-01.jsonl", "log.2026-11-02.jsonl.gz", "v1.0/a.jsonl", "v1.0/a.json"]):
        log(tmp_path / "logs" / name.removesuffix(".gz"), [number])
        if name.endswith(".gz"):
            plain = tmp_path / "logs" / name.removesuffix(".gz")
            (tmp_path / "logs" / name).write_bytes(gzip.compress(plain.read_bytes().replace(b"r1", b"r0")))
            plain.unlink()
    artifact = collect_prompts(run(str(tmp_path / "logs")), store, tiny_target)
    assert sorted(record.id for record in read_prompts(store, artifact)) == [
        "logs/log.2026-11-01/r0",
        "logs/log.2026-11-02/r0",
        "logs/v1.0/a.json/r3",
        "logs/v1.0/a.jsonl/r2",
    ]


def test_sources_of_one_name_do_not_share_ids(tmp_path, store, tiny_target):
    for number, name in enumerate(["a-3.jsonl", "builtin.jsonl", "a.x.jsonl", "a.y.jsonl"]):
        log(tmp_path / name, [number])
    for number, folder in enumerate(["one/talks", "two/talks"], start=4):
        log(tmp_path / folder / "train.jsonl", [number])
    files = [str(tmp_path / name) for name in ("a-3.jsonl", "builtin.jsonl", "a.x.jsonl", "a.y.jsonl")]
    datasets = [str(tmp_path / folder) for folder in ("one/talks", "two/talks")]
    artifact = collect_prompts(run(*files, datasets=datasets), store, tiny_target)
    assert asked(store, artifact) == [0, 1, 2, 3, 4, 5]
    prefixes = [record.id.partition("/")[0] for record in read_prompts(store, artifact)]
    assert prefixes == ["a-3", "builtin-2", "a-3-3", "a-4", "talks-5", "talks-6"]


@pytest.mark.parametrize("entry", ["/none/", "/2027-*/", "/2026-11-27/*.csv", ""])
def test_an_entry_without_files_is_refused(tmp_path, store, tiny_target, entry):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no file of conversations there; check prompts\.files"):
        collect_prompts(run(f"{tmp_path}/empty{entry}"), store, tiny_target)


def test_the_newest_are_the_last_rows_of_the_newest_files(traffic, store, tiny_target):
    artifact = collect_prompts(run(str(traffic), newest=4), store, tiny_target)
    assert asked(store, artifact) == [3, 4, 5, 6]
    assert artifact.summary["in_window"] == 4


def test_the_newest_by_a_field_are_found_in_any_order(tmp_path, store, tiny_target):
    log(tmp_path / "logs" / "a.jsonl", [5, 0, 3])
    log(tmp_path / "logs" / "b.jsonl", [4, 1])
    artifact = collect_prompts(run(str(tmp_path / "logs"), newest=3, time_field="meta.at"), store, tiny_target)
    assert asked(store, artifact) == [3, 4, 5]


@pytest.mark.parametrize("field", [None, "meta.at"])
def test_the_last_days_leave_older_ones_out(traffic, field):
    config = PromptsConfig(files=(str(traffic),), last_days=10, time_field=field)
    found = newest_of(resolve(config), config, NOW)
    assert [item.id.rpartition("/")[2] for item in found] == ["r2", "r3", "r4", "r5", "r6"]


def test_a_window_is_something_new_only_when_its_conversations_are(traffic, store, tiny_target):
    config = run(str(traffic), newest=3)
    first = collect_prompts(config, store, tiny_target)
    log(traffic / "2026-10-01" / "part-0.jsonl", [8, 9], days_ago=60)  # comes late, and is old
    assert collect_prompts(config, store, tiny_target).digest == first.digest
    log(traffic / "2026-11-28" / "part-0.jsonl", [7])
    assert asked(store, collect_prompts(config, store, tiny_target)) == [5, 6, 7]


def test_a_row_without_a_time_is_skipped_with_its_reason(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Why?", "at": "yesterday"}\n{"prompt": "How?", "at": 1795737600000}\n')
    config = PromptsConfig(files=(str(file),), newest=5, time_field="at")
    found = newest_of(resolve(config), config)
    assert [item.reason if isinstance(item, Skipped) else item.id for item in found] == [
        "no time in the field at",
        "rows/2",
    ]


SECONDS = 1795824000
TIMES = ["2026-11-28T00:00:00Z", "2026-11-28", str(SECONDS), NOW, NOW.date()]
TIMES += [SECONDS * per_second for per_second in (1, 1.0, 1000, 10**6, 10**9)]


@pytest.mark.parametrize("value", TIMES, ids=str)
def test_times_are_read_as_logs_write_them(value):
    assert seconds_of(value) == NOW.timestamp()


@pytest.mark.parametrize("value", [None, True, "soon", [], {}, float("nan"), float("inf"), 10**400, "9" * 5000])
def test_what_is_no_time_is_none(value):
    assert seconds_of(value) is None


def test_a_share_of_the_targets_own_prompts_is_mixed_in(traffic, store, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.prompts.prompt_problem", lambda text: None if text else "too short")
    artifact = collect_prompts(run(str(traffic), self_written_share=0.3, max_prompt_tokens=80), store, tiny_target)
    assert artifact.summary["self_written_wanted"] == 3  # of ten
    assert artifact.summary["from_self-written"] == 3


def test_a_prefix_of_s3_is_listed_anew_at_every_run(s3_store, store, tiny_target, tmp_path):
    root = f"{s3_store.root}/traffic"
    for day, number in (("2026-11-01", 0), ("2026-11-02", 1)):
        log(tmp_path / "part.jsonl", [number])
        s3_store.fs.put_file(str(tmp_path / "part.jsonl"), f"{root}/{day}/part-0.jsonl")
    config = run(f"{root}/2026-*/")
    first = collect_prompts(config, store, tiny_target)
    assert asked(store, first) == [0, 1]
    assert collect_prompts(config, store, tiny_target).digest == first.digest
    time.sleep(1)  # S3 tells whole seconds
    s3_store.fs.put_file(str(tmp_path / "part.jsonl"), f"{root}/2026-11-02/part-0.jsonl")  # by a nightly copy
    assert collect_prompts(config, store, tiny_target).digest == first.digest, "put there again, not changed"
    log(tmp_path / "part.jsonl", [2])
    s3_store.fs.put_file(str(tmp_path / "part.jsonl"), f"{root}/2026-11-03/part-0.jsonl")
    assert asked(store, collect_prompts(config, store, tiny_target)) == [0, 1, 2]
    assert asked(store, collect_prompts(run(f"{root}/", newest=1), store, tiny_target)) == [2]


def test_a_dataset_is_keyed_by_its_content_and_recorded(tmp_path, store, tiny_target):
    folder = tmp_path / "talks"
    log(folder / "train.jsonl", [0, 1])
    config = parse_config({"prompts": {"builtin": False, "datasets": [str(folder)]}})
    first = collect_prompts(config, store, tiny_target)
    assert asked(store, first) == [0, 1]
    assert len(first.summary[f"revision/{folder}"]) == 16
    log(folder / "train.jsonl", [2])
    second = collect_prompts(config, store, tiny_target)
    assert second.digest != first.digest
    assert asked(store, second) == [2]


def test_a_window_on_a_dataset_needs_a_field():
    with pytest.raises(ConfigError, match=r"need prompts\.time_field for prompts\.datasets"):
        parse_config({"prompts": {"datasets": ["a"], "newest": 3}})


@pytest.mark.parametrize(
    "address", ["s3://nobody/traffic/", "s3://nobody/2026-*/", "nowhere://a/b.jsonl", "s3://nobody/a.jsonl"]
)
def test_a_remote_place_that_cannot_be_reached_is_told(store, tiny_target, monkeypatch, address):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        BadInput, match=r"cannot be listed: .*; check the address, its credentials and AWS_ENDPOINT_URL"
    ):
        collect_prompts(run(address), store, tiny_target)
