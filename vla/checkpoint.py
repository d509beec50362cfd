"""Checkpoints that are whole or not there.

They are written to a hidden folder (vla/saver.py), MANIFEST.json, with every file's size and hash, last; everything is
flushed to disk; one rename commits. What is left after a crash at any line is either the old state or the new one.

    checkpoints/step_00001000/
        model.safetensors, optimizer.bin, random_states_<rank>.pkl, scaler.pt (fp16): as accelerate names them, so that
        accelerator.load_state reads the folder
        ema.safetensors, config.json: the folder loads with VLAPolicy.from_pretrained
        trainer_state.json (counters, best metric, versions), MANIFEST.json

Where the policy is sharded, each process writes its rows of it, of its average and of the moments to files of its own,
model-00001-of-00004.safetensors and so on (vla/shards.py). Both kinds load with and without sharding.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TypeVar

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vla import InputError, NotSaved, flush, in_one_line, shards
from vla.config import CheckpointConfig
from vla.options import run_folder

logger = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d{8})")
TENSORS = {"model.safetensors", "optimizer.bin"}
NEEDED = {"random_states_0.pkl", "config.json", "trainer_state.json"}
PIECE = 1 << 24  # bytes hashed at once
T = TypeVar("T")


class Unreadable(InputError):
    """A checkpoint that cannot be loaded as things are, which does not prove that it is damaged."""


# ---- The folder of a run.


def prepare(run_dir: Path, resuming: bool, rank: int) -> Path:
    """The folder of a run's checkpoints, made if need be, kept for this job, and rid of what crashes left half-done.

    Raises InputError if it cannot be written to, is in use, holds checkpoints of another run, or none to resume from.
    """
    folder = run_dir / "checkpoints"
    _check_begun(run_dir, resuming)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            lock(run_dir)
            put_back(folder)
            for path in left_over(folder):
                with _spared(path):
                    shutil.rmtree(path)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16 if rank == 0 else 0))  # others are here before there is room again
    except OSError as failure:
        raise InputError(f"cannot write to {folder} ({failure}); make room, or choose another --run_dir") from None
    if rank == 0:
        _check_begun(run_dir, resuming)  # again: the job that was waited for may have saved
    return folder


def _check_begun(run_dir: Path, resuming: bool) -> None:
    folder = run_dir / "checkpoints"
    begun = bool(all_steps(folder)) or any(folder.glob(".replaced_*"))
    if resuming and not begun:
        raise InputError(f"{folder} holds no checkpoint to resume from; leave out --resume_from to start the run anew")
    if begun and not resuming:
        raise InputError(
            f"{run_dir} already holds checkpoints; go on with --resume_from {run_dir}, or choose another --run_dir"
        )


def put_back(folder: Path) -> None:
    """Give checkpoints their names back that were to be replaced by others which are not there."""
    for replaced in folder.glob(".replaced_*"):
        with contextlib.suppress(OSError):  # the other is there
            replaced.rename(replaced.with_name(replaced.name.removeprefix(".replaced_")))


def lock(run_dir: Path, patience: float = 60) -> None:
    """Keep other jobs out of a run for as long as this process lives, after waiting for one that is just ending."""
    handle, deadline = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT), time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its own: what it forks does not hold it
            break
        except OSError as failure:
            if failure.errno not in (errno.EAGAIN, errno.EACCES):
                why = in_one_line(failure)
                raise InputError(
                    f"{run_dir} cannot be kept from other jobs ({why}); choose a --run_dir on a disk that has locks"
                ) from None
            if time.monotonic() > deadline:
                owner = os.read(handle, 1000).decode().strip() or "another process"
                raise InputError(f"{run_dir} is in use by {owner}; end it, or choose another --run_dir") from None
            time.sleep(0.2)
    with contextlib.suppress(OSError):  # without a name in it, it is a lock as well
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def left_over(folder: Path) -> list[Path]:
    """What a crash has left, or a job is writing or deleting."""
    return sorted(path for what in ("saving", "deleting", "replaced") for path in folder.glob(f".{what}_*"))


def all_steps(folder: Path) -> dict[int, Path]:
    """Committed checkpoints by step, ascending; not verified."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


# ---- Commit, rotate.


