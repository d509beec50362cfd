"""Data sets without a fault, and plants: functions that put one fault into the data set at `root`."""

import io

import av
import numpy as np
import pyarrow.parquet as pq
from lerobot_sets import (
    DATA,
    EPISODES,
    LENGTHS,
    as_v21,
    column,
    cut_video,
    edit_columns,
    edit_info,
    edit_value,
    picture,
    read_lines,
    take,
    truncate,
    write,
    write_lines,
)
from PIL import Image

TABLE, WRIST = "observation.images.table", "observation.images.wrist"
VIDEO = f"videos/{WRIST}/chunk-000/file-000.mp4"
TASKS = "meta/tasks.parquet"
F = sum(LENGTHS)  # episodes are frames 0-3, 4-6, 7-11, 12-13
ALL = {0, 1, 2, 3}
OLDER_FILE = "data/chunk-000/episode_000001.parquet"
OLDER_VIDEO = f"videos/chunk-000/{WRIST}/episode_000001.mp4"


def sound_sets(folder):
    """Data sets without a fault, of every layout, by name."""
    sets = {
        "png": write(folder / "png"),
        "files": write(folder / "files", data_files_size_in_mb=0),  # an episode each
        "h264": write(folder / "h264", codec="h264"),
    }
    sets["v2.1"] = as_v21(sets["png"], folder / "older")
    sets["v2.1 h264"] = as_v21(sets["h264"], folder / "older-h264")
    return sets


def value(name, row, new, path=DATA):
    return lambda root: edit_value(root / path, name, row, new)


def values(name, change, path=DATA):
    return lambda root: edit_columns(root / path, {name: [change(old) for old in column(root / path, name)]})


def rows(chosen, path=DATA):
    return lambda root: take(root / path, chosen)


def shorter(path, share=0.5):
    return lambda root: truncate(root / path, share)


def removed(path):
    return lambda root: (root / path).unlink()


def content(path, new):
    return lambda root: (root / path).write_bytes(new)


def info(**changes):
    return lambda root: edit_info(root, lambda info: info.update(changes))


def feature(key, **changes):
    return lambda root: edit_info(root, lambda info: info["features"][key].update(changes))


def line(path, number, **changes):
    """A plant: other entries in one line of JSON."""

    def plant(root):
        lines = read_lines(root / path)
        lines[number] |= changes
        write_lines(root / path, lines)

    return plant


def rows_of_lines(path, chosen):
    return lambda root: write_lines(root / path, [read_lines(root / path)[row] for row in chosen])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def both(*plants):
    return lambda root: [plant(root) for plant in plants]


def damaged_page(name, path=DATA, group=1):
    """A plant: garbage in the place of what a row group has in one column."""

    def plant(root):
        chunks = pq.ParquetFile(root / path).metadata.row_group(group)
        chunk = next(c for c in map(chunks.column, range(chunks.num_columns)) if c.path_in_schema.startswith(name))
        data = bytearray((root / path).read_bytes())
        start = chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        (root / path).write_bytes(data)

    return plant


def damaged_names(path):
    """A plant: names of columns that are no text."""

    def plant(root):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data.replace(b"task_index", b"task\xff\xfe\xff\xfe\xff\xfe"))

    return plant


def damaged_packet(number):
    def plant(root):
        with av.open(str(root / VIDEO)) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][number]
            damaged = slice(packet.pos, packet.pos + packet.size)
        data = bytearray((root / VIDEO).read_bytes())
        data[damaged] = b"\xa5" * packet.size
        (root / VIDEO).write_bytes(data)

    return plant


def filmed_anew(path, shown, fps=10, size=(16, 32)):
    """A plant: another video, of pictures that show these numbers, in the place of one."""

    def plant(root):
        with av.open(str(root / path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p", options={"g": "2", "bf": "0"})
            stream.height, stream.width = size
            for number in shown:
                image = np.ascontiguousarray(picture(number, size).transpose(1, 2, 0))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())

    return plant


def cut_short(path, seconds):
    def plant(root):
        whole = (root / path).rename(root / path.replace(".mp4", ".whole.mp4"))
        cut_video(whole, root / path, 0, seconds)
        whole.unlink()

    return plant


def start(episode, seconds):
    return value(f"videos/{WRIST}/from_timestamp", episode, seconds, EPISODES)


def begins(episode):
    return f"meta/episodes: episode {episode}: {WRIST} begins at"
