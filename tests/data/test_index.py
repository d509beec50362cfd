"""The index that opening a data set makes beside it, and the digest that it has."""

import mmap
import pickle

import numbered
import numpy as np
import pytest
from lerobot_sets import (
    DATA,
    EPISODES,
    LENGTHS,
    column,
    copy,
    edit_columns,
    edit_value,
    features,
    made_up,
    noise,
    write,
)
from training import flip

from vla import InputError
from vla.data.lerobot import LeRobotDataset


@pytest.fixture
def root(png, tmp_path):
    return copy(png, tmp_path / "set")


def test_numbers_are_mapped_not_held_and_a_data_set_travels_to_workers_as_paths(tmp_path):
    root = write(tmp_path / "set", made_up((400, 600), cameras=("top",), size=(2, 4), draw=noise))
    data = LeRobotDataset(root)
    for values in (data.state, data.actions, data.task_index):
        assert isinstance(values.base.base.obj, mmap.mmap)
        assert not values.flags.writeable
    sent = pickle.dumps(data)
    assert len(sent) < data.state.nbytes / 2
    np.testing.assert_array_equal(pickle.loads(sent).actions, data.actions)


def left_behind(root):
    """What opening a data set has made in its folder, and when."""
    return {path: path.stat().st_mtime_ns for path in sorted((root / ".vla_cache").rglob("*.*"))}


def test_index_is_made_once_and_again_when_a_file_changes_even_in_place(root):
    LeRobotDataset(root)
    before = left_behind(root)
    LeRobotDataset(root)
    assert left_behind(root) == before

    (path,), content = root.glob("data/*/*"), (root / DATA).read_bytes()
    old = made_up()[2]["actions"][1, :1]
    assert content.count(old.tobytes()) == 1
    path.write_bytes(content.replace(old.tobytes(), np.float32(0.125).tobytes()))
    assert path.stat().st_size == len(content)
    data = LeRobotDataset(root)
    assert data.actions[8, 0] == 0.125
    assert set(before) < set(left_behind(root))

    (root / "meta/tasks.parquet").write_bytes((root / "meta/tasks.parquet").read_bytes().replace(b"task 1", b"taste1"))
    assert LeRobotDataset(root).instructions == ["task 0", "taste1"]


def test_index_is_made_again_when_a_file_in_a_linked_folder_changes(root):
    (root / "meta/episodes").rename(root.parent / "elsewhere")
    (root / "meta/episodes").symlink_to(root.parent / "elsewhere")
    LeRobotDataset(root)
    edit_columns(root / EPISODES, {"length": [5, 2, 5, 2], "dataset_to_index": [5, 7, 12, 14]})
    edit_columns(root / EPISODES, {"dataset_from_index": [0, 5, 7, 12]})
    with pytest.raises(InputError, match="fault"):
        LeRobotDataset(root)


def test_index_and_pictures_lie_in_the_folder_asked_for(root, tmp_path):
    data = LeRobotDataset(root, cache_dir=tmp_path / "fast/disk")
    np.testing.assert_array_equal(data.actions, np.concatenate([e["actions"] for e in made_up()]))
    assert not (root / ".vla_cache").exists()
    assert len(list((tmp_path / "fast/disk").glob("*/frames.npy"))) == 2


def test_index_is_of_the_features_that_are_asked_for(root):
    usual = LeRobotDataset(root)
    np.testing.assert_array_equal(LeRobotDataset(root, state=("action",)).state, usual.actions)
    np.testing.assert_array_equal(LeRobotDataset(root, action=("observation.state",)).actions, usual.state)


def test_times_in_long_episodes_are_as_exact_as_float32(tmp_path):
    root = numbered.write(tmp_path / "set", lengths=(13_000,), cameras=("table",), fps=3)  # over an hour
    assert LeRobotDataset(root, cache="none").num_frames == 13_000


def swapped_images(root):
    images = column(root / DATA, "observation.images.wrist")
    edit_columns(root / DATA, {"observation.images.wrist": [*images[1::-1], *images[2:]]})


def another_packet(root):
    (path,) = root.glob("videos/*wrist/*/*.mp4")
    flip(path)


DIFFERENT = {
    "an action": (
        "h264",
        lambda root: edit_columns(root / DATA, {"action": [[0.5 * i, 1.0 - i] for i in range(sum(LENGTHS))]}),
    ),
    "a state": ("h264", lambda root: edit_value(root / DATA, "observation.state", 5, [0.0, 1.0, 2.0])),
    "a task": ("h264", lambda root: edit_value(root / DATA, "task_index", 0, 1)),
    "an instruction": ("h264", lambda root: edit_value(root / "meta/tasks.parquet", "task", 0, "another")),
    "names": ("h264", features(action={"names": ["left", "right"]})),
    "an image": ("png", swapped_images),
    "a video": ("h264", another_packet),
}


@pytest.mark.parametrize("different", DIFFERENT)
def test_digest_follows_the_content_and_not_the_place(png, h264, tmp_path, different):
    base, change = DIFFERENT[different]
    root = {"png": png, "h264": h264}[base]
    original = LeRobotDataset(root, cache="none").digest
    other = copy(root, tmp_path / "copy")
    assert LeRobotDataset(other, cache="none").digest == original
    change(other)
    assert LeRobotDataset(other, cache="none").digest != original
