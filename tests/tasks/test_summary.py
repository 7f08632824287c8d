"""The line of a finished stage in the terminal."""

from hass_core.store import Artifact
from tasks.summary import stage_words


def test_it_says_why_prompts_were_left_out_the_commonest_reason_first():
    found = {"prompts": 289, "skipped": 72, "skipped/too short": 11, "skipped/breaks off": 61}
    told = stage_words(Artifact(stage="prompts", digest="0", root="store", summary=found))
    assert told == "289 prompts, 72 left out: 61 × breaks off, 11 × too short"
    found = {"prompts": 1289, "skipped": 0}
    assert (
        stage_words(Artifact(stage="prompts", digest="0", root="store", summary=found)) == "1,289 prompts, 0 left out"
    )
