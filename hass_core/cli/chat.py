"""`hass chat`: talk to the target through a draft and watch how many tokens each cycle brings."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.text import Text

from hass_core.cli.common import console
from hass_core.cli.draft_address import default_draft, target_of
from hass_core.cli.options import DraftDefault, PromptTokens, TargetSource
from hass_core.config import SamplingConfig, TreeConfig
from hass_core.errors import ConfigError
from hass_core.settings import validated

if TYPE_CHECKING:
    from hass_core.data.templates import Message
    from hass_core.decoding.answers import Step, StopRule
    from hass_core.decoding.decoder import Decoder
    from hass_core.target_model.loader import Target

ACCEPTED, OWN = "green", "default"
HELP = "/plain switches the draft off and on, /t 0.7 sets the temperature; an empty line or Ctrl-D ends"


def chat(
    draft: DraftDefault = None,
    target: TargetSource = None,
    temperature: Annotated[float, typer.Option(help="0 = greedy")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have")] = 512,
    depth: Annotated[int, typer.Option(help="Levels of the draft tree")] = 3,
    top_k: Annotated[int, typer.Option(help="Children of a node")] = 4,
    nodes: Annotated[int, typer.Option(help="Tokens verified at once")] = 12,
    prompt_tokens: PromptTokens = None,
    plan: Annotated[bool, typer.Option(help="Choose the tree by measuring this machine first")] = False,
) -> None:
    """Chat with the target: accepted draft tokens in green, the target's own ones plain.

    While you chat, /plain switches the draft off and on, /t 0.7 sets the temperature; an empty line or Ctrl-D ends.

    Example: hass chat

    Example: hass chat models:/hass-draft-smollm2-135m@champion --temperature 0.7
    """
    tree = validated(TreeConfig, {"depth": depth, "top_k": top_k, "nodes": nodes}, "the draft tree")
    sampling = validated(SamplingConfig, {"temperature": temperature}, "sampling")
    chosen = default_draft(draft, target)
    source = target_of(chosen, target)
    from hass_core.cli.decoders import build_decoder
    from hass_core.decoding.answers import StopRule
    from hass_core.target_model.loader import load_target

    loaded = load_target(source)
    plain = build_decoder(loaded, None, None)
    drafting = build_decoder(loaded, chosen, None if plan else tree, prompt_tokens) if chosen else plain
    console.print(f"[dim]{HELP}[/]", highlight=False)
    talk = Talk(loaded, plain, drafting, sampling, StopRule.of(loaded), max_new_tokens)
    while said := _question():
        talk.hear(said)


@dataclass
class Talk:
    """A conversation under way."""

    target: "Target"
    plain: "Decoder"
    drafting: "Decoder"
    sampling: SamplingConfig
    stop: "StopRule"
    max_new_tokens: int
    with_draft: bool = True
    history: "list[Message]" = field(default_factory=list)

    def hear(self, said: str) -> None:
        """Answer, or obey where it begins with a stroke."""
        if said.startswith("/"):
            console.print(f"[dim]{self._obey(*said.split())}[/]", highlight=False)
        else:
            self._answer(said)

    def _obey(self, order: str, *arguments: str) -> str:
        if order == "/plain" and not arguments:
            self.with_draft = not self.with_draft
            return "with the draft" if self.with_draft else "without the draft"
        if order == "/t" and len(arguments) == 1:
            try:
                self.sampling = validated(SamplingConfig, {"temperature": arguments[0]}, "/t")
            except ConfigError as error:
                return str(error)
            return f"temperature {self.sampling.temperature:g}"
        return HELP

    def _answer(self, said: str) -> None:
        self.history.append({"role": "user", "content": said})
        prompt = self._prompt()
        if len(prompt) >= self.target.context_tokens and len(self.history) > 1:
            console.print(
                "[dim]the conversation has become longer than the target's context: it begins anew[/]", soft_wrap=True
            )
            self.history = self.history[-1:]
            prompt = self._prompt()
        if len(prompt) >= self.target.context_tokens:
            self.history.clear()
            context = f"the target's context holds {self.target.context_tokens} with the answer"
            console.print(
                f"[dim]this has {len(prompt)} tokens, {context}: say it in fewer[/]", highlight=False, soft_wrap=True
            )
        else:
            self._show(prompt)

    def _prompt(self) -> list[int]:
        from hass_core.data.rendering import render, tokenize

        asked = render(self.target.tokenizer, self.history, add_generation_prompt=True, day=datetime.now())
        return tokenize(self.target.tokenizer, asked)

    def _show(self, prompt: list[int]) -> None:
        from hass_core.decoding.text import AnswerText

        decoder = self.drafting if self.with_draft else self.plain
        text = AnswerText(lambda ids: str(self.target.tokenizer.decode(ids, skip_special_tokens=True)))
        shown = Shown()
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for step in decoder.stream(prompt, self.sampling, self.max_new_tokens, self.stop):
                drafted, own = step.token_ids[:-1], step.token_ids[-1:]
                shown.add(step, text.add(drafted, None) if drafted else "", text.add(own, step.finished))
                if console.is_terminal:
                    live.update(shown.text(), refresh=True)
            live.update(shown.text(), refresh=True)
        if not console.is_terminal:  # there the display leaves its line open
            console.print()
        self.history.append({"role": "assistant", "content": text.shown})


@dataclass
class Shown:
    """An answer on the screen: its text in two colours, and below it how fast it comes."""

    answer: Text = field(default_factory=Text)
    tokens: int = 0
    cycles: int = 0
    seconds: float = 0.0

    def add(self, step: "Step", drafted: str, own: str) -> None:
        """One cycle more."""
        self.answer.append(drafted, style=ACCEPTED)
        self.answer.append(own, style=OWN)
        self.tokens += len(step.token_ids)
        self.cycles += 1
        self.seconds += step.timing.total_seconds

    def text(self) -> Text:
        """What to show now."""
        rate = self.tokens / max(self.seconds, 1e-9)
        told = f"{self.tokens} tokens, {rate:.0f} tokens/s, τ {self.tokens / max(1, self.cycles):.2f} tokens a cycle"
        return Text.assemble(self.answer, "\n", (told, "dim"))


def _question() -> str:
    """What the user says; nothing when the input ends."""
    try:
        return console.input("[bold]you[/] ").strip()
    except EOFError:
        console.print()
        return ""
