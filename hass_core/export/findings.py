"""What a check of a draft folder finds."""

from dataclasses import dataclass

EXPORT_AGAIN = "export the draft again with `hass export`"


@dataclass(frozen=True)
class Finding:
    """One fault of a draft folder."""

    check: str
    what: str
    consequence: str
    mend: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}. {self.consequence}. To mend: {self.mend}."
