"""Read a LeRobot v3.0 data set whose images are in its parquet files.

Dimensions: F frames of the data set, E episodes, B batch, N cameras, H action horizon, P state, A action, h and w of an
image. A frame is named by its row in the whole data set, from 0 to F - 1.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla import InputError
from vla.data.frames import cache_frames

STATE, ACTION = "observation.state", "action"
TAIL_BYTES = 1 << 20  # the end of a parquet file has its last images, and the sizes of all
REPAIR = "copy or write the data set again"


class LeRobotDataset:
    """A data set in memory, except for its images, which are in the frame cache.

    root: the data set's folder. cameras: short names ("table" for "observation.images.table") in the order wanted, by
    default all in the order of meta/info.json. image_cache: folder for the decoded images, by default root.
    Opening checks everything, decodes the images unless an earlier opening did, and raises InputError at any fault.

    Attributes: fps, cameras, image_size (h, w), state_dim, state_names, action_dim, action_names, num_episodes,
    num_frames, instructions (by task index), episode_from and episode_to (exclusive) int64 [E], task_index int64 [F],
    state float32 [F, P], actions float32 [F, A].
    """

    def __init__(self, root: str | Path, *, cameras: tuple[str, ...] = (), image_cache: str | Path | None = None):
        self.root = Path(root)
        self._info = self._read_info()
        self.fps = self._info["fps"]
        self.state_names, self.action_names = self._names(STATE), self._names(ACTION)
        self.state_dim, self.action_dim = len(self.state_names), len(self.action_names)
        keys, self.image_size = self._choose_cameras(cameras)
        self.cameras = tuple(keys)
        self.instructions = self._read_instructions()
        self.episode_from, self.episode_to, self._files = self._read_episodes()
        self.state, self.actions, self.task_index = self._read_frames(list(keys.values()))
        self.num_episodes, self.num_frames = len(self.episode_to), len(self.state)
        files, shape = [self.root / file for file in self._files], (self.num_frames, 3, *self.image_size)
        self._caches = cache_frames(Path(image_cache or root), self.fingerprint(), list(keys.values()), files, shape)

    def windows(self, frames: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions of each frame and of those after it, the episode's last one repeated past its end.

        frames: int64 [B]. Returns actions float32 [B, H] + [A] and action_is_pad bool [B, H], H = chunk_size.
        """
        wanted = frames[:, None] + np.arange(chunk_size)  # [B, H]
        last = self.episode_to[self._episode(frames)] - 1  # [B]
        clamped = np.minimum(wanted, last[:, None])
        return self.actions[clamped], wanted > clamped

    def images(self, frames: np.ndarray) -> np.ndarray:
        """The images of all cameras, in the order of `cameras`: int64 [B] -> uint8 [B, N, 3, h, w]."""
        images = np.empty((len(frames), len(self.cameras), 3, *self.image_size), dtype=np.uint8)
        for camera, file in enumerate(self._caches):
            # Mapped anew for each batch: a worker inherits a path, forked or spawned, and holds no pages for longer.
            images[:, camera] = np.load(file, mmap_mode="r")[frames]
        return images

    def fingerprint(self) -> str:
        """Identify the content, wherever it lies: a hash of its numbers, texts and the ends of its files."""
        digest = hashlib.sha256(json.dumps([self.fps, self._info["features"], self.instructions]).encode())
        for array in (self.episode_to, self.task_index, self.state, self.actions):
            digest.update(array)
        for file in self._files:
            with open(self.root / file, "rb") as parquet:
                size = parquet.seek(0, 2)
                parquet.seek(max(0, size - TAIL_BYTES))
                digest.update(f"{file} {size}".encode() + parquet.read())
        return digest.hexdigest()

    def _episode(self, frames: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.episode_to, frames, side="right")

    def _read_info(self) -> dict:
        path = self.root / "meta/info.json"
        try:
            info = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}), expected JSON: check --data.path") from error
        if (version := info.get("codebase_version")) != "v3.0":
            cure = "convert it with LeRobot's convert_dataset_v21_to_v30"
            raise InputError(f"{path}: codebase_version is {version!r}, expected 'v3.0': {cure}")
        if missing := {"fps", "features", "total_frames", "data_path"} - info.keys():
            raise InputError(f"{path} lacks {sorted(missing)}: {REPAIR}")
        return info

    def _names(self, key: str) -> tuple[str, ...]:
        feature = self._info["features"].get(key)
        if feature is None or len(feature["shape"]) != 1:
            found = feature["shape"] if feature else f"only {sorted(self._info['features'])}"
            raise InputError(f"{self.root}/meta/info.json: {key!r} is {found}, expected a feature of shape [D]")
        names, dim = feature.get("names"), feature["shape"][0]
        if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}
            (names,) = names.values()
        return tuple(map(str, names)) if names and len(names) == dim else tuple(f"{key}_{i}" for i in range(dim))

    def _choose_cameras(self, wanted: tuple[str, ...]) -> tuple[dict[str, str], tuple[int, int]]:
        features, sizes = self._info["features"], {}
        keys = [key for key in features if key == "observation.image" or key.startswith("observation.images.")]
        available = {key.removeprefix("observation.").removeprefix("images."): key for key in keys}
        if not available or not available.keys() >= set(wanted):
            expected = list(wanted) or "at least one"
            raise InputError(f"{self.root} has cameras {list(available)}, expected {expected}: correct --data.cameras")
        for name in wanted or available:
            dtype, shape, names = (features[available[name]].get(field) for field in ("dtype", "shape", "names"))
            channels_last = names[-1].startswith("channel") if names else shape[0] != 3
            channels, *sizes[name] = (shape[2], *shape[:2]) if channels_last else shape
            if dtype != "image" or channels != 3:
                expected = "'image' (PNG in parquet) with 3 channels: choose others with --data.cameras"
                raise InputError(f"{self.root}: camera {name!r} is {dtype!r}, shape {shape}, expected {expected}")
        if any(size != sizes[name] for size in sizes.values()):
            raise InputError(f"{self.root}: cameras have sizes {sizes}, expected one size: choose with --data.cameras")
        return {name: available[name] for name in sizes}, tuple(sizes[name])

    def _read_instructions(self) -> list[str]:
        path = self.root / "meta/tasks.parquet"
        rows = _read_parquet(path).to_pylist()
        # Older files leave the pandas index, which holds the text, unnamed.
        tasks = {row.get("task_index"): row.get("task", row.get("__index_level_0__")) for row in rows}
        instructions = [tasks.get(index) for index in range(len(tasks))]
        for index, text in enumerate(instructions):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{path}: task_index {index} has instruction {text!r}, expected words: {REPAIR}")
        return instructions

    def _read_episodes(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        columns = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
        tables = [_read_parquet(file, columns) for file in files]
        if not sum(len(table) for table in tables):
            raise InputError(f"{self.root}/meta/episodes has no episode, expected at least 1: {REPAIR}")
        table = pa.concat_tables(tables).sort_by("episode_index")
        episode, start, stop, chunk, file = (table.column(name).to_numpy().astype(np.int64) for name in columns)
        previous_stop = np.append(0, stop[:-1])
        for row in np.flatnonzero((episode != np.arange(len(table))) | (start != previous_stop) | (stop <= start)):
            found = f"episode {episode[row]} has frames {start[row]} to {stop[row]}"
            expected = f"episode {row}, from frame {previous_stop[row]}, of at least 1 frame"
            raise InputError(f"{self.root}/meta/episodes: {found}, expected {expected}: {REPAIR}")
        paths = [self._info["data_path"].format(chunk_index=c, file_index=f) for c, f in zip(chunk, file, strict=True)]
        return start, stop, list(dict.fromkeys(paths))

    def _read_frames(self, cameras: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = [STATE, ACTION, "episode_index", "frame_index", "task_index"]
        parts = []
        for path in (self.root / file for file in self._files):
            table = _read_parquet(path, columns, cameras)
            vectors = [_vectors(path, table, STATE, self.state_dim), _vectors(path, table, ACTION, self.action_dim)]
            parts.append([*vectors, *(table.column(name).to_numpy() for name in columns[2:])])
        state, actions, episode, frame, task = (np.concatenate(column) for column in zip(*parts, strict=True))
        counts = {"info.json": self._info["total_frames"], "episodes": int(self.episode_to[-1]), "data": len(state)}
        if len(set(counts.values())) > 1:
            raise InputError(f"{self.root} has these numbers of frames: {counts}, expected one number: {REPAIR}")
        expected_episode = self._episode(np.arange(len(state)))
        expected_frame = np.arange(len(state)) - self.episode_from[expected_episode]
        file_to, tasks = np.cumsum([len(part[0]) for part in parts]), len(self.instructions)
        for key, values, good, expected in (
            ("episode_index", episode, episode == expected_episode, "the episode that meta/episodes has here"),
            ("frame_index", frame, frame == expected_frame, "0, 1, 2, ... in each episode"),
            ("task_index", task, (task >= 0) & (task < tasks), f"one of the {tasks} of meta/tasks.parquet"),
            (STATE, state, np.isfinite(state).all(1), "finite numbers"),
            (ACTION, actions, np.isfinite(actions).all(1), "finite numbers"),
        ):
            for row in np.flatnonzero(~good):
                file = self._files[np.searchsorted(file_to, row, side="right")]
                where = f"{self.root}/{file}: episode {expected_episode[row]}, frame {expected_frame[row]}"
                raise InputError(f"{where}: {key} is {values[row]}, expected {expected}: {REPAIR}")
        return state, actions, task.astype(np.int64)


def _read_parquet(path: Path, columns: list[str] | None = None, also_expected: list[str] = ()) -> pa.Table:
    try:
        with pq.ParquetFile(path) as parquet:
            missing = {*(columns or []), *also_expected} - set(parquet.schema_arrow.names)
            table = parquet.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is missing or unreadable ({error}): {REPAIR}") from error
    if missing:
        raise InputError(f"{path} lacks the columns {sorted(missing)}: {REPAIR}")
    return table


def _vectors(path: Path, table: pa.Table, key: str, dim: int) -> np.ndarray:
    """A column of lists, or of single numbers, as float32 [rows, dim]."""
    column, lengths = table.column(key), [1]
    if not pa.types.is_primitive(column.type):
        lengths, column = pc.unique(pc.list_value_length(column)).to_pylist(), pc.list_flatten(column)
    if lengths != [dim]:
        raise InputError(f"{path}: {key} has {lengths} numbers a frame, expected {dim} as in meta/info.json: {REPAIR}")
    return column.to_numpy().astype(np.float32).reshape(-1, dim)
