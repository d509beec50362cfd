import errno
import io
import json
import resource
import shutil
import tracemalloc
from itertools import pairwise

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla import InputError, collect
from vla.data import write as write_module
from vla.data.lerobot import LeRobotDataset
from vla.data.stats import statistics
from vla.data.write import LeRobotWriter

CAMERAS = {"table": (6, 8), "gripper": (6, 8)}
FILMED = {"table": (32, 64), "gripper": (48, 64)}
VIDEO = ["av1", "h264"]
STATE_NAMES, ACTION_NAMES = ["x", "y", "z"], ["dx", "dy"]


def episode(seed, length=5, instruction="put the cube on the plate", cameras=CAMERAS):
    rng = np.random.default_rng(seed)
    return {
        "images": {name: rng.integers(0, 256, (length, 3, h, w), dtype=np.uint8) for name, (h, w) in cameras.items()},
        "state": rng.normal(seed, 1, (length, 3)).astype(np.float32),
        "actions": rng.normal(0, 1, (length, 2)).astype(np.float32),
        "instruction": instruction,
    }


def filmed(seed, length=5, instruction="put the cube on the plate", cameras=FILMED):
    """An episode whose pictures say in black and white squares which camera, episode and frame they are of."""
    images = {}
    for camera, (name, (h, w)) in enumerate(cameras.items()):
        y, x = np.mgrid[:h, :w]
        images[name] = np.tile(np.stack([2 * x, 2 * y, 255 - x - y]).astype(np.uint8), (length, 1, 1, 1))
        for frame, image in enumerate(images[name]):
            for row, number in enumerate((frame, 2 * seed + camera)):
                for bit in range(8):
                    image[:, 8 * row : 8 * row + 8, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return episode(seed, length, instruction) | {"images": images}


def said(image):
    """(frame, 2 * seed + camera) that a picture of `filmed` says."""
    rows = image[:, :16, :64].reshape(3, 2, 8, 8, 8).mean(axis=(0, 2, 4)) > 128
    return tuple(int(row @ 2 ** np.arange(8)) for row in rows)


def writer(root, cameras=CAMERAS, fps=10, **options):
    names = {"state_names": STATE_NAMES, "action_names": ACTION_NAMES}
    return LeRobotWriter(root, fps=fps, cameras=cameras, robot_type="tabletop", **names, **options)


def write(root, episodes, **options):
    with writer(root, **options) as out:
        for one in episodes:
            out.add_episode(**one)


def read_meta(root):
    """info.json, stats.json and the rows of the episodes table."""
    info, stats = (json.loads((root / f"meta/{name}.json").read_text()) for name in ("info", "stats"))
    return info, stats, pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def read_video(root, camera):
    """Of each episode: its pictures, uint8 [L, 3, h, w], and which of them are key frames, all found by their times."""
    info, _, rows = read_meta(root)
    key, files, episodes = f"observation.images.{camera}", {}, []
    for row in rows:
        place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        path = root / info["video_path"].format(video_key=key, **place)
        if path not in files:
            with av.open(path) as container:
                assert container.streams.video[0].average_rate == info["fps"]
                files[path] = {frame.pts * frame.time_base: frame for frame in container.decode(video=0)}
        times = np.array([float(time) for time in files[path]])
        wanted = row[f"videos/{key}/from_timestamp"] + np.arange(row["length"]) / info["fps"]
        found = np.abs(times - wanted[:, None]).argmin(1)
        np.testing.assert_allclose(times[found], wanted, rtol=0, atol=1e-9)
        frames = [list(files[path].values())[index] for index in found]
        pictures = np.stack([frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in frames])
        episodes.append((pictures, [frame.key_frame for frame in frames]))
    return episodes


def assert_holds(root, episodes, codec="png"):
    """All files of the data set agree that it has these episodes, whole, and no other."""
    info, stats, rows = read_meta(root)
    lengths = [len(one["state"]) for one in episodes]
    tasks = list(dict.fromkeys(one["instruction"] for one in episodes))
    assert [info[f"total_{what}"] for what in ("episodes", "frames", "tasks")] == [len(rows), sum(lengths), len(tasks)]
    assert info["splits"] == {"train": f"0:{len(episodes)}"}
    assert pq.read_table(root / "meta/tasks.parquet").to_pydict() == {
        "task_index": list(range(len(tasks))),
        "task": tasks,
    }
    assert [row["tasks"] for row in rows] == [[one["instruction"]] for one in episodes]
    assert [row["length"] for row in rows] == lengths
    assert [row["dataset_to_index"] for row in rows] == np.cumsum(lengths).tolist()
    data = {}
    for path in sorted(root.glob("data/*/*")):
        parquet = pq.ParquetFile(path)
        place = int(path.parent.name[-3:]), int(path.stem[-3:])
        data[place] = [parquet.read_row_group(group).to_pydict() for group in range(parquet.num_row_groups)]
    assert sum(map(len, data.values())) == len(episodes)
    for number, (one, row) in enumerate(zip(episodes, rows, strict=True)):
        group = data[row["data/chunk_index"], row["data/file_index"]].pop(0)
        assert set(group["episode_index"]) == {row["episode_index"]} == {number}
        assert set(group["task_index"]) == {tasks.index(one["instruction"])}
        assert group["index"] == list(range(row["dataset_from_index"], row["dataset_to_index"]))
        np.testing.assert_array_equal(np.float32(group["observation.state"]), one["state"])
        np.testing.assert_array_equal(np.float32(group["action"]), one["actions"])
        if codec == "png":
            for name, images in one["images"].items():
                pngs = [png["bytes"] for png in group[f"observation.images.{name}"]]
                pictures = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]).transpose(0, 3, 1, 2)
                np.testing.assert_array_equal(pictures, images)
    if codec != "png":
        for name in episodes[0]["images"]:
            for one, (pictures, _) in zip(episodes, read_video(root, name), strict=True):
                assert [said(picture) for picture in pictures] == [said(image) for image in one["images"][name]]
    for key, name in {"observation.state": "state", "action": "actions"}.items():
        for statistic, values in statistics(np.concatenate([one[name] for one in episodes])).items():
            assert stats[key][statistic] == values.tolist()
    counts = [stats[key]["count"] for key in info["features"] if key.startswith("observation.images")]
    assert counts == [[sum(-(-length // 10) for length in lengths)]] * len(episodes[0]["images"])
    assert not (root / "spill").exists()


@pytest.mark.parametrize(("chunks_size", "data_files_size_in_mb", "files"), [(1000, 100, 1), (2, 0, 5), (1, 0.005, 2)])
def test_what_is_read_equals_what_was_written_bit_for_bit(tmp_path, chunks_size, data_files_size_in_mb, files):
    episodes = [episode(seed, length, f"task {seed % 3}") for seed, length in enumerate([5, 1, 7, 12, 3])]
    write(tmp_path / "set", episodes, chunks_size=chunks_size, data_files_size_in_mb=data_files_size_in_mb)
    assert len(list(tmp_path.glob("set/data/*/*.parquet"))) == files
    data = LeRobotDataset(tmp_path / "set")
    frames = np.arange(data.num_frames)
    assert (data.num_frames, data.fps) == (28, 10)
    assert (data.cameras, data.image_size) == (("table", "gripper"), (6, 8))
    assert (data.state_names, data.action_names) == (tuple(STATE_NAMES), tuple(ACTION_NAMES))
    np.testing.assert_array_equal(data.state, np.concatenate([one["state"] for one in episodes]))
    np.testing.assert_array_equal(data.actions, np.concatenate([one["actions"] for one in episodes]))
    for n, camera in enumerate(data.cameras):
        written = np.concatenate([one["images"][camera] for one in episodes])
        np.testing.assert_array_equal(data.images(frames)[:, n], written)
    np.testing.assert_array_equal(data.episode_from, [0, 5, 6, 13, 25])
    np.testing.assert_array_equal(data.episode_to, [5, 6, 13, 25, 28])
    for one, first in zip(episodes, data.episode_from, strict=True):
        assert data.instructions[data.task_index[first]] == one["instruction"]
    assert data.instructions == ["task 0", "task 1", "task 2"]


def test_files_follow_the_format_and_hold_one_row_group_per_episode(tmp_path):
    write(tmp_path / "set", [episode(0, 4, "open"), episode(1, 3, "close"), episode(2, 2, "open")])
    parquet = pq.ParquetFile(tmp_path / "set/data/chunk-000/file-000.parquet")
    assert [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)] == [4, 3, 2]
    assert parquet.metadata.row_group(0).column(0).compression == "SNAPPY"
    types = {field.name: field.type for field in parquet.schema_arrow}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    int64 = dict.fromkeys(["frame_index", "episode_index", "index", "task_index"], pa.int64())
    assert types == {
        "observation.images.table": image,
        "observation.images.gripper": image,
        "observation.state": pa.list_(pa.float32(), 3),
        "action": pa.list_(pa.float32(), 2),
        "timestamp": pa.float32(),
        **int64,
    }
    rows = parquet.read(["timestamp", *int64]).to_pydict()
    np.testing.assert_allclose(rows["timestamp"], [0, 0.1, 0.2, 0.3, 0, 0.1, 0.2, 0, 0.1])
    assert rows["frame_index"] == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert rows["episode_index"] == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert rows["index"] == list(range(9))
    assert rows["task_index"] == [0, 0, 0, 0, 1, 1, 1, 0, 0]

    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "fps": 10,
        "robot_type": "tabletop",
        "total_episodes": 3,
        "total_frames": 9,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "splits": {"train": "0:3"},
    }
    assert features.keys() == types.keys()
    names = ["channels", "height", "width"]
    assert features["observation.images.table"] == {"dtype": "image", "shape": [3, 6, 8], "names": names}
    assert features["observation.state"] == {"dtype": "float32", "shape": [3], "names": STATE_NAMES}
    assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}


def test_tasks_are_a_pandas_frame_indexed_by_task(tmp_path):
    write(tmp_path / "set", [episode(0, 2, "open"), episode(1, 2, "close")])
    table = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["open", "close"]}
    pandas = json.loads(table.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]
    assert [column["field_name"] for column in pandas["columns"]] == ["task_index", "task"]


