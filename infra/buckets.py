"""Copy the buckets of store and MLflow to a folder, or back: `python -m infra.buckets save FOLDER`, `… load FOLDER`.

Reads AWS_ENDPOINT_URL and AWS keys from the environment, as a worker does; one of its keys is enough.
"""

import argparse
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

from hass_core.errors import ConfigError, StoreError
from hass_core.store.places import s3_options
from infra.mistakes import in_one_sentence, needed

BUCKETS = ("hass", "mlflow")


def save(folder: Path) -> int:
    """Copy every file of the buckets below `folder`; how many."""
    files = s3fs.S3FileSystem(skip_instance_cache=True, **s3_options())
    names = [name for bucket in BUCKETS for name in files.find(bucket)]
    for bucket in BUCKETS:
        (folder / bucket).mkdir(parents=True, exist_ok=True)  # an empty bucket is in the copy too
    if names:
        files.get(names, [str(folder / name) for name in names])
    return len(names)


def load(folder: Path) -> int:
    """Copy what `save` wrote back into the buckets, which exist; how many files. Raises ConfigError for no copy."""
    if not any((folder / bucket).is_dir() for bucket in BUCKETS):
        raise ConfigError(f"{folder} is no copy of the buckets: it has no folder {' or '.join(BUCKETS)}")
    files = s3fs.S3FileSystem(skip_instance_cache=True, **s3_options())
    paths = sorted(path for bucket in BUCKETS for path in (folder / bucket).rglob("*") if path.is_file())
    if paths:
        files.put([str(path) for path in paths], [path.relative_to(folder).as_posix() for path in paths])
    return len(paths)


def main() -> None:
    """Copy, and say how many files."""
    parser = argparse.ArgumentParser(prog="python -m infra.buckets", description=__doc__)
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    endpoint = needed("AWS_ENDPOINT_URL")
    try:
        copied = (save if given.action == "save" else load)(given.folder)
    except (BotoCoreError, OSError) as error:  # s3fs has its own names for what a server refuses
        raise StoreError(
            f"cannot copy between {given.folder} and the buckets {', '.join(BUCKETS)} of {endpoint}: {error}; check "
            "the address, the AWS keys and the folder"
        ) from error
    print(f"{copied} files of {', '.join(BUCKETS)}")


if __name__ == "__main__":
    in_one_sentence(main)
