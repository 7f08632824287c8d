"""One small class per mistake a user can make. A message says what, where and what to do next."""


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
