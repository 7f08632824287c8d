"""What makes a text unfit: each check answers with a short fixed reason, or None when the text is fine."""

import re
from collections.abc import Sequence
from itertools import pairwise

MIN_CHARACTERS = 15
MIN_LETTER_SHARE = 0.6
LOOP_NGRAM = 8
LOOP_MIN_TOKENS = 48
MAX_REPEATED_SHARE = 0.4
ASCII_LETTERS_AND_SPACES = bytes(i for i in range(128) if chr(i).isalpha() or chr(i).isspace())

ENDINGS = tuple(".?!…:;)]}\"'`”’。？！")
ROLE_MARKER = re.compile(r"(^|\n)\s*(user|assistant|human|system|ai|bot|chatbot)\s*:", re.IGNORECASE)
SELF_REFERENCE = re.compile(
    r"\b(as an? (ai|artificial|language model|virtual|digital)\b"
    r"|i('m| am) (an? |your )?(ai|artificial|language model|chatbot|virtual assistant|digital assistant|smollm)\b"
    r"|(created|trained|developed) by (hugging face|openai|google|meta|anthropic|alibaba|mistral)"
    r"|how (can|may) i (help|assist) you|i('m| am) here to (help|assist))",
    re.IGNORECASE,
)
ANSWER_OPENING = re.compile(
    r"^(sure|certainly|of course|absolutely|i'm sorry|i apologi[sz]e|thank you for|here (is|are)\b)[,.! ]",
    re.IGNORECASE,
)


def is_loop(tokens: Sequence[object]) -> bool:
    """True when more than 40 % of the 8-token pieces have occurred before: the model turns in a circle."""
    if len(tokens) < LOOP_MIN_TOKENS:
        return False
    pieces = [tuple(tokens[i : i + LOOP_NGRAM]) for i in range(len(tokens) - LOOP_NGRAM + 1)]
    return 1 - len(set(pieces)) / len(pieces) > MAX_REPEATED_SHARE


def prompt_problem(text: str) -> str | None:
    """Why a text the target wrote in the user's place is no plausible request."""
    if len(text) < MIN_CHARACTERS:
        return "too short"
    if _letters_and_spaces(text) < MIN_LETTER_SHARE * len(text):
        return "mostly not letters"
    if not text.rstrip().endswith(ENDINGS):
        return "breaks off"
    if ":" in text and ROLE_MARKER.search(text):
        return "contains a role marker"
    if SELF_REFERENCE.search(text) or ANSWER_OPENING.search(text):
        return "speaks as the assistant"
    words = text.split()
    if len(words) >= 20 and len(set(words)) < 0.4 * len(words):
        return "repetitive"
    return None


def _letters_and_spaces(text: str) -> int:
    """How many characters are letters or white space."""
    if text.isascii():  # the same count, without a step per character
        return len(text) - len(text.encode().translate(None, ASCII_LETTERS_AND_SPACES))
    return sum(c.isalpha() or c.isspace() for c in text)


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """How varied prompts are: distinct word pairs / all, distinct first three words / prompts, mean length in words."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for line in words for pair in pairwise(line)]
    openings = {tuple(line[:3]) for line in words}
    return {
        "distinct_2": round(len(set(pairs)) / max(1, len(pairs)), 4),
        "distinct_openings": round(len(openings) / max(1, len(words)), 4),
        "mean_words": round(sum(map(len, words)) / max(1, len(words)), 1),
    }


def metric_name(group: str, reason: str) -> str:
    """A reason as the name of a count, in the letters that trackers allow."""
    return f"{group}/{re.sub('[^A-Za-z0-9_. -]', '', reason)[:60].strip()}"
