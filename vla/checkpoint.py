"""Checkpoints that are whole or not there.

A save goes into a hidden folder; MANIFEST.json, with every file's size and hash, is written last; everything is
flushed to disk; one rename commits. What is left after a crash at any line is either the old state or the new one.

    checkpoints/step_00001000/   model.safetensors, optimizer.bin, random_states_<rank>.pkl, scaler.pt (fp16): as
    accelerate names them
                                 ema.safetensors, config.json (the policy's: the folder loads with
                                 VLAPolicy.from_pretrained) trainer_state.json (counters, best metric, versions),
                                 MANIFEST.json
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from vla import InputError
from vla.optim import EMA

logger = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d{8})")


def prepare(run_dir: Path, resuming: bool) -> Path:
    """The folder of a run's checkpoints, made if need be. Raises InputError if it is not writable, or for a new run
    not empty.
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
    """Commit a checkpoint of everything prepared by `accelerator` to folder/step_<state["step"]>; every process
    calls this.

    Call it between optimizer steps only: gradients under accumulation are not saved. Raises OSError on every process
    if writing failed on any; nothing is then left under the final name.
    """
    final = folder / f"step_{state['step']:08d}"
    temporary = folder / f".saving_{final.name}"
    error = None
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        if accelerator.is_main_process:
            if ema is not None:
                save_file(
                    {name: value.contiguous() for name, value in ema.average.items()}, temporary / "ema.safetensors"
                )
            (temporary / "config.json").write_text(json.dumps(policy_config, indent=2) + "\n")
            (temporary / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")
    except OSError as failure:
        error = failure
    _raise_together(accelerator, error)  # also the barrier behind which all ranks' files are there
    if accelerator.is_main_process:
        try:
            _commit(temporary, final)
        except OSError as failure:
            error = failure
    _raise_together(accelerator, error)
    return final


def load(accelerator: Accelerator, path: Path, ema: EMA | None) -> dict:
    """Restore everything prepared by `accelerator` from a verified checkpoint. Returns what `save` was given as
    `state`.
    """
    accelerator.load_state(str(path), map_location="cpu")
    accelerator.step = (
        0  # saves fall between steps; a process that is new to this run has no file to read its count from
    )
    if ema is not None:
        ema.load(load_file(path / "ema.safetensors"))
    return json.loads((path / "trainer_state.json").read_text())


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


def rotate(folder: Path, keep: int, keep_every: int, best: int | None) -> None:
    """Delete what is neither among the newest `keep`, nor the best, nor a multiple of keep_every. Call it after a
    commit.
    """
    steps = all_steps(folder)
    kept = {*list(steps)[-keep:], best} | {step for step in steps if keep_every and step % keep_every == 0}
    for step, path in steps.items():
        if step not in kept:
            doomed = path.with_name(
                f".deleting_{path.name}"
            )  # a crash half-way must not leave half a checkpoint by that name
            path.rename(doomed)
            shutil.rmtree(doomed)
    for left_over in folder.glob(".deleting_*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _commit(temporary: Path, final: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = {}
    for path in sorted(temporary.iterdir()):
        path.chmod(0o666 & ~umask)  # safetensors leaves 0600
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = temporary / "MANIFEST.json"
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    _flush(manifest)
    _flush(temporary)
    if final.exists():  # left by a run that was resumed from before it: what was there is replaced
        doomed = final.with_name(f".deleting_{final.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
    temporary.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise_together(accelerator: Accelerator, error: OSError | None) -> None:
    """Raise on every process if any has an error, so that none waits for another that has gone."""
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum")
    if error is not None:
        raise error
    if failed.item():
        raise OSError("another process could not write its part of the checkpoint")