def test_episodes_table_says_where_each_episode_lies(tmp_path):
    write(tmp_path / "set", [episode(seed, 4 + seed) for seed in range(3)], chunks_size=2, data_files_size_in_mb=0)
    table = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet")
    rows = table.to_pydict()
    assert rows["episode_index"] == [0, 1, 2]
    assert rows["tasks"] == [["put the cube on the plate"]] * 3
    assert rows["length"] == [4, 5, 6]
    assert (rows["dataset_from_index"], rows["dataset_to_index"]) == ([0, 4, 9], [4, 9, 15])
    assert (rows["data/chunk_index"], rows["data/file_index"]) == ([0, 0, 1], [0, 1, 0])
    assert (rows["meta/episodes/chunk_index"], rows["meta/episodes/file_index"]) == ([0] * 3, [0] * 3)
    np.testing.assert_allclose(rows["stats/observation.state/mean"][2], episode(2, 6)["state"].mean(0), rtol=1e-6)
    assert np.shape(rows["stats/observation.images.table/std"]) == (3, 3, 1, 1)
    files = sorted(str(file.relative_to(tmp_path / "set/data")) for file in tmp_path.glob("set/data/*/*"))
    assert files == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]


def test_stored_quantiles_are_those_of_all_frames_and_not_an_envelope_of_episodes(tmp_path):
    episodes = [episode(seed, 40) for seed in (0, 5, 10)]
    write(tmp_path / "set", episodes)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())["observation.state"]
    values = np.concatenate([one["state"] for one in episodes]).astype(np.float64)
    for name, quantile in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        np.testing.assert_allclose(stats[name], np.quantile(values, quantile, axis=0), rtol=1e-6)
    envelope = np.min([np.quantile(one["state"], 0.1, axis=0) for one in episodes], axis=0)
    assert (np.abs(stats["q10"] - envelope) > 0.1).all()
    np.testing.assert_allclose(stats["mean"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], values.std(0), rtol=1e-6)
    assert stats["min"] == values.min(0).tolist()
    assert stats["max"] == values.max(0).tolist()
    assert stats["count"] == [120]


