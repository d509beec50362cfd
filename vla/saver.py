"""Saving beside the training: copy the state out of the way, and let a thread write it (see vla/checkpoint.py)."""

import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vla import InputError, NotSaved, checkpoint
from vla.config import CheckpointConfig
from vla.optim import EMA

logger = logging.getLogger(__name__)
FAILURES = 3  # saves in a row that may fail before the run stops
ALIGNMENT = 64  # bytes, of each tensor in the buffer


class Saver:
    """Saves in the background: training waits only while its state is copied into a buffer that is used again.

    One save is in flight; the next waits for it. Every process calls `save` and `finish`; the main process writes.
    alive: is called every second while a save is waited for.
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
        alive: Callable[[], object] = lambda: None,
    ):
        self.accelerator, self.folder, self.policy, self.policy_config = accelerator, folder, policy, policy_config
        self.optimizer, self.ema, self.config, self.alive = optimizer, ema, config, alive
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
        while not wait([self.pending], timeout=1).done:
            self.alive()
        failure, done, self.pending = self.pending.exception(), self.pending, None
        if failure is None:
            self.failures = 0
            self.metrics.append(done.result())
        else:
            self.failures += 1
            left = list(checkpoint.all_steps(self.folder))
            newest = f"the newest is of step {left[-1]}" if left else "there is none yet"
            why = checkpoint.in_one_line(failure)
            self.problems.append(
                f"a checkpoint could not be saved ({why}): {newest}; {self.failures} of {FAILURES} failures in a row "
                "after which the run stops"
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
            checkpoint.write_json(temporary / "config.json", self.policy_config)
            checkpoint.write_json(temporary / "trainer_state.json", state | {"versions": checkpoint.versions()})
            size = checkpoint.commit(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            checkpoint.put_back(self.folder)
            raise
        self.good.add(final)
        checkpoint.rotate(self.folder, state, self.config, self._is_good)
        seconds = time.perf_counter() - began
        return {"save/blocked_seconds": blocked, "save/commit_seconds": seconds, "save/bytes": size}

    def _is_good(self, path: Path) -> bool:
        """Whole, by its hashes once, then by its sizes alone."""
        try:
            checkpoint.verify(path, sizes_only=path in self.good)
        except InputError as failure:
            logger.warning("%s", failure)
            return False
        self.good.add(path)
        return True


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
