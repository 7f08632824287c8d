"""Release: the champion, exported for the engines that serve it, goes to where they load it from."""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel

from hass_core.config import RunConfig
from hass_core.errors import ConfigError, HassError
from hass_core.store import Release, Releases
from tasks import tracking
from tasks.export import DraftSource, tree_of, write_export
from tasks.resources import is_served, store_of
from tasks.retries import SHORT, SHORT_SECONDS
from tasks.stage_lines import told
from tasks.tracking import DraftVersion

WEBHOOK_SECONDS = 30
OUTPUT_SHOWN = 500  # characters of what a failed command said


class Released(BaseModel, frozen=True):
    """What a release did."""

    release: Release
    told: bool  # the servers, by command or webhook

    def __str__(self) -> str:
        engines = ", ".join(self.release.engines)
        told = "; the servers were told" if self.told else ""
        return f"version {self.release.version} of {self.release.name} is released for {engines}{told}"


def release_champion(config: RunConfig) -> Released | None:
    """Bring what the engines load, and what they were told, up to the champion; None where that is so already.

    Raises HassError when the export or the telling fails; the former release stays current in the first case.
    """
    client, name = tracking.connect(config), tracking.registered_name(config)
    champion = tracking.champion(client, name)
    if champion is None or not config.promotion.release or not is_served(config, champion):
        return None
    current = Releases(store_of(config), name).current()
    in_place = current and _holds(current, champion) and set(current.engines) == set(config.promotion.release)
    if current and in_place and tracking.is_released(client, champion):
        return None
    release = current if current and in_place else told("release", partial(put_release, config, champion), _engines)
    notified = notify_servers(config, release)
    tracking.record_release(client, champion, release.engines)
    done = Released(release=release, told=notified)
    create_markdown_artifact(str(done), key="release", description="What the engines load now")
    return done


def _holds(release: Release, version: DraftVersion) -> bool:
    """Whether a release is of this version; where it says so, of this draft too."""
    return release.version == version.version and release.draft in ("", version.draft.digest)


def _engines(release: Release) -> str:
    return f"version {release.version} for {', '.join(release.engines)}"


@task(name="put-release", **SHORT)
def put_release(config: RunConfig, version: DraftVersion) -> Release:
    """Export the version for every engine of `promotion.release`, checked, and make it the current release."""
    client = tracking.connect(config)
    tracking.forget_release(client, version)
    with tempfile.TemporaryDirectory(prefix="hass-release-") as scratch:
        folders = {engine: Path(scratch) / engine for engine in config.promotion.release}
        for engine in config.promotion.release:
            write_export(config, DraftSource(version=version), engine, folders[engine], tree_of(config, version), None)
        return Releases(store_of(config), version.model).publish(version.version, folders, version.draft.digest)


@task(name="notify-servers", retries=3, retry_delay_seconds=[5, 30, 120], timeout_seconds=SHORT_SECONDS)
def notify_servers(config: RunConfig, release: Release) -> bool:
    """Run the command and call the webhook of the settings; whether there was one. Raises HassError when it fails."""
    rules, text = config.promotion, release.model_dump_json()
    if rules.release_command:
        done = subprocess.run(
            rules.release_command, shell=True, env=os.environ | {"HASS_RELEASE": text}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-OUTPUT_SHOWN:]
            raise HassError(
                f"version {release.version} is released, but promotion.release_command ended with {done.returncode}: "
                f"{said}; the next retraining or promotion runs it again"
            )
    if rules.release_webhook:
        _post(rules.release_webhook, text, release.version)
    return bool(rules.release_command or rules.release_webhook)


def _post(variable: str, text: str, version: str) -> None:
    address = os.environ.get(variable, "").strip()
    if not address:
        raise ConfigError(f"promotion.release_webhook names the environment variable {variable}, which is not set")
    headers = {"Content-Type": "application/json"}
    try:
        httpx.post(address, content=text, headers=headers, timeout=WEBHOOK_SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HassError(
            f"version {version} is released, but the webhook that {variable} names {_failure(error)}; it is called "
            "again next time"
        ) from None


def _failure(error: Exception) -> str:
    """What became of a call, without its address, which httpx writes into its errors in a spelling of its own."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"answered {error.response.status_code} {error.response.reason_phrase}"
    if isinstance(error, httpx.ConnectError):
        return f"cannot be reached: {error}"
    return f"failed: {type(error).__name__}"
