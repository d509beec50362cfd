import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written import (
    ACTION_NAMES,
    CAMERAS,
    FILMED,
    STATE_NAMES,
    VIDEO,
    assert_holds,
    episode,
    filmed,
    read_meta,
    read_video,
    write,
    writer,
)

from vla import InputError, collect
from vla.data import write as write_module
from vla.data.lerobot import LeRobotDataset


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


@pytest.mark.parametrize("limit", [1, 1000, 10**4])  # of about 200 bytes a PNG
def test_episode_of_more_bytes_than_one_array_holds_is_one_row_group_all_the_same(tmp_path, monkeypatch, limit):
    pieces, write_table = [], pq.ParquetWriter.write_table

    def counted(self, table, *arguments, **options):
        pieces.append(table.column(0).num_chunks)
        write_table(self, table, *arguments, **options)

    monkeypatch.setattr(write_module, "PIECE_BYTES", limit)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", counted)
    episodes = [episode(0, 23), episode(1, 1)]
    write(tmp_path / "set", episodes)
    assert (pieces[0] > 4) == (limit < 10**4)
    assert_holds(tmp_path / "set", episodes)
    for data in (LeRobotDataset(tmp_path / "set"), LeRobotDataset(tmp_path / "set", cache="none")):
        written = np.concatenate([one["images"]["gripper"] for one in episodes])
        np.testing.assert_array_equal(data.images(np.arange(24))[:, 1], written)


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


@pytest.mark.parametrize("there", [True, False])
def test_root_that_is_a_link_is_written_where_it_points_to(tmp_path, there):
    (tmp_path / "link").symlink_to("disk/set")
    if there:
        (tmp_path / "disk/set").mkdir(parents=True)
    with writer(tmp_path / "link") as out:
        out.add_episode(**episode(0))
        assert {path.name for path in tmp_path.iterdir()} == {"link", "disk"}  # no part of it is on another disk
    assert (tmp_path / "link").is_symlink()
    assert_holds(tmp_path / "link", [episode(0)])


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_numbers_of_any_type_are_written_as_the_format_has_them(tmp_path, codec):
    numbers = {"fps": 12.5, "chunks_size": 2, "data_files_size_in_mb": 0.5, "video_files_size_in_mb": 3}
    others = {"fps": np.float32(12.5), "chunks_size": np.int64(2), "data_files_size_in_mb": np.float32(0.5)}
    others |= {"video_files_size_in_mb": np.uint8(3)}
    for name, given in {"plain": numbers, "others": others}.items():
        with writer(tmp_path / name, codec=codec, **given) as out:
            out.add_episode(**episode(0))
    assert read_meta(tmp_path / "others") == read_meta(tmp_path / "plain")
    writer(tmp_path / "one file", codec=codec, data_files_size_in_mb=np.inf)
    for wrong in ({"fps": 0}, {"fps": np.nan}, {"chunks_size": 2.5}, {"chunks_size": 0}):
        with pytest.raises(InputError, match=r"fps is .* and chunks_size .*, expected numbers above 0, the second who"):
            writer(tmp_path / "refused", **wrong)


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


@pytest.mark.parametrize(("owner", "name"), [(write_module, "image_statistics"), (json, "dumps"), (Path, "rename")])
def test_root_is_refused_to_others_until_the_folder_has_its_name(tmp_path, monkeypatch, owner, name):
    original, refused, late = getattr(owner, name), [], writer(tmp_path / "set")

    def meanwhile(*arguments, **options):
        monkeypatch.undo()
        with pytest.raises(InputError, match="another process is writing"):
            write(tmp_path / "set", [episode(1)])
        refused.append(name)
        return original(*arguments, **options)

    with writer(tmp_path / "set") as first:
        first.add_episode(**episode(0))
        monkeypatch.setattr(owner, name, meanwhile)
    assert refused
    with pytest.raises(InputError, match="set exists, expected no such folder"), late:
        pass
    assert_holds(tmp_path / "set", [episode(0)])


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
