"""Folders that are made once, whole or not at all, and shared by all processes of a machine and by later runs."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from vla import InputError, flush

WORTH_A_WORD = 10_000_000  # bytes
LOCKS = "locks"  # a folder beside, with a file for each


def built(done: Path, build: Callable[[Path], None], bytes_needed: int, what: str) -> Path:
    """The folder `done`, which `build` fills (it is given a folder of another name) unless it is there.

    Of several processes that call this at once one builds and the others wait; what a killed one has left is removed.
    Raises InputError if the disk cannot be written, is too small or has no locks.
    """
    locks = done.parent / LOCKS
    try:
        if done.exists():  # or nobody but another user may know
            return done
        locks.mkdir(parents=True, exist_ok=True)
        lock = open(locks / done.name, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {what} to {done.parent} ({error}): set --data.cache_dir") from error
    with lock:
        try:
            if not _locked(lock):
                if os.environ.get("LOCAL_RANK", "0") == "0":  # once for each run of a machine
                    tqdm.write(f"{what}: waiting for another process that makes {done}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however this process ends
        except OSError as error:
            found = f"{done.parent} has no locks ({error}), which keep processes from making {what} at once"
            raise InputError(f"{found}: set --data.cache_dir to a disk that has them") from error
        if done.exists():
            return done
        unfinished = done.with_name(f"{done.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        _remove_unfinished(done.parent)
        if bytes_needed > (free := shutil.disk_usage(done.parent).free):
            raise InputError(
                f"{what} need {size_of(bytes_needed)}, {done.parent} has {size_of(free)} free: make room, or set "
                "--data.cache_dir, a smaller --data.image_size or --data.cache none"
            )
        if bytes_needed >= WORTH_A_WORD:
            tqdm.write(f"{what}: {size_of(bytes_needed)} to {done}", file=sys.stderr)
        try:
            unfinished.mkdir()
            build(unfinished)
            for path in [*unfinished.iterdir(), unfinished]:
                flush(path)
            unfinished.rename(done)
            flush(done.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{what} found no room for {size_of(bytes_needed)} in {done.parent} ({error}): make room, or set "
                "--data.cache_dir, a smaller --data.image_size or --data.cache none"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return done


def allocate(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped, whose blocks the disk has given already.

    A write through the map to a block that the disk cannot give would kill the process with SIGBUS.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextlib.contextmanager
def whole(file: Path):
    """Inside, this file of a cache is read. Raises InputError if it is damaged or gone."""
    try:
        yield file
    except (FileNotFoundError, EOFError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): delete its folder, it is made again") from error


def place(file: Path) -> tuple[np.dtype, int, tuple[int, ...]]:
    """How an array lies in its .npy file: dtype, where it begins in bytes, shape. Raises InputError as `whole`."""
    with whole(file):
        array = np.load(file, mmap_mode="r")
    return array.dtype, array.offset, array.shape


def size_of(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _locked(file: TextIO) -> bool:
    """Lock it, unless another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unfinished(folder: Path) -> None:
    """Remove what is locked by nobody, as its process was killed."""
    for unfinished in folder.glob("*.partial"):
        with contextlib.suppress(OSError), open(folder / LOCKS / unfinished.stem, "w") as lock:
            if _locked(lock):
                shutil.rmtree(unfinished)
