"""What a target's chat template and tokenizer make of messages: text, token ids, and text again."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content; and what `hass_core.data.messages` adds
Tools = Sequence[Mapping[str, Any]]


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
) -> str:
    """The template's text. Raises SkippedConversation when the template refuses these messages."""
    given: Any = [dict(tool) for tool in tools] or None
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=given, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except RecursionError as error:
        raise SkippedConversation("nested too deep for the template") from error
    except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # it computes
        raise SkippedConversation(f"the template refuses: {error}") from error
    assert isinstance(text, str)
    return text


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
