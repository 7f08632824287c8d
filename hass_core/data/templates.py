"""From a conversation to token ids and a loss mask, by rendering prefixes with the target's own chat template.

For an assistant turn i, `prefix` = messages before i with the generation prompt (what the target saw when it began to
answer) and `upto` = messages through i. What `upto` has beyond `prefix` is the answer. No marker is ever searched for
by its text, so any template works; what a template does to a conversation is either reproduced or refused:

- the mask ends with the end-of-turn token; what the template writes after it (a line break) is not supervised;
- text the template puts between prefix and answer (an empty thinking block) is not supervised;
- an earlier turn that the template rewrites later (thinking removed) is context only: its tokens as rendered were
  never generated;
- the token ids that the target really generated are used where they are known, even when the tokenizer would cut
  the same text otherwise;
- an answer that ended with another of the target's end tokens than the template writes is followed by the template's,
  as an engine would send the conversation back.

Every mask is checked by decoding it.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from hass_core.data.rendering import (
    Message,
    SkippedConversation,
    Tools,
    decode,
    next_role_token,
    render,
    special_token_ids,
    special_tokens,
    tokenize,
)
from hass_core.errors import TemplateError


@dataclass(frozen=True)
class Encoded:
    """A conversation as the target sees it, up to the end of its last answer."""

    token_ids: list[int]
    loss_mask: list[int]  # 1 = the token belongs to an answer, its end-of-turn token included


@dataclass(frozen=True)
class _Span:
    """One answer in the final text, in characters: the prompt ends at `start`, the answer is [content, end)."""

    turn: int
    start: int
    content: int  # behind `start` where the template writes something of its own first
    end: int


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer_token_ids: Sequence[Sequence[int]] | None = None,
    tools: Tools = (),
) -> Encoded:
    """Token ids and loss mask of one conversation, through its last answer.

    `answer_token_ids`: for each assistant message the ids the target generated, ending with an end-of-turn token if
    and only if it finished; an empty list means unknown. They replace the tokenizer's own cut of the same text.
    Raises SkippedConversation (with a reason) or TemplateError (the target has no template).
    """
    answers = _answers_by_turn(messages, answer_token_ids)
    if not answers:
        raise SkippedConversation("no assistant turn")
    last = max(answers)
    text = _closed(tokenizer, messages[: last + 1], tools)
    spans = _answer_spans(tokenizer, messages, text, list(answers), tools)
    encoded = _join(tokenizer, text, spans, answers)
    _check(tokenizer, encoded, [messages[span.turn] for span in spans])
    return encoded


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer_token_ids: Sequence[Sequence[int]] | None = None,
    tools: Tools = (),
) -> list[int]:
    """Token ids of a conversation ending with a user or tool turn, with the opening of the answer to come.

    Earlier answers keep their generated ids where given, as in `encode_conversation`.
    """
    text = render(tokenizer, messages, True, tools)
    answers = _answers_by_turn(messages, answer_token_ids)
    if not any(answers.values()):
        return tokenize(tokenizer, text)
    spans = _answer_spans(tokenizer, messages, text, list(answers), tools, last_must_stand=False)
    return _join(tokenizer, text, spans, answers, with_tail=True).token_ids


def is_prompt_longer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], limit: int, tools: Tools = ()
) -> bool:
    """Whether `encode_prompt` gives more than `limit` tokens; short texts and huge ones are told untokenized."""
    text = render(tokenizer, messages, True, tools)
    if unicodedata.is_normalized("NFC", text) and has_token_per_byte(tokenizer):
        if len(text.encode()) <= limit:
            return False
        if len("".join(text.split()).encode()) > limit * longest_token(tokenizer):  # some tokens swallow white space
            return True
    return len(tokenize(tokenizer, text)) > limit


@lru_cache(maxsize=16)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """No token of a byte-level tokenizer stands for more bytes than this."""
    return max(len(token.encode()) for token in tokenizer.get_vocab())


@lru_cache(maxsize=16)
def has_token_per_byte(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when text in Unicode's NFC form provably gives no more tokens than it has bytes.

    That is so for byte-level BPE: each byte becomes one symbol, and merging lessens them. The normalizer named leaves
    such text as it is, and the cuts named add no symbol. Any other part may add some, a prefix space for example.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    cuts = _flat(parts["pre_tokenizer"], "pretokenizers")
    byte_level = [cut for cut in cuts if cut["type"] == "ByteLevel"]
    return (
        parts["model"]["type"] == "BPE"
        and not parts["model"]["byte_fallback"]
        and all(step["type"] == "NFC" for step in _flat(parts["normalizer"], "normalizers"))
        and all(cut["type"] in ("ByteLevel", "Digits", "Split") and cut.get("behavior") != "Removed" for cut in cuts)
        and [cut["add_prefix_space"] for cut in byte_level] == [False]
    )


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], finished: bool = True, tools: Tools = ()
) -> list[int]:
    """The tokenizer's own ids of the last message, an answer; without its end-of-turn token if not `finished`.

    Reasoning before the answer (`reasoning_content`) belongs to it. Raises SkippedConversation.
    """
    encoded = encode_conversation(tokenizer, messages, tools=tools)
    start = len(encoded.loss_mask)
    while start and encoded.loss_mask[start - 1]:
        start -= 1
    ids = encoded.token_ids[start:]
    return ids if finished or ids[-1] not in special_token_ids(tokenizer) else ids[:-1]


def _closed(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> str:
    """The text of a conversation that ends with an answer, through the token that ends it."""
    return render(tokenizer, messages, tools=tools) + (next_role_token(tokenizer) or "")


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: none, one, or those of a Sequence."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _flat(inner, key)] if part["type"] == "Sequence" else [part]


def _answers_by_turn(
    messages: Sequence[Message], answer_token_ids: Sequence[Sequence[int]] | None
) -> dict[int, list[int]]:
    """Generated ids by turn; a tool call that the prompt gave is no answer but part of the question."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    given = [[] for _ in turns] if answer_token_ids is None else answer_token_ids
    if len(given) != len(turns):
        raise ValueError(f"{len(turns)} assistant messages but {len(given)} lists of answer token ids")
    pairs = zip(turns, given, strict=True)
    return {turn: list(ids) for turn, ids in pairs if ids or not messages[turn].get("tool_calls")}


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    turns: list[int],
    tools: Tools,
    last_must_stand: bool = True,
) -> list[_Span]:
    """Where each answer stands in `text`; earlier ones that the template rewrote there are left out."""
    spans: list[_Span] = []
    for turn in turns:
        prefix = render(tokenizer, messages[:turn], True, tools)
        upto = _closed(tokenizer, messages[: turn + 1], tools)
        must_stand = last_must_stand and turn == turns[-1]
        if not upto.startswith(prefix):
            if must_stand:
                raise SkippedConversation("the template's prompt is not a prefix of the conversation")
            continue
        content, end = _locate(tokenizer, upto, len(prefix), messages[turn])
        if text.startswith(upto[:end]):
            spans.append(_Span(turn, len(prefix), content, end))
    return spans


