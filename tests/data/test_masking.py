"""Personal data is gone before anything is stored."""

import json
import sys

import pytest

from hass_core.config import PromptsConfig, parse_config
from hass_core.data.conversations import Record, parse_row
from hass_core.data.masking import Mask
from hass_core.data.prompts import collect_prompts
from hass_core.data.sources import Skipped
from hass_core.errors import ConfigError

EMAIL = r"(?P<EMAIL>[\w.]+@[\w.]+\w)"
RENAME = "import json, sys\nfor line in sys.stdin: print(json.dumps(json.loads(line).replace('Ada', 'NAME')))\n"


def masked(row: dict, **settings: object) -> Record:
    (item,) = Mask.of(PromptsConfig.model_validate(settings)).masked([parse_row(row, "file", 1)])
    assert isinstance(item, Record)
    return item


def test_a_pattern_is_replaced_by_its_name():
    row = {"messages": [{"role": "user", "content": "Write to ada@example.org, tel. 555-1234."}]}
    record = masked(row, mask_patterns=(EMAIL, r"\d{3}-\d{4}"))
    assert record.messages[0] == {"role": "user", "content": "Write to [EMAIL], tel. [MASKED]."}


def test_calls_and_ids_are_masked_and_names_of_tools_are_not():
    call = {"id": "c", "type": "function", "function": {"name": "user", "arguments": {"user": ["ada@example.org", 3]}}}
    turns = [{"role": "user", "content": "Mail ada"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    record = masked({"id": "ada@example.org", "messages": turns}, mask_patterns=(EMAIL, "user"))
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "user", "arguments": {"user": ["[EMAIL]", 3]}}
    assert record.messages[0]["role"] == "user"
    assert record.id.startswith("file/")
    assert "ada" not in record.id


def test_the_id_of_a_skipped_conversation_is_masked():
    (item,) = Mask((EMAIL,), None).masked([Skipped("file/ada@example.org", "file", "no user turn")])
    assert "ada" not in item.id


def test_a_command_masks_and_its_content_is_part_of_the_key(tmp_path, store, tiny_target):
    script = tmp_path / "mask.py"
    script.write_text(RENAME)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "Ada", "prompt": "What did Ada\u2028 do\nin London in the year 1843?"}) + "\n")
    prompts = {"builtin": False, "files": [str(file)], "mask_command": f"{sys.executable} {script}"}
    artifact = collect_prompts(parse_config({"prompts": prompts}), store, tiny_target)
    folder = tmp_path / "store" / "prompts" / artifact.digest
    assert artifact.summary["prompts"] == 1
    assert not any(b"Ada" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    script.write_text(RENAME + "# changed\n")
    assert collect_prompts(parse_config({"prompts": prompts}), store, tiny_target).digest != artifact.digest


BAD = {
    "import sys; sys.exit('no model')": r"prompts\.mask_command ended with status 1: no model",
    "print('[')": r"must write a JSON string for each of the 3 it reads",
    "": r"it wrote 0",
    "print(chr(34) + chr(92) + 'ud83d' + chr(34) + 2 * (chr(10) + '0') )": r"must write a JSON string",
    "for _ in range(3): print(chr(34) + chr(92) + 'ud83d' + chr(34))": r"wrote half of a surrogate pair",
}


@pytest.mark.parametrize("code", BAD)
def test_a_command_that_fails_stops_the_run(code):
    with pytest.raises(ConfigError, match=BAD[code]):
        masked({"prompt": "Why?"}, mask_command=f'{sys.executable} -c "{code}"')


def test_a_command_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"prompts\.mask_command cannot be run"):
        masked({"prompt": "Why?"}, mask_command="/nowhere/mask")


def test_a_question_of_which_nothing_is_left_is_skipped(tmp_path, store, tiny_target):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'ada@example.org'})}\n{json.dumps({'prompt': 'Why do cats purr?'})}\n")
    (tmp_path / "blank.py").write_text(RENAME.replace("'Ada', 'NAME'", "'ada@example.org', ' '"))
    prompts = {"builtin": False, "files": [str(file)], "mask_command": f"{sys.executable} {tmp_path / 'blank.py'}"}
    artifact = collect_prompts(parse_config({"prompts": prompts}), store, tiny_target)
    assert artifact.summary["skipped/empty user turn"] == 1


def test_a_pattern_that_takes_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("hass_core.data.masking.MATCH_SECONDS", 0.05)
    with pytest.raises(ConfigError, match=r"mask_patterns: '.*' takes more than 0\.05 seconds on a text of 3002 char"):
        masked({"prompt": "@ " + "a" * 3000}, mask_patterns=(r"\w*\w*\w*[.@]",))


@pytest.mark.parametrize("command", ["", "  ", "mask 'half"])
def test_a_command_line_that_is_none_is_refused(command):
    with pytest.raises(ConfigError, match=r"mask_command = .* (names no program|is no command line)"):
        parse_config({"prompts": {"mask_command": command}})


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"mask_patterns: '\(' is no regular expression"):
        parse_config({"prompts": {"mask_patterns": ["("]}})
