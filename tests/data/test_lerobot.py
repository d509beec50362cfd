import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla import InputError
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def write(root, lengths=(4, 3, 2), cameras=None, state_names=("x", "y", "z"), **options):
    cameras, rng = cameras or {"table": (6, 8), "gripper": (6, 8)}, np.random.default_rng(0)
    names = {"state_names": list(state_names), "action_names": ["dx", "dy"]}
    with LeRobotWriter(root, fps=10, cameras=cameras, robot_type="tabletop", **names, **options) as writer:
        for episode, length in enumerate(lengths):
            writer.add_episode(
                images={name: rng.integers(0, 256, (length, 3, *hw), dtype=np.uint8) for name, hw in cameras.items()},
                state=rng.normal(size=(length, len(state_names))).astype(np.float32),
                actions=rng.normal(size=(length, 2)).astype(np.float32),
                instruction=f"task {episode % 2}",
            )
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")


def edit_info(root, change):
    info = json.loads((root / "meta/info.json").read_text())
    change(info)
    (root / "meta/info.json").write_text(json.dumps(info))


def edit_columns(path, **columns):
    """Replace columns of a parquet file; the value None drops one, and `__` stands for a dot or a slash."""
    table = pq.ParquetFile(path).read()
    for name, values in columns.items():
        index = next(i for i, column in enumerate(table.column_names) if column.translate({46: 95, 47: 95}) == name)
        label = table.column_names[index]
        table = table.remove_column(index) if values is None else table.set_column(index, label, pa.array(values))
    pq.write_table(table, path)


def column(path, name):
    return pq.ParquetFile(path).read().column(name).to_pylist()


def test_windows_at_both_ends_of_an_episode_equal_a_table_made_by_hand(root):
    data = LeRobotDataset(root)  # episodes are frames 0-3, 4-6, 7-8
    rows = {
        0: ([0, 1, 2], [False, False, False]),
        2: ([2, 3, 3], [False, False, True]),
        3: ([3, 3, 3], [False, True, True]),
        4: ([4, 5, 6], [False, False, False]),
        6: ([6, 6, 6], [False, True, True]),
        7: ([7, 8, 8], [False, False, True]),
        8: ([8, 8, 8], [False, True, True]),
    }
    actions, action_is_pad = data.windows(np.array(list(rows)), chunk_size=3)
    assert (actions.dtype, actions.shape) == (np.float32, (7, 3, 2))
    for window, pad, (frames, expected_pad) in zip(actions, action_is_pad, rows.values(), strict=True):
        np.testing.assert_array_equal(window, data.actions[frames])
        assert pad.tolist() == expected_pad


def test_cameras_come_in_the_order_asked_for(root):
    both, swapped = LeRobotDataset(root), LeRobotDataset(root, cameras=("gripper", "table"))
    one = LeRobotDataset(root, cameras=("gripper",))
    frames = np.array([5, 0, 8])
    np.testing.assert_array_equal(both.images(frames)[:, ::-1], swapped.images(frames))
    np.testing.assert_array_equal(both.images(frames)[:, 1:], one.images(frames))
    assert one.cameras == ("gripper",)
    assert one.images(frames).shape == (3, 1, 3, 6, 8)


def test_fingerprint_follows_the_content_and_not_the_place(root, tmp_path):
    original = LeRobotDataset(root).fingerprint()
    shutil.copytree(root, tmp_path / "copy")
    assert LeRobotDataset(tmp_path / "copy", cameras=("table",)).fingerprint() == original
    edit_columns(tmp_path / "copy" / DATA, action=[[0.0, 0.0]] * 9)
    assert LeRobotDataset(tmp_path / "copy").fingerprint() != original
    edit_columns(root / "meta/tasks.parquet", task=["another task", "task 1"])
    assert LeRobotDataset(root).fingerprint() != original


