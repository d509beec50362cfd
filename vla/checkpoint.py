"""Checkpoints that are whole or not there, written while training goes on.

A save copies the state out of the way; a thread then writes it to a hidden folder, MANIFEST.json, with every file's
size and hash, last; everything is flushed to disk; one rename commits. What is left after a crash at any line is
either the old state or the new one.

    checkpoints/step_00001000/
        model.safetensors, optimizer.bin, random_states_<rank>.pkl, scaler.pt (fp16): as accelerate names them, so that
        accelerator.load_state reads the folder
        ema.safetensors, config.json: the folder loads with VLAPolicy.from_pretrained
        trainer_state.json (counters, best metric, versions), MANIFEST.json
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import random
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import load as load_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vla import InputError, NotSaved
from vla.config import CheckpointConfig
from vla.optim import EMA

logger = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d{8})")
NEEDED = {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "config.json", "trainer_state.json"}
FAILURES = 3  # saves in a row that may fail before the run stops
ALIGNMENT = 64  # bytes, of each tensor in the buffer
PIECE = 1 << 24  # bytes hashed at once


# ---- The folder of a run.


def prepare(run_dir: Path, resuming: bool, rank: int) -> Path:
    """The folder of a run's checkpoints, made if need be, kept for this job, and rid of what crashes left half-done.

    Raises InputError if it cannot be written to, is in use, holds checkpoints of another run, or none to resume from.
    """
    folder = run_dir / "checkpoints"
    _check_begun(run_dir, resuming)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as failure:
        raise InputError(f"cannot write to {folder} ({failure}); choose another --run_dir") from None
    if rank == 0:
        _lock(run_dir)
        _put_back(folder)
        for pattern in (".saving_*", ".deleting_*", ".replaced_*"):
            for left_over in folder.glob(pattern):
                shutil.rmtree(left_over)
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


def _put_back(folder: Path) -> None:
    """Give checkpoints their names back that were to be replaced by others which are not there."""
    for replaced in folder.glob(".replaced_*"):
        with contextlib.suppress(OSError):  # the other is there
            replaced.rename(replaced.with_name(replaced.name.removeprefix(".replaced_")))


def _lock(run_dir: Path, patience: float = 60) -> None:
    """Keep other jobs out of a run for as long as this process lives, after waiting for one that is just ending."""
    handle, deadline = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT), time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its own: what it forks does not hold it
            break
        except OSError:
            if time.monotonic() > deadline:
                owner = os.read(handle, 1000).decode().strip() or "another process"
                raise InputError(f"{run_dir} is in use by {owner}; end it, or choose another --run_dir") from None
            time.sleep(0.2)
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def all_steps(folder: Path) -> dict[int, Path]:
    """Committed checkpoints by step, ascending; not verified."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


# ---- Save.