def test_image_statistics_are_those_of_every_tenth_frame_scaled_to_one(tmp_path):
    episodes = [episode(0, 25), episode(1, 10)]
    write(tmp_path / "set", episodes)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())["observation.images.gripper"]
    sampled = np.concatenate([one["images"]["gripper"][::10] for one in episodes]) / 255
    pixels = sampled.transpose(1, 0, 2, 3).reshape(3, -1)
    expected = {"mean": pixels.mean(1), "std": pixels.std(1), "min": pixels.min(1), "max": pixels.max(1)}
    expected |= {f"q{q:02d}": np.quantile(pixels, q / 100, axis=1, method="lower") for q in (1, 10, 50, 90, 99)}
    for name, value in expected.items():
        np.testing.assert_allclose(stats[name], value.reshape(3, 1, 1), rtol=1e-6, err_msg=name)
    assert stats["count"] == [4]
    assert stats.keys() == {*expected, "count"}


def with_value(array, index, value):
    array[index] = value
    return array


WRONG_EPISODES = {
    "empty instruction": ({"instruction": "  "}, ["instruction is '  '"]),
    "a camera too few": ({"images": {"table": None}}, ["['table']", "['gripper', 'table']"]),
    "float images": (
        {"images": dict.fromkeys(CAMERAS, np.zeros((5, 3, 6, 8), np.float32))},
        ["observation.images.table is float32 (5, 3, 6, 8)", "expected uint8 (5, 3, 6, 8)"],
    ),
    "channels last": (
        {"images": dict.fromkeys(CAMERAS, np.zeros((5, 6, 8, 3), np.uint8))},
        ["uint8 (5, 6, 8, 3)", "expected uint8 (5, 3, 6, 8)"],
    ),
    "an action too few": ({"actions": np.zeros((4, 2), np.float32)}, ["action is float32 (4, 2)", "float32 (5, 2)"]),
    "a state of other size": ({"state": np.zeros((5, 4), np.float32)}, ["observation.state", "(5, 4)", "(5, 3)"]),
    "double precision": ({"state": np.zeros((5, 3))}, ["float64 (5, 3)", "expected float32"]),
    "no frame": ({"state": np.zeros((0, 3), np.float32)}, ["(0, 3)", "expected float32 (1, 3)"]),
    "NaN": (
        {"state": with_value(np.zeros((5, 3), np.float32), (3, 1), np.nan)},
        ["frame 3", "y of observation.state is nan", "expected a finite number"],
    ),
    "Inf": (
        {"actions": with_value(np.zeros((5, 2), np.float32), (4, 0), -np.inf)},
        ["frame 4", "dx of action is -inf"],
    ),
}


