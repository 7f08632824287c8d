"""Golden masks of the real chat templates: ⟦…⟧ marks what is supervised."""

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from hass_core.data.rendering import render
from hass_core.data.templates import (
    Encoded,
    SkippedConversation,
    answer_tokens,
    check_template,
    decode,
    encode_conversation,
    encode_prompt,
    has_token_per_byte,
    is_prompt_longer,
    longest_token,
    special_token_ids,
    supervised_runs,
    tokenize,
)
from hass_core.errors import TemplateError
from tests.data.families import SPECIAL, family_tokenizer


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("Name a colour."), assistant("Red is one. \n"), user("Thank you!"), assistant("  What else?")]
WITH_SYSTEM = [system("Be brief."), user("Name a colour."), assistant("Blue")]
THINKING = [
    user("Name a colour."),
    assistant("<think>\nhm\n</think>\n\nRed"),
    user("else?"),
    assistant("<think>\nfour\n</think>\n\nBlue"),
]
WITH_TOOL = [user("Q"), assistant("call()"), {"role": "tool", "content": "4"}, assistant("four")]

GOLDEN = {
    ("llama-2", "two turns"): (
        "<s>[INST] Name a colour. [/INST]⟦Red is one. </s>⟧<s>[INST] Thank you! [/INST]⟦What else? </s>⟧"
    ),
    ("llama-2", "system"): "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a colour. [/INST]⟦Blue </s>⟧",
    ("mistral", "two turns"): (
        "<s>[INST] Name a colour. [/INST]⟦Red is one. \n</s>⟧[INST] Thank you! [/INST]⟦ What else?</s>⟧"
    ),
    ("llama-3", "two turns"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Red is one.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nThank you!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦What else?<|eot_id|>⟧"
    ),
    ("llama-3", "tool"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦call()<|eot_id|>⟧"
        "<|start_header_id|>tool<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦four<|eot_id|>⟧"
    ),
    ("qwen2", "two turns"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Red is one. \n<|im_end|>⟧\n<|im_start|>user\nThank you!<|im_end|>\n"
        "<|im_start|>assistant\n⟦  What else?<|im_end|>⟧"
    ),
    ("qwen3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Blue<|im_end|>⟧"
    ),
    ("qwen3", "thinking"): (
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nRed<|im_end|>\n"
        "<|im_start|>user\nelse?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nfour\n</think>\n\nBlue<|im_end|>⟧"
    ),
    ("qwen3", "tool"): (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\ncall()<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦four<|im_end|>⟧"
    ),
    ("smollm2", "two turns"): (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n⟦Red is one. \n<|im_end|>⟧\n"
        "<|im_start|>user\nThank you!<|im_end|>\n<|im_start|>assistant\n⟦  What else?<|im_end|>⟧"
    ),
    ("smollm2", "leading line break"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n⟦\nBlue<|im_end|>⟧"
    ),
}
CONVERSATIONS = {
    "two turns": TWO_TURNS,
    "system": WITH_SYSTEM,
    "leading line break": [*WITH_SYSTEM[:2], assistant("\nBlue")],
    "thinking": THINKING,
    "tool": WITH_TOOL,
}


def marked(tokenizer, encoded: Encoded) -> str:
    """The decoded conversation with its supervised runs in ⟦⟧."""
    pairs = zip(encoded.token_ids, encoded.loss_mask, strict=True)
    text = ""
    for flag, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        words = decode(tokenizer, [token for token, _ in run])
        text += f"⟦{words}⟧" if flag else words
    return text


@pytest.mark.parametrize(("family", "name"), GOLDEN, ids=lambda value: value.replace(" ", "-"))
def test_supervises_exactly_the_answer_and_its_end_token(family, name):
    tokenizer = family_tokenizer(family)
    assert marked(tokenizer, encode_conversation(tokenizer, CONVERSATIONS[name])) == GOLDEN[family, name]


@pytest.mark.parametrize("family", SPECIAL)
def test_tokens_are_those_of_the_rendered_conversation(family):
    tokenizer = family_tokenizer(family)
    encoded = encode_conversation(tokenizer, TWO_TURNS)
    whole = tokenize(tokenizer, tokenizer.apply_chat_template(TWO_TURNS, tokenize=False))
    assert whole[: len(encoded.token_ids)] == encoded.token_ids
    assert encoded.token_ids[-1] in special_token_ids(tokenizer)


@pytest.mark.parametrize("family", SPECIAL)
def test_the_prompt_is_what_stands_before_the_answer(family):
    tokenizer = family_tokenizer(family)
    encoded = encode_conversation(tokenizer, TWO_TURNS[:2])
    prompt = encode_prompt(tokenizer, TWO_TURNS[:1])
    assert encoded.token_ids[: len(prompt)] == prompt
    assert not any(encoded.loss_mask[: len(prompt)])


def test_an_earlier_answer_whose_thinking_the_template_removes_is_not_supervised():
    encoded = encode_conversation(family_tokenizer("qwen3"), THINKING)
    assert len(supervised_runs(encoded)) == 1


