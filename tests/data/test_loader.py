"""Batches made by worker processes in memory that the training process shares."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from numbered import edit, equal, samples, write
from training import train

from vla import InputError
from vla.data.lerobot import LeRobotDataset
from vla.data.loader import SLOTS, _Slots, loader
from vla.data.mixture import Mixture
from vla.data.stream import training_positions

CPU, BATCH = torch.device("cpu"), 4


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Of two data sets, so that images are masked too."""
    folder = tmp_path_factory.mktemp("loader")
    first, second = write(folder / "first"), write(folder / "second", 1, (4, 6), ("gripper", "side"), (3, 2))
    return samples(Mixture([LeRobotDataset(first), LeRobotDataset(second)], (0.7, 0.3)))


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """After any test, once its batches are dropped."""
    yield
    if multiprocessing.active_children():
        gc.collect()  # an error that pytest holds
    assert not multiprocessing.active_children()


def batches(stream, count, workers, first=0):
    """Batches from a position on."""
    positions = (range(p, p + BATCH) for p in range(first, first + count * BATCH, BATCH))
    return loader(stream, positions, BATCH, workers, CPU)


def worker_pids():
    return [child.pid for child in multiprocessing.active_children()]


# ---- The same batches, whoever makes them.


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_are_those_of_the_samples_in_order_and_take_nothing_from_the_global_random_state(workers, stream):
    torch.manual_seed(5)
    before, made = torch.get_rng_state(), 0
    for batch in batches(stream, 40, workers, first=100):
        assert equal(batch, stream.batch(range(100 + made * BATCH, 100 + (made + 1) * BATCH)))
        assert len(worker_pids()) == workers
        made += 1
    assert made == 40
    assert torch.equal(torch.get_rng_state(), before)


def test_more_workers_than_cores_draw_no_advice_of_torch(stream, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert len(list(batches(stream, 3, workers=3))) == 3
    assert not list(recwarn)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_resuming_at_a_step_gives_exactly_the_tail(step, workers, stream):
    def run(first_step, workers):
        positions = training_positions(first_step, 12, 8, 4, 1, 2)
        return list(loader(stream, positions, 4, workers, CPU))

    whole, tail = run(0, 0), run(step, workers)
    assert [batch["position"][0] for batch in whole] == list(range(4, 100, 8))
    assert len(tail) == 12 - step
    assert all(equal(a, b) for a, b in zip(whole[step:], tail, strict=True))


# ---- Memory that is used again, and never too early.


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_are_never_overwritten(workers, stream):
    kept = list(batches(stream, 60, workers))  # more than there are slots
    assert len(kept) > workers * SLOTS
    for number, batch in enumerate(kept):
        assert equal(batch, stream.batch(range(number * BATCH, (number + 1) * BATCH)))


def copied(values):
    return torch.as_tensor(values).numpy().copy()


KEPT = {
    "slice": lambda images: images[1:3, 0],
    "view": lambda images: images.flatten(1),
    "one pixel": lambda images: images[2, 1, 0, 3, 5],
    "array": lambda images: images.numpy(),
    "view of an array": lambda images: images.numpy()[::2],
    "detached": lambda images: images.detach(),
    "storage": lambda images: torch.tensor([], dtype=torch.uint8).set_(images.untyped_storage()),
    "memoryview": lambda images: np.asarray(memoryview(images.numpy())),
}


@pytest.mark.parametrize("part", KEPT)
def test_any_part_of_its_images_keeps_a_batch_from_being_overwritten(part, stream):
    kept, expected = [], []
    for number, batch in enumerate(batches(stream, 40, 1)):
        if number % 3 == 0:
            kept.append(KEPT[part](batch["images"]))
            expected.append(copied(kept[-1]))
        del batch
    assert all(np.array_equal(copied(one), other) for one, other in zip(kept, expected, strict=True))
    assert len({array.tobytes() for array in expected}) > 10  # so that another batch would be noticed


def test_all_else_of_a_batch_outlives_its_images(stream):
    kept = []
    for batch in batches(stream, 40, 1):
        del batch["images"]  # as training does, where it changes them
        kept.append(batch)
    for number, batch in enumerate(kept):
        expected = stream.batch(range(number * BATCH, (number + 1) * BATCH))
        assert equal(batch, {name: value for name, value in expected.items() if name != "images"})


def test_memory_is_used_again_once_a_batch_is_dropped(stream):
    places = [batch["images"].data_ptr() for batch in batches(stream, 100, 2)]
    assert len(places) == 100
    size = sum(value.numpy().nbytes for value in stream.batch(range(BATCH)).values()) + 8 * 16  # for alignment
    assert len(set(places)) <= 2 * SLOTS
    assert set(places[::2]).isdisjoint(places[1::2])  # each worker has its own, and so they need no lock
    assert max(places) - min(places) < 2 * SLOTS * size  # all in one map, none copied through the queue


@pytest.mark.parametrize("status", [0, 304])
def test_memory_that_cannot_be_locked_for_a_gpu_is_used_as_it_is(status, stream, monkeypatch, caplog):
    def kernel(*_, **__):  # raises what came before it
        raise RuntimeError("CUDA error: OS call failed")

    unlocked, lock = [], lambda *_: SimpleNamespace(value=status)
    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=unlocked.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch, "ones", kernel)
    slots = _Slots(2, BATCH, stream.batch(range(1)))
    address = slots.batches.ctypes.data
    slots.pin()
    del slots
    assert unlocked == ([] if status else [address])
    told = "memory for batches could not be locked (CUDA error 304): they arrive later"
    assert caplog.messages == ([told] if status else [])