@pytest.mark.parametrize("codec", ["png", "h264"])
@pytest.mark.parametrize("wrong", WRONG_EPISODES)
def test_wrong_episode_is_refused_and_leaves_no_trace(tmp_path, wrong, codec):
    change, told = WRONG_EPISODES[wrong]
    with writer(tmp_path / "set", codec=codec) as out:
        out.add_episode(**episode(0))
        with pytest.raises(InputError) as refusal:
            out.add_episode(**episode(1) | change)
        out.add_episode(**episode(2))
    for text in ["episode 1", *told]:
        assert text in str(refusal.value)
    state = pq.read_table(tmp_path / "set/data")["observation.state"].to_pylist()
    np.testing.assert_array_equal(np.float32(state), np.concatenate([episode(0)["state"], episode(2)["state"]]))


def test_root_that_holds_something_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="set exists, expected no such folder or an empty one: delete it or choose"):
        writer(tmp_path / "set")
    with pytest.raises(InputError, match="exists"):
        writer(tmp_path / "set/notes.txt")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", [episode(0)])
    assert_holds(tmp_path / "empty", [episode(0)])


def test_root_that_another_process_is_writing_is_refused_and_left_alone(tmp_path):
    with writer(tmp_path / "set") as first:
        first.add_episode(**episode(0))
        with pytest.raises(InputError, match=r"another process is writing .*set: wait for it, or choose another"):
            write(tmp_path / "set", [episode(1)])
        first.add_episode(**episode(2))
    assert_holds(tmp_path / "set", [episode(0), episode(2)])
    with pytest.raises(InputError, match="expected a finite number"):
        write(tmp_path / "other", [episode(0), episode(1) | {"state": np.full((5, 3), np.nan, np.float32)}])
    write(tmp_path / "other", [episode(2)])


