"""`hass bench`: measure this machine. Each verb takes its module's options and prints one JSON line last."""

import runpy
import sys

import typer

app = typer.Typer(no_args_is_help=True)
MODULES = {
    "train": "hass_core.bench.training",
    "decode": "hass_core.bench.decoding",
    "features": "hass_core.bench.features",
}


def _add(verb: str, module: str) -> None:
    @app.command(
        verb,
        help=f"Same as `python -m {module}`.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def bench(context: typer.Context) -> None:
        sys.argv = [f"hass bench {verb}", *context.args]
        runpy.run_module(module, run_name="__main__")


for _verb, _module in MODULES.items():
    _add(_verb, _module)


@app.callback()
def _group() -> None:
    """Keeps the verbs sub-commands."""
