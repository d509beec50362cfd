"""Policies from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from vla import InputError

OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def downloaded(path: str | Path, options: dict) -> Path:
    """The folder of a policy: the path itself, or what owner/name on the hub was downloaded to.

    options: some of OPTIONS. Raises InputError if it is neither, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), **options))
    except Exception as error:  # the errors of the client, and of the two ways it downloads, have no base in common
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(
            f"{path} is no folder here, and could not be downloaded from the Hugging Face hub ({reason}): check the "
            "path or the name, or the network, or log in if the policy is private"
        ) from error