@pytest.mark.parametrize("codec", VIDEO)
@pytest.mark.parametrize("fps", [10, 15, 30, 80])
def test_video_shows_each_frame_at_its_time_and_begins_each_episode_with_a_key_frame(tmp_path, codec, fps):
    episodes = [filmed(seed, length, f"task {seed % 2}") for seed, length in enumerate([1, 5, 12, 7])]
    write(tmp_path / "set", episodes, cameras=FILMED, fps=fps, codec=codec)
    assert_holds(tmp_path / "set", episodes, codec)
    _, _, rows = read_meta(tmp_path / "set")
    for name in FILMED:
        key = f"videos/observation.images.{name}"
        to = [row[f"{key}/to_timestamp"] for row in rows]
        assert [row[f"{key}/from_timestamp"] for row in rows] == [0, *to[:-1]]
        np.testing.assert_allclose(to, np.cumsum([1, 5, 12, 7]) / fps, rtol=1e-12)
        for one, (pictures, key_frames) in zip(episodes, read_video(tmp_path / "set", name), strict=True):
            assert key_frames[0]
            assert all(first or second for first, second in pairwise(key_frames))
            assert np.abs(pictures.astype(int) - one["images"][name]).mean() < 3


@pytest.mark.parametrize(
    ("limits", "places"),
    [
        ({}, [(0, 0)] * 5),
        ({"video_files_size_in_mb": 0, "chunks_size": 2}, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]),
        ({"video_files_size_in_mb": 0.002}, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2)]),
    ],
)
def test_video_files_and_chunks_have_the_size_asked_for(tmp_path, limits, places):
    episodes = [filmed(seed, 9) for seed in range(5)]
    write(tmp_path / "set", episodes, cameras=FILMED, codec="h264", **limits)
    assert_holds(tmp_path / "set", episodes, "h264")
    info, _, rows = read_meta(tmp_path / "set")
    key = "observation.images.gripper"
    assert [(row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]) for row in rows] == places
    begin = [row[f"videos/{key}/from_timestamp"] for row in rows]
    assert begin == [0.9 * places[:number].count(place) for number, place in enumerate(places)]
    files = {str(path.relative_to(tmp_path / "set")) for path in tmp_path.glob(f"set/videos/{key}/*/*")}
    assert files == {info["video_path"].format(video_key=key, chunk_index=c, file_index=f) for c, f in places}


