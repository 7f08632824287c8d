"""Which language an answer is in. Needs the package py3langid, which brings its model along."""

from collections.abc import Callable
from functools import lru_cache

from hass_core.errors import ConfigError

SURE = 0.9  # probability from which a foreign language is believed
MIN_LETTERS = 40  # code, sums and one-word answers have no language to speak of

Gate = Callable[[str], str | None]


@lru_cache(maxsize=4)
def language_gate(wanted: tuple[str, ...]) -> Gate:
    """A check that answers why a text is unfit, or None; `wanted` holds ISO 639-1 codes, none = any language.

    Raises ConfigError for an unknown code, or when py3langid is missing.
    """
    if not wanted:
        return lambda text: None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError(
            "responses.languages needs the package py3langid; install it with pip install 'hass-pipeline[language]', "
            "or leave responses.languages empty"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if unknown := sorted(set(wanted) - set(identifier.labels)):
        raise ConfigError(f"responses.languages: unknown {', '.join(unknown)}; give ISO 639-1 codes such as en, de, zh")

    def problem(text: str) -> str | None:
        if sum(map(str.isalpha, text)) < MIN_LETTERS:
            return None
        found, probability = identifier.classify(text)
        return f"answer in another language ({found})" if found not in wanted and probability >= SURE else None

    return problem