def flushed(paths: Iterable[Path]) -> dict[str, dict]:
    """These files on the disk for sure, as the manifest lists them."""
    entries = {}
    for path in paths:
        path.chmod(file_mode(path.parent))  # safetensors leaves 0600
        flush(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def commit(temporary: Path, final: Path, others: dict[str, dict]) -> int:
    """Flush, hash, verify, rename. others: what other processes have flushed. Returns the bytes written by all."""
    entries = flushed(path for path in sorted(temporary.iterdir()) if path.name not in others) | others
    write_json(temporary / "MANIFEST.json", {"files": entries})
    flush(temporary / "MANIFEST.json")
    flush(temporary)
    verify(temporary, hashed=() if others else None)  # they have read their files
    replaced = final.with_name(f".replaced_{final.name}")
    if final.exists():  # damaged, or of a future that was left by resuming from before it
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return sum(entry["bytes"] for entry in entries.values())


def rotate(folder: Path, state: dict, config: CheckpointConfig, is_good: Callable[[Path], bool]) -> None:
    """Delete all but the newest good ones, the best, those to keep for good, and those that cannot be loaded now.

    is_good: raises Unreadable for one of these. Call it after committing and verifying step state["step"]. Checkpoints
    of later steps are deleted too: they are of a future that was left by resuming from before it.
    """
    paths, good, unreadable = all_steps(folder), [], set()
    for path in [path for step, path in reversed(paths.items()) if step <= state["step"]]:
        try:
            if is_good(path):
                read_state(path)
                good.append(path)
        except Unreadable as failure:
            logger.warning("%s; it is kept", failure)
            unreadable.add(path)
    for path in set(paths.values()) - unreadable - to_keep(good, state, config) if good else ():
        with _spared(path):
            delete(path)


def to_keep(good: list[Path], state: dict, config: CheckpointConfig) -> set[Path]:
    """Those of these good checkpoints, newest first, that a run needs whose newest state is `state`."""
    steps = {int(path.name[-8:]): path for path in good}
    regular = [path for step, path in steps.items() if config.keep_every and step % config.keep_every == 0]
    # In a row of skipped updates the run may yet have to go back to before it.
    before = [path for step, path in steps.items() if step <= state["step"] - state["bad_in_a_row"]]
    return {*good[: config.keep], *before[:1], *regular, best(state, good)} - {None}


def best(state: dict, good: list[Path]) -> Path | None:
    """The best of these good checkpoints: the one that `state` names, or if it was lost, that of the lowest score."""
    scores = {}
    for path in good:
        saved = read_state(path)
        if saved["step"] == state["best_step"]:
            return path
        alike = all(saved.get(name) == state.get(name) for name in ("metric", "judged_on"))
        if saved["evaluated"] == saved["step"] and alike and saved["score"] is not None:
            scores[path] = saved["score"]
    return min(scores, key=scores.get, default=None)


@contextlib.contextmanager
def _spared(path: Path):
    """Around a deletion: one that fails costs room and a warning."""
    try:
        yield
    except OSError as failure:
        logger.warning("warning: %s cannot be deleted (%s); delete it by hand", path, in_one_line(failure))


def delete(path: Path) -> None:
    doomed = path.with_name(f".deleting_{path.name}")  # a crash half-way leaves no half checkpoint under its name
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


# ---- Find.


def check_origin(folder: Path, what: str, digests: list[str]) -> None:
    """Raises InputError if the run's checkpoints were made with other data or base, of other digests, than these."""
    name = {"data": "the data of --data.path", "base": "the frozen weights of --model.backbone"}[what]
    for path in reversed(all_steps(folder).values()):
        try:
            verify(path, hashed=["trainer_state.json"])
            recorded = read_state(path)[what]
        except (InputError, KeyError):  # a damaged one; `find` says so
            continue
        if recorded != digests:
            raise InputError(
                f"{name} are not those that {path} was trained on, so the run cannot go on exactly: "
                "bring them back as they were, or start a new run with --init_from"
            )
        return


def verify(path: Path, hashed: Container[str] | None = None) -> None:
    """Raises InputError, naming the file, unless the checkpoint is exactly what was committed; Unreadable if unknown.

    hashed: the files whose hashes are compared, beside the sizes of all; default all.
    """
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        there = {entry.name: entry.is_file() and not entry.is_symlink() for entry in path.iterdir()}
    except Exception as failure:  # by every kind of damage another one
        problem = f"it or its MANIFEST.json cannot be read ({in_one_line(failure)})"
        raise _unread(failure, f"{path} is no whole checkpoint: {problem}") from None
    if missing := _needed(listed) - listed.keys():
        raise InputError(f"{path} is no whole checkpoint: MANIFEST.json does not list {', '.join(sorted(missing))}")
    if strange := sorted(name for name in {*listed, "MANIFEST.json"} if not there.get(name)):
        raise InputError(f"{path} does not hold what its MANIFEST.json lists: look at {', '.join(strange)}")
    hashed = listed if hashed is None else hashed
    for name, (size, digest) in listed.items():
        file = path / name
        try:
            if file.stat().st_size != size or (name in hashed and _sha256(file) != digest):
                raise InputError(f"{file} is damaged: its size or hash is not the manifest's")
        except OSError as failure:
            raise _unread(failure, f"{file} cannot be read: {failure}") from None
    if added := sorted(there.keys() - listed.keys() - {"MANIFEST.json"}):  # what is listed is intact
        raise Unreadable(f"{path} holds {', '.join(added)}, which its MANIFEST.json does not list: remove it")


def _unread(failure: Exception, text: str) -> InputError:
    """The error of this text: Unreadable, unless the failure lies in what is on the disk."""
    missing = FileNotFoundError, NotADirectoryError, IsADirectoryError
    unknown = isinstance(failure, OSError | MemoryError) and not isinstance(failure, missing)
    return (Unreadable if unknown else InputError)(text)


def _needed(listed: Iterable[str]) -> set[str]:
    """What belongs to a checkpoint that has these files: of tensors in rows, the files of all processes."""
    cut = {(match[1], int(match[2])) for name in listed if (match := shards.NAME.fullmatch(name))}
    cut |= {(kind, processes) for _, processes in cut for kind in ("model", "optimizer")}
    parts = {shards.shard(kind, rank, processes) for kind, processes in cut for rank in range(processes)}
    return NEEDED | (parts or TENSORS)


def find(resume_from: str, folder: Path, passed_over: Iterable[Path] = ()) -> Path:
    """The checkpoint that --resume_from means, verified. folder: the run's checkpoints.

    For a run it is the newest good one: damaged ones are named in a warning and passed over. Raises InputError if
    none is good, never falling back to a fresh start.
    """
    if (name := wanted(resume_from)) not in ("", "best"):
        path = Path(resume_from).resolve()
        if not (path.exists() and NAME.fullmatch(name)):
            there = ", ".join(map(str, all_steps(folder)))
            raise InputError(f"{resume_from} is not there; there are the steps {there}")
        verify(path)
        return path
    best_wanted, good = name == "best", []
    for path in reversed(all_steps(folder).values()):
        if path in passed_over:
            continue
        try:
            verify(path, hashed=["trainer_state.json"] if best_wanted else None)
        except InputError as failure:
            logger.warning("%s; trying the one before it", failure)
            continue
        if not best_wanted:
            return path
        good.append(path)
    if not good:
        cure = "mend what the warnings name, or start a new run in another --run_dir"
        raise InputError(f"{folder} holds no good checkpoint to resume from; {cure}")
    newest = read_state(good[0])
    while found := best(newest, good) if newest["metric"] else next(iter(good), None):  # the last, if none was judged
        try:
            verify(found)
        except InputError as failure:
            logger.warning("%s; trying the next best", failure)
            good.remove(found)
        else:
            return found
    raise InputError(f"no good checkpoint of {folder.parent} was judged best; resume from {folder.parent} itself")


def wanted(resume_from: str) -> str:
    """The name of the checkpoint that --resume_from means: step_…, best, or "" for the newest of a run."""
    path = Path(resume_from).resolve()
    newest = "checkpoints" in (Path(resume_from).name, path.name) or run_folder(path) == path  # it may be a link
    return "" if newest else path.name


def together(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Call `act()` on the main process alone; what it returns, or its InputError or NotSaved, reaches all."""
    answer: list = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = act()
        except (InputError, NotSaved) as failure:
            answer[1] = failure
    broadcast_object_list(answer)
    if answer[1]:
        raise answer[1]
    return answer[0]


# ---- Small things.


def read_state(path: Path) -> dict:
    """The trainer's counters in a checkpoint, as `Saver.save` got them. Raises InputError if there are none."""
    try:
        state = json.loads((path / "trainer_state.json").read_text())
        del state["versions"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise _unread(failure, f"{path / 'trainer_state.json'} cannot be read ({in_one_line(failure)})") from None
    return state


def versions() -> dict[str, str]:
    """What numbers depend on beside the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpus": str(os.cpu_count()),
    }


def file_mode(folder: Path) -> int:
    """What the umask said a file's mode is when this folder was made; it cannot be asked for without changing it."""
    return folder.stat().st_mode & 0o666


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sha256(path: Path) -> str:
    # In large pieces: between them the thread that saves takes Python's lock, and training has to wait for it.
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(path.stat().st_size, PIECE) or 1))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()