def test_sets_of_other_writers_are_read_alike(root, tmp_path):
    expected, frames = LeRobotDataset(root), np.arange(9)
    other = shutil.copytree(root, tmp_path / "other")

    def change(info):
        info["unknown"] = {"key": 1}
        image = {"dtype": "image", "shape": [6, 8, 3], "names": ["height", "width", "channel"], "info": None}
        info["features"]["observation.images.table"] = image
        info["features"]["observation.images.gripper"] = {"dtype": "image", "shape": [6, 8, 3], "names": None}
        info["features"]["observation.state"]["names"] = {"motors": ["x", "y", "z"]}
        info["features"]["action"]["names"] = None
        info["features"]["next.done"] = {"dtype": "bool", "shape": [1], "names": None}

    edit_info(other, change)
    tasks = pa.table({"task_index": [1, 0], "__index_level_0__": ["task 1", "task 0"]})  # index unnamed, other order
    pq.write_table(tasks, other / "meta/tasks.parquet")
    table = pq.ParquetFile(other / DATA).read()
    for name in ("observation.state", "action"):  # lists of any length, of float64
        values = pa.array(table.column(name).to_pylist(), pa.list_(pa.float64()))
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, other / DATA, row_group_size=7)  # not one row group per episode
    episodes = pq.ParquetFile(other / EPISODES).read()  # in two files, the later episodes first
    pq.write_table(episodes.slice(2), other / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(episodes.slice(0, 2), other / "meta/episodes/chunk-000/file-001.parquet")

    data = LeRobotDataset(other)
    np.testing.assert_array_equal(data.state, expected.state)
    np.testing.assert_array_equal(data.actions, expected.actions)
    np.testing.assert_array_equal(data.images(frames), expected.images(frames))
    np.testing.assert_array_equal(data.episode_to, expected.episode_to)
    assert data.instructions == ["task 0", "task 1"]
    assert (data.state_names, data.action_names) == (("x", "y", "z"), ("action_0", "action_1"))


def test_single_camera_and_single_number_state_are_read(tmp_path):
    root = write(tmp_path / "set", cameras={"top": (4, 4)}, state_names=("height",))
    expected = LeRobotDataset(root)
    assert expected.state.shape == (9, 1)
    assert expected.state[:, 0].tolist() == column(root / DATA, "observation.state")

    def rename(info):
        info["features"] = {
            key.replace("observation.images.top", "observation.image"): value for key, value in info["features"].items()
        }

    edit_info(root, rename)
    table = pq.ParquetFile(root / DATA).read()
    pq.write_table(table.rename_columns(["observation.image", *table.column_names[1:]]), root / DATA)
    data = LeRobotDataset(root)
    assert data.cameras == ("image",)
    np.testing.assert_array_equal(data.images(np.arange(9)), expected.images(np.arange(9)))


def test_cameras_of_different_size_are_refused_unless_one_is_chosen(tmp_path):
    root = write(tmp_path / "set", cameras={"table": (6, 8), "wrist": (4, 4)})
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in ("'table': [6, 8]", "'wrist': [4, 4]", "expected one size", "data.cameras"):
        assert text in str(refusal.value)
    assert LeRobotDataset(root, cameras=("wrist",)).image_size == (4, 4)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/meta/info.json cannot be read .*No such file.*: check --data.path"):
        LeRobotDataset(tmp_path / "nowhere")


def test_unknown_camera_is_refused_with_those_there_are(root):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, cameras=("table", "front"))
    for text in (str(root), "['table', 'gripper']", "expected ['table', 'front']", "data.cameras"):
        assert text in str(refusal.value)


def with_features(**changes):
    def change(info):
        for name, feature in changes.items():
            key = next(key for key in info["features"] if key.endswith(name))
            info["features"][key].update(feature)

    return lambda root: edit_info(root, change)


def with_row(name, row, value):
    def plant(root):
        values = column(root / DATA, name)
        values[row] = value
        edit_columns(root / DATA, **{name.replace(".", "_"): values})

    return plant


def without_cameras(info):
    info["features"] = {key: value for key, value in info["features"].items() if "images" not in key}


