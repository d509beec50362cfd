"""Write a LeRobot v3.0 data set, episode by episode, with the images as PNG inside the parquet files.

Dimensions: L frames of one episode, P state, A action, h and w of an image.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla import InputError
from vla.data.stats import image_statistics, statistics

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
IMAGE_STATISTICS_STRIDE = 10  # every tenth frame tells the colours of an episode: neighbours look alike
TASK_COLUMNS = (("task_index", "int64", "int64"), ("task", "unicode", "object"))
PANDAS_TASKS = {  # pandas then reads `task` as the index, which the format asks for
    "index_columns": ["task"],
    "columns": [{"name": n, "field_name": n, "pandas_type": p, "numpy_type": d} for n, p, d in TASK_COLUMNS],
}


class LeRobotWriter:
    """Context manager that writes one data set; the folder `root` appears, whole, when the block ends without error.

    root: must not exist, or be empty. fps: frames per second. cameras: name -> (h, w).
    state_names, action_names: a name for each of the P and A dimensions.
    chunks_size: files in a chunk folder. data_files_size_in_mb: a data file that has reached this size is closed.
    Until then all lies in `.NAME.partial` beside root; after an exception it stays there, a readable data set of the
    episodes added so far, until the next writer to the same root removes it.
    Memory holds the images of one episode, and state and action of all (exact quantiles need every value).
    Raises InputError if root holds something, and at the end of the block if no episode was added.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: int,
        cameras: dict[str, tuple[int, int]],
        state_names: list[str],
        action_names: list[str],
        robot_type: str,
        chunks_size: int = 1000,
        data_files_size_in_mb: float = 100,
    ):
        self.root = Path(root)
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise InputError(f"{root} exists, expected no such folder or an empty one: delete it or choose another")
        self.partial = self.root.parent / f".{self.root.name}.partial"
        self.cameras = {name: f"observation.images.{name}" for name in cameras}
        image = {"dtype": "image", "names": ["channels", "height", "width"]}
        self.features = {self.cameras[name]: image | {"shape": [3, int(h), int(w)]} for name, (h, w) in cameras.items()}
        for key, names in {"observation.state": state_names, "action": action_names}.items():
            self.features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        indices = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
        for key, dtype in {"timestamp": "float32", **indices}.items():
            self.features[key] = {"dtype": dtype, "shape": [1], "names": None}
        self.info = {"codebase_version": "v3.0", "robot_type": robot_type, "fps": fps, "chunks_size": chunks_size}
        self.info |= {"data_files_size_in_mb": data_files_size_in_mb, "video_files_size_in_mb": 200}
        self.info |= {"data_path": DATA_PATH, "video_path": None, "features": self.features}
        self._num_files = self._num_frames = 0
        self._parquet: pq.ParquetWriter | None = None
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict] = []
        self._vectors: dict[str, list[np.ndarray]] = {"observation.state": [], "action": []}  # of [L, P] and [L, A]
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in self.cameras.values()}

    def __enter__(self) -> "LeRobotWriter":
        shutil.rmtree(self.partial, ignore_errors=True)
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self._close_file()
        if self._episodes:
            self._write_metadata()
        elif error is None:
            raise InputError(f"no episode was added to {self.root}, expected at least 1")
        if error is None:
            self.partial.rename(self.root)

    def add_episode(
        self, *, images: dict[str, np.ndarray], state: np.ndarray, actions: np.ndarray, instruction: str
    ) -> None:
        """Append one episode as one row group.

        images: camera -> uint8 [L, 3, h, w]. state: float32 [L, P]. actions: float32 [L, A]. L >= 1.
        Raises InputError, and writes nothing, on another dtype or shape, NaN or Inf, or an empty instruction.
        """
        vectors = {"observation.state": state, "action": actions}
        self._check(images, vectors, instruction)
        length, episode, first = len(state), len(self._episodes), self._num_frames
        frame_index = np.arange(length)
        columns = {key: _image_column(images[name]) for name, key in self.cameras.items()}
        columns |= {key: _vector_column(values) for key, values in vectors.items()}
        columns["timestamp"] = (frame_index / self.info["fps"]).astype(np.float32)
        columns["frame_index"] = frame_index
        columns["episode_index"] = np.full(length, episode)
        columns["index"] = first + frame_index
        columns["task_index"] = np.full(length, self._tasks.setdefault(instruction, len(self._tasks)))

        histograms = {key: _histogram(images[name][::IMAGE_STATISTICS_STRIDE]) for name, key in self.cameras.items()}
        stats = self._statistics(vectors, histograms)
        chunk_index, file_index = self._write(pa.table(columns))

        row = {"episode_index": episode, "tasks": [instruction], "length": length}
        row |= {"dataset_from_index": first, "dataset_to_index": first + length}
        row |= {"data/chunk_index": chunk_index, "data/file_index": file_index}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        row |= {f"stats/{key}/{name}": value for key in stats for name, value in stats[key].items()}
        self._episodes.append(row)
        self._num_frames += length
        for key, values in vectors.items():
            self._vectors[key].append(values.copy())  # the caller may reuse its buffers
        for key, histogram in histograms.items():
            self._histograms[key] += histogram

    def _check(self, images: dict[str, np.ndarray], vectors: dict[str, np.ndarray], instruction: str) -> None:
        episode = f"episode {len(self._episodes)}"
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
        for key, array in vectors.items():
            for frame, column in np.argwhere(~np.isfinite(array)):
                found = f"{self.features[key]['names'][column]} of {key} is {array[frame, column]}"
                raise InputError(f"{episode}, frame {frame}: {found}, expected a finite number")

    def _write(self, table: pa.Table) -> tuple[int, int]:
        chunk_index, file_index = divmod(self._num_files, self.info["chunks_size"])
        path = self.partial / DATA_PATH.format(chunk_index=chunk_index, file_index=file_index)
        if self._parquet is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Neither statistics nor dictionaries of images, which would copy whole PNGs into the footer.
            options = {"use_dictionary": False, "write_statistics": ["episode_index", "index"]}
            self._parquet = pq.ParquetWriter(path, table.schema, compression="snappy", **options)
        self._parquet.write_table(table, row_group_size=len(table))
        if path.stat().st_size >= self.info["data_files_size_in_mb"] * 1024**2:
            self._close_file()
        return chunk_index, file_index

    def _close_file(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
            self._num_files += 1

    def _statistics(self, vectors: dict[str, np.ndarray], histograms: dict[str, np.ndarray]) -> dict[str, dict]:
        stats = {key: statistics(values) for key, values in vectors.items()}
        for key, histogram in histograms.items():
            _, h, w = self.features[key]["shape"]
            stats[key] = image_statistics(histogram, h * w)
        return {key: {name: value.tolist() for name, value in row.items()} for key, row in stats.items()}

    def _write_metadata(self) -> None:
        meta = self.partial / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), meta / "episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": list(self._tasks.values()), "task": list(self._tasks)})
        pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(PANDAS_TASKS)}), meta / "tasks.parquet")
        vectors = {key: np.concatenate(values) for key, values in self._vectors.items()}
        stats = self._statistics(vectors, self._histograms)
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        totals = {"total_episodes": len(self._episodes), "total_frames": self._num_frames}
        totals |= {"total_tasks": len(self._tasks), "splits": {"train": f"0:{len(self._episodes)}"}}
        (meta / "info.json").write_text(json.dumps(self.info | totals, indent=4))


def _vector_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _image_column(images: np.ndarray) -> pa.StructArray:
    pngs = []
    for image in images:
        png = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(png, "png", compress_level=1)  # of 9: for speed
        pngs.append(png.getvalue())
    return pa.StructArray.from_arrays([pa.array(pngs), pa.nulls(len(pngs), pa.string())], ["bytes", "path"])


def _histogram(images: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(3)])  # int64 [3, 256]
