"""Small LeRobot data sets: made up, written as v3.0, laid out anew as v2.1, and changed by hand.

Dimensions: F frames of the data set, L of an episode, N cameras, h and w of a picture.
"""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data.write import LeRobotWriter

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
LENGTHS, SIZE = (4, 3, 5, 2), (16, 32)
CAMERAS = ("table", "wrist")


def picture(number, size=SIZE):
    """uint8 [3, h, w] that shows a number below 256 in two rows of four blocks, dark or bright, in colours."""
    h, w = size
    image = np.empty((3, h, w), np.uint8)
    for bit in range(8):
        row, column = divmod(bit, 4)
        colour = (40, 10, 20) if number >> bit & 1 == 0 else (230, 255 - 10 * column, 200)
        image[:, row * h // 2 : (row + 1) * h // 2, column * w // 4 : (column + 1) * w // 4] = np.reshape(
            colour, (3, 1, 1)
        )
    return image


def noise(number, size):
    return np.random.default_rng(number).integers(0, 256, (3, *size), dtype=np.uint8)


def numbers(images):
    """What pictures show: uint8 [..., 3, h, w] -> int64 [...]."""
    h, w = images.shape[-2:]
    blocks = images[..., 1, h // 4 :: h // 2, w // 8 :: w // 4] > 128  # [..., 2, 4], their middles
    return (blocks.reshape(*blocks.shape[:-2], 8) << np.arange(8)).sum(-1)


def made_up(lengths=LENGTHS, cameras=CAMERAS, size=SIZE, state_dim=3, action_dim=2, draw=picture):
    """Episodes for LeRobotWriter.add_episode. Camera n shows 100 n + the number of the frame in the data set.

    size: (h, w), or that of each camera by name. draw: (number, size) -> picture.
    """
    rng, frame, episodes = np.random.default_rng(0), 0, []
    sizes = size if isinstance(size, dict) else dict.fromkeys(cameras, size)
    for episode, length in enumerate(lengths):
        shown = {name: 100 * n + np.arange(frame, frame + length) for n, name in enumerate(cameras)}
        episodes.append(
            {
                "images": {name: np.stack([draw(i, sizes[name]) for i in shown[name]]) for name in cameras},
                "state": rng.normal(size=(length, state_dim)).astype(np.float32),
                "actions": rng.normal(size=(length, action_dim)).astype(np.float32),
                "instruction": f"task {episode % 2}",
            }
        )
        frame += length
    return episodes


def write(root, episodes=None, fps=10, codec="png", **options):
    """Write made-up episodes as a v3.0 data set; returns its folder."""
    episodes = episodes or made_up()
    first = episodes[0]
    names = {
        "state_names": list("xyzuvw"[: first["state"].shape[1]]),
        "action_names": [f"d{axis}" for axis in "xyzuvw"[: first["actions"].shape[1]]],
    }
    sizes = {name: images.shape[2:] for name, images in first["images"].items()}
    with LeRobotWriter(root, fps=fps, cameras=sizes, robot_type="arm", codec=codec, **names, **options) as writer:
        for episode in episodes:
            writer.add_episode(**episode)
    return Path(root)


def images_of(episodes):
    """uint8 [F, N, 3, h, w]."""
    cameras = episodes[0]["images"]
    return np.concatenate([np.stack([episode["images"][name] for name in cameras], axis=1) for episode in episodes])


def as_v21(root, target, chunks_size=1000):
    """Lay a v3.0 data set out as v2.1: a parquet file and videos for each episode, metadata in lines of JSON."""
    info = json.loads((root / "meta/info.json").read_text())
    rows = pq.read_table(root / "meta/episodes").to_pylist()
    data = pa.concat_tables([pq.ParquetFile(file).read() for file in sorted(root.glob("data/*/*.parquet"))])
    video_keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    layout = {
        "codebase_version": "v2.1",
        "chunks_size": chunks_size,
        "total_chunks": -(-len(rows) // chunks_size),
        "total_videos": len(rows) * len(video_keys),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    for row in rows:
        place = {"episode_chunk": row["episode_index"] // chunks_size, "episode_index": row["episode_index"]}
        path = target / layout["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(data.slice(row["dataset_from_index"], row["length"]), path)
        for key in video_keys:
            where = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            path = target / layout["video_path"].format(**place, video_key=key)
            path.parent.mkdir(parents=True, exist_ok=True)
            span = row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"]
            cut_video(root / info["video_path"].format(**where, video_key=key), path, *span)
    (target / "meta").mkdir()
    lines = [{key: row[key] for key in ("episode_index", "tasks", "length")} for row in rows]
    write_lines(target / "meta/episodes.jsonl", lines)
    write_lines(target / "meta/tasks.jsonl", pq.read_table(root / "meta/tasks.parquet").to_pylist())
    (target / "meta/info.json").write_text(json.dumps(info | layout))
    return target


def cut_video(source, target, start, stop):
    """Copy the packets shown from `start` to `stop` (seconds) to a file of their own."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as part:
        stream = part.add_stream_from_template(whole.streams.video[0], opaque=True)
        for packet in whole.demux(video=0):
            if packet.size and start - 1e-6 <= packet.pts * packet.time_base < stop - 1e-6:
                shift = round(start / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                part.mux(packet)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_info(root, change):
    info = json.loads((root / "meta/info.json").read_text())
    change(info)
    (root / "meta/info.json").write_text(json.dumps(info))


def features(**changes):
    """A change of info.json: the features whose names end so are updated."""

    def change(info):
        for name, feature in changes.items():
            key = next(key for key in info["features"] if key.endswith(name))
            info["features"][key].update(feature)

    return lambda root: edit_info(root, change)


def column(path, name):
    return pq.ParquetFile(path).read().column(name).to_pylist()


def edit_columns(path, columns):
    """Replace columns of a parquet file or add them; one for which None is given is dropped."""
    table = pq.ParquetFile(path).read()
    for name, values in columns.items():
        if name in table.column_names:
            index = table.column_names.index(name)
            table = table.remove_column(index) if values is None else table.set_column(index, name, pa.array(values))
        else:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


def edit_value(path, name, row, value):
    """Replace what one row of a parquet file has in one column."""
    table = pq.ParquetFile(path).read()
    values = table.column(name).to_pylist()
    values[row] = value
    edit_columns(path, {name: values})


def take(path, rows):
    """Keep these rows of a parquet file, in this order."""
    pq.write_table(pq.ParquetFile(path).read().take(pa.array(rows, pa.int64())), path)


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def copy(root, target):
    """A copy without what opening the data set has left there."""
    return shutil.copytree(root, target, ignore=shutil.ignore_patterns(".vla_cache"))
