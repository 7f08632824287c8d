"""The Prefect server that a flow in a terminal reports to: that of PREFECT_API_URL, or one that lives with the run.

Looked at before anything starts: Prefect itself waits two minutes in silence for a server that cannot come, and ends
with a traceback that names neither address nor file.
"""

import re
import sqlite3
import sys
import time
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)
from sqlalchemy.engine import make_url

from hass_core.errors import ConfigError, Unreachable

PAUSES_SECONDS = (1, 2, 4, 8, 15)
VERSION = re.compile(r"\d+\.\d+")
EXAMPLE = "PREFECT_API_URL is to be as http://HOST:4200/api"


def check_server() -> None:
    """Return when a run can be reported.

    Raises Unreachable naming the address where no server answers for half a minute, and ConfigError naming the database
    that another version of Prefect has written.
    """
    settings = get_current_settings()
    if settings.api.url:
        wait_for_server(settings.api.url)
    elif database := settings.server.database.connection_url:
        check_database(database.get_secret_value())


def wait_for_server(url: str, pauses: tuple[float, ...] = PAUSES_SECONDS) -> None:
    """Return when the server at `url` answers; that it does not is told at the first miss.

    Raises Unreachable, and ConfigError where it answers but is no Prefect server, or refuses this machine's key.
    """
    parts = urlsplit(url)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    for number, pause in enumerate(pauses):
        if (why := _why_away(url, shown)) is None:
            return
        if number == 0:
            print(f"Prefect at {shown} does not answer ({why}); asking again for {sum(pauses):.0f} s", file=sys.stderr)
        time.sleep(pause)
    if (why := _why_away(url, shown)) is not None:
        raise Unreachable(f"Prefect at {shown} does not answer ({why}): start it, or change or unset PREFECT_API_URL")


def _why_away(url: str, shown: str) -> str | None:
    """None where a Prefect server lets us in. Raises ConfigError where asking again is of no use."""
    try:
        version = _version(url)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"Prefect at {shown} refuses this machine (status {status}): set "
                "PREFECT_API_AUTH_STRING (user:password) or PREFECT_API_KEY as that server's operator has told"
            ) from None
        if status >= 500 or status == 429:
            return f"status {status}"
        version = f"status {status}"
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError(f"PREFECT_API_URL is {shown!r}, which is no address ({error}): {EXAMPLE}") from None
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    except ValueError:  # no JSON
        version = "another program's page"
    if not VERSION.match(str(version)):
        raise ConfigError(f"what answers at {shown} is no Prefect server ({version!s:.40}): {EXAMPLE}")
    return None


def _version(url: str) -> object:
    """What a Prefect server at `url` says when asked for its version, which it tells only those whom it lets in."""
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        client = get_client(sync_client=True, httpx_settings={"timeout": 10})
        if client.server_type == ServerType.CLOUD:
            if error := client.api_healthcheck():
                raise error
            return prefect.__version__  # it has none of its own
        return client.api_version()


def check_database(url: str) -> None:
    """Raises ConfigError where the SQLite file at `url` has a revision that this Prefect does not know."""
    address = make_url(url)
    if not address.drivername.startswith("sqlite") or not address.database or not Path(address.database).is_file():
        return
    with closing(sqlite3.connect(f"file:{address.database}?mode=ro", uri=True)) as database:
        try:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError:  # no such table: a new file
            return
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{address.database}, Prefect's database, cannot be read: {error}") from error
    if found and not _is_known(found[0]):
        raise ConfigError(
            f"{address.database} was written by another version of Prefect: its revision {found[0]} is not one of "
            f"Prefect {prefect.__version__}; install the version that wrote it, or name another folder in PREFECT_HOME"
        )


def _is_known(revision: str) -> bool:
    """Whether a migration names this revision; read as text, for importing Prefect's server takes seconds."""
    migrations = files("prefect") / "server/database/_migrations/versions/sqlite"
    return any(revision in file.read_text() for file in migrations.iterdir() if file.name.endswith(".py"))