class Saver:
    """Saves in the background: training waits only while its state is copied into a buffer that is used again.

    One save is in flight; the next waits for it. Every process calls `save` and `finish`; the main process writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        policy: nn.Module,
        policy_config: dict,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        config: CheckpointConfig,
    ):
        self.accelerator, self.folder, self.policy, self.policy_config = accelerator, folder, policy, policy_config
        self.optimizer, self.ema, self.config = optimizer, ema, config
        self.cuda = accelerator.device.type == "cuda"
        self.failures = 0  # in a row
        self.good: set[Path] = set()  # verified by this process
        self.pending: Future | None = None
        self.metrics: list[dict[str, float]] = []
        self.problems: list[str] = []
        if accelerator.is_main_process:
            # One thread, so that saves keep their order; the buffer is made in it, while the first steps run.
            self.thread = ThreadPoolExecutor(1, "checkpoint", _let_training_go_first)
            self.buffer = self.thread.submit(_buffer, self.bytes(), self.cuda)

    def bytes(self) -> int:
        """Size of the tensors in a checkpoint, known before the first step."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors = [*self.policy.state_dict().values(), *trained, *trained]  # AdamW has two moments
        tensors += self.ema.average.values() if self.ema else []
        return sum(map(_aligned, tensors)) + ALIGNMENT * len(trained)  # and a count of steps

    def save(self, state: dict) -> None:
        """Begin the checkpoint of step state["step"]; what follows may change every tensor. Every process calls this.

        Call it between optimizer steps only: gradients under accumulation are not saved.
        """
        if self.cuda:
            torch.cuda.synchronize()  # what the device still had to do is no cost of saving
        began = time.perf_counter()
        self.settle()
        random_states = gather_object([_random_state(self.accelerator.step)])
        if not self.accelerator.is_main_process:
            return
        tensors = {"model": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema:
            tensors["ema"] = self.ema.average
        if self.accelerator.scaler:
            tensors["scaler"] = self.accelerator.scaler.state_dict()
        copies, copied = self._copy(tensors)
        copies["random_states"] = random_states
        blocked = time.perf_counter() - began
        self.pending = self.thread.submit(self._write, copies, copied, state.copy(), blocked)

    def settle(self) -> None:
        """Wait for the save in flight, whatever becomes of it."""
        if self.pending is None:
            return
        failure, done, self.pending = self.pending.exception(), self.pending, None
        if failure is None:
            self.failures = 0
            self.metrics.append(done.result())
        else:
            self.failures += 1
            left = list(all_steps(self.folder))
            newest = f"the newest is of step {left[-1]}" if left else "there is none yet"
            self.problems.append(
                f"a checkpoint could not be saved ({_in_one_line(failure)}): {newest}; {self.failures} of {FAILURES} "
                "failures in a row after which the run stops"
            )

    def report(self) -> tuple[list[dict[str, float]], list[str]]:
        """What became of the saves since the last call: metrics of each that was committed, of each that failed why.

        Only the main process has any.
        """
        if self.pending is not None and self.pending.done():
            self.settle()
        metrics, problems, self.metrics, self.problems = self.metrics, self.problems, [], []
        return metrics, problems

    @property
    def given_up(self) -> bool:
        """Too many saves in a row have failed; only the main process knows."""
        return self.failures >= FAILURES

    def finish(self) -> None:
        """Wait until the save in flight is committed. Raises NotSaved on every process if it could not be."""
        self.settle()
        failed = torch.tensor(float(self.failures), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item():
            raise NotSaved("; ".join(self.problems) or "the main process could not save a checkpoint")

    def _copy(self, tree: dict) -> tuple[dict, tuple | None]:
        """The tree with its tensors copied to the buffer; and the events before and after, if a GPU copies."""
        needed = sum(_aligned(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        if len(self.buffer.result()) < needed:
            self.buffer = self.thread.submit(_buffer, needed, self.cuda)
        buffer, used = self.buffer.result(), 0

        def copy(tensor: Tensor) -> Tensor:
            nonlocal used
            # A slice made by numpy has a storage of its own: torch.save writes a tensor's whole storage.
            place = torch.from_numpy(buffer[used : used + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
            used += _aligned(tensor)
            return place.copy_(tensor.detach(), non_blocking=True)

        if not self.cuda:
            return tree_map_only(Tensor, copy, tree), None
        # In training's own stream, so that whatever changes the weights next comes after the copies.
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        copies = tree_map_only(Tensor, copy, tree)
        events[1].record()
        return copies, events

    def _write(self, copies: dict, copied: tuple | None, state: dict, blocked: float) -> dict[str, float]:
        """Write, commit, rotate; in the thread."""
        began = time.perf_counter()
        if copied:
            copied[1].synchronize()
            blocked += copied[0].elapsed_time(copied[1]) / 1e3
        tensors = [leaf for leaf in tree_leaves(copies) if isinstance(leaf, Tensor)]
        if not all(map(_finite, tensors)):
            raise FloatingPointError("weights or moments are not finite")
        final = self.folder / f"step_{state['step']:08d}"
        temporary = self.folder / f".saving_{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            needed, free = sum(map(_aligned, tensors)), shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on the disk")
            temporary.mkdir()
            save_file(copies["model"], temporary / "model.safetensors")
            torch.save(copies["optimizer"], temporary / "optimizer.bin")
            if "ema" in copies:
                save_file(copies["ema"], temporary / "ema.safetensors")
            if "scaler" in copies:
                torch.save(copies["scaler"], temporary / "scaler.pt")
            for rank, random_state in enumerate(copies["random_states"]):
                torch.save(random_state, temporary / f"random_states_{rank}.pkl")
            _write_json(temporary / "config.json", self.policy_config)
            _write_json(temporary / "trainer_state.json", state | {"versions": versions()})
            size = _commit(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _put_back(self.folder)
            raise
        self.good.add(final)
        rotate(self.folder, state, self.config, self._is_good)
        seconds = time.perf_counter() - began
        return {"save/blocked_seconds": blocked, "save/commit_seconds": seconds, "save/bytes": size}

    def _is_good(self, path: Path) -> bool:
        """Whole, by its hashes once, then by its sizes alone."""
        try:
            verify(path, sizes_only=path in self.good)
        except InputError as failure:
            logger.warning("%s", failure)
            return False
        self.good.add(path)
        return True


def _commit(temporary: Path, final: Path) -> int:
    """Hash, flush, verify, rename. Returns the bytes written."""
    files = {}
    for path in sorted(temporary.iterdir()):
        path.chmod(file_mode(temporary))  # safetensors leaves 0600
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    _write_json(temporary / "MANIFEST.json", {"files": files})
    _flush(temporary / "MANIFEST.json")
    _flush(temporary)
    verify(temporary)
    replaced = final.with_name(f".replaced_{final.name}")
    if final.exists():  # damaged, or of a future that was left by resuming from before it
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return sum(entry["bytes"] for entry in files.values())


def rotate(folder: Path, state: dict, config: CheckpointConfig, is_good: Callable[[Path], bool]) -> None:
    """Delete all but the newest good ones, the best, and those to keep for good.

    Call it after committing and verifying step state["step"]. Checkpoints of later steps are deleted too: they are of a
    future that was left by resuming from before it.
    """
    steps = all_steps(folder)
    good = {step: path for step, path in reversed(steps.items()) if step <= state["step"] and is_good(path)}
    newest = list(good.values())
    regular = [path for step, path in good.items() if config.keep_every and step % config.keep_every == 0]
    # In a row of skipped updates the run may yet have to go back to before it.
    before = [path for step, path in good.items() if step <= state["step"] - state["bad_in_a_row"]]
    kept = {*newest[: config.keep], *before[:1], *regular, best(state, newest)}
    for path in steps.values() if good else ():
        if path not in kept:
            _delete(path)


def best(state: dict, good: list[Path]) -> Path | None:
    """The best of these good checkpoints: the one that `state` names, or if it was lost, that of the lowest score."""
    scores = {}
    for path in good:
        saved = read_state(path)
        if saved["step"] == state["best_step"]:
            return path
        if saved["evaluated"] == saved["step"] and saved["metric"] == state["metric"] and saved["score"] is not None:
            scores[path] = saved["score"]
    return min(scores, key=scores.get, default=None)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".deleting_{path.name}")  # a crash half-way leaves no half checkpoint under its name
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _let_training_go_first() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 14)  # on Linux a thread has a priority of its own


def _buffer(size: int, cuda: bool) -> np.ndarray:
    """Memory that is there: touched, and locked for the GPU's copies if there is one. uint8 [size]."""
    buffer = np.empty(size, np.uint8)
    buffer.fill(0)
    if cuda and size:
        status = torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, size, 0)
        if status.value:
            logger.warning("memory for checkpoints could not be locked (CUDA error %d): saves wait longer", status)
    return buffer


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.dtype == torch.bfloat16:  # unknown to numpy; all ones in the exponent: infinite or no number
        return bool((tensor.view(torch.int16).numpy() & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(tensor.numpy()).all())  # numpy uses one core, torch would take those of the training


def _random_state(step: int) -> dict:
    """The generators of this process, as accelerate.load_state takes them."""
    state = {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),  # noqa: NPY002
        "torch_manual_seed": torch.get_rng_state(),
    }
    return state | ({"torch_cuda_manual_seed": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


# ---- Load.


def load(accelerator: Accelerator, path: Path, ema: EMA | None) -> dict:
    """Restore everything prepared by `accelerator` from a verified checkpoint. Returns the `state` given to `save`.

    Nothing of it is executed: JSON, safetensors, and torch.load with weights_only.
    """
    own = path / f"random_states_{accelerator.process_index}.pkl"
    if own.exists():  # a process that is new to this run has none
        load_tensors(own)  # accelerate would ignore one that is broken or unsafe
    accelerator.load_state(str(path), map_location="cpu")
    accelerator.step = 0  # saves fall between steps; a process new to this run has no file to read its count from
    if ema is not None:
        ema.load(load_file(path / "ema.safetensors"))
    return read_state(path)


def restore(
    accelerator: Accelerator, resume_from: str, folder: Path, ema: EMA | None, passed_over: Iterable[Path] = ()
) -> tuple[dict, Path]:
    """Find, verify, load, on all processes together. Returns the `state` given to `save`, and the checkpoint.

    If loading fails on any process, all load the next older checkpoint, whole. Raises InputError if none is left, and
    at once for a checkpoint that was named.
    """
    passed_over = set(passed_over)
    while True:
        path, state, problem = find_together(accelerator, resume_from, folder, passed_over), None, ""
        try:
            state = load(accelerator, path, ema)
        except Exception as failure:  # by every kind of damage another one; all processes must hear of it
            problem = f"{path} cannot be loaded: {_in_one_line(failure)}"
        problem = next(filter(None, gather_object([problem])), "")
        if not problem:
            return state, path
        if NAME.fullmatch(Path(resume_from).name):
            raise InputError(problem)
        if accelerator.is_main_process:
            logger.warning("%s; trying the one before it", problem)
        passed_over.add(path)


def verify(path: Path, sizes_only: bool = False) -> None:
    """Raises InputError, naming the file, unless the checkpoint is exactly what was committed."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        there = {entry.name: entry.is_file() and not entry.is_symlink() for entry in path.iterdir()}
    except Exception as failure:  # by every kind of damage another one
        problem = f"it or its MANIFEST.json cannot be read ({_in_one_line(failure)})"
        raise InputError(f"{path} is no whole checkpoint: {problem}") from None
    if missing := NEEDED - files.keys():
        raise InputError(f"{path} is no whole checkpoint: MANIFEST.json does not list {', '.join(sorted(missing))}")
    if strange := there.keys() ^ {*files, "MANIFEST.json"} | {name for name, is_file in there.items() if not is_file}:
        raise InputError(f"{path} does not hold what its MANIFEST.json lists: look at {', '.join(sorted(strange))}")
    for name, (size, digest) in files.items():
        file = path / name
        try:
            if file.stat().st_size != size or (not sizes_only and _sha256(file) != digest):
                raise InputError(f"{file} is damaged: its size or hash is not the manifest's")
        except OSError as failure:
            raise InputError(f"{file} cannot be read: {failure}") from None


def find(resume_from: str, folder: Path, passed_over: Iterable[Path] = ()) -> Path:
    """The checkpoint that --resume_from means, verified. folder: the run's checkpoints.

    For a run it is the newest good one: damaged ones are named in a warning and passed over. Raises InputError if
    none is good, never falling back to a fresh start.
    """
    if NAME.fullmatch(Path(resume_from).name):
        verify(Path(resume_from))
        return Path(resume_from)
    best_wanted, good = Path(resume_from).name == "best", []
    for path in reversed(all_steps(folder).values()):
        if path in passed_over:
            continue
        try:
            verify(path)
        except InputError as failure:
            logger.warning("%s; trying the one before it", failure)
            continue
        if not best_wanted:
            return path
        good.append(path)
    if not good:
        raise InputError(f"{folder} holds no good checkpoint to resume from; start a new run in another --run_dir")
    found = best(read_state(good[0]), good)
    if found is None:
        raise InputError(f"no checkpoint of {folder.parent} was judged best yet; resume from {folder.parent} itself")
    return found


def find_together(accelerator: Accelerator, resume_from: str, folder: Path, passed_over: Iterable[Path] = ()) -> Path:
    """`find` on the main process, agreed on by all: each gets its path, or its InputError."""
    answer: list = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = find(resume_from, folder, passed_over)
        except InputError as failure:
            answer[1] = str(failure)
    broadcast_object_list(answer)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]


# ---- Small things.


def read_state(path: Path) -> dict:
    """The trainer's counters in a checkpoint, as `Saver.save` got them. Raises InputError if there are none."""
    try:
        state = json.loads((path / "trainer_state.json").read_text())
        del state["versions"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise InputError(f"{path / 'trainer_state.json'} cannot be read ({_in_one_line(failure)})") from None
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


def _in_one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    # In large pieces: between them this thread takes Python's lock, which the training's thread then has to wait for.
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(path.stat().st_size, PIECE) or 1))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()