def split_in_letters(tokenizer, text: str) -> list[int]:
    """A cut of the text that the tokenizer itself would not choose."""
    ids = [token for letter in text for token in tokenize(tokenizer, letter)]
    assert ids != tokenize(tokenizer, text)
    return ids


@pytest.mark.parametrize("family", ["qwen2", "smollm2", "llama-3"])
def test_generated_token_ids_replace_the_tokenizers_own_cut(family):
    tokenizer = family_tokenizer(family)
    end = tokenizer.eos_token_id
    answers = [[*split_in_letters(tokenizer, "Red is one."), end], [*split_in_letters(tokenizer, "What else?"), end]]
    messages = [user("Name a colour."), assistant("Red is one."), user("Thank you!"), assistant("What else?")]
    encoded = encode_conversation(tokenizer, messages, answers)
    assert supervised_runs(encoded) == answers
    assert decode(tokenizer, encoded.token_ids) == decode(tokenizer, encode_conversation(tokenizer, messages).token_ids)


def test_generated_ids_are_kept_where_the_tokenizer_would_merge_them_with_the_prompt():
    tokenizer = family_tokenizer("qwen2")  # the prompt ends with a line break, the answer begins with one
    messages = [user("Name a colour."), assistant("\nBlue")]
    with pytest.raises(SkippedConversation, match="an answer begins inside a token"):
        encode_conversation(tokenizer, messages)
    answer = [*tokenize(tokenizer, "\nBlue"), tokenizer.eos_token_id]
    encoded = encode_conversation(tokenizer, messages, [answer])
    assert encoded.token_ids == encode_prompt(tokenizer, messages[:1]) + answer


@pytest.mark.parametrize("family", ["qwen2", "llama-3"])
def test_the_end_token_after_a_truncated_answer_is_not_supervised(family):
    tokenizer = family_tokenizer(family)
    end = tokenizer.eos_token_id
    answers = [tokenize(tokenizer, "Red is"), [*tokenize(tokenizer, "Blue"), end]]
    messages = [user("Name a colour."), assistant("Red is"), user("Thank you!"), assistant("Blue")]
    encoded = encode_conversation(tokenizer, messages, answers)
    assert supervised_runs(encoded) == answers
    cut = encoded.token_ids.index(answers[0][-1], len(encode_prompt(tokenizer, messages[:1]))) + 1
    assert encoded.token_ids[cut] == end
    assert encoded.loss_mask[cut] == 0


def test_the_next_prompt_carries_the_generated_ids_of_earlier_answers():
    tokenizer = family_tokenizer("smollm2")
    answer = [*split_in_letters(tokenizer, "Red is one."), tokenizer.eos_token_id]
    messages = [user("Name a colour."), assistant("Red is one."), user("Thank you!")]
    prompt = encode_prompt(tokenizer, messages, [answer])
    first = encode_prompt(tokenizer, messages[:1])
    assert prompt[len(first) : len(first) + len(answer)] == answer
    assert decode(tokenizer, prompt) == decode(tokenizer, encode_prompt(tokenizer, messages))


REFUSALS = [
    ([user("Hello")], "no assistant turn"),
    ([user("Hello"), assistant(" \n")], "empty answer"),
]


@pytest.mark.parametrize(("messages", "reason"), REFUSALS)
def test_a_conversation_without_a_sound_mask_is_refused_with_its_reason(messages, reason):
    with pytest.raises(SkippedConversation) as refusal:
        encode_conversation(family_tokenizer("smollm2"), messages)
    assert refusal.value.reason == reason


def test_what_a_template_refuses_is_a_reason_to_skip():
    with pytest.raises(SkippedConversation, match="the template refuses: Conversation roles must alternate"):
        encode_conversation(family_tokenizer("mistral"), WITH_TOOL)


def with_template(template: str):
    """A SmolLM2-like tokenizer with another template."""
    tokenizer = family_tokenizer.__wrapped__("smollm2")
    tokenizer.chat_template = template
    return tokenizer


NEXT_ROLE_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role if m.role != 'assistant' else '' }}"
    "{{ '\n' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def test_an_answer_that_the_next_role_ends_is_supervised_through_its_token():
    tokenizer = with_template(NEXT_ROLE_ENDS)
    assert marked(tokenizer, encode_conversation(tokenizer, TWO_TURNS)) == (
        "<|im_start|>user\nName a colour.<|im_start|>⟦\nRed is one. \n<|im_start|>⟧user\nThank you!<|im_start|>"
        "⟦\n  What else?<|im_start|>⟧"
    )
    assert answer_tokens(tokenizer, TWO_TURNS)[-1] == tokenizer.bos_token_id
    assert answer_tokens(tokenizer, TWO_TURNS, finished=False)[-1] != tokenizer.bos_token_id


