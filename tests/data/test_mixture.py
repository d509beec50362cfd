"""Several data sets trained on as one."""

import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered import CAMERAS, SEED, equal, instruction, samples, write

from vla import InputError
from vla.config import DataConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.loader import loader
from vla.data.mixture import Mixture, open_datasets, select
from vla.data.stats import QUANTILES
from vla.data.stream import Samples, split, summary, training_positions

FAR = 10**12
WEIGHTS = {
    (0.7, 0.3): (7, 3),
    (1.0, 2.0): (1, 2),
    (0.5, 0.25, 0.25): (2, 1, 1),
    (0.3333, 0.3333, 0.3334): (3333, 3333, 3334),
    (0.1, 0.2, 0.7): (1, 2, 7),
    (64.0, 16.0): (4, 1),
    (1e-3, 1.0): (1, 1000),
    (5.0, 5.0): (1, 1),
}


def stand_in(frames=100, **attributes):
    """A data set of one episode, of which only the order of its frames is asked."""
    spans = {"episode_from": np.array([0]), "episode_to": np.array([frames])}
    return SimpleNamespace(**spans, cameras=("table",), image_size=(4, 6), instructions=["go"], **attributes)


def mixed(*weights, lengths=(100, 100, 100)):
    return Mixture([stand_in(frames) for frames, _ in zip(lengths, weights, strict=False)], weights)


