"""`hass init`: settings for a model of one's own, as a commented file with what a run will cost."""

import glob
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hass_core.cli.common import show
from hass_core.cli.options import out_file, target_there
from hass_core.config import RunConfig, load_config, parse_config
from hass_core.errors import BadInput
from hass_core.settings import toml_value
from hass_core.target_model.source import portable, target_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SMALL = 2e9  # parameters: below, a preset of SmolLM2's fits, above one of Llama's
ENGINES_ASKED = ("vllm", "sglang", "eagle")
WIDTH = 116
FROM_THE_START = {  # on a machine without a GPU, where SmolLM2's preset continues from a draft
    "prompts": {"self_written": 150, "max_prompts": None},
    "responses": {"max_new_tokens": 160},
    "training": {"passes": 3, "lr_peak": 1e-3},
}

CONTEXT_SHARES = {  # of a target's context, at most
    "prompts": {"max_prompt_tokens": 1 / 2},
    "responses": {"max_new_tokens": 1 / 2},
    "features": {"max_tokens_per_conversation": 1},
    "evaluation": {"max_new_tokens": 1 / 4},
}


def init(
    model: Annotated[str, typer.Argument(help="Hugging Face id, folder, GGUF or package:NAME", callback=target_there)],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", "-p", help="Your prompts or logs: files, folders, patterns")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; default: the model's name", callback=out_file)
    ] = None,
) -> None:
    """Write a commented settings file for any model: sized for this machine, with a forecast of memory, disk and time.

    Example: hass init Qwen/Qwen3-8B --prompts logs.jsonl
    """
    name = target_name(model)
    out = out or Path(f"{name}.toml")
    if out.exists():
        raise BadInput(f"{out} is there already; name another file with --out")
    missing = [file for file in prompts or [] if not _may_be_there(file)]
    if missing:
        raise BadInput(f"{missing[0]}: no such file, folder or pattern; check --prompts")
    values = _values(model, name, prompts or [])
    out.write_text(_text(model, out, values), encoding="utf-8")
    load_config(out)  # what was written is what is read
    show(f"wrote {out}. To look at what it costs: hass forecast {out}")
    start = "make retrain PRESET=" if Path("Makefile").is_file() else "python -m flows.retrain "
    show(f"To start it: {start}{out}")


def _may_be_there(file: str) -> bool:
    """Whether prompts are there, or lie elsewhere."""
    return "://" in file or bool(glob.glob(str(Path(file).expanduser()), recursive=True)) or Path(file).exists()


def _values(model: str, name: str, prompts: list[str]) -> dict[str, Any]:
    """Settings for the model's size and this machine."""
    from hass_core.forecast.ready import present_gpus
    from hass_core.forecast.shape import shape_of
    from hass_core.presets import read_settings

    config = _looked_at(model)
    engines = _engines(config)
    try:
        parameters = shape_of(model).target
    except BadInput:  # a GGUF: small enough to be tried here
        parameters = 0
    gpu = bool(present_gpus())
    values = read_settings("llama-3.1-8b" if parameters >= SMALL else "smollm2-gpu" if gpu else "smollm2-cpu")
    own = {"name": name, "target": {"source": portable(model)}}
    values = own | {section: dict(rest) for section, rest in values.items() if section not in own}
    given = [file if "://" in file else str(Path(file).expanduser().absolute()) for file in prompts]
    values["prompts"] = {"builtin": not given, "files": given} | values["prompts"]
    draft = {key: value for key, value in values.pop("draft", {}).items() if key != "warm_start"}
    if draft.get("vocab_size", 0) >= config.get_text_config().vocab_size:
        del draft["vocab_size"]  # all of the target's tokens are fewer
    if not gpu and parameters < SMALL:
        for section, changes in FROM_THE_START.items():
            values[section] = {name: value for name, value in (values[section] | changes).items() if value is not None}
    _bound(values, config.get_text_config().max_position_embeddings)
    return values | ({"draft": draft} if draft else {}) | {"promotion": {"engines": engines}}


def _bound(values: dict[str, Any], context: int) -> None:
    """Keep what the settings say, or would say by default, within the target's `context` in tokens."""
    for section, settings in CONTEXT_SHARES.items():
        kind: Any = RunConfig.model_fields[section].annotation
        for name, share in settings.items():
            longest = max(16, int(share * context))
            if values.get(section, {}).get(name, kind.model_fields[name].default) > longest:
                values.setdefault(section, {})[name] = longest


def _looked_at(model: str) -> "PretrainedConfig":
    """The target's configuration; of a preset's target the recorded one, so that nothing need be fetched.

    Raises TargetError or TemplateError for one that is not known, or that no draft can be trained for: without a
    tokenizer, a chat template or, in a folder, its weights.
    """
    from hass_core.presets import recorded_shapes
    from hass_core.target_model.hub import check_hub
    from hass_core.target_model.source import gguf_of

    if model not in recorded_shapes() and not gguf_of(model) and not Path(model).expanduser().is_dir():
        check_hub(model)  # before torch loads: a name is easily misspelt
    from transformers import AutoConfig

    from hass_core.target_model.files import resolve_source, weight_files
    from hass_core.target_model.loader import failures_named, load_words

    with failures_named(model):
        if recorded := recorded_shapes().get(model):
            kind = recorded["config"]
            return AutoConfig.for_model(**kind)
        folder = resolve_source(model)
        config, _ = load_words(folder, model, {})
        if Path(folder).is_dir():
            weight_files(folder, config)
        return config


def _engines(config: "PretrainedConfig") -> list[str]:
    """The engines that will hold a draft of this target's shape."""
    from hass_core.draft_model.engines import ENGINES, unheld
    from hass_core.draft_model.family import draft_architecture

    draft = draft_architecture(config)
    return [name for name in ENGINES_ASKED if not any(True for _ in unheld(ENGINES[name], draft))]


def _text(model: str, out: Path, values: dict[str, Any]) -> str:
    """The file: a head with the forecast, then the tables, each setting with its description."""
    from hass_core.forecast.ready import announcement

    head = [f"Settings of a retraining for {model}, by `hass init`. Any line may be changed or left out."]
    head += ["All settings there are: docs/settings.md.", "", f"Forecast (`hass forecast {out}` says more):"]
    head += [f"  {line}" for line in announcement(parse_config(json.loads(json.dumps(values))))]
    lines = ["#" if not line else f"# {line}" for line in head] + [f"name = {toml_value(values['name'])}"]
    for section, settings in values.items():
        if isinstance(settings, dict):
            lines += ["", f"[{section}]", *_settings(section, settings)]
    return "\n".join(lines) + "\n"


def _settings(section: str, settings: dict[str, Any]) -> list[str]:
    kind: Any = RunConfig.model_fields[section].annotation
    lines = []
    for name, value in settings.items():
        about = kind.model_fields[name].description
        lines += textwrap.wrap(about or "", WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"{name} = {toml_value(value)}")
    return lines
