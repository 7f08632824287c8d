"""Every command of docs/ and CONTRIBUTING.md is one that its program takes; those of the README are run, see
test_readme.py. What is read here is the verb, each option and each setting; what runs nowhere stands in NOT_RUN.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from flows.arguments import read
from hass_core.cli.app import app
from hass_core.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES = [page for page in PAGES if page.name != "results.md"]  # records of what was run, at the commit that each names
PROGRAMS = ("hass", "make", "python", "prefect")
NOT_RUN = {  # the first word of a command, and why no test reads the rest
    ".": "activates the environment that `make install` makes",
    "$C": "containers: no engine is here; tests/infra/test_compose.py reads compose.yaml",
    "accelerate": "tests/training/test_division.py starts the same module by torch's launcher",
    "curl": "tests/serving/test_server.py asks the same over HTTP",
    "docker": "containers: no engine is here",
    "export": "keys of the reader's own",
    "vllm": "needs vLLM, in an environment of its own (CONTRIBUTING.md)",
    "~/vllm/bin/pip": "fetches vLLM, some gigabytes",
    "~/speculators/bin/pip": "fetches another project to compare with",
    "python3": "makes an environment",
    "hf": "fetches from the hub",
    "kubectl": "needs a cluster; tests/infra reads the files",
    "git": "the reader's own copy",
    "pip": "installs",
    "HASS_VLLM_PYTHON=~/vllm/bin/python": "needs vLLM",
}


def commands() -> list[tuple[str, str]]:
    """(page, command) of all blocks of code: lines that end in a backslash are joined, remarks are cut."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^```(?:bash|sh|)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        indented = re.findall(r"(?<=\n\n)(?:    \S.*\n?)+", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M))
        lines = [line.strip() for block in fenced + indented for line in block.splitlines()]
        found += [(page.name, line) for line in lines if _first(line) in (*PROGRAMS, *NOT_RUN)]
    return found


def _first(line: str) -> str:
    return line.split(maxsplit=1)[0] if line else ""


def words_of(line: str) -> list[str]:
    """As a shell splits it; remarks are cut, and what it runs in the background, or a pipe takes, ends it."""
    words = shlex.split(line, comments=True)
    return words[: min((words.index(end) for end in ("&", "|", "&&", ">") if end in words), default=len(words))]


COMMANDS = commands()


def of(program: str) -> list[str]:
    return sorted({line for _, line in COMMANDS if _first(line) == program})


def test_the_pages_have_commands_of_every_program():
    assert len(COMMANDS) > 50
    assert all(of(program) for program in PROGRAMS)


def test_no_block_has_a_command_of_another_program():
    """A line of a block that begins as a command does, by a word of the shell's, is read by a test or listed."""
    known = {*PROGRAMS, *NOT_RUN}
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                assert not line.strip() or line.startswith("#") or _first(line) in known, f"{page.name}: {line}"


@pytest.mark.parametrize("line", of("hass"))
def test_a_command_of_hass_has_a_verb_and_options_that_there_are(line):
    command = typer.main.get_command(app)
    words = words_of(line)[1:]
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    assert not getattr(command, "commands", {}), f"{line}: no such verb"
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    settings = []
    for place, word in enumerate(words):
        if re.match(r"--?[A-Za-z]", word):
            assert word.partition("=")[0] in options | {"--help"}, f"{line}: no option {word}"
        if word in ("-s", "--set"):
            settings.append(words[place + 1])
    load_config("smollm2-cpu", settings)


@pytest.mark.parametrize("line", [line for line in of("python") if "flows." in line])
def test_a_flow_takes_its_settings(line):
    module, *rest = words_of(line)[2:]
    read(module.removeprefix("flows."), ["smollm2-cpu" if word.endswith(".toml") else word for word in rest])


@pytest.mark.parametrize("line", of("make"))
def test_a_target_of_make_is_there_and_takes_its_settings(line):
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    given = dict(word.split("=", 1) for word in words_of(line)[1:] if "=" in word)
    assert {word for word in words_of(line)[1:] if "=" not in word} <= {*targets}, line
    assert given.keys() <= {*variables}, line
    preset = given.get("PRESET", "smollm2-cpu")
    read("retrain", ["smollm2-cpu" if preset.endswith(".toml") else preset, *shlex.split(given.get("SET", ""))])


@pytest.mark.parametrize("line", [line for line in of("prefect") if "deployment run" in line])
def test_a_deployment_is_one_of_prefect_yaml(line):
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flow, name = re.findall(r"'([\w-]+)/([\w-]+)'", line)[0]
    entries = {(Path(d["entrypoint"].partition(":")[0]).stem.replace("_", "-"), d["name"]) for d in deployments}
    assert (flow, name) in entries
