"""Batches made by worker processes, in memory that they share with the training process, and brought to its device.

An image is copied once on its way from the cache to the device: a worker reads it into a slot of a shared map, which
for a GPU is pinned, so that the device fetches it from there by itself. Everything else of a batch is small.
"""

import atexit
import mmap
import multiprocessing
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vla import InputError
from vla.data.stream import Samples

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
    slots = _Slots(workers * SLOTS, (batch_size, *samples.image_shape))
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
        for batch in batches:
            if "error" in batch:
                raise InputError(batch["error"])
            images = batch.pop("images")
            small = {name: torch.from_numpy(value).to(device, non_blocking=True) for name, value in batch.items()}
            yield small | {"images": slots.take(images, device)}
    finally:
        del batches  # ends the workers; else the error's traceback would hold them


class _Slots:
    """Shared memory for the images of some batches. A slot is free again when nobody can see its batch any more."""

    def __init__(self, count: int, shape: tuple[int, ...]):
        # Not torch's shared tensors, which lie in /dev/shm: containers often have 64 MB of that.
        self.images = np.frombuffer(mmap.mmap(-1, count * int(np.prod(shape))), np.uint8).reshape(count, *shape)
        self.used = np.frombuffer(mmap.mmap(-1, count), np.uint8)  # 0 or 1 for each slot
        self._on_their_way: deque[tuple[torch.cuda.Event, int]] = deque()

    def pin(self) -> None:
        """Let a GPU read the slots by itself."""
        done = torch.cuda.cudart().cudaHostRegister(self.images.ctypes.data, self.images.nbytes, 0)
        torch.cuda.check_error(done)
        weakref.finalize(self.images, torch.cuda.cudart().cudaHostUnregister, self.images.ctypes.data)

    def free(self) -> int | None:
        """One of this worker's slots, used from now on; none if all are in use."""
        worker = get_worker_info()
        for slot in range(worker.id, len(self.used), worker.num_workers):
            if not self.used[slot]:
                self.used[slot] = 1
                return slot
        return None

    def take(self, images: int | np.ndarray, device: torch.device) -> Tensor:
        """The images of a batch on the device, from a slot or as they are."""
        if not isinstance(images, int):
            return torch.from_numpy(images).to(device)
        view = self.images[images]
        if device.type == "cpu":
            weakref.finalize(view, self.used.__setitem__, images, 0)
            return torch.from_numpy(view)
        while self._on_their_way and self._on_their_way[0][0].query():
            self.used[self._on_their_way.popleft()[1]] = 0
        copied = torch.from_numpy(view).to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._on_their_way.append((event, images))
        return copied


class _Filler:
    """The data set that a worker sees."""

    def __init__(self, samples: Samples, slots: _Slots):
        self.samples, self.slots = samples, slots

    def __getitems__(self, positions: Sequence[int]) -> dict[str, np.ndarray | int]:
        slot = self.slots.free()
        images = None if slot is None else self.slots.images[slot]
        try:
            batch = {name: value.numpy() for name, value in self.samples.batch(positions, images).items()}
        except InputError as error:  # torch would tell it as a traceback of another process
            return {"error": str(error)}
        return batch if slot is None else batch | {"images": slot}


def _whole(batch: dict) -> dict:
    return batch


def _ignore_signals(worker: int) -> None:
    # Schedulers signal the whole process group; workers must outlive the save that the main process makes of it.
    import signal

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # After an error Python ends its children with SIGTERM, which workers ignore, and would wait for them for ever.
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each of them as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