def test_memory_of_the_processes_does_not_grow(tmp_path):
    root = write(tmp_path / "set", size=(128, 128))
    stream = samples(LeRobotDataset(root))  # a batch has 400 kB
    sizes = {}
    for number, batch in enumerate(batches(stream, 400, 1)):
        if number in (100, 399):
            processes = [psutil.Process(), psutil.Process(*worker_pids())]
            sizes[number] = [process.memory_info().rss for process in processes]
        del batch
    for before, after in zip(sizes[100], sizes[399], strict=True):
        assert after - before < 4e6  # of 120 MB that went by


def test_more_batches_than_slots_can_be_in_use_for_a_while(stream):
    in_use, source = [], batches(stream, 80, 1)
    for keep in (0, 20, 0, 3, 30, 0):
        in_use = in_use[:keep]
        while len(in_use) < keep + 5:
            in_use.append(next(source))
        for batch in in_use:
            assert equal(batch, stream.batch(batch["position"].tolist()))
    source.close()


def test_a_slow_consumer_finds_the_same_batches(stream):
    for number, batch in enumerate(batches(stream, 20, 2)):
        if number % 7 == 3:
            time.sleep(0.3)  # in which the workers make all that they may
        assert equal(batch, stream.batch(range(number * BATCH, (number + 1) * BATCH)))


# ---- Ends.


def test_workers_end_when_the_rest_is_not_wanted(stream):
    source = batches(stream, 10**9, 2)
    batch = next(source)
    pids = worker_pids()
    assert len(pids) == 2
    started = time.perf_counter()
    source.close()
    assert time.perf_counter() - started < 4
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert equal(batch, stream.batch(range(BATCH)))


def test_workers_end_when_the_loader_is_dropped_or_has_given_all(stream):
    source = batches(stream, 3, 2)
    next(source)
    pids = worker_pids()
    del source
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert len(list(batches(stream, 3, 2))) == 3
    assert not worker_pids()


@pytest.mark.parametrize("workers", [0, 2])
def test_fault_found_by_a_worker_is_told_in_its_own_words_alone(workers, tmp_path):
    root = write(tmp_path / "set", cameras=("table",))
    edit(root, "observation.images.table", 20, {"bytes": b"no image", "path": None})
    stream = samples(LeRobotDataset(root, cache="none"))
    with pytest.raises(InputError) as refusal:
        list(batches(stream, 40, workers))
    told = str(refusal.value)
    assert told.startswith("data/chunk-000/file-000.parquet: episode 3: row 20: no readable image of ")
    assert told.endswith("or give --data.skip_bad with --data.cache disk to leave out the episode")
    assert "Traceback" not in told
    assert "worker" not in told


def test_training_ends_with_the_fault_that_a_worker_found(flags, tmp_path):
    root = write(tmp_path / "set", cameras=("table",), size=(64, 64))
    edit(root, "observation.images.table", 20, {"bytes": b"no image", "path": None})
    own = ["--data.path", root, "--data.cache", "none", "--data.workers", 2, "--data.val_fraction", 0.01]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    assert child.code == 1
    lines = child.stderr.splitlines()
    assert "error: data/chunk-000/file-000.parquet: episode 3: row 20: no readable image" in child.stderr
    assert not [line for line in lines if line.startswith("Traceback")]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_worker_is_an_error_and_no_hang(workers, stream):
    source = batches(stream, 10**9, workers)
    next(source)
    os.kill(worker_pids()[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        deque(source, maxlen=0)


def test_workers_are_deaf_to_the_signals_of_a_scheduler(stream):
    source = batches(stream, 40, 2)
    assert len([next(source), next(source)]) == len(worker_pids())  # each has given one: it has long begun
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for pid in worker_pids():
            os.kill(pid, name)
    for number, batch in enumerate(source, 2):
        assert equal(batch, stream.batch(range(number * BATCH, (number + 1) * BATCH)))
    assert number == 39


def test_process_ends_after_an_error_though_its_loader_workers_ignore_signals():
    program = """
import torch
from vla.data.loader import loader
class Samples:
    def batch(self, positions, images=None):
        return {"images": torch.zeros(len(positions), 1, 3, 2, 2, dtype=torch.uint8)}
batches = loader(Samples(), iter([range(2)] * 9), batch_size=2, workers=1, device=torch.device("cpu"))
next(batches)
raise KeyError("an error")
"""
    words, root = [sys.executable, "-c", program], Path(__file__).parents[2]
    ended = subprocess.run(words, cwd=root, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("KeyError: 'an error'\n")
