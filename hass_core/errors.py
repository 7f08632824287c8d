"""One small class per mistake a user can make. A message says what, where and what to do next."""

from collections.abc import Iterator

FINDINGS, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit statuses of every command, beside 0


class HassError(Exception):
    """Something the user can mend. The command line prints the message without a traceback."""


class ConfigError(HassError):
    """A setting is unknown, out of range, or contradicts another."""


class StoreError(HassError):
    """The store cannot be written, is full, or answers wrongly."""


class CorruptFile(HassError):
    """A file's content does not match the record made when it was written."""


class BadInput(HassError):
    """A file of the user's (prompts, conversations, questions) has a broken record."""


class TemplateError(HassError):
    """The target has no chat template, or its template cannot give a sound loss mask."""


class TargetError(HassError):
    """The target model cannot be loaded or lacks something the pipeline needs."""


class DraftMismatch(HassError):
    """A draft does not belong to this target: hidden size, vocabulary, template or fingerprint differ."""


class ContextTooLong(HassError):
    """A prompt and its answer do not fit the model's context."""


class NonFinite(HassError):
    """A loss, gradient, feature or logit is NaN or infinite."""


class LeakedBenchmark(HassError):
    """A held-out or benchmark question stands in the training prompts."""


class TrackingError(HassError):
    """Runs cannot be recorded, or the model registry does not hold what is asked of it."""


class Unreachable(HassError):
    """A server that the work needs does not answer."""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, what that was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def sentence_of(error: BaseException) -> str | None:
    """What a user is told of a mistake of theirs; None where the program is at fault and a traceback is due."""
    if isinstance(error, HassError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:  # no such folder, no right, no space
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    return None
