"""Data sets and policies from the Hugging Face hub."""

import re
from pathlib import Path

from vla import InputError, in_one_line

OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")  # of a policy's download


def dataset_name(path: str | Path) -> str:
    """What a data set is called: its folder's name, or its name on the hub without the owner."""
    return Path(path if Path(path).is_dir() else str(path).partition("@")[0]).resolve().name


def dataset(path: str | Path) -> Path:
    """The folder of a data set: the path itself, or what owner/name on the hub was downloaded to, once.

    A revision may follow the name: owner/name@v3.0. Raises InputError if it is neither, or the hub cannot be reached.
    """
    if Path(path).is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(path)):
        return Path(path)
    name, _, revision = str(path).partition("@")
    return _downloaded(path, name, "check --data.path", repo_type="dataset", revision=revision or None)


def policy(path: str | Path, options: dict) -> Path:
    """The folder of a policy: the path itself, or what owner/name on the hub was downloaded to.

    options: some of OPTIONS. Raises InputError if it is neither, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    return _downloaded(path, str(path), "check the path or the name", **options)


def _downloaded(path: str | Path, name: str, cure: str, **options) -> Path:
    from huggingface_hub import snapshot_download  # here, as flags are read with what is above

    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the errors of the client, and of the two ways it downloads, have no base in common
        raise InputError(
            f"{path} is no folder here, and could not be downloaded from the Hugging Face hub ({in_one_line(error)}): "
            f"{cure}, or the network, or log in if it is private"
        ) from error
