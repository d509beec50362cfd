"""Write a LeRobot v3.0 data set, episode by episode, its images as PNG in the parquet files or as video beside them.

Dimensions: L frames of one episode, P state, A action, h and w of an image.
"""

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla import InputError
from vla.data.encode import ENCODERS, Pictures, encode, image_feature
from vla.data.stats import image_statistics, statistics

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
LOCK = "meta/info.json"  # a file that the finished data set has: it stays locked while the partial folder is renamed
SPILL = "spill"  # in the partial folder: state, action and the rows of the episodes table, until all are known
ROWS_IN_MEMORY = 500  # of the episodes table
PIECE_BYTES = 2**30  # of the PNGs of an episode in one array, and the picture that is begun by then
CLOSING_BYTES = 100 * 1024**2  # disk space kept free for the ends of open files and the metadata
TASK_COLUMNS = (("task_index", "int64", "int64"), ("task", "unicode", "object"))
PANDAS_TASKS = {  # pandas then reads `task` as the index, which the format asks for
    "index_columns": ["task"],
    "columns": [{"name": n, "field_name": n, "pandas_type": p, "numpy_type": d} for n, p, d in TASK_COLUMNS],
}


class LeRobotWriter:
    """Context manager that writes one data set; the folder `root` appears, whole, when the block ends without error.

    root: must not exist, or be empty. fps: frames per second. cameras: name -> (h, w), both even for h264.
    state_names, action_names: a name for each of the P and A dimensions.
    codec: of the images; "png" keeps every pixel, "av1" and "h264" are video, smaller, and lose some detail.
    chunks_size: files in a chunk folder. data_files_size_in_mb, video_files_size_in_mb: a file that has reached this
    size is closed.
    Until then all lies in `.NAME.partial` beside root; after an exception it stays there, a readable data set of the
    episodes added so far, until the next writer to the same root removes it.
    Memory holds the images of one episode, and the index of the open files.
    Raises InputError if root holds something or another process is writing it, if the codec cannot store such images,
    and at the end of the block if no episode was added.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        cameras: dict[str, tuple[int, int]],
        state_names: list[str],
        action_names: list[str],
        robot_type: str,
        codec: Literal["png", "av1", "h264"] = "png",
        chunks_size: int = 1000,
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
    ):
        self.root = Path(root).resolve()  # a link stays: the folder it points to is replaced
        self._check_root()
        if not 0 < fps < math.inf or not 1 <= chunks_size < math.inf or chunks_size != int(chunks_size):
            raise InputError(f"fps is {fps} and chunks_size {chunks_size}, expected numbers above 0, the second whole")
        if codec != "png" and codec not in ENCODERS:
            raise InputError(f"codec is {codec!r}, expected one of {['png', *ENCODERS]}")
        for name, (h, w) in cameras.items():
            if codec == "h264" and (h % 2 or w % 2):  # it has one colour for two by two pixels; AV1 rounds up itself
                found = f"camera {name!r} has images of {h} x {w} pixels"
                raise InputError(f"{found}, expected even numbers for codec 'h264': choose av1, png or another size")
        self.partial = self.root.parent / f".{self.root.name}.partial"
        self.codec = codec
        self.cameras = {name: f"observation.images.{name}" for name in cameras}
        self.features = {
            self.cameras[name]: image_feature(codec, _plain(fps), int(h), int(w)) for name, (h, w) in cameras.items()
        }
        for key, names in {"observation.state": state_names, "action": action_names}.items():
            self.features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        indices = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
        for key, dtype in {"timestamp": "float32", **indices}.items():
            self.features[key] = {"dtype": dtype, "shape": [1], "names": None}
        numbers = {"fps": fps, "chunks_size": chunks_size}
        numbers |= {"data_files_size_in_mb": data_files_size_in_mb, "video_files_size_in_mb": video_files_size_in_mb}
        self.info = {"codebase_version": "v3.0", "robot_type": robot_type}
        self.info |= {name: _plain(number) for name, number in numbers.items()}
        self.info |= {"data_path": DATA_PATH, "video_path": VIDEO_PATH if codec in ENCODERS else None}
        self.info |= {"features": self.features}
        self._num_files = self._num_episodes = self._num_frames = 0
        self._torn = False  # whether an episode was written in part
        self._parquet: pq.ParquetWriter | None = None
        self._videos = {key: _VideoFiles(self.partial, key, self.info) for key in self.cameras.values()}
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> "LeRobotWriter":
        meta = self.partial / "meta"
        try:
            meta.mkdir(parents=True, exist_ok=True)
            self._locked = self._lock()
        except OSError as error:
            raise InputError(f"{self.root} cannot be written ({error}): choose another folder") from error
        self._check_root()  # another process may have finished it since
        self._locked.truncate(0)
        for left in {*self.partial.iterdir(), *meta.iterdir()} - {meta, self.partial / LOCK}:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (self.partial / SPILL).mkdir()
        (self.partial / SPILL / "episodes").touch()
        return self

    def _check_root(self) -> None:
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            found = f"{self.root} exists, expected no such folder or an empty one"
            raise InputError(f"{found}: delete it or choose another")
        if os.path.ismount(self.root) or self.root == Path.cwd():  # the finished folder takes its place
            found = f"{self.root} is where a disk is mounted, or the current folder"
            raise InputError(f"{found}, expected one that can be replaced: choose a folder in it")

    def _lock(self) -> BinaryIO:
        """A file that is to stay open while this process alone may write here."""
        file = open(self.partial / LOCK, "ab")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another process is writing {self.root}: wait for it, or choose another folder") from None
        except OSError:
            pass  # this file system has no locks
        return file

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        with self._locked:
            for video in self._videos.values():
                video.close()
            if num_frames := self._close_data_and_count():
                self._write_metadata(num_frames)
                shutil.rmtree(self.partial / SPILL)
            else:
                shutil.rmtree(self.partial)
                if error is None:
                    raise InputError(f"no episode was added to {self.root}, expected at least 1")
            if error is None:
                self.partial.rename(self.root)

    def add_episode(
        self, *, images: dict[str, np.ndarray | Pictures], state: np.ndarray, actions: np.ndarray, instruction: str
    ) -> None:
        """Append one episode: to each camera's video, then as one row group, with which it is part of the data set.

        images: camera -> uint8 [L, 3, h, w], or what `encode` made of that. state: float32 [L, P].
        actions: float32 [L, A]. L >= 1.
        Raises InputError, and writes nothing, on another dtype or shape, NaN or Inf, an empty instruction or a full
        disk. After another exception no further episode is taken.
        """
        vectors = {"observation.state": state, "action": actions}
        self._check(images, vectors, instruction)
        length, episode, first = len(state), self._num_episodes, self._num_frames
        frame_index = np.arange(length)
        columns, videos, histograms = {}, {}, {}
        for name, key in self.cameras.items():
            pictures = images[name]
            if not isinstance(pictures, Pictures):
                pictures = encode(pictures, self.codec, self.info["fps"])
            if self.codec == "png":
                columns[key] = _image_column(pictures)
            else:
                videos[key] = io.BytesIO(pictures.data)
            histograms[key] = pictures.histogram
        columns |= {key: _vector_column(values) for key, values in vectors.items()}
        columns["timestamp"] = (frame_index / self.info["fps"]).astype(np.float32)
        columns["frame_index"] = frame_index
        columns["episode_index"] = np.full(length, episode)
        columns["index"] = first + frame_index
        task_index = self._tasks.get(instruction, len(self._tasks))
        columns["task_index"] = np.full(length, task_index)
        table = pa.table(columns)
        stats = self._statistics(vectors, histograms)
        self._check_disk(table.nbytes + sum(video.getbuffer().nbytes for video in videos.values()))

        self._torn = True
        row = {"episode_index": episode, "tasks": [instruction], "length": length}
        row |= {"dataset_from_index": first, "dataset_to_index": first + length}
        row |= {f"data/{name}": index for name, index in _place(self._num_files, self.info).items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key, video in videos.items():
            row |= {f"videos/{key}/{name}": value for name, value in self._videos[key].append(video).items()}
        row |= {f"stats/{key}/{name}": value for key in stats for name, value in stats[key].items()}
        row["histograms"] = {key: histogram.tolist() for key, histogram in histograms.items()}
        for key, values in vectors.items():
            self._spill(key, values.tobytes())
        self._spill("episodes", json.dumps(row).encode() + b"\n")
        self._write(table)
        self._tasks[instruction] = task_index
        self._torn = False

    def _check(
        self, images: dict[str, np.ndarray | Pictures], vectors: dict[str, np.ndarray], instruction: str
    ) -> None:
        episode = f"episode {self._num_episodes}"
        if self._torn:
            found = f"{episode} was written in part before an exception"
            raise InputError(f"{found}, expected no further one: write {self.root} again")
        if not instruction.strip():
            raise InputError(f"{episode}: instruction is {instruction!r}, expected what the robot is to do, in words")
        if images.keys() != self.cameras.keys():
            raise InputError(f"{episode}: images are of {sorted(images)}, expected {sorted(self.cameras)}")
        length = max(1, len(vectors["observation.state"]))
        for key, array in (vectors | {key: images[name] for name, key in self.cameras.items()}).items():
            dtype = "float32" if key in vectors else "uint8"
            found, expected = f"{array.dtype} {array.shape}", f"{dtype} {(length, *self.features[key]['shape'])}"
            if found != expected:
                raise InputError(f"{episode}: {key} is {found}, expected {expected}")
            if isinstance(array, Pictures) and array.codec != self.codec:
                raise InputError(f"{episode}: {key} was encoded as {array.codec}, expected {self.codec}")
        for key, array in vectors.items():
            for frame, column in np.argwhere(~np.isfinite(array)):
                found = f"{self.features[key]['names'][column]} of {key} is {array[frame, column]}"
                raise InputError(f"{episode}, frame {frame}: {found}, expected a finite number")

    def _check_disk(self, needed: int) -> None:
        needed += CLOSING_BYTES + (self.partial / SPILL / "episodes").stat().st_size
        if (free := shutil.disk_usage(self.partial).free) < needed:
            found = f"episode {self._num_episodes}: the disk of {self.partial} has {free / 1e6:.0f} MB left"
            raise InputError(f"{found}, expected {needed / 1e6:.0f} MB: free some, or choose another disk")

    def _spill(self, name: str, data: bytes) -> None:
        with open(self.partial / SPILL / name, "ab") as file:
            file.write(data)

    def _write(self, table: pa.Table) -> None:
        path = self._data_file(self._num_files)
        if self._parquet is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Neither statistics nor dictionaries of images, which would copy whole PNGs into the footer.
            options = {"use_dictionary": False, "write_statistics": ["episode_index", "index"]}
            self._parquet = pq.ParquetWriter(path, table.schema, compression="snappy", **options)
        self._parquet.write_table(table, row_group_size=len(table))
        self._num_episodes += 1
        self._num_frames += len(table)
        if path.stat().st_size >= self.info["data_files_size_in_mb"] * 1024**2:
            self._parquet.close()
            self._parquet = None
            self._num_files += 1

    def _close_data_and_count(self) -> int:
        """The number of frames in the data files, which an exception may have kept from being counted."""
        if self._parquet is not None:
            self._parquet.close()
        for number in range(self._num_files, -1, -1):
            try:
                with pq.ParquetFile(self._data_file(number)) as parquet:
                    if groups := parquet.num_row_groups:
                        return parquet.read_row_group(groups - 1, ["index"])["index"][-1].as_py() + 1
            except (FileNotFoundError, pa.ArrowInvalid):
                pass  # a row group written in part leaves a file without an end
            self._data_file(number).unlink(missing_ok=True)
        return 0

    def _statistics(self, vectors: dict[str, np.ndarray], histograms: dict[str, np.ndarray]) -> dict[str, dict]:
        stats = {key: statistics(values) for key, values in vectors.items()}
        for key, histogram in histograms.items():
            _, h, w = self.features[key]["shape"]
            stats[key] = image_statistics(histogram, h * w)
        return {key: {name: value.tolist() for name, value in row.items()} for key, row in stats.items()}

    def _write_metadata(self, num_frames: int) -> None:
        path = self.partial / EPISODES_PATH
        path.parent.mkdir(parents=True)
        rows, parquet, num_episodes, tasks = self._rows(num_frames), None, 0, {}
        histograms = {key: np.zeros((3, 256), np.int64) for key in self.cameras.values()}
        while group := list(islice(rows, ROWS_IN_MEMORY)):
            for row in group:
                tasks |= dict.fromkeys(row["tasks"])
                for key, histogram in row.pop("histograms").items():
                    histograms[key] += histogram
            table = pa.Table.from_pylist(group)
            parquet = parquet or pq.ParquetWriter(path, table.schema)
            parquet.write_table(table)
            num_episodes += len(group)
        parquet.close()

        meta = self.partial / "meta"
        table = pa.table({"task_index": range(len(tasks)), "task": list(tasks)})
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(PANDAS_TASKS)}), meta / "tasks.parquet")
        shapes = {key: (num_frames, *self.features[key]["shape"]) for key in ("observation.state", "action")}
        vectors = {key: np.memmap(self.partial / SPILL / key, np.float32, "r", 0, shapes[key]) for key in shapes}
        (meta / "stats.json").write_text(json.dumps(self._statistics(vectors, histograms), indent=4))
        totals = {"total_episodes": num_episodes, "total_frames": num_frames}
        totals |= {"total_tasks": len(tasks), "splits": {"train": f"0:{num_episodes}"}}
        (meta / "info.json").write_text(json.dumps(self.info | totals, indent=4))

    def _rows(self, num_frames: int) -> Iterator[dict]:
        """The rows of the episodes table, up to the episode that ends with this frame."""
        with open(self.partial / SPILL / "episodes", "rb") as lines:
            for row in map(json.loads, lines):
                yield row
                if row["dataset_to_index"] == num_frames:
                    return

    def _data_file(self, number: int) -> Path:
        return self.partial / DATA_PATH.format(**_place(number, self.info))


class _VideoFiles:
    """The video files of one camera, each with several episodes one after the other."""

    def __init__(self, root: Path, key: str, info: dict):
        self.root, self.key, self.info = root, key, info
        self.num_files = self.num_frames = self.num_bytes = 0  # the last two: of the open file
        self.container: av.container.OutputContainer | None = None

    def append(self, episode: io.BytesIO) -> dict[str, float]:
        """Copy the frames of a video, as they are, behind those of the file; returns where they then lie."""
        place, begin = _place(self.num_files, self.info), self.num_frames / self.info["fps"]
        with av.open(episode) as source:
            [video] = source.streams.video
            if self.container is None:
                path = self.root / VIDEO_PATH.format(video_key=self.key, **place)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.container = av.open(path, "w")
                self.stream = self.container.add_stream_from_template(video, opaque=True)
            ticks = round(begin / video.time_base)
            for packet in source.demux(video):
                if packet.size:  # the last one only says that the video ends
                    packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, self.stream
                    self.container.mux(packet)
                    self.num_frames, self.num_bytes = self.num_frames + 1, self.num_bytes + packet.size
        end = self.num_frames / self.info["fps"]
        if self.num_bytes >= self.info["video_files_size_in_mb"] * 1024**2:
            self.close()
            self.container, self.num_files, self.num_frames, self.num_bytes = None, self.num_files + 1, 0, 0
        return place | {"from_timestamp": begin, "to_timestamp": end}

    def close(self) -> None:
        if self.container is not None:
            self.container.close()


def _plain(number: float) -> int | float:
    """Of a type that JSON has, which NumPy's are not."""
    return int(number) if float(number).is_integer() else float(number)


def _place(number: int, info: dict) -> dict[str, int]:
    chunk_index, file_index = divmod(number, info["chunks_size"])
    return {"chunk_index": chunk_index, "file_index": file_index}


def _vector_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _image_column(pictures: Pictures) -> pa.ChunkedArray:
    """In pieces, as the offsets of one have 32 bits."""
    starts, pieces = np.append(0, pictures.ends), []  # [L + 1]
    cuts = np.searchsorted(pictures.ends, np.arange(PIECE_BYTES, pictures.ends[-1], PIECE_BYTES))
    for first, last in pairwise([0, *cuts.tolist(), len(pictures.ends)]):
        offsets = (starts[first : last + 1] - starts[first]).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(pictures.data[starts[first] : starts[last]])]
        pngs = pa.Array.from_buffers(pa.binary(), last - first, buffers)
        pieces.append(pa.StructArray.from_arrays([pngs, pa.nulls(len(pngs), pa.string())], ["bytes", "path"]))
    return pa.chunked_array(pieces)
