"""Prefect's server or database is not usable: one sentence with its address, or its file and revision."""

import sqlite3

import pytest

from flows.prefect_server import check_database, wait_for_server
from hass_core.errors import ConfigError, Unreachable
from tests.flows.stack import free_port
from tests.loopback import answering


def database_with(folder, revision: str) -> str:
    with sqlite3.connect(folder / "prefect.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
    database.close()
    return f"sqlite+aiosqlite:///{folder}/prefect.db"


def test_a_server_that_is_away_is_told_at_once_and_named(capsys):
    url = f"http://me:secret@127.0.0.1:{free_port()}/api"
    shown = url.replace("me:secret@", "")
    with pytest.raises(Unreachable, match=rf"^Prefect at {shown} does not answer \(.*refused.*PREFECT_API_URL"):
        wait_for_server(url, pauses=(0.01,))
    assert capsys.readouterr().err.count(f"Prefect at {shown} does not answer") == 1


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, "Unauthorized", r"refuses this machine \(status 401\): set PREFECT_API_AUTH_STRING"),
        (404, '{"detail": "Not Found"}', r"is no Prefect server \(status 404\): .*http://HOST:4200/api"),
        (200, "<html>Welcome</html>", "is no Prefect server .another program's page"),
        (200, "{}", "is no Prefect server"),
    ],
)
def test_what_is_no_prefect_server_or_lets_nobody_in_is_told_without_waiting(capsys, status, body, told):
    with answering(status, body) as url, pytest.raises(ConfigError, match=told):
        wait_for_server(f"{url}/api", pauses=(3600,))
    assert capsys.readouterr().err == ""


def test_a_server_that_starts_late_is_waited_for():
    with answering(200, '"3.8.8"') as url:
        wait_for_server(f"{url}/api", pauses=())
    with answering(503) as url, pytest.raises(Unreachable, match="status 503"):
        wait_for_server(f"{url}/api", pauses=())


def test_an_address_that_is_none_is_told():
    with pytest.raises(ConfigError, match="'localhost', which is no address"):
        wait_for_server("localhost", pauses=(3600,))


def test_a_database_of_another_version_is_named_with_its_revision(tmp_path):
    url = database_with(tmp_path, "f00dfeed1234")
    with pytest.raises(ConfigError, match=r"prefect\.db was written by another version.*f00dfeed1234.*PREFECT_HOME"):
        check_database(url)


def test_a_database_of_this_version_is_taken(tmp_path):
    check_database(database_with(tmp_path, "bb2345678901"))  # a revision that no migration's file is named after
    check_database(f"sqlite+aiosqlite:///{tmp_path}/none-yet.db")
    check_database("postgresql+asyncpg://hass@db/prefect")


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "prefect.db").write_text("no database, but long enough to be looked at " * 9)
    with pytest.raises(ConfigError, match=r"prefect\.db, Prefect's database, cannot be read"):
        check_database(f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