def _locate(tokenizer: PreTrainedTokenizerBase, upto: str, start: int, answer: Message) -> tuple[int, int]:
    """Characters of the answer with its end token inside `upto[start:]`. Raises SkippedConversation."""
    body = answer["content"].strip()
    if not body:
        raise SkippedConversation("empty answer")
    thought = answer.get("reasoning_content", "").strip()
    begin = upto.find(thought, start)
    if begin < 0:
        raise SkippedConversation("the template has no place for the answer's reasoning")
    begin += len(thought)
    found = upto.find(body, begin)
    if found < 0:
        found, after = begin, _end_of_reformatted(upto, begin, body)
    else:
        after = found + len(body)
    if thought or not upto[start:found].strip():  # white space before it was generated too, and so was reasoning
        found = start
    ends = [(at, at + len(token)) for token in special_tokens(tokenizer) if (at := upto.find(token, after)) >= 0]
    return found, min(ends)[1] if ends else after


def _end_of_reformatted(upto: str, start: int, body: str) -> int:
    """End of `body` in `upto[start:]` where the template changed only its white space."""
    wanted = "".join(body.split())
    position, matched = start, 0
    while matched < len(wanted) and position < len(upto):
        if upto[position].isspace():
            position += 1
        elif upto[position] == wanted[matched]:
            position, matched = position + 1, matched + 1
        else:
            break
    if matched < len(wanted):
        raise SkippedConversation("the template rewrites the answer")
    return position


