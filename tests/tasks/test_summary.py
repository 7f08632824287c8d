"""The line of a finished stage in the terminal."""

from hass_core.store import Artifact
from tasks.gate import Verdict, all_of
from tasks.summary import stage_words, version_lines
from tasks.tracking import DraftVersion


def test_it_says_why_prompts_were_left_out_the_commonest_reason_first():
    found = {"prompts": 289, "skipped": 72, "skipped/too short": 11, "skipped/breaks off": 61}
    told = stage_words(Artifact(stage="prompts", digest="0", root="store", summary=found))
    assert told == "289 prompts, 72 left out: 61 × breaks off, 11 × too short"
    found = {"conversations": 158, "response_tokens": 17_897, "skipped": 2, "skipped/repetitive": 2}
    told = stage_words(Artifact(stage="responses", digest="0", root="store", summary=found))
    assert told == "158 answers, 17,897 tokens; 2 left out: 2 × repetitive"
    found = {"prompts": 612, "skipped": 3, "skipped/duplicate": 3, "unused": "logs (3 × duplicate)"}
    told = stage_words(Artifact(stage="prompts", digest="0", root="store", summary=found))
    assert told == "612 prompts, 3 left out: 3 × duplicate; nothing of logs (3 × duplicate)"
    found = {"prompts": 1289, "skipped": 0}
    assert (
        stage_words(Artifact(stage="prompts", digest="0", root="store", summary=found)) == "1,289 prompts, 0 left out"
    )


def test_what_refuses_a_draft_is_told_before_what_is_only_so_besides():
    draft = Artifact(stage="draft", digest="0", root="store")
    version = DraftVersion(model="hass-draft-mine", version="1", alias="challenger", draft=draft)
    none, slow = "there is no champion", "the gain over plain decoding is +10.8%: its lower end is not above the margin"
    passed = Verdict(promoted=True, reasons=(none,), challenger="1")
    refused = all_of([passed, Verdict(promoted=False, reasons=(slow,), challenger="1")])
    told = version_lines(version, refused).splitlines()
    assert told == ["registered  hass-draft-mine version 1", f"not promoted: {slow}", f"    {none}"]
    both = all_of([passed, Verdict(promoted=True, reasons=("the gain is +20%",), challenger="1")])
    assert version_lines(version, both).splitlines()[1:] == [f"promoted: {none}", "promoted: the gain is +20%"]
