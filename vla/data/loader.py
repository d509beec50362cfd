"""Batches made by worker processes, in memory that they share with the training process, and brought to its device.

An image is copied once on its way from the cache to the device: a worker reads it into a slot of a shared map, which
for a GPU is pinned, so that the device fetches it from there by itself. Through the pipe comes the slot's number alone.
"""

import atexit
import contextlib
import logging
import mmap
import multiprocessing
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vla import InputError
from vla.data.stream import Samples

logger = logging.getLogger(__name__)
AHEAD = 4  # batches that each worker makes before they are asked for
SLOTS = AHEAD + 2  # of each worker: also one in use, and one on its way to the device


def loader(
    samples: Samples, positions: Iterable[Sequence[int]], batch_size: int, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches at these positions, each of batch_size, on the device, in order whatever the number of workers."""
    if not workers:
        for of_batch in positions:
            yield {name: value.to(device) for name, value in samples.batch(of_batch).items()}
        return
    slots = _Slots(workers * SLOTS, batch_size, samples.batch(range(1)))
    with warnings.catch_warnings():  # too many for the cores: what that costs is in perf/data_wait_share
        warnings.filterwarnings("ignore", "This DataLoader will create")
        batches = iter(
            DataLoader(
                _Filler(samples, slots),
                batch_sampler=positions,
                collate_fn=_whole,
                num_workers=workers,
                prefetch_factor=AHEAD,
                multiprocessing_context="fork",  # the workers inherit the slots
                generator=torch.Generator(),  # the loader draws a seed for its workers: not from training's generator
                worker_init_fn=_ignore_signals,
            )
        )
    if device.type == "cuda":
        slots.pin()
    try:
        for made in batches:
            if isinstance(made, str):
                raise InputError(made)
            if isinstance(made, int):
                yield slots.take(made, device)
            else:
                yield {name: torch.from_numpy(value).to(device) for name, value in made.items()}
    finally:
        del batches  # ends the workers; else the error's traceback would hold them


class _Slots:
    """Shared memory for some batches. A slot is free again when nobody can see the images of its batch any more."""

    def __init__(self, count: int, batch_size: int, example: dict[str, Tensor]):
        fields = [(name, value.numpy().dtype, (batch_size, *value.shape[1:])) for name, value in example.items()]
        slot = np.dtype(fields, align=True)
        # Not torch's shared tensors, which lie in /dev/shm: containers often have 64 MB of that.
        self.batches = np.frombuffer(mmap.mmap(-1, count * slot.itemsize), slot)  # [count]
        self.used = np.frombuffer(mmap.mmap(-1, count), np.uint8)  # 0 or 1 for each slot
        self._turn = 0
        self._on_their_way: deque[tuple[torch.cuda.Event, int]] = deque()

    def pin(self) -> None:
        """Let a GPU read the slots by itself, or warn that they cannot be locked for it: it copies from them then."""
        runtime, address = torch.cuda.cudart(), self.batches.ctypes.data
        status = runtime.cudaHostRegister(address, self.batches.nbytes, 0)
        if status.value == 0:
            weakref.finalize(self.batches, runtime.cudaHostUnregister, address)
        else:
            logger.warning("memory for batches could not be locked (CUDA error %d): they arrive later", status.value)
            with contextlib.suppress(RuntimeError):  # CUDA has kept the error, for the next kernel to raise
                torch.ones(1, device="cuda")
        self._copying = torch.cuda.Stream()

    def free(self) -> int | None:
        """One of this worker's slots, used from now on; none if all are in use."""
        worker = get_worker_info()
        self._turn += 1  # all in turn, so that a worker soon has the memory that it is going to have
        for step in range(SLOTS):
            slot = worker.id + (self._turn + step) % SLOTS * worker.num_workers
            if not self.used[slot]:
                self.used[slot] = 1
                return slot
        return None

    def take(self, slot: int, device: torch.device) -> dict[str, Tensor]:
        """The batch in a slot, on the device."""
        batch = {name: self.batches[name][slot] for name in self.batches.dtype.names}
        if device.type == "cpu":
            weakref.finalize(batch["images"], self.used.__setitem__, slot, 0)
            return {
                name: torch.from_numpy(value if name == "images" else value.copy()) for name, value in batch.items()
            }
        while self._on_their_way and self._on_their_way[0][0].query():
            self.used[self._on_their_way.popleft()[1]] = 0
        with torch.cuda.stream(self._copying):  # while the device computes with the batch before
            copied = {name: torch.from_numpy(value).to(device, non_blocking=True) for name, value in batch.items()}
        arrived, computing = self._copying.record_event(), torch.cuda.current_stream()
        computing.wait_event(arrived)
        for value in copied.values():
            value.record_stream(computing)
        self._on_their_way.append((arrived, slot))
        return copied


class _Filler:
    """The data set that a worker sees."""

    def __init__(self, samples: Samples, slots: _Slots):
        self.samples, self.slots = samples, slots

    def __getitems__(self, positions: Sequence[int]) -> int | dict[str, np.ndarray] | str:
        """The slot that has the batch, the batch itself if none was free, or what is wrong with it."""
        slot = self.slots.free()
        shared = None if slot is None else self.slots.batches[slot]
        try:
            batch = self.samples.batch(positions, None if shared is None else shared["images"])
        except InputError as error:  # torch would tell it as a traceback of another process
            return str(error)
        if shared is None:
            return {name: value.numpy() for name, value in batch.items()}
        for name, value in batch.items():
            if name != "images":
                shared[name][...] = value.numpy()
        return slot


def _whole(made):
    return made


def _ignore_signals(worker: int) -> None:
    # Schedulers signal the whole process group; workers must outlive the save that the main process makes of it.
    import signal

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # After an error Python ends its children with SIGTERM, which workers ignore, and would wait for them for ever.
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each of them as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
