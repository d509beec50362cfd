"""Saving beside the training: copy the state out of the way, and let a thread write it (see vla/checkpoint.py)."""

import contextlib
import json
import logging
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import distributed_c10d as distributed
from torch.utils._pytree import tree_leaves, tree_map_only

from vla import InputError, NotSaved, checkpoint, in_one_line
from vla.config import CheckpointConfig
from vla.model.policy import VLAPolicy
from vla.optim import EMA, trained_parameters
from vla.shards import local, own, shard

logger = logging.getLogger(__name__)
FAILURES = 3  # saves in a row that may fail before the run stops
PATIENCE = 600.0  # seconds, and ten times its own, for which the main process waits for what others write
ALIGNMENT = 64  # bytes, of each tensor in the buffer


class Saver:
    """Saves in the background: training waits only while its state is copied into a buffer that is used again.

    One save is in flight; the next waits for it. Every process calls `save` and `finish`; the main process writes, or
    where the policy is sharded each its own rows, and the main process commits.
    alive: is called every second while a save is waited for. committing: before each commit, in the thread of the main
    process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        policy: VLAPolicy,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        config: CheckpointConfig,
        alive: Callable[[], object] = lambda: None,
        committing: Callable[[], object] = lambda: None,
    ):
        self.accelerator, self.folder, self.policy = accelerator, folder, policy
        self.optimizer, self.ema, self.config, self.alive, self.committing = optimizer, ema, config, alive, committing
        self.cuda = accelerator.device.type == "cuda"
        self.failures = 0  # in a row
        self.good: set[Path] = set()  # verified by this process
        self.pending: Future | None = None
        self.metrics: list[dict[str, float]] = []
        self.problems: list[tuple[str, int]] = []  # and how many in a row these then were
        self.trained, self.turn = trained_parameters(policy, optimizer), 0
        self.store = distributed._get_default_store().clone() if accelerator.is_fsdp2 else None  # between the threads
        if accelerator.is_main_process or self.store:
            # One thread, so that saves keep their order; the buffer is made in it, while the first steps run.
            self.thread = ThreadPoolExecutor(1, "checkpoint", _let_training_go_first)
            self.buffer = self.thread.submit(_buffer, self.bytes(), accelerator.device)

    def bytes(self) -> int:
        """Size of the tensors in a checkpoint when all is trained that ever will be, known before the first step."""
        beside = [*self.trained.values()] * (3 if self.ema else 2)  # moments of AdamW, average
        tensors = [*self.policy.own_state().values(), *beside]
        return sum(_aligned(local(t)) for t in tensors) + ALIGNMENT * len(self.trained)  # and a count of steps

    def save(self, state: dict) -> None:
        """Begin the checkpoint of step state["step"]; what follows may change every tensor. Every process calls this.

        Call it between optimizer steps only: gradients under accumulation are not saved.
        """
        if self.cuda:
            torch.cuda.synchronize()  # what the device still had to do is no cost of saving
        began = time.perf_counter()
        self.settle()
        self.turn, main_process = self.turn + 1, self.accelerator.is_main_process
        if self.store and main_process:
            shutil.rmtree(self._temporary(state), ignore_errors=True)
            with contextlib.suppress(OSError):  # the thread will meet it again
                self._temporary(state).mkdir()
        random_states = gather_object([_random_state(self.accelerator.step)])  # nobody goes on before all are here
        if not main_process and not self.store:
            return
        tensors = {"model": self.policy.own_state()}
        if self.store:
            moments = {name: self.optimizer.state.get(p, {}).items() for name, p in self.trained.items()}
            tensors["optimizer"] = {f"{name}/{kind}": value for name, has in moments.items() for kind, value in has}
        else:
            tensors["optimizer"] = self.optimizer.state_dict()
        if self.ema:
            tensors["ema"] = self.ema.average
        if self.accelerator.scaler:
            tensors["scaler"] = self.accelerator.scaler.state_dict()
        if self.store:
            tensors = {kind: own(values, main_process) for kind, values in tensors.items()}
        copies, copied = self._copy(tensors)
        if main_process:
            copies |= {"random_states": random_states, "config": asdict(self.policy.own_config())}
        write = self._write if main_process else self._write_rows
        self.pending = self.thread.submit(write, copies, copied, state.copy(), time.perf_counter() - began)

    def settle(self) -> None:
        """Wait for the save in flight, whatever becomes of it."""
        if self.pending is None:
            return
        while not wait([self.pending], timeout=1).done:
            self.alive()
        failure, done, self.pending = self.pending.exception(), self.pending, None
        if failure is None:
            self.failures = 0
            self.metrics += done.result()
        else:
            self.failures += 1
            left = list(checkpoint.all_steps(self.folder))
            newest = f"the newest is of step {left[-1]}" if left else "there is none yet"
            why = in_one_line(failure)
            self.problems.append((f"a checkpoint could not be saved ({why}): {newest}", self.failures))

    def report(self) -> tuple[list[dict[str, float]], list[str]]:
        """What became of the saves since the last call: metrics of each that was committed, of each that failed why.

        Only the main process has any.
        """
        if self.pending is not None and self.pending.done():
            self.settle()
        left = f"of {FAILURES} failures in a row after which the run stops"
        metrics, problems = self.metrics, [f"{problem}; {count} {left}" for problem, count in self.problems]
        self.metrics, self.problems = [], []
        return metrics, problems

    @property
    def given_up(self) -> bool:
        """Too many saves in a row have failed; only the main process knows."""
        return self.failures >= FAILURES

    def finish(self) -> None:
        """Wait until the save in flight is committed. Raises NotSaved on every process if it could not be."""
        self.settle()
        told = "; ".join(problem for problem, _ in self.problems) or "the last checkpoint could not be saved"
        if problems := gather_object([told] if self.failures else []):
            raise NotSaved(problems[0])

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

    def _write(self, copies: dict, copied: tuple | None, state: dict, blocked: float) -> list[dict[str, float]]:
        """Write, commit, rotate; in the thread of the main process."""
        began = time.perf_counter()
        if copied:
            copied[1].synchronize()
            blocked += copied[0].elapsed_time(copied[1]) / 1e3
        final, temporary = self.folder / f"step_{state['step']:08d}", self._temporary(state)
        try:
            try:
                if not self.store:
                    shutil.rmtree(temporary, ignore_errors=True)
                self._write_tensors(copies, temporary)
                for rank, random_state in enumerate(copies["random_states"]):
                    torch.save(random_state, temporary / f"random_states_{rank}.pkl")
                checkpoint.write_json(temporary / "config.json", copies["config"])
                checkpoint.write_json(temporary / "trainer_state.json", state | {"versions": checkpoint.versions()})
            finally:  # only then nobody writes any more
                others = self._others(10 * (time.perf_counter() - began)) if self.store else {}
            self.committing()
            size = checkpoint.commit(temporary, final, others)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            checkpoint.put_back(self.folder)
            raise
        self.good.add(final)
        try:
            checkpoint.rotate(self.folder, state, self.config, self._is_good)
        except (OSError, InputError) as failure:  # the save is committed all the same
            logger.warning("warning: old checkpoints are kept (%s)", in_one_line(failure))
        seconds = time.perf_counter() - began
        return [{"save/blocked_seconds": blocked, "save/commit_seconds": seconds, "save/bytes": size}]

    def _write_rows(self, copies: dict, copied: tuple | None, state: dict, blocked: float) -> list[dict[str, float]]:
        """Write this process's rows beside those of the main process, and tell it; in the thread of another."""
        try:
            if copied:
                copied[1].synchronize()
            answer = {"files": checkpoint.flushed(self._write_tensors(copies, self._temporary(state)))}
        except Exception as failure:
            answer = {"problem": in_one_line(failure)}
        self.store.set(self._key(self.accelerator.process_index), json.dumps(answer))
        return []

    def _write_tensors(self, copies: dict, folder: Path) -> list[Path]:
        """Write the files with tensors. Raises FloatingPointError or OSError, having written nothing, if it is vain."""
        tensors, processes = [leaf for leaf in tree_leaves(copies) if isinstance(leaf, Tensor)], 1
        if not all(map(_finite, tensors)):
            raise FloatingPointError("weights or moments are not finite")
        if self.store:
            processes = self.accelerator.num_processes
        needed, free = sum(map(_aligned, tensors)) * processes, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on the disk")
        folder.mkdir(exist_ok=True)
        if self.store:
            rows = {kind: copies[kind] for kind in ("model", "optimizer", "ema") if kind in copies}
            names = {kind: shard(kind, self.accelerator.process_index, processes) for kind in rows}
            for kind, name in names.items():
                save_file(rows[kind], folder / name)
            return [folder / name for name in names.values()]
        save_file(copies["model"], folder / "model.safetensors")
        torch.save(copies["optimizer"], folder / "optimizer.bin")
        if "ema" in copies:
            save_file(copies["ema"], folder / "ema.safetensors")
        if "scaler" in copies:
            torch.save(copies["scaler"], folder / "scaler.pt")
        return []

    def _others(self, seconds: float) -> dict[str, dict]:
        """What the other processes have written, as the manifest lists it.

        Raises OSError, once no process writes any more, if one could not, or if one does not answer in time.
        """
        entries, problems, deadline = {}, [], time.monotonic() + PATIENCE + seconds
        for rank in range(1, self.accelerator.num_processes):
            try:
                self.store.wait([self._key(rank)], timedelta(seconds=max(1, deadline - time.monotonic())))
                answer = json.loads(self.store.get(self._key(rank)))
                self.store.delete_key(self._key(rank))
            except RuntimeError:
                answer = {"problem": "no word of it"}
            entries |= answer.get("files", {})
            problems += [f"process {rank}: {answer['problem']}"] if "problem" in answer else []
        if problems:
            raise OSError("; ".join(problems))
        return entries

    def _key(self, rank: int) -> str:
        return f"save/{self.turn}/{rank}"

    def _temporary(self, state: dict) -> Path:
        return self.folder / f".saving_step_{state['step']:08d}"

    def _is_good(self, path: Path) -> bool:
        """Whole, by its hashes once, then by its sizes alone. Raises Unreadable if it cannot be read now."""
        try:
            checkpoint.verify(path, hashed=() if path in self.good else None)
        except checkpoint.Unreadable:
            raise
        except InputError as failure:
            logger.warning("%s", failure)
            return False
        self.good.add(path)
        return True


def _let_training_go_first() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 14)  # on Linux a thread has a priority of its own


def _buffer(size: int, device: torch.device) -> np.ndarray:
    """Memory that is there: touched, and locked for the copies if the device is a GPU. uint8 [size]."""
    buffer = np.empty(size, np.uint8)
    buffer.fill(0)
    if device.type == "cuda" and size:
        runtime, address = torch.cuda.cudart(), buffer.ctypes.data
        with torch.cuda.device(device):  # threads begin with the first GPU, where each would take memory for a context
            status = runtime.cudaHostRegister(address, size, 0)
        if status.value == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, address)  # else its pages would stay locked
        else:
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