def test_video_set_differs_from_a_png_set_in_its_pictures_alone(tmp_path):
    episodes = [filmed(seed, 11) for seed in range(3)]
    infos, stats, rows, data = [], [], [], []
    for codec in ("png", "av1"):
        write(tmp_path / codec, episodes, cameras=FILMED, codec=codec)
        info, of_all, episode_rows = read_meta(tmp_path / codec)
        infos.append(info)
        stats.append(of_all)
        rows.append([{k: v for k, v in row.items() if not k.startswith("videos/")} for row in episode_rows])
        table = pq.read_table(tmp_path / codec / "data")
        data.append(table.select([name for name in table.column_names if "images" not in name]))
    assert stats[0] == stats[1]
    assert rows[0] == rows[1]
    assert data[0].equals(data[1])
    assert table.column_names == data[1].column_names
    assert infos[1].pop("video_path") == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert infos[0].pop("video_path") is None
    for name, (h, w) in FILMED.items():
        features = [info["features"].pop(f"observation.images.{name}") for info in infos]
        assert features[0] == {"dtype": "image", "shape": [3, h, w], "names": ["channels", "height", "width"]}
        video = {"height": h, "width": w, "codec": "av1", "pix_fmt": "yuv420p", "fps": 10, "channels": 3}
        video = {f"video.{key}": value for key, value in video.items()} | {"has_audio": False, "is_depth_map": False}
        assert features[1] == features[0] | {"dtype": "video", "info": video}
        with av.open(tmp_path / f"av1/videos/observation.images.{name}/chunk-000/file-000.mp4") as container:
            stream = container.streams.video[0].codec_context
            assert (stream.height, stream.width, stream.pix_fmt) == (h, w, "yuv420p")
            assert stream.codec.canonical_name == "av1"
    assert infos[0] == infos[1]


def test_odd_sizes_are_kept_by_av1_and_refused_for_h264(tmp_path):
    odd = {"table": (33, 65)}
    episodes = [filmed(0, cameras=odd)]
    write(tmp_path / "set", episodes, cameras=odd, codec="av1")
    assert_holds(tmp_path / "set", episodes, "av1")
    for size in ((33, 64), (32, 65)):
        with pytest.raises(InputError, match=f"'table' has images of {size[0]} x {size[1]} .* even .* choose av1, png"):
            writer(tmp_path / "other", cameras={"table": size}, codec="h264")
    with pytest.raises(InputError, match=r"codec is 'mp4', expected one of \['png', 'av1', 'h264'\]"):
        writer(tmp_path / "other", codec="mp4")


def test_exception_leaves_finished_episodes_readable_beside_the_root(tmp_path):
    def failing_collection():
        with writer(tmp_path / "set", data_files_size_in_mb=0.008) as out:
            for seed in range(4):
                out.add_episode(**episode(seed))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing_collection()
    assert not (tmp_path / "set").exists()
    assert_holds(tmp_path / ".set.partial", [episode(seed) for seed in range(4)])

    write(tmp_path / "set", [episode(7)])
    assert not (tmp_path / ".set.partial").exists()
    assert_holds(tmp_path / "set", [episode(7)])


# Of the fourth episode: which call to what fails, whether it has done its work, and the episodes that are then whole.
FAILURES = {
    "its last PNG": ("png", Image.Image, "save", 10, False, 3),
    "the encoding of its second video": ("av1", av, "open", 2, False, 3),
    "the copy of its second video": ("h264", av, "open", 4, False, 3),
    "its row group": ("h264", pq.ParquetWriter, "write_table", 1, False, 3),
    "its row group of PNGs": ("png", pq.ParquetWriter, "write_table", 1, False, 3),
    "an interrupt after its row group": ("h264", pq.ParquetWriter, "write_table", 1, True, 4),
    "an interrupt after a file is closed": ("png", pq.ParquetWriter, "close", 1, True, 4),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_episode_that_fails_half_way_is_not_in_the_data_set(tmp_path, monkeypatch, failure, error):
    codec, owner, name, number, done, whole = FAILURES[failure]
    original, calls = getattr(owner, name), []
    episodes = [filmed(seed, 5, f"task {seed}") for seed in range(4)]

    def fails(*args, **options):
        calls.append(name)
        result = original(*args, **options) if done or len(calls) != number else None
        if len(calls) == number:
            raise error
        return result

    def failing_collection():
        with writer(tmp_path / "set", FILMED, codec=codec, data_files_size_in_mb=0.004) as out:
            for one in episodes[:3]:
                out.add_episode(**one)
            monkeypatch.setattr(owner, name, fails)
            out.add_episode(**episodes[3])

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        failing_collection()
    assert not (tmp_path / "set").exists()
    assert_holds(tmp_path / ".set.partial", episodes[:whole], codec)


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_exception_in_the_first_episode_leaves_nothing(tmp_path, monkeypatch, codec):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(MemoryError):
        write(tmp_path / "set", [filmed(0)], cameras=FILMED, codec=codec)
    assert list(tmp_path.iterdir()) == []


def test_row_group_that_was_cut_off_costs_the_episodes_of_its_file_and_no_others(tmp_path):
    sizes = {"table": (64, 64)}
    episodes = [episode(seed, 5, cameras=sizes) for seed in range(4)]

    def failing_collection():
        with writer(tmp_path / "set", sizes, data_files_size_in_mb=0.1) as out:
            for one in episodes[:3]:
                out.add_episode(**one)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = (tmp_path / ".set.partial/data/chunk-000/file-001.parquet").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, limits[1]))
            try:
                out.add_episode(**episodes[3])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match="File too large"):
        failing_collection()
    assert_holds(tmp_path / ".set.partial", episodes[:2])


