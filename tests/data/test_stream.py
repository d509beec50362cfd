import itertools
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla import InputError, keyed
from vla.data.lerobot import LeRobotDataset
from vla.data.stream import Samples, loader, permute, split, training_positions
from vla.data.write import LeRobotWriter
from vla.model.backbone import tokenize

LENGTHS = (5, 1, 7, 12, 3, 9, 4, 8)  # of the episodes: 49 frames
TRAIN, CHUNK, SEED = np.array([0, 1, 3, 4, 5, 7]), 4, 3  # 38 frames
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every number of frame i tells that it is frame i."""
    root, first = tmp_path_factory.mktemp("stream") / "set", 0
    cameras = {"table": (4, 6), "gripper": (4, 6)}
    names = {"state_names": ["x", "y"], "action_names": ["dx"]}
    with LeRobotWriter(root, fps=10, cameras=cameras, robot_type="tabletop", **names) as writer:
        for episode, length in enumerate(LENGTHS):
            frames = np.arange(first, first + length)
            image = np.broadcast_to(frames[:, None, None, None], (length, 3, 4, 6)).astype(np.uint8)
            writer.add_episode(
                images={"table": image, "gripper": image + 100},
                state=np.stack([frames, -frames], axis=1).astype(np.float32),
                actions=frames[:, None].astype(np.float32) * 10,
                instruction=f"task {episode % 3}",
            )
            first += length
    return LeRobotDataset(root)


def samples(data, episodes=TRAIN, shuffle=True, seed=SEED):
    return Samples(data, episodes, partial(tokenize, length=8), CHUNK, seed, shuffle)


def frames_of(data, episodes):
    return [f for e in episodes for f in range(data.episode_from[e], data.episode_to[e])]


def epoch(size, key):
    return permute(torch.arange(size), size, torch.full((size,), key))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, -1, 2**62])
def test_permutation_reaches_every_place_once(size, key):
    assert epoch(size, key).sort().values.tolist() == list(range(size))


def test_permutation_leaves_its_arguments_alone():
    index, key = torch.arange(5), torch.arange(5)
    permute(index, 5, key)
    assert index.tolist() == key.tolist() == list(range(5))


@pytest.mark.parametrize("size", [64, 1000, 4097])
def test_permutations_look_shuffled_and_differ_between_keys(size):
    identity, first, second = torch.arange(size), epoch(size, 10), epoch(size, 11)
    for a, b in ((identity, first), (identity, second), (first, second)):
        assert (a == b).float().mean() < 5 / size + 0.01  # about one place in `size` agrees by chance
        assert abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]) < 4 / size**0.5
    assert (first.diff() == 1).float().mean() < 5 / size + 0.01  # neighbours are torn apart


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_index_goes_to_every_place_equally_often(size):
    trials = 20_000
    key = keyed.derive(0, torch.arange(trials))
    for index in range(size):
        places = permute(torch.full((trials,), index), size, key)
        share = torch.bincount(places, minlength=size) * size / trials
        assert (share - 1).abs().max() < 0.1, (index, share)  # a network of few rounds is not quite fair on few bits


def test_a_far_position_of_a_billion_frames_costs_nothing_and_does_not_depend_on_its_batch():
    episodes = np.arange(1000)
    huge = SimpleNamespace(
        episode_from=episodes * 10**6, episode_to=(episodes + 1) * 10**6, instructions=["carry the cube"]
    )
    huge = Samples(huge, episodes, partial(tokenize, length=16), CHUNK, SEED, shuffle=True)
    position = torch.arange(10**12, 10**12 + 5000)
    started = time.perf_counter()
    together = huge.frames(position)
    assert time.perf_counter() - started < 2  # a stored permutation of 10^9 frames takes minutes, and 8 GB
    assert together.tolist()[::250] == [huge.frames(p[None]).item() for p in position[::250]]
    assert len(set(together)) == 5000  # all of epoch 1000
    assert together.min() >= 0
    assert together.max() < 10**9
    assert abs(together.mean() / 10**9 - 0.5) < 0.03


def test_each_epoch_reads_every_training_frame_once_across_step_boundaries(data):
    stream, size = samples(data), 38
    assert len(stream) == size
    assert size % GLOBAL_BATCH  # so that steps straddle epochs
    positions = [p for batch in training_positions(0, 19, GLOBAL_BATCH, GLOBAL_BATCH, 0, 1) for p in batch]
    read = [
        frame
        for start in range(0, len(positions), 5)
        for frame in stream.frames(torch.tensor(positions[start : start + 5]))
    ]
    epochs = [read[start : start + size] for start in range(0, 4 * size, size)]
    assert len(positions) == 4 * size
    for one in epochs:
        assert sorted(one) == frames_of(data, TRAIN)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert samples(data, seed=SEED + 1).frames(torch.arange(size)).tolist() != epochs[0]


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (2, 4), (4, 2), (1, 4), (2, 2), (8, 1)])
def test_any_processes_and_accumulation_cover_each_steps_positions_once(processes, micro_batch):
    accumulation = GLOBAL_BATCH // (processes * micro_batch)
    ranks = [list(training_positions(3, 9, GLOBAL_BATCH, micro_batch, r, processes)) for r in range(processes)]
    assert all(len(batches) == 6 * accumulation for batches in ranks)
    for step in range(3, 9):
        window = slice((step - 3) * accumulation, (step - 2) * accumulation)
        taken = [p for batches in ranks for batch in batches[window] for p in batch]
        assert sorted(taken) == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert all(len(batch) == micro_batch for batches in ranks for batch in batches[window])


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (1, 2), (2, 2)])
def test_positions_from_a_later_step_are_the_tail_of_all(processes, micro_batch):
    for rank in range(processes):
        whole = list(training_positions(0, 10, GLOBAL_BATCH, micro_batch, rank, processes))
        tail = list(training_positions(7, 10, GLOBAL_BATCH, micro_batch, rank, processes))
        assert tail == whole[-3 * GLOBAL_BATCH // (micro_batch * processes) :]


def test_batch_holds_the_frames_of_its_positions(data):
    stream = samples(data)
    batch = stream.__getitems__(range(30, 46))  # straddles the first two epochs
    frames = stream.frames(torch.arange(30, 46))
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    assert shapes == {
        "images": (torch.uint8, (16, 2, 3, 4, 6)),
        "state": (torch.float32, (16, 2)),
        "tokens": (torch.int64, (16, 8)),
        "token_mask": (torch.bool, (16, 8)),
        "actions": (torch.float32, (16, CHUNK, 1)),
        "action_is_pad": (torch.bool, (16, CHUNK)),
        "position": (torch.int64, (16,)),
        "key": (torch.int64, (16,)),
    }
    assert batch["position"].tolist() == list(range(30, 46))
    for row, frame in enumerate(frames):
        episode = next(e for e in range(len(LENGTHS)) if frame < data.episode_to[e])
        last = data.episode_to[episode] - 1
        assert batch["state"][row].tolist() == [frame, -frame]
        assert batch["images"][row].flatten(1).unique(dim=1).tolist() == [[frame], [frame + 100]]
        assert batch["actions"][row, :, 0].tolist() == [10 * min(frame + i, last) for i in range(CHUNK)]
        assert batch["action_is_pad"][row].tolist() == [frame + i > last for i in range(CHUNK)]
        text = bytes(batch["tokens"][row][batch["token_mask"][row]][1:].tolist()).decode()
        assert text == f"task {episode % 3}"


def run(data, first_step=0, workers=0):
    positions = training_positions(first_step, 12, GLOBAL_BATCH, 4, 1, 2)
    return list(loader(samples(data), positions, workers, pin_memory=False))


def test_workers_change_neither_batches_nor_their_order_nor_the_global_random_state(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone, shared = run(data), run(data, workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(shared) == 12
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert [batch["position"][0] for batch in alone] == list(range(4, 100, 8))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_resuming_at_a_step_gives_exactly_the_tail(data, step, workers):
    whole, tail = run(data), run(data, first_step=step, workers=workers)
    assert len(tail) == 12 - step
    assert all(equal(a, b) for a, b in zip(whole[step:], tail, strict=True))


@pytest.mark.parametrize(("episodes", "fraction", "held_out"), [(20, 0.1, 2), (8, 0.05, 1), (2, 0.01, 1), (10, 0.9, 9)])
def test_split_holds_out_whole_episodes_and_at_least_one(episodes, fraction, held_out):
    train, val = split(episodes, fraction, 0)
    assert len(val) == held_out
    assert sorted([*train, *val]) == list(range(episodes))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    again = split(episodes, fraction, 0)
    assert (again[0].tolist(), again[1].tolist()) == (train.tolist(), val.tolist())


def test_split_depends_on_the_seed_and_every_episode_gets_its_turn():
    held_out = [tuple(split(12, 0.2, seed)[1]) for seed in range(60)]
    assert len(set(held_out)) > 30
    assert {episode for val in held_out for episode in val} == set(range(12))


def test_no_share_holds_out_no_episode(data):
    train, val = split(5, 0, 0)
    assert train.tolist() == list(range(5))
    assert val.tolist() == []
    assert len(samples(data, val, shuffle=False)) == 0


@pytest.mark.parametrize(("episodes", "fraction"), [(1, 0.05), (2, 0.8), (4, 0.9)])
def test_split_that_leaves_nothing_to_train_on_is_refused(episodes, fraction):
    with pytest.raises(InputError, match=rf"{episodes} episodes and --data.val_fraction {fraction} would hold out"):
        split(episodes, fraction, 0)


def test_validation_samples_enumerate_the_frames_of_their_episodes_in_order(data):
    episodes = np.array([2, 6])
    val = samples(data, episodes, shuffle=False)
    assert len(val) == 11
    assert val.frames(torch.arange(11)).tolist() == frames_of(data, episodes)
    assert val.__getitems__([10, 0])["state"][:, 0].tolist() == [frames_of(data, episodes)[i] for i in (10, 0)]


def test_statistics_are_those_of_the_training_episodes_alone(data):
    frames = np.array(frames_of(data, TRAIN))
    state, actions = samples(data).statistics()
    expected = np.stack([frames, -frames], axis=1).astype(np.float64)
    for found, values in ((state, expected), (actions, 10.0 * frames[:, None])):
        np.testing.assert_array_equal(found["min"], values.min(0))
        np.testing.assert_array_equal(found["max"], values.max(0))
        np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found["std"], values.std(0), rtol=1e-6)
        np.testing.assert_allclose(found["q01"], np.quantile(values, 0.01, axis=0), rtol=1e-5)
        assert found["count"] == [38]
    assert state["mean"][0] != data.state[:, 0].mean()


def test_flow_noise_differs_between_samples_and_between_epochs_of_one_frame(data):
    stream = samples(data)
    batch = stream.__getitems__(range(2 * 38))
    frames, key = stream.frames(torch.arange(2 * 38)).tolist(), batch["key"]
    noise, t = keyed.normal(key, keyed.FLOW_NOISE, (CHUNK, 1)), keyed.uniform(key, keyed.FLOW_TIME)
    assert len(key.unique()) == len(noise.flatten(1).unique(dim=0)) == len(t.unique()) == 76
    for frame in frames_of(data, TRAIN):
        first, second = (i for i, f in enumerate(frames) if f == frame)
        assert first < 38 <= second
        assert not torch.equal(noise[first], noise[second])
        assert t[first] != t[second]
    assert not torch.equal(samples(data, seed=SEED + 1).__getitems__(range(76))["key"], key)


def test_process_ends_after_an_error_though_its_loader_workers_ignore_signals():
    program = """
import torch
from vla.data.stream import loader
class Positions(torch.utils.data.Dataset):
    def __getitems__(self, positions): return {"position": torch.tensor(positions)}
batches = iter(loader(Positions(), iter([range(2)] * 9), workers=1, pin_memory=False))
next(batches)
raise KeyError("an error")
"""
    words, root = [sys.executable, "-c", program], Path(__file__).parents[2]
    ended = subprocess.run(words, cwd=root, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("KeyError: 'an error'\n")
