"""The command line of a flow, read before Prefect, MLflow and torch are loaded, which takes ten seconds."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from flows.parameters import ExportParameters, PromotionParameters, RejectionParameters, RunParameters
from hass_core.config import COMMAND_LINE
from hass_core.errors import USER_ERROR, ConfigError, sentence_of
from hass_core.settings import validated

OWN_PARAMETERS = {  # the others have none
    "export_draft": ExportParameters,
    "promote_draft": PromotionParameters,
    "reject_draft": RejectionParameters,
}
COMMANDS = (
    "evaluate_draft", "export_draft", "extract_features", "generate_data", "promote_draft", "reject_draft", "retrain",
    "rollback_draft", "train_draft", "watch_drafts",
)  # fmt: skip
PRESET = "smollm2-cpu"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help says more")


def read(flow: str, arguments: Sequence[str]) -> RunParameters:
    """The flow's parameters, with every setting checked. Raises ConfigError naming a wrong one."""
    kind = OWN_PARAMETERS.get(flow, RunParameters)
    own = kind.model_fields.keys() - RunParameters.model_fields.keys()
    parser = _Parser(prog=f"python -m flows.{flow}", description="Exit status: 0 done, 2 your mistake, 130 Ctrl-C.")
    parser.add_argument("preset", nargs="?", help=f"preset or .toml file, first; {PRESET} where it is left out")
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("-c", "--config", help="the same as PRESET")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="a change")
    names = f"a parameter of this flow: {', '.join(sorted(own))}" if own else argparse.SUPPRESS
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help=names)
    options = parser.parse_intermixed_args(arguments)
    words = [options.preset, *options.changes] if options.preset else []
    preset = words.pop(0) if words and "=" not in words[0] else None
    if preset and options.config:
        raise ConfigError(f"two presets: {preset} and {options.config}; give one")
    changes = [*words, *options.set, *options.parameter]
    given = dict(change.split("=", 1) for change in changes if change.partition("=")[0] in own)
    rest = [change for change in changes if change.partition("=")[0] not in own]
    values = {"preset": preset or options.config or PRESET, "overrides": rest, **given}
    run = validated(kind, values, f"flows.{flow}")
    run.config(COMMAND_LINE)
    return run


def check(flow: str, arguments: Sequence[str]) -> None:
    """Exit with 2 and one sentence where `read` finds a mistake, or `flow` is no command and would run nothing."""
    try:
        if flow not in COMMANDS:
            raise ConfigError(f"flows.{flow} is no command of a terminal; these are: {', '.join(COMMANDS)}")
        read(flow, arguments)
    except Exception as error:
        complain(error)


def complain(error: Exception) -> NoReturn:
    """Tell a user's mistake and exit with 2; raise again what is none."""
    sentence = sentence_of(error)
    if sentence is None:
        raise error
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(USER_ERROR)
