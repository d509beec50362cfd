"""Episodes to write, and what is read of them without our reader."""

import io
import json

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

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