def of_stand_ins(mixture, seed=SEED):
    return Samples(mixture, [np.array([0])] * len(mixture.datasets), (None, None), 4, seed, shuffle=True)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Of 49 frames of two cameras, of 10 of two cameras of which it shares one, and of 9 of that one."""
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "first")
    write(folder / "second", 1, (4, 6), ("gripper", "side"), (3, 2))
    write(folder / "third", 2, (2, 3, 4), ("gripper",), (1, 3))
    return [str(folder / name) for name in ("first", "second", "third")]


def opened(paths, **options):
    equally = (1.0,) * len(paths) if len(paths) > 1 else ()
    config = DataConfig(path=tuple(map(str, paths)), **{"weights": equally, "pad_dims": True} | options)
    return open_datasets(select(config), config)


# ---- Which data set a sample comes from.


@pytest.mark.parametrize("first_block", [0, 1, 12_345, FAR // 7])
@pytest.mark.parametrize(("weights", "counts"), WEIGHTS.items(), ids=map(str, WEIGHTS))
def test_each_block_of_the_stream_has_exactly_the_shares_of_the_weights(weights, counts, first_block):
    mixture = mixed(*weights)
    assert (tuple(mixture.counts), mixture.block) == (counts, sum(counts))
    blocks = max(2, 2000 // mixture.block)
    position = torch.arange(first_block * mixture.block, (first_block + blocks) * mixture.block)
    dataset, own = mixture.draw(position, SEED)
    for of_block in dataset.view(blocks, -1):
        assert torch.bincount(of_block, minlength=len(counts)).tolist() == list(counts)
    for k, count in enumerate(counts):  # and each takes its own stream on from where it is
        assert own[dataset == k].sort().values.tolist() == [*range(first_block * count, (first_block + blocks) * count)]


def test_share_of_any_part_of_the_stream_is_off_by_less_than_a_block():
    mixture = mixed(0.7, 0.3)
    for first, count in ((3, 5), (7, 1000), (FAR + 1, 4999), (12_345, 12_345)):
        dataset, _ = mixture.draw(torch.arange(first, first + count), SEED)
        assert abs((dataset == 0).sum() - 0.7 * count) <= 4.2  # worst: three of the other set at either end


def test_data_sets_alternate_in_another_order_in_each_block_and_for_each_seed():
    mixture, position = mixed(0.7, 0.3), torch.arange(10_000)
    dataset, _ = mixture.draw(position, SEED)
    share = (dataset.view(-1, 10) == 1).float().mean(0)  # of each place in a block
    assert (share - 0.3).abs().max() < 0.06  # four standard errors
    assert len(dataset.view(-1, 10).unique(dim=0)) == 120  # all ways to choose three of ten
    other, _ = mixture.draw(position, SEED + 1)
    assert 0.3 < (dataset != other).float().mean() < 0.54


def test_each_data_set_is_read_in_epochs_of_its_own_without_repeats():
    mixture = mixed(0.6, 0.4, lengths=(7, 50))
    stream, position = of_stand_ins(mixture), torch.arange(500)
    (dataset, frames), (_, own) = stream.frames(position), mixture.draw(position, SEED)
    for k, length in enumerate((7, 50)):
        mine, place = frames[dataset == k], own[dataset == k].numpy()
        epochs = [mine[place // length == epoch] for epoch in range(len(mine) // length)]
        assert len(epochs) == (42, 4)[k]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        counts = np.bincount(mine, minlength=length)
        assert counts.max() - counts.min() <= 1


def test_orders_of_data_sets_of_one_length_have_nothing_in_common():
    mixture = mixed(1.0, 1.0)
    stream, position = of_stand_ins(mixture), torch.arange(200)
    (dataset, frames), (_, own) = stream.frames(position), mixture.draw(position, SEED)
    first, second = (frames[dataset == k][own[dataset == k].argsort()] for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first == second).sum() < 6
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.4


def test_far_positions_need_no_state_no_order_and_no_time():
    stream = of_stand_ins(mixed(0.7, 0.3, lengths=(10**9, 12_345)))
    position = torch.arange(FAR, FAR + 3000)
    seconds = []
    for first in (0, FAR):
        started = time.perf_counter()
        stream.frames(torch.arange(first, first + 3000))
        seconds.append(time.perf_counter() - started)
    assert max(seconds) < 1  # to come there step by step takes days
    dataset, frames = stream.frames(position)
    again = of_stand_ins(mixed(0.7, 0.3, lengths=(10**9, 12_345)))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    shuffled, of_shuffled = again.frames(position[order])
    assert shuffled.equal(dataset[order])
    np.testing.assert_array_equal(of_shuffled, frames[order.numpy()])
    for i in range(0, 3000, 400):
        alone, frame = again.frames(position[i : i + 1])
        assert (alone.item(), frame.item()) == (dataset[i].item(), frames[i])


def test_first_data_set_is_read_in_the_order_that_it_has_alone(roots):
    (data, *_) = (mixture := opened(roots[:2])).datasets
    dataset, frames = samples(mixture).frames(torch.arange(200))
    _, own = mixture.draw(torch.arange(200), SEED)
    alone = samples(data).frames(own[dataset == 0])[1]
    np.testing.assert_array_equal(frames[dataset == 0], alone)


@pytest.mark.parametrize("weights", [(), (0.4,)])
def test_mixture_of_one_data_set_is_that_data_set(roots, weights):
    one, plain = opened(roots[:1], weights=weights), LeRobotDataset(roots[0])
    assert equal(samples(one).batch(range(90, 130)), samples(plain).batch(range(90, 130)))
    assert one.cameras == plain.cameras


@pytest.mark.parametrize(("processes", "micro_batch", "workers"), [(1, 4, 0), (2, 6, 0), (4, 3, 0), (3, 2, 2)])
def test_any_processes_and_workers_read_the_same_samples(roots, processes, micro_batch, workers):
    stream, steps = samples(opened(roots, weights=(0.5, 0.3, 0.2))), (5, 9)
    whole = stream.batch(range(5 * 12, 9 * 12))
    for rank in range(processes):
        positions = training_positions(*steps, 12, micro_batch, rank, processes)
        for batch in loader(stream, positions, micro_batch, workers, torch.device("cpu")):
            assert equal(batch, {name: value[batch["position"] - 5 * 12] for name, value in whole.items()})


# ---- What a sample holds.


def test_sample_is_that_of_its_data_set_and_what_that_lacks_is_masked_and_zero(roots):
    mixture = opened(roots, weights=(0.5, 0.3, 0.2))
    assert mixture.cameras == CAMERAS
    stream = samples(mixture)
    dirty = np.full((60, 3, 3, 4, 6), 77, np.uint8)
    batch = stream.batch(range(60), dirty)
    dataset, frames = stream.frames(torch.arange(60))
    assert batch["dataset"].equal(dataset)
    assert torch.bincount(dataset).tolist() == [30, 18, 12]
    has = {0: (True, True, False), 1: (False, True, True), 2: (False, True, False)}
    for row, (k, frame) in enumerate(zip(dataset.tolist(), frames.tolist(), strict=True)):
        data, value = mixture.datasets[k], 1000.0 * k + frame
        state, actions = [value, 2 * value, 3 * value], [-value, -2 * value, -3 * value]
        padded = [x * (d < data.state_dim) for d, x in enumerate(state)]
        assert batch["state"][row].tolist() == padded
        assert batch["actions"][row, 0].tolist() == [x * (d < data.action_dim) for d, x in enumerate(actions)]
        assert batch["image_mask"][row].tolist() == list(has[k])
        pixels = batch["images"][row].flatten(2).unique(dim=2).squeeze(2).tolist()
        assert pixels == [[frame, n, k] if has[k][n] else [0, 0, 0] for n in range(3)]
        episode = np.searchsorted(data.episode_to, frame, side="right")
        assert instruction(batch, row) == f"task {k}.{episode % 3}"
        past_end = (frame + torch.arange(4) >= data.episode_to[episode]).tolist()
        assert batch["action_is_pad"][row].tolist() == past_end


CAMERA_MAPS = {
    "as they are": ((), ("table", "gripper", "side"), [(0, 1), (1, 2)]),
    "of all data sets": (("side=table",), ("table", "gripper"), [(0, 1), (1, 0)]),
    "of one data set": (("second:gripper=table",), ("table", "gripper", "side"), [(0, 1), (0, 2)]),
    "of each": (("first:gripper=hand", "gripper=table", "second:side=hand"), ("table", "hand"), [(0, 1), (0, 1)]),
}


@pytest.mark.parametrize(("camera_map", "cameras", "places"), CAMERA_MAPS.values(), ids=CAMERA_MAPS)
def test_cameras_are_matched_by_the_names_that_the_map_gives_them(roots, camera_map, cameras, places):
    if camera_map[:1] == ("first:gripper=hand",):  # the plain rule would rename that of `first` too
        camera_map = ("first:gripper=hand", "second:gripper=table", "second:side=hand")
    mixture = opened(roots[:2], camera_map=camera_map)
    assert mixture.cameras == cameras
    batch = samples(mixture).batch(range(20))
    own = [("table", "gripper"), ("gripper", "side")]  # names in the data sets, whose numbers the pixels tell
    for images, mask, k in zip(batch["images"], batch["image_mask"], batch["dataset"].tolist(), strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(places[k])
        for place, name in zip(places[k], own[k], strict=True):
            assert (images[place, 1] == CAMERAS.index(name)).all()


@pytest.mark.parametrize("cameras", [("gripper",), ("side", "table"), ("side", "gripper", "table")])
def test_cameras_asked_for_come_in_that_order_whatever_each_data_set_has(roots, cameras):
    mixture = opened(roots[:2], cameras=cameras)
    assert mixture.cameras == cameras
    batch = samples(mixture).batch(range(20))
    has = [("table", "gripper"), ("gripper", "side")]
    for images, mask, k in zip(batch["images"], batch["image_mask"], batch["dataset"].tolist(), strict=True):
        assert mask.tolist() == [camera in has[k] for camera in cameras]
        assert images[:, 1, 0, 0].tolist() == [CAMERAS.index(c) if c in has[k] else 0 for c in cameras]


def test_statistics_of_each_data_set_are_those_of_its_own_training_frames(roots):
    mixture = opened(roots[:2])
    train, _ = zip(*(split(data.episodes, 0.3, SEED) for data in mixture.datasets), strict=True)
    of_each = samples(mixture, train).statistics()
    for data, episodes, both in zip(mixture.datasets, train, of_each, strict=True):
        frames = np.concatenate([np.arange(data.episode_from[e], data.episode_to[e]) for e in episodes])
        assert len(frames) < data.num_frames
        for found, values in zip(both, (data.state[frames], data.actions[frames]), strict=True):
            values = values.astype(np.float64)
            expected = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
            expected |= {name: np.quantile(values, quantile, axis=0) for name, quantile in QUANTILES.items()}
            assert found["count"] == [len(frames)]
            for name, row in expected.items():
                np.testing.assert_allclose(found[name], row, rtol=1e-6, err_msg=name)


def test_held_out_samples_are_those_of_one_data_set_after_the_other(roots):
    mixture = opened(roots[:2])
    held_out = samples(mixture, [np.array([1, 4]), np.array([1])], shuffle=False)
    dataset, frames = held_out.frames(torch.arange(10))
    assert len(held_out) == 10
    assert dataset.tolist() == [0] * 4 + [1] * 6
    assert frames.tolist() == [5, 25, 26, 27, 4, 5, 6, 7, 8, 9]


def test_shares_and_places_are_told_by_data_set(roots):
    mixture = opened(roots[:2], weights=(0.7, 0.3))
    stream, held_out = samples(mixture), samples(mixture, [np.array([1, 4]), np.array([1])], shuffle=False)
    assert summary(stream, held_out).splitlines() == [
        "data       first: 0.7 of the samples, 49 frames of 8 episodes to train on, 4 frames of 2 held out",
        "data       second: 0.3 of the samples, 10 frames of 2 episodes to train on, 6 frames of 1 held out",
    ]
    dataset, frames = stream.frames(torch.arange(10))
    position = int((dataset == 1).nonzero()[0])
    episode, first = divmod(frames[position], 4) if frames[position] < 4 else (1, frames[position] - 4)
    assert stream.describe([position]) == f"position {position} (frame {first} of episode {episode} of second)"


def test_different_frame_rates_are_told(tmp_path):
    mixture = opened([write(tmp_path / "slow", fps=5), write(tmp_path / "fast", number=1, fps=12.5)])
    told = summary(samples(mixture), samples(mixture)).splitlines()[2:]
    assert told == [
        "warning: frames a second differ, slow 5, fast 12.5: so does the time that the actions of a chunk take"
    ]


# ---- What cannot be one.


REFUSED = {
    "weights missing": ({"weights": ()}, ["--data.path names 2 data sets", "--data.weights 0 shares", "such as 0.7"]),
    "too many weights": ({"weights": (0.5, 0.3, 0.2)}, ["names 2 data sets", "--data.weights 3 shares"]),
    "weight of zero": ({"weights": (1.0, 0.0)}, ["--data.weights has 0.0", "more than 0", "leave the data set out"]),
    "negative weight": ({"weights": (-1.0, 2.0)}, ["--data.weights has -1.0", "more than 0"]),
    "infinite weight": ({"weights": (1.0, float("inf"))}, ["--data.weights has inf"]),
    "weight that is no number": ({"weights": (float("nan"), 1.0)}, ["--data.weights has nan"]),
    "weights too fine": ({"weights": (0.33333, 0.66667)}, ["--data.weights 0.33333 0.66667", "100000", "round them"]),
    "dims": ({"pad_dims": False}, ["number of states, {'first': 2, 'second': 3}", "--data.state", "--data.pad_dims"]),
    "unknown camera": ({"cameras": ("gripper", "top")}, ["--data.cameras names top", "none of first, second"]),
    "no camera of one": ({"cameras": ("table",)}, ["second has cameras ['gripper', 'side']", "--data.cameras"]),
    "one name for two": ({"camera_map": ("side=gripper",)}, ["second: cameras", "in common", "--data.camera_map"]),
    "map of no camera": ({"camera_map": ("sude=top",)}, ["'sude'", "first", "table, gripper", "--data.camera_map"]),
    "map of no data set": ({"camera_map": ("third:side=top",)}, ["'side'", "first, second", "--data.camera_map"]),
    "map without name": ({"camera_map": ("side",)}, ["--data.camera_map has 'side'", "dataset:camera=name"]),
    "map without camera": ({"camera_map": ("second:=top",)}, ["--data.camera_map has 'second:=top'"]),
}


@pytest.mark.parametrize(("options", "told"), REFUSED.values(), ids=REFUSED)
def test_flags_that_do_not_fit_the_data_sets_are_refused_by_name(roots, options, told):
    with pytest.raises(InputError) as refusal:
        opened(roots[:2], **options)
    for text in told:
        assert text in str(refusal.value)


def test_weights_for_one_data_set_are_refused_unless_it_is_one(roots):
    with pytest.raises(InputError, match=r"--data.path names 1 data sets and --data.weights 2 shares"):
        opened(roots[:1], weights=(0.5, 0.5))


def test_data_sets_that_differ_in_actions_alone_are_refused_unless_padded(tmp_path):
    paths = [write(tmp_path / "a"), write(tmp_path / "b", 1, dims=(2, 3))]
    with pytest.raises(
        InputError, match=r"number of actions, {'a': 1, 'b': 3}, expected one value: .* or give --data.pad_dims"
    ):
        opened(paths, pad_dims=False)
    assert samples(opened(paths)).batch(range(3))["actions"].shape == (3, 4, 3)


def test_flags_of_the_data_reach_every_data_set(roots, monkeypatch):
    given = {"cache": "none", "cache_dir": "elsewhere", "tolerance_s": 0.5, "skip_bad": True}
    given["accept"] = ("constant_action",)
    monkeypatch.setattr("vla.data.mixture.LeRobotDataset", lambda part, **options: stand_in(options=options))
    assert [data.options for data in opened(roots[:2], **given).datasets] == [given, given]


def test_features_that_are_named_are_those_of_every_data_set(roots):
    for data in opened(roots[:2], state=("action",), action=("observation.state",)).datasets:
        assert (data.state_names[0], data.action_names[0]) == ("a0", "x0")


def test_data_sets_of_one_name_are_refused(roots, tmp_path):
    shutil.copytree(roots[1], tmp_path / "first")
    for other in (tmp_path / "first", roots[0]):
        with pytest.raises(InputError, match=r"has 2 data sets, called first, first: give each a name .* --data.names"):
            opened([roots[0], other])
    mixture = opened([roots[0], tmp_path / "first"], names=("one", "two"), camera_map=("two:side=table",))
    assert [(data.name, *data.cameras) for data in mixture.datasets] == [
        ("one", "table", "gripper"),
        ("two", "gripper", "table"),
    ]
    for names in (("one",), ("one", "two", "three"), ("one", "one")):
        with pytest.raises(InputError, match=f"called {', '.join(names)}: give each"):
            opened(roots[:2], names=names)


def test_images_of_different_size_are_refused_unless_brought_to_one(roots, tmp_path):
    write(tmp_path / "large", 1, (4,), size=(8, 6))
    paths = [roots[0], tmp_path / "large"]
    with pytest.raises(InputError) as refusal:
        opened(paths)
    for text in ("image_size", "'first': (4, 6), 'large': (8, 6)", "--data.image_size"):
        assert text in str(refusal.value)
    batch = samples(opened(paths, image_size=(8, 6))).batch(range(8))
    frames = samples(opened(paths, image_size=(8, 6))).frames(torch.arange(8))[1]
    for images, k, frame in zip(batch["images"], batch["dataset"], frames, strict=True):
        assert (images[0, 0, 2:6] == frame).all()
        assert (images[0, 0, [0, 1, 6, 7]] == (frame if k else 0)).all()  # the wider one stands between black bars