def test_generated_ids_that_end_with_the_next_role_are_not_doubled():
    tokenizer = with_template(NEXT_ROLE_ENDS)
    end = tokenizer.bos_token_id
    answers = [[*tokenize(tokenizer, "\nRed is"), end], [*tokenize(tokenizer, "\nBlue"), end]]
    messages = [user("Name a colour."), assistant("\nRed is"), user("Thank you!"), assistant("\nBlue")]
    encoded = encode_conversation(tokenizer, messages, answers)
    assert supervised_runs(encoded) == answers
    assert decode(tokenizer, encoded.token_ids) == (
        "<|im_start|>user\nName a colour.<|im_start|>\nRed is<|im_start|>user\nThank you!<|im_start|>\nBlue<|im_start|>"
    )
    prompt = encode_prompt(tokenizer, messages[:3], answers[:1])
    assert encoded.token_ids[: len(prompt)] == prompt


def test_an_answer_that_ended_otherwise_is_followed_by_the_templates_own_end():
    tokenizer = family_tokenizer("smollm2")
    red, blue = tokenize(tokenizer, "Red."), tokenize(tokenizer, "Blue.")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    messages = [user("Name a colour."), assistant("Red."), user("Thank you!"), assistant("Blue.")]
    encoded = encode_conversation(tokenizer, messages, [[*red, other], [*blue, other]])
    assert supervised_runs(encoded) == [red, [*blue, other]]
    assert decode(tokenizer, encoded.token_ids[:-1]) + "<|im_end|>\n" == render(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:3], [[*red, other]])
    assert encoded.token_ids[: len(prompt)] == prompt


def test_a_next_role_at_which_the_target_does_not_stop_is_refused_with_the_way_out():
    tokenizer = with_template(NEXT_ROLE_ENDS)
    check_template(tokenizer, [tokenizer.bos_token_id])
    with pytest.raises(TemplateError, match=r"closes no turn: <\|im_start\|>.* add 1 to eos_token_id in"):
        check_template(tokenizer, [tokenizer.eos_token_id])


THOUGHT = {"role": "assistant", "content": "Blue.", "reasoning_content": "Which one?"}


def test_reasoning_goes_where_the_template_puts_it_or_the_answer_is_skipped():
    tokenizer = family_tokenizer("qwen3")
    answer = decode(tokenizer, answer_tokens(tokenizer, [user("Name a colour."), THOUGHT]))
    assert answer == "<think>\nWhich one?\n</think>\n\nBlue.<|im_end|>"
    with pytest.raises(SkippedConversation, match="the template has no place for the answer's reasoning"):
        answer_tokens(family_tokenizer("smollm2"), [user("Name a colour."), THOUGHT])


def test_a_template_that_computes_wrongly_is_a_reason_to_skip():
    tokenizer = with_template("{{ messages[0]['content'] + 3 }}")
    with pytest.raises(SkippedConversation, match="the template refuses"):
        encode_prompt(tokenizer, [user("Name a colour.")])


BODY = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
BROKEN_TEMPLATES = [
    (BODY + "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}", "not a prefix of the conversation"),
    ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "the template rewrites the answer"),
    ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no end-of-turn token"),
    ("{{ messages[-1]['content'] if not add_generation_prompt else '' }}<|im_end|>", "not a prefix"),
]


@pytest.mark.parametrize(("template", "message"), BROKEN_TEMPLATES)
def test_a_template_without_a_sound_mask_is_refused_before_any_work(template, message):
    with pytest.raises(TemplateError, match=message):
        check_template(with_template(template))


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(TemplateError, match=r"no chat template; put a chat_template\.jinja"):
        check_template(with_template(""))


@pytest.mark.parametrize("family", SPECIAL)
def test_the_real_templates_pass_the_check(family):
    check_template(family_tokenizer(family))


@pytest.mark.parametrize("family", SPECIAL)
def test_only_byte_level_tokenizers_are_known_to_give_no_more_tokens_than_bytes(family):
    assert has_token_per_byte(family_tokenizer(family)) == (family not in ("llama-2", "mistral"))


def test_a_prefix_space_is_a_byte_too_many():
    tokenizer = family_tokenizer.__wrapped__("smollm2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not has_token_per_byte(tokenizer)


LETTERS = st.characters(max_codepoint=127) | st.sampled_from("é日\u0958 \n")
CONTENTS = st.lists(LETTERS.map(str) | st.sampled_from(["<|im_end|>", "[INST]", "</s>"]), max_size=60).map("".join)


@given(CONTENTS, st.sampled_from(list(SPECIAL)), st.integers(-3, 3))
def test_a_prompt_is_longer_when_its_tokens_are_more(content, family, more):
    tokenizer = family_tokenizer(family)
    length = len(encode_prompt(tokenizer, [user(content)]))
    assert is_prompt_longer(tokenizer, [user(content)], length + more) == (more < 0)


@given(st.text(max_size=80), st.sampled_from(list(SPECIAL)))
def test_text_gives_as_many_tokens_as_its_bytes_let_expect_where_that_is_claimed(text, family):
    tokenizer, text = family_tokenizer(family), unicodedata.normalize("NFC", text)
    if has_token_per_byte(tokenizer):
        tokens = len(tokenize(tokenizer, text))
        assert tokens <= len(text.encode())
        assert len("".join(text.split()).encode()) <= tokens * longest_token(tokenizer)
