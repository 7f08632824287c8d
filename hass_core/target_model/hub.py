"""What can be known of a model of the hub before it is loaded: whether it is here, and whether it can be had.

Libraries try six times, for half a minute, before they say that a name is misspelt or that there is no network, and
print each try. One question that is not asked again tells both at once.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from hass_core.errors import TargetError
from hass_core.presets import recorded_shapes

PATIENCE_SECONDS = 5.0
NEAR = 0.8  # of 1, how much of a name must agree with another for that to be offered


def hub_file(source: str, name: str) -> Path | None:
    """A file of a hub's model in this machine's cache; None where it is not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name)
    except HFValidationError:  # a .gguf file, package:NAME
        return None
    return Path(found) if isinstance(found, str) else None


def check_hub(source: str, revision: str | None = None) -> None:
    """Raise TargetError, after one question, where the hub's model `source` is neither in the cache nor to be had."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if hub_file(source, "config.json"):
        return
    if constants.HF_HUB_OFFLINE:
        raise TargetError(_not_here(source, "the hub is switched off (HF_HUB_OFFLINE)"))
    try:
        address = hf_hub_url(source, "config.json", revision=revision, endpoint=constants.ENDPOINT)
        get_hf_file_metadata(address, timeout=PATIENCE_SECONDS, retry_on_errors=False)
    except HFValidationError as error:
        raise TargetError(f"the target {source!r} is no Hugging Face id: {str(error).splitlines()[0]}") from error
    except HfHubHTTPError as error:
        if reason := refusal(source, [error]):
            raise TargetError(f"cannot load the target {source!r}: {reason}") from error
        # a hub that has trouble, or no config.json: transformers tries again, and says what it lacks
    except Exception as error:  # of the HTTP library, which differs by version
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise TargetError(_not_here(source, f"{constants.ENDPOINT} cannot be reached ({reason[0]})")) from error


def refusal(source: str, errors: Sequence[BaseException]) -> str | None:
    """Why the hub does not give a model, and what to do, where one of `errors` is its refusal; else None."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    refused = [e.response.status_code for e in errors if isinstance(e, HfHubHTTPError) and e.response is not None]
    page = f"https://huggingface.co/{source}"  # terms are accepted there, also where a mirror is asked
    if any(isinstance(error, GatedRepoError) for error in errors) or 403 in refused:
        return f"it is gated: accept its terms on {page} and set HF_TOKEN to a token of that account"
    if any(isinstance(error, RepositoryNotFoundError) for error in errors) or 401 in refused:
        known = "set HF_TOKEN to a token that may read it"
        return f"{constants.ENDPOINT}/{source} does not exist or is private; {meant(source)}check the name, and {known}"
    return None


def _not_here(source: str, why: str) -> str:
    return (
        f"the target {source!r} is not in this machine's cache, and {why}; {meant(source)}check the name and the "
        "network, or give a folder"
    )


def meant(source: str) -> str:
    """The known name that is nearest, as the beginning of an advice; empty where none is near.

    Known are the targets of the presets and the models in this machine's cache.
    """
    from huggingface_hub import constants

    cached = [folder.name.split("--")[1:] for folder in Path(constants.HF_HUB_CACHE).glob("models--*--*")]
    names = {name.lower(): name for name in [*recorded_shapes(), *map("/".join, cached)] if "/" in name}
    if "/" not in source:  # its owner left out
        names |= {short.partition("/")[2]: name for short, name in names.items()}
    near = difflib.get_close_matches(source.lower(), names, n=1, cutoff=NEAR)
    return f"did you mean {names[near[0]]}? " if near else ""