def test_fault_in_a_later_file_is_told_with_that_file(tmp_path):
    root = write(tmp_path / "set", data_files_size_in_mb=0)
    later = "data/chunk-000/file-001.parquet"
    edit_columns(root / later, action=[[0.0, float("nan")], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    assert f"{root / later}: episode 1, frame 0: action is [ 0. nan]" in str(refusal.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


REPAIR = "copy or write the data set again"
WRONG_SETS = {
    "no info": (
        lambda root: (root / "meta/info.json").unlink(),
        ["meta/info.json cannot be read", "check --data.path"],
    ),
    "broken info": (lambda root: truncate(root / "meta/info.json"), ["meta/info.json cannot be read", "expected JSON"]),
    "version 2.1": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v2.1")),
        ["meta/info.json", "'v2.1'", "expected 'v3.0'", "convert_dataset_v21_to_v30"],
    ),
    "no fps": (lambda root: edit_info(root, lambda info: info.pop("fps")), ["meta/info.json lacks ['fps']", REPAIR]),
    "no episodes": (
        lambda root: shutil.rmtree(root / "meta/episodes"),
        ["meta/episodes has no episode", "expected at least 1", REPAIR],
    ),
    "empty episodes": (
        lambda root: pq.write_table(pq.ParquetFile(root / EPISODES).read().slice(0, 0), root / EPISODES),
        ["meta/episodes has no episode"],
    ),
    "episode missing": (
        lambda root: pq.write_table(pq.ParquetFile(root / EPISODES).read().take([0, 2]), root / EPISODES),
        ["meta/episodes", "episode 2 has frames 7 to 9", "expected episode 1, from frame 4", REPAIR],
    ),
    "episodes overlap": (
        lambda root: edit_columns(root / EPISODES, dataset_from_index=[0, 3, 7]),
        ["meta/episodes", "episode 1 has frames 3 to 7", "expected episode 1, from frame 4", REPAIR],
    ),
    "data file missing": (lambda root: (root / DATA).unlink(), [DATA, "is missing or unreadable", REPAIR]),
    "data file truncated": (lambda root: truncate(root / DATA), [DATA, "is missing or unreadable", REPAIR]),
    "tasks missing": (lambda root: (root / "meta/tasks.parquet").unlink(), ["tasks.parquet is missing", REPAIR]),
    "column missing": (
        lambda root: edit_columns(root / DATA, observation_images_gripper=None, task_index=None),
        [DATA, "lacks the columns ['observation.images.gripper', 'task_index']", REPAIR],
    ),
    "total_frames": (
        lambda root: edit_info(root, lambda info: info.update(total_frames=10)),
        ["'info.json': 10, 'episodes': 9, 'data': 9", "expected one number", REPAIR],
    ),
    "rows missing": (
        lambda root: pq.write_table(pq.ParquetFile(root / DATA).read().slice(0, 8), root / DATA),
        ["'info.json': 9, 'episodes': 9, 'data': 8"],
    ),
    "state dimension": (
        with_features(state={"shape": [4]}),
        [DATA, "observation.state has [3] numbers a frame", "expected 4 as in meta/info.json", REPAIR],
    ),
    "action dimension": (
        with_row("action", 5, [0.0, 0.0, 0.0]),
        [DATA, "action has [2, 3] numbers a frame", "expected 2 as in meta/info.json"],
    ),
    "no state": (
        lambda root: edit_info(root, lambda info: info["features"].pop("observation.state")),
        ["meta/info.json", "'observation.state' is only ['action', 'episode_index'", "expected a feature of shape [D]"],
    ),
    "NaN": (
        with_row("observation.state", 5, [0.0, float("nan"), 0.0]),
        [f"{DATA}: episode 1, frame 1: observation.state is [ 0. nan  0.], expected finite numbers", REPAIR],
    ),
    "Inf": (
        with_row("action", 8, [float("inf"), 0.0]),
        [f"{DATA}: episode 2, frame 1: action is [inf  0.], expected finite numbers", REPAIR],
    ),
    "null": (with_row("action", 8, None), [DATA, "action has [2, None] numbers a frame", "expected 2"]),
    "rows of another episode": (
        with_row("episode_index", 4, 0),
        [f"{DATA}: episode 1, frame 0: episode_index is 0, expected the episode that meta/episodes has here", REPAIR],
    ),
    "rows out of order": (
        with_row("frame_index", 2, 3),
        [f"{DATA}: episode 0, frame 2: frame_index is 3, expected 0, 1, 2, ... in each episode", REPAIR],
    ),
    "unknown task": (
        with_row("task_index", 6, 2),
        [f"{DATA}: episode 1, frame 2: task_index is 2, expected one of the 2 of meta/tasks.parquet", REPAIR],
    ),
    "empty instruction": (
        lambda root: edit_columns(root / "meta/tasks.parquet", task=["task 0", " "]),
        ["meta/tasks.parquet: task_index 1 has instruction ' ', expected words", REPAIR],
    ),
    "no instructions": (
        lambda root: edit_columns(root / "meta/tasks.parquet", task=None),
        ["meta/tasks.parquet: task_index 0 has instruction None, expected words"],
    ),
    "no camera": (
        lambda root: edit_info(root, without_cameras),
        ["has cameras []", "expected at least one", "data.cameras"],
    ),
    "video": (
        with_features(gripper={"dtype": "video"}),
        ["camera 'gripper' is 'video'", "expected 'image' (PNG in parquet)", "data.cameras"],
    ),
    "depth": (with_features(table={"shape": [1, 6, 8]}), ["camera 'table'", "shape [1, 6, 8]", "with 3 channels"]),
}


@pytest.mark.parametrize("wrong", WRONG_SETS)
def test_wrong_data_set_is_refused_at_opening_with_found_expected_and_cure(root, wrong):
    plant, told = WRONG_SETS[wrong]
    plant(root)
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in [str(root), *told]:
        assert text in str(refusal.value)
    assert not list(root.glob(".frames*"))
