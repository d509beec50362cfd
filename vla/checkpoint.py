"""Checkpoints that are whole or not there.

A save goes into a hidden folder; MANIFEST.json, with every file's size and hash, is written last; everything is
flushed to disk; one rename commits. What is left after a crash at any line is either the old state or the new one.

    checkpoints/step_00001000/
        model.safetensors, optimizer.bin, random_states_<rank>.pkl, scaler.pt (fp16): as accelerate names them
        ema.safetensors, config.json: the folder loads with VLAPolicy.from_pretrained
        trainer_state.json (counters, best metric, versions), MANIFEST.json
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla import InputError
from vla.optim import EMA

logger = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d{8})")


def prepare(run_dir: Path, resuming: bool) -> Path:
    """The folder of a run's checkpoints, made if need be.

    Raises InputError if it cannot be written to, holds checkpoints of another run, or holds none to resume from.
    """
    folder = run_dir / "checkpoints"
    if resuming and not all_steps(folder):
        raise InputError(f"{folder} holds no checkpoint to resume from; leave out --resume_from to start the run anew")
    if not resuming and all_steps(folder):
        raise InputError(
            f"{run_dir} already holds checkpoints; go on with --resume_from {run_dir}, or choose another --run_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as failure:
        raise InputError(f"cannot write to {folder} ({failure}); choose another --run_dir") from None
    return folder


def save(accelerator: Accelerator, folder: Path, state: dict, policy_config: dict, ema: EMA | None) -> Path:
    """Commit everything prepared by `accelerator` to folder/step_<state["step"]>; every process calls this.

    Call it between optimizer steps only: gradients under accumulation are not saved. Raises on every process if writing
    failed on any; nothing new is then left under the final name.
    """
    final = folder / f"step_{state['step']:08d}"
    temporary = folder / f".saving_{final.name}"
    with _agreed(accelerator):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    with _agreed(accelerator):
        accelerator.save_state(str(temporary), safe_serialization=True)
        if accelerator.is_main_process:
            if ema is not None:
                save_file(ema.average, temporary / "ema.safetensors")
            _write_json(temporary / "config.json", policy_config)
            _write_json(temporary / "trainer_state.json", state | {"versions": versions()})
    with _agreed(accelerator):
        if accelerator.is_main_process:
            _commit(temporary, final)
    return final


def load(accelerator: Accelerator, path: Path, ema: EMA | None) -> dict:
    """Restore everything prepared by `accelerator` from a verified checkpoint. Returns the `state` given to `save`."""
    accelerator.load_state(str(path), map_location="cpu")
    accelerator.step = 0  # saves fall between steps; a process new to this run has no file to read its count from
    if ema is not None:
        ema.load(load_file(path / "ema.safetensors"))
    state = json.loads((path / "trainer_state.json").read_text())
    del state["versions"]
    return state


def verify(path: Path) -> None:
    """Raises InputError, naming the file, unless the checkpoint is exactly what was committed."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as failure:
        raise InputError(f"{path} is no whole checkpoint: MANIFEST.json cannot be read ({failure})") from None
    for name, (size, digest) in files.items():
        try:
            if (path / name).stat().st_size != size or _sha256(path / name) != digest:
                raise InputError(f"{path / name} is damaged: its size or hash is not the manifest's")
        except OSError as failure:
            raise InputError(f"{path / name} cannot be read: {failure}") from None


def find(resume_from: str, folder: Path) -> Path:
    """The checkpoint that --resume_from means, verified. folder: the run's checkpoints.

    For a run it is the newest good one: damaged ones are named in a warning and passed over. Raises InputError if
    none is good, never falling back to a fresh start.
    """
    if NAME.fullmatch(Path(resume_from).name):
        verify(Path(resume_from))
        return Path(resume_from)
    newest = None
    for path in reversed(all_steps(folder).values()):
        try:
            verify(path)
            newest = path
            break
        except InputError as failure:
            logger.warning("%s; trying the one before it", failure)
    if newest is None:
        raise InputError(f"{folder} holds no good checkpoint to resume from; start a new run in another --run_dir")
    if Path(resume_from).name != "best":
        return newest
    step = json.loads((newest / "trainer_state.json").read_text())["best_step"]
    if step is None:
        raise InputError(f"no checkpoint of {folder.parent} was judged best yet; resume from {folder.parent} itself")
    best = folder / f"step_{step:08d}"
    verify(best)
    return best


def find_together(accelerator: Accelerator, resume_from: str, folder: Path) -> Path:
    """`find` on the main process, agreed on by all: each gets its path, or its InputError."""
    answer: list = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = find(resume_from, folder)
        except InputError as failure:
            answer[1] = str(failure)
    broadcast_object_list(answer)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]


def all_steps(folder: Path) -> dict[int, Path]:
    """Committed checkpoints by step, ascending; not verified."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def rotate(folder: Path, step: int, keep: int, keep_every: int, best: int | None) -> None:
    """Delete all but the newest `keep`, the best, and multiples of keep_every. Call it after committing `step`.

    Checkpoints of later steps are deleted too: they are of a future that was left by resuming from before it.
    """
    steps = all_steps(folder)
    newest = [other for other in steps if other <= step][-keep:]
    for other, path in steps.items():
        regular = keep_every and other % keep_every == 0 and other <= step
        if other not in newest and other != best and not regular:
            _delete(path)
    for left_over in folder.glob(".deleting_*"):
        shutil.rmtree(left_over)


def versions() -> dict[str, str]:
    """What numbers depend on beside the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpus": str(os.cpu_count()),
    }


def file_mode() -> int:
    """What the umask says a new file's mode is."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _commit(temporary: Path, final: Path) -> None:
    files = {}
    for path in sorted(temporary.iterdir()):
        path.chmod(file_mode())  # safetensors leaves 0600
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    _write_json(temporary / "MANIFEST.json", {"files": files})
    _flush(temporary / "MANIFEST.json")
    _flush(temporary)
    if final.exists():  # damaged, or of a future that was left by resuming from before it
        _delete(final)
    temporary.rename(final)
    _flush(final.parent)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".deleting_{path.name}")  # a crash half-way leaves no half checkpoint under its name
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _agreed(accelerator: Accelerator):
    """What fails inside on one process fails on all, so that none waits for another that has gone. Also a barrier."""
    error = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as failure:  # a full disk is each of them, by who finds it
        error = failure
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum")
    if error is not None:
        raise error
    if failed.item():
        raise OSError("another process could not write its part of the checkpoint")