def test_no_episode_follows_one_that_was_written_in_part(tmp_path, monkeypatch):
    original = pq.ParquetWriter.write_table

    def fails(*_, **__):
        monkeypatch.setattr(pq.ParquetWriter, "write_table", original)
        raise OSError

    with writer(tmp_path / "set") as out:
        out.add_episode(**episode(0))
        monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
        with pytest.raises(OSError):
            out.add_episode(**episode(1))
        with pytest.raises(InputError, match=r"episode 1 was written in part .* write .*set again"):
            out.add_episode(**episode(2))
    assert_holds(tmp_path / "set", [episode(0)])


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=80_000_000)
    with writer(tmp_path / "set") as out:
        out.add_episode(**episode(0, instruction="open"))
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda _: free)
            with pytest.raises(
                InputError, match=r"episode 1: the disk of .* has 80 MB left, expected 105 MB: free some"
            ):
                out.add_episode(**episode(1, instruction="close"))
        out.add_episode(**episode(2, instruction="push"))
    assert_holds(tmp_path / "set", [episode(0, instruction="open"), episode(2, instruction="push")])


def test_episodes_table_has_more_rows_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "ROWS_IN_MEMORY", 2)
    episodes = [episode(seed, 1 + seed, f"task {seed}") for seed in range(5)]
    write(tmp_path / "set", episodes)
    assert_holds(tmp_path / "set", episodes)
    assert pq.read_metadata(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").num_row_groups == 3


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path, codec):
    used = []
    tracemalloc.start()
    with writer(tmp_path / "set", {"table": (16, 16)}, codec=codec, data_files_size_in_mb=0.1) as out:
        for seed in range(120):
            out.add_episode(**episode(seed, 10, cameras={"table": (16, 16)}))
            used.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
    tracemalloc.stop()
    assert max(used[90:]) - max(used[:30]) < 200_000  # of 60 episodes of 8,000 bytes each


def test_collect_stores_images_as_it_is_told(tmp_path):
    collect.main(collect.CollectConfig("tabletop", str(tmp_path / "set"), episodes=1, workers=1, codec="h264"))
    info, _, rows = read_meta(tmp_path / "set")
    assert info["features"]["observation.images.table"]["info"]["video.codec"] == "h264"
    [(pictures, _)] = read_video(tmp_path / "set", "table")
    assert pictures.shape == (rows[0]["length"], 3, 64, 64)


def test_data_set_without_an_episode_is_refused(tmp_path):
    with pytest.raises(InputError, match="no episode was added"):
        write(tmp_path / "set", [])
    assert not (tmp_path / "set").exists()


def test_statistics_are_right_when_the_caller_reuses_its_buffers(tmp_path):
    buffers = episode(0)
    with writer(tmp_path / "set") as out:
        out.add_episode(**buffers)
        buffers["state"][:] = 100
        out.add_episode(**buffers)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())["observation.state"]
    assert max(stats["min"]) < 100
    np.testing.assert_allclose(stats["mean"], (episode(0)["state"].mean(0) + 100) / 2, rtol=1e-5)
