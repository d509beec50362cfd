"""One data set as an endless stream of training samples."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered import CHUNK, LENGTHS, SEED, edit, equal, instruction, samples, write

from vla import InputError, keyed
from vla.config import ModelConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.mixture import Mixture
from vla.data.stats import statistics
from vla.data.stream import Samples, split, summary, training_positions
from vla.model.backbone import LanguageModel

TRAIN = np.array([0, 1, 3, 4, 5, 7])  # 38 frames
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return LeRobotDataset(write(tmp_path_factory.mktemp("stream") / "set"))


def frames_of(data, episodes):
    return [f for e in episodes for f in range(data.episode_from[e], data.episode_to[e])]


def frames(stream, positions):
    return stream.frames(torch.tensor(positions))[1].tolist()


def test_a_far_position_of_a_billion_frames_costs_nothing_and_does_not_depend_on_its_batch():
    episodes = np.arange(1000)
    spans = {"episode_from": episodes * 10**6, "episode_to": (episodes + 1) * 10**6}
    huge = SimpleNamespace(**spans, instructions=["carry the cube"], cameras=(), image_size=(4, 6))
    tokens = LanguageModel(ModelConfig(max_tokens=16)).tokenize(huge.instructions)
    huge = Samples(Mixture([huge]), [episodes], tokens, CHUNK, SEED, shuffle=True)
    position = torch.arange(10**12, 10**12 + 5000)
    started = time.perf_counter()
    together = huge.frames(position)[1]
    assert time.perf_counter() - started < 2  # a stored permutation of 10^9 frames takes minutes, and 8 GB
    assert together.tolist()[::250] == [huge.frames(p[None])[1].item() for p in position[::250]]
    assert len(set(together)) == 5000  # all of epoch 1000
    assert together.min() >= 0
    assert together.max() < 10**9
    assert abs(together.mean() / 10**9 - 0.5) < 0.03


def test_each_epoch_reads_every_training_frame_once_across_step_boundaries(data):
    stream, size = samples(data, TRAIN), 38
    assert len(stream) == size
    assert size % GLOBAL_BATCH  # so that steps straddle epochs
    positions = [p for batch in training_positions(0, 19, GLOBAL_BATCH, GLOBAL_BATCH, 0, 1) for p in batch]
    read = [frame for start in range(0, len(positions), 5) for frame in frames(stream, positions[start : start + 5])]
    epochs = [read[start : start + size] for start in range(0, 4 * size, size)]
    assert len(positions) == 4 * size
    for one in epochs:
        assert sorted(one) == frames_of(data, TRAIN)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert frames(samples(data, TRAIN, seed=SEED + 1), range(size)) != epochs[0]


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


@pytest.mark.parametrize(
    ("left_out", "taken"),
    [
        ([(2, 3)], [0, 1, 5, 6, 7, 8]),
        ([(2, 3), (2, 1)], [0, 1, 6, 7, 8, 9]),  # the second is of step 2 as it was after the first: 5
        ([(4, 1), (1, 2)], [0, 3, 5, 6, 7, 8]),
    ],
)
def test_steps_take_the_positions_that_are_not_left_out(left_out, taken):
    batches = list(training_positions(0, 6, 1, 1, 0, 1, left_out))
    assert batches == [range(p, p + 1) for p in taken]


def test_batch_holds_the_frames_of_its_positions(data):
    stream = samples(data, TRAIN)
    batch = stream.batch(range(30, 46))  # straddles the first two epochs
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    assert shapes == {
        "dataset": (torch.int64, (16,)),
        "images": (torch.uint8, (16, 2, 3, 4, 6)),
        "image_mask": (torch.bool, (16, 2)),
        "state": (torch.float32, (16, 2)),
        "tokens": (torch.int64, (16, 12)),
        "token_mask": (torch.bool, (16, 12)),
        "actions": (torch.float32, (16, CHUNK, 1)),
        "action_is_pad": (torch.bool, (16, CHUNK)),
        "position": (torch.int64, (16,)),
        "key": (torch.int64, (16,)),
    }
    assert batch["position"].tolist() == list(range(30, 46))
    assert batch["image_mask"].all()
    assert not batch["dataset"].any()
    for row, frame in enumerate(frames(stream, range(30, 46))):
        episode = next(e for e in range(len(LENGTHS)) if frame < data.episode_to[e])
        last = data.episode_to[episode] - 1
        assert batch["state"][row].tolist() == [frame, 2 * frame]
        assert batch["images"][row].flatten(2).unique(dim=2).squeeze(2).tolist() == [[frame, 0, 0], [frame, 1, 0]]
        assert batch["actions"][row, :, 0].tolist() == [-min(frame + i, last) for i in range(CHUNK)]
        assert batch["action_is_pad"][row].tolist() == [frame + i > last for i in range(CHUNK)]
        assert instruction(batch, row) == f"task 0.{episode % 3}"


def test_images_go_to_the_memory_that_is_given(data):
    stream, images = samples(data), np.full((5, 2, 3, 4, 6), 77, np.uint8)
    batch = stream.batch(range(20, 25), images)
    assert batch["images"].data_ptr() == images.ctypes.data
    assert equal(batch, stream.batch(range(20, 25)))


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(20, 0.1, 2), (8, 0.05, 1), (2, 0.01, 1), (10, 0.9, 9)])
def test_split_holds_out_whole_episodes_and_at_least_one(count, fraction, held_out):
    episodes = np.arange(count) * 3 + 1  # others are left out
    train, val = split(episodes, fraction, 0)
    assert len(val) == held_out
    assert sorted([*train, *val]) == episodes.tolist()
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    again = split(episodes, fraction, 0)
    assert (again[0].tolist(), again[1].tolist()) == (train.tolist(), val.tolist())


def test_split_depends_on_the_seed_and_every_episode_gets_its_turn():
    held_out = [tuple(split(np.arange(12), 0.2, seed)[1]) for seed in range(60)]
    assert len(set(held_out)) > 30
    assert {episode for val in held_out for episode in val} == set(range(12))


def test_no_share_holds_out_no_episode(data):
    train, val = split(data.episodes, 0, 0)
    assert train.tolist() == list(range(len(LENGTHS)))
    assert val.tolist() == []
    assert len(samples(data, val, shuffle=False)) == 0


@pytest.mark.parametrize(("episodes", "fraction"), [(1, 0.05), (2, 0.8), (4, 0.9)])
def test_split_that_leaves_nothing_to_train_on_is_refused(episodes, fraction):
    with pytest.raises(InputError, match=rf"{episodes} episodes and --data.val_fraction {fraction} would hold out"):
        split(np.arange(episodes), fraction, 0)


def test_validation_samples_enumerate_the_frames_of_their_episodes_in_order(data):
    episodes = np.array([2, 6])
    val = samples(data, episodes, shuffle=False)
    assert len(val) == 11
    assert frames(val, range(11)) == frames_of(data, episodes)
    assert val.batch([10, 0])["state"][:, 0].tolist() == [frames_of(data, episodes)[i] for i in (10, 0)]


def test_statistics_are_those_of_the_training_episodes_alone(data):
    chosen = frames_of(data, TRAIN)
    ((state, actions),) = samples(data, TRAIN).statistics()
    for found, values in ((state, data.state), (actions, data.actions)):
        expected = statistics(np.array(values)[chosen])
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in expected)
        assert found["mean"][0] != values[:, 0].mean()


def test_keys_and_so_noise_differ_between_samples_and_between_epochs_of_one_frame(data):
    stream = samples(data, TRAIN)
    read, key = frames(stream, range(2 * 38)), stream.batch(range(2 * 38))["key"]
    noise, t = keyed.normal(key, keyed.FLOW_NOISE, (CHUNK, 1)), keyed.uniform(key, keyed.FLOW_TIME)
    assert len(key.unique()) == len(noise.flatten(1).unique(dim=0)) == len(t.unique()) == 76
    for frame in frames_of(data, TRAIN):
        first, second = (i for i, f in enumerate(read) if f == frame)
        assert first < 38 <= second
        assert not torch.equal(noise[first], noise[second])
        assert t[first] != t[second]
    assert not torch.equal(samples(data, TRAIN, seed=SEED + 1).batch(range(76))["key"], key)


def test_held_out_samples_share_no_key_with_those_of_training(data):
    held_out = samples(data, shuffle=False).batch(range(49))["key"]
    assert not set(held_out.tolist()) & set(keyed.derive(SEED, torch.arange(10**5)).tolist())


def test_places_of_samples_are_told_by_episode_and_frame(data):
    stream = samples(data, TRAIN)
    at = {frame: position for position, frame in enumerate(frames(stream, range(38)))}
    assert stream.describe([at[14]]) == f"position {at[14]} (frame 1 of episode 3)"
    assert stream.describe([at[0]] * 6).endswith(f"position {at[0]} (frame 0 of episode 0) and 2 more")


def test_episodes_with_faults_are_neither_trained_on_nor_held_out_and_counted(tmp_path):
    edit(write(tmp_path / "set"), "action", 14, float("nan"))  # of episode 3
    data = LeRobotDataset(tmp_path / "set", skip_bad=True)
    train, val = (samples(data, own, shuffle=False) for own in split(data.episodes, 0.3, SEED))
    read = [*frames(train, range(len(train))), *frames(val, range(len(val)))]
    assert sorted(read) == frames_of(data, [0, 1, 2, 4, 5, 6, 7])
    assert summary(train, val) == (
        f"data       set: {len(train)} frames of 5 episodes to train on, {len(val)} frames of 2 held out; "
        "left out for faults: 1"
    )
