"""Connect to MLflow: the server that is set, else SQLite, beside the store where no other place is set. Artifacts lie
beside the SQLite file.

`tracking.uri` wins over the environment's MLFLOW_TRACKING_URI. A server's user name and password come from the
environment only (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), and go to no server
that settings name and the operator does not.
"""

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import read_mlflow_creds
from sqlalchemy.engine import make_url

from hass_core.command_path import command_path
from hass_core.config import RunConfig
from hass_core.errors import TrackingError
from hass_core.store.scratch import locked
from hass_core.trusted_hosts import VARIABLE, is_trusted
from tasks.clone import is_of_one_run
from tasks.tracking.in_place import ARTIFACTS, follow_the_folder
from tasks.tracking.outage import log_outages, outage_in, refusal_in
from tasks.tracking.view import MODEL_TRAINING, VIEW, add_view, experiment_tags

POSTGRES_KEYS = ("PGPASSWORD", "PGPASSFILE", "PGSERVICE")
"""Where PostgreSQL's client finds a password that an address does not have."""


def tracking_uri(config: RunConfig) -> str:
    """Where runs are recorded."""
    named = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _plain(named) if named else _database_in(_beside_store(config))


def _plain(uri: str) -> str:
    """An address as MLflow reads it: no blanks around it, and what stands before `://` in small letters."""
    scheme, separator, rest = uri.strip().partition("://")
    return scheme.lower() + separator + rest


def local_folder(config: RunConfig) -> Path:
    """The folder of the SQLite file in use, where artifacts go too; for another database, the folder of a local store,
    `.hass` for a remote one."""
    uri = tracking_uri(config)
    file = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(file).resolve().parent if file else _beside_store(config)


def _beside_store(config: RunConfig) -> Path:
    folder = Path(".hass/store") if "://" in config.store else Path(config.store).expanduser()
    return folder.resolve().parent


def _database_in(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def connect(config: RunConfig) -> MlflowClient:
    """A client whose experiment exists. Raises TrackingError when MLflow cannot be reached, would be given the
    credentials of another server, or would be gone with this run."""
    uri = tracking_uri(config)
    _check_trust(uri)
    if uri.startswith("sqlite:") and is_of_one_run(urlsplit(uri).path.removeprefix("/")):
        raise TrackingError(
            f"runs and drafts would be recorded in {uri}, in the clone of the code that this run alone has, and be "
            "gone with it: set MLFLOW_TRACKING_URI on the worker, or HASS_STORE to a whole path"
        )
    try:
        client = _client(uri, local_folder(config))
        experiment_id(client, config)
    except MlflowException as error:
        raise unusable(uri, error) from None  # no cause: its text has the password too
    return client


def unusable(uri: str, error: MlflowException) -> TrackingError:
    """What to tell of the first request to `uri`, which failed: without its password."""
    return outage_in(error) or refusal_in(MlflowException(str(error).replace(uri, _shown(uri))), _shown(uri))


def _check_trust(uri: str) -> None:
    """Raise TrackingError for a server of the settings' that would get credentials meant for another one."""
    if uri == _plain(os.environ.get("MLFLOW_TRACKING_URI", "")):
        return
    if _is_server(uri):
        trusted = is_trusted(uri)
        keys = os.environ.get("MLFLOW_TRACKING_TOKEN") or any(read_mlflow_creds())
    else:
        trusted = is_trusted(uri) and not urlsplit(uri).query  # `?host=` names another one
        keys = uri.startswith("postgresql") and any(os.environ.get(name) for name in POSTGRES_KEYS)
    if keys and not trusted:
        raise TrackingError(
            f"tracking.uri is {_shown(uri)}, and MLflow would send this machine's user name and password or token "
            f"there: name the host in {VARIABLE} on this machine if it may have them"
        )


def experiment_id(client: MlflowClient, config: RunConfig) -> str:
    """The experiment's id; created on first use. Raises TrackingError for one that was deleted: MLflow keeps those for
    a while, with their names."""
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = local_folder(config) / ARTIFACTS
        location = None if _is_server(tracking_uri(config)) else artifacts.as_uri()
        try:
            return client.create_experiment(name, artifact_location=location, tags=experiment_tags())
        except MlflowException:  # another process was first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackingError(
            f"the experiment {name} was deleted in MLflow: restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or name another one in tracking.experiment"
        )
    add_view(client, experiment)
    return experiment.experiment_id


def ui_command(config: RunConfig) -> str:
    """The one command, where there is no server, and the address that show the runs."""
    uri = tracking_uri(config)
    page = f"#/experiments/{experiment_id(connect(config), config)}/runs?{VIEW}"
    if _is_server(uri):
        return f"{_base(uri)}/{page}"
    command = f"{command_path('mlflow')} ui --host 127.0.0.1 --backend-store-uri {shlex.quote(_shown(uri))}"
    if uri == _database_in(Path(".hass").resolve()) and Path("Makefile").is_file():
        command = "make ui"
    return f"{command}, then http://127.0.0.1:5000/{page}"


def run_url(config: RunConfig, run_id: str) -> str | None:
    """The run's page on a tracking server; None where there is no server, so no page either."""
    uri = tracking_uri(config)
    if not _is_server(uri):
        return None
    return f"{_base(uri)}/#/experiments/{experiment_id(connect(config), config)}/runs/{run_id}?{MODEL_TRAINING}"


@cache
def _client(uri: str, folder: Path) -> MlflowClient:
    for name in ("alembic", "mlflow.store", "mlflow.pyfunc"):  # what they do is no news
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # pages on what is raised too
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # nor that they miss a server: it is told anyway
    if _is_server(uri):
        log_outages(_base(uri))
    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    with locked(folder):  # two processes that make MLflow's tables at once break each other's work
        follow_the_folder(uri, folder)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)  # a store is opened at its first question
    return client


@contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make `uri` the process's default for MLflow calls that take none; MLflow keeps it in the environment."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType]


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _base(uri: str) -> str:
    """A server's address without user and password."""
    address = urlsplit(uri)
    return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _shown(uri: str) -> str:
    """The address without a password."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri
