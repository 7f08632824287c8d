"""What a target's chat template and tokenizer make of messages: text, token ids, and text again."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content; and what `hass_core.data.messages` adds
Tools = Sequence[Mapping[str, Any]]


CALL_FOR_DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
TODAY = datetime(2024, 7, 26)  # told to templates that ask for the day; Llama 3's falls back on it too


class SkippedConversation(Exception):
    """This conversation cannot be given a sound mask; `reason` is a short fixed text, good for counting."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Tools = (),
    day: datetime = TODAY,
) -> str:
    """The template's text. Raises SkippedConversation when the template refuses these messages.

    `day` is what a template is told that asks for it (`strftime_now`): a fixed one, so that answers, features and
    questions of one pipeline are rendered alike whenever a stage runs. Who answers people gives their day.
    """
    given: Any = [dict(tool) for tool in tools] or None
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=given,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=_dated(tokenizer, day, given),
        )
    except RecursionError as error:
        raise SkippedConversation("nested too deep for the template") from error
    except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # it computes
        raise SkippedConversation(f"the template refuses: {error}") from error
    assert isinstance(text, str)
    return text


def template_date(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """For the key of a stage: the day, where the template asks for it."""
    return {"today": TODAY.date().isoformat()} if "strftime_now" in str(tokenizer.chat_template) else {}


def _dated(tokenizer: PreTrainedTokenizerBase, day: datetime, tools: Any) -> str | None:
    """The template with a certain day's text in place of its calls for the present one; None where it has none.

    transformers lets no function of ours into a template, so the calls are replaced.
    """
    if not template_date(tokenizer):
        return None
    return CALL_FOR_DAY.sub(lambda call: repr(day.strftime(call[2])), tokenizer.get_chat_template(tools=tools))


@lru_cache(maxsize=16)
def next_role_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that ends an answer by opening the user's next turn; None where answers have an end of theirs.

    GLM's template closes no turn: the model is trained to write the next role's token, and stops there.
    """
    answer = "Red and blue."
    messages = [{"role": "user", "content": "Name two."}, {"role": "assistant", "content": answer}]
    try:
        text, longer = render(tokenizer, messages), render(tokenizer, [*messages, messages[0]])
    except SkippedConversation:
        return None
    end = text.rfind(answer) + len(answer)
    known = special_tokens(tokenizer)
    if any(token in text[end:] for token in known) or not longer.startswith(text):
        return None
    return max((token for token in known if longer.startswith(token, len(text))), key=len, default=None)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of rendered text: special tokens are parsed, none is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=16)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → id of every special token (end-of-turn tokens are among them)."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | {text: i for text, i in named if i is not None}


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of every special token."""
    return frozenset(special_tokens(tokenizer).values())


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The exact text of token ids, special tokens included."""
    words: Any = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return words