def _join(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: list[_Span],
    answers: dict[int, list[int]],
    with_tail: bool = False,
) -> Encoded:
    """Alternate the tokens between answers (mask 0) with the answers' tokens (mask 1)."""
    ids: list[int] = []
    mask: list[int] = []

    def put(tokens: list[int], flag: int) -> None:
        ids.extend(tokens)
        mask.extend([flag] * len(tokens))

    before: list[int] = []  # the tokenizer's cut of the text up to the end of the previous answer
    closing: list[int] = []  # the end token that the template wrote after an answer that has none, or another
    for span in spans:
        given = answers[span.turn]
        head = tokenize(tokenizer, text[: span.start if given else span.content])
        if head[: len(before)] != before:
            raise SkippedConversation("an answer ends inside a token")
        put(closing + head[len(before) :], 0)
        if given and span is spans[-1] and not with_tail:
            put(given, 1)  # how the tokenizer would cut it matters only to text behind it
            break
        through = tokenize(tokenizer, text[: span.end])
        if not given and through[: len(head)] != head:
            raise SkippedConversation("an answer begins inside a token")
        special = special_token_ids(tokenizer)
        closing = through[-1:] if given and through[-1] in special and given[-1] != through[-1] else []
        own = given[:-1] if closing and given[-1] in special else given
        put(own if given else through[len(head) :], 1)
        before = through
    if with_tail:
        put(closing + tokenize(tokenizer, text)[len(before) :], 0)
    return Encoded(ids, mask)


def _check(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, answers: list[Message]) -> None:
    """Decode the supervised runs and compare them with the answers. Raises SkippedConversation."""
    if not any(encoded.loss_mask):
        raise SkippedConversation("nothing is supervised")
    if all(encoded.loss_mask):
        raise SkippedConversation("everything is supervised")
    special = special_token_ids(tokenizer)
    runs = supervised_runs(encoded)
    if len(runs) != len(answers):
        raise SkippedConversation("two answers without a turn between them")
    for run, answer in zip(runs, answers, strict=True):
        if not _is_answer(decode(tokenizer, run[:-1] if run[-1] in special else run), answer):
            raise SkippedConversation("the mask does not decode to the answer")


def _is_answer(text: str, answer: Message) -> bool:
    """Whether a text is this answer; with its reasoning, the template's own words may stand around that."""
    text, content = _letters(text), _letters(answer["content"])
    if thought := answer.get("reasoning_content"):
        return text.endswith(content) and _letters(thought) in text
    return text == content


def _letters(text: str) -> str:
    """Text without white space, in the composed Unicode form that some tokenizers (Qwen) impose."""
    return unicodedata.normalize("NFC", "".join(text.split()))


def supervised_runs(encoded: Encoded) -> list[list[int]]:
    """The token ids of each unbroken run of supervised tokens."""
    runs: list[list[int]] = []
    previous = 0
    for token, flag in zip(encoded.token_ids, encoded.loss_mask, strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return runs


def check_template(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] | None = None) -> None:
    """Prove the template on a small conversation before any long work. Raises TemplateError.

    `eos_token_ids`: the tokens at which the target stops, to judge an answer that only the next role's token ends.
    """
    if not tokenizer.chat_template:
        raise TemplateError("the target has no chat template; put a chat_template.jinja into its folder")
    user: Message = {"role": "user", "content": "Name two primary colours."}
    answer: Message = {"role": "assistant", "content": "Red and blue are primary colours."}
    try:
        single = encode_conversation(tokenizer, [user, answer])
        encode_conversation(tokenizer, [user, answer, user, answer])
    except SkippedConversation as problem:
        raise TemplateError(
            f"the target's chat template gives no sound loss mask: {problem.reason}; correct chat_template.jinja in "
            "the target's folder so that a conversation begins with its own generation prompt"
        ) from problem
    if single.token_ids[-1] not in special_token_ids(tokenizer):
        raise TemplateError(
            "the target's chat template writes no end-of-turn token after an answer, so an answer would never end; "
            "add the end token to chat_template.jinja in the target's folder"
        )
    token = next_role_token(tokenizer)
    if token and eos_token_ids is not None and single.token_ids[-1] not in eos_token_ids:
        raise TemplateError(
            f"the target's chat template closes no turn: {token}, which opens the user's next turn, is what follows an "
            f"answer, and the target does not stop at it; where it was trained to, add {single.token_ids[-1]} to "
            "eos_token_id in its generation_config.json"
        )
