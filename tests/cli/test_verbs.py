"""What `hass` prints: results on stdout, for people or as JSON, and a clean end."""

import json
import signal
import subprocess
import sys

import pytest
import torch

import hass_core
from hass_core.config import load_config, preset_names
from tests.cli.conftest import ROOT, command


def test_the_version_is_told(bad):
    told = command(bad, "hass --version")
    assert (told.status, told.out) == (0, f"hass {hass_core.__version__}\n")
    assert not told.loaded_torch


def test_help_lists_the_verbs_and_the_exit_statuses(bad):
    for line in ("hass", "hass --help", "hass -h"):
        told = command(bad, line)
        assert told.status == 0
        words = " ".join(told.out.split())
        assert "Exit status: 0 done, 1 findings (doctor), 2 a mistake" in words
        for verb in (
            "init",
            "run",
            "chat",
            "serve",
            "evaluate",
            "plan",
            "export",
            "import",
            "doctor",
            "bench",
            "presets",
        ):
            assert f" {verb} " in words


def test_a_shell_is_told_how_to_complete(bad):
    assert "--install-completion" in command(bad, "hass --help").out


def test_presets_are_whole_settings_as_json(bad):
    told = command(bad, "hass presets --json")
    found = json.loads(told.out)
    assert list(found) == preset_names()
    assert found["smollm2-cpu"] == load_config("smollm2-cpu").model_dump(mode="json")


@pytest.mark.slow
def test_a_finished_stage_is_told_as_json_and_nothing_else(bad):
    line = 'hass run prompts -s target.source=target -s prompts.builtin=false -s prompts.files=["asked.jsonl"]'
    told = command(bad, f"{line} -s store=json --json")
    assert told.status == 0, told.error
    prompts = json.loads(told.out)["prompts"]
    assert prompts["url"].endswith(f"/json/prompts/{prompts['digest']}")
    assert (bad / "json" / "prompts" / prompts["digest"] / "manifest.json").is_file()


@pytest.mark.slow
def test_a_settings_file_for_any_model_is_whole_and_says_what_it_costs(bad):
    told = command(bad, "hass init target --prompts asked.jsonl -o mine.toml")
    assert told.status == 0, told.error
    assert "To start it: python -m flows.retrain mine.toml" in told.out
    text, settings = (bad / "mine.toml").read_text(), load_config(bad / "mine.toml")
    assert settings.target.source == str(bad / "target")
    assert settings.prompts.files == (str(bad / "asked.jsonl"),)
    assert settings.draft.warm_start is None
    assert "# Times the training data is seen\npasses = 3" in text
    assert "trained parameters, beside the target's embedding and head" in text
    again = command(bad, "hass init target -o mine.toml")
    assert (again.status, "is there already" in again.error) == (2, True)


@pytest.mark.slow
def test_a_settings_file_asks_for_no_more_than_the_target_has(bad):
    """Of tokens, and of room in its context; what it costs is told in units that suit, and that no time is known."""
    told = command(bad, "hass init target -o small.toml")
    assert told.status == 0, told.error
    settings = load_config(bad / "small.toml")
    assert settings.draft.vocab_size is None  # the target has 259 tokens, smollm2-cpu drafts among 8192
    assert settings.features.max_tokens_per_conversation <= 512
    assert settings.responses.max_new_tokens + settings.prompts.max_prompt_tokens <= 512
    text = (bad / "small.toml").read_text()
    assert "0.0 GB" not in text
    if not torch.cuda.is_available():
        assert "no time is forecast: without a GPU only SmolLM2-135M-Instruct was measured" in text


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["", "\n", "hello\n"])
def test_a_chat_ends_with_the_input(bad, typed):
    told = command(bad, "hass chat -t target --max-new-tokens 4", stdin=typed)
    assert told.status == 0, told.error
    assert "Traceback" not in told.error
    assert ("tokens a cycle" in told.out) == bool(typed.strip())


def test_a_chat_that_has_grown_beyond_the_context_begins_anew(bad):
    typed = "a" * 200 + "\n" + "b" * 400 + "\n" + "c" * 600 + "\nd\n"  # a byte is a token, and the context holds 512
    told = command(bad, "hass chat -t target --max-new-tokens 4", stdin=typed)
    assert told.status == 0, told.error
    assert told.out.count("it begins anew") == 2
    assert told.out.count("say it in fewer") == 1
    assert told.out.count("tokens a cycle") == 3


@pytest.mark.slow
def test_ctrl_c_ends_a_chat_with_130(bad):
    process = subprocess.Popen(
        [sys.executable, "-m", "hass_core.cli", "chat", "-t", str(bad / "target")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job behind `&` ignores it
    )  # fmt: skip
    assert process.stdout is not None
    shown = ""
    while not shown.endswith("you"):
        shown += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
