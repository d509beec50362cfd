"""What the metadata of a LeRobot data set say, v2.1 and v3.0 in one form: which files hold which episodes.

Dimensions: E episodes.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla import InputError
from vla.data.faults import Fault

REPAIR = "copy or write the data set again"
NOWHERE = "no file"  # in the place of a path that the metadata do not tell


@dataclass
class Files:
    """The file of each episode."""

    paths: list[str]  # relative to the root
    of: np.ndarray  # int32 [E], index into paths
    start: np.ndarray | None = None  # float64 [E], seconds from a video's beginning to the episode's
    stop: np.ndarray | None = None  # float64 [E], to its end; the v2.1 metadata do not tell

    def __post_init__(self):
        self._order = np.argsort(self.of, kind="stable")
        self._ends = np.searchsorted(self.of[self._order], np.arange(len(self.paths)), side="right")

    def rows(self, file: int) -> np.ndarray:
        """The episodes of a file, ascending: int64, in [0, E)."""
        return self._order[self._ends[file - 1] if file else 0 : self._ends[file]]


@dataclass
class Layout:
    """A data set on the disk."""

    root: Path
    version: str
    robot: str
    fps: float
    features: dict[str, dict]
    instructions: list[str]  # by task index; empty where the file has none
    episodes: np.ndarray  # int64 [E], the number of each episode, ascending
    lengths: np.ndarray  # int64 [E], frames of each
    index_from: np.ndarray | None  # int64 [E], the column `index` of its first frame; the v2.1 metadata do not tell
    data: Files
    videos: dict[str, Files]  # by feature
    tasks_file: str
    episodes_file: str
    faults: list[Fault] = field(default_factory=list)

    def stamp(self, files: list[str]) -> list[tuple[str, int, int]]:
        """Path, size and time of change of these files; -1 for what is missing."""
        stamps = []
        for file in files:
            try:
                status = (self.root / file).stat()
                stamps.append((file, status.st_size, status.st_mtime_ns))
            except OSError:
                stamps.append((file, -1, -1))
        return stamps

    def cameras(self) -> list[str]:
        """Features that are pictures, depth maps left out."""
        visual = [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]
        return [key for key in visual if not _is_depth(self.features[key])]

    def image_size(self, key: str) -> tuple[int, int]:
        """Height and width of a camera. Raises InputError for a shape that is no image's."""
        shape, names = self.features[key]["shape"], self.features[key].get("names")
        if len(shape) != 3 or min(shape) < 1:
            found = f"{self.root}/meta/info.json: {key!r} has shape {shape}"
            raise InputError(f"{found}, expected three numbers above 0: {REPAIR}")
        named = [str(name).startswith("channel") for name in names] if isinstance(names, list) else []
        channels_last = named[-1] if any(named) else shape[-1] in (1, 3, 4)
        return tuple(shape[:2] if channels_last else shape[1:])


def _is_depth(feature: dict) -> bool:
    info = feature.get("info") or feature.get("video_info")
    return isinstance(info, dict) and bool(info.get("video.is_depth_map") or info.get("is_depth_map"))


def read_layout(root: Path) -> Layout:
    """Read meta/. Raises InputError where it cannot be understood; what else is wrong is in `faults`."""
    info_path = root / "meta/info.json"
    try:
        info = json.loads(info_path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{info_path} cannot be read ({error}), expected JSON: check --data.path") from error
    _check_info(info_path, info)
    layout = (_read_v3 if info["codebase_version"] == "v3.0" else _read_v2)(root, info)
    if not len(layout.episodes):
        raise InputError(f"{root}/{layout.episodes_file} has no episode, expected at least 1: {REPAIR}")
    if not any(layout.instructions):
        raise InputError(f"{root}/{layout.tasks_file} has no instruction, expected one for each task: {REPAIR}")
    _check_episodes(layout, info)
    return layout


def _check_info(path: Path, info: dict) -> None:
    needed = {"codebase_version", "fps", "features", "total_frames", "data_path"}
    if missing := needed - (info.keys() if isinstance(info, dict) else set()):
        raise InputError(f"{path} lacks {sorted(missing)}: {REPAIR}")
    if (version := info["codebase_version"]) not in ("v2.0", "v2.1", "v3.0"):
        cure = "convert it with LeRobot's converter to v2.1 or later"
        raise InputError(f"{path}: codebase_version is {version!r}, expected 'v2.1' or 'v3.0': {cure}")
    fps, features = info["fps"], info["features"]
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise InputError(f"{path}: fps is {fps!r}, expected a number above 0: correct it")
    if not isinstance(features, dict):
        raise InputError(f"{path}: features are {features!r}, expected one entry for each: {REPAIR}")
    for key, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int for n in shape) or "dtype" not in feature:
            raise InputError(f"{path}: feature {key!r} is {feature!r}, expected its dtype and shape: {REPAIR}")


def _path(root: Path, info: dict, kind: str, **place) -> str:
    try:
        return info[kind].format(**place)
    except (AttributeError, LookupError, ValueError) as error:
        found = f"{root}/meta/info.json: {kind} is {info.get(kind)!r}"
        raise InputError(f"{found}, expected a path that names {', '.join(place)}: {REPAIR}") from error


def _read_v3(root: Path, info: dict) -> Layout:
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    columns = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    times = ("from_timestamp", "to_timestamp")
    needed = len(columns)  # a video, if its camera is used at all
    columns += [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", *times)]
    # macOS leaves files of attributes beside the real ones, with a dot before their names.
    tables = [read_parquet(file, columns) for file in sorted(root.glob("meta/episodes/*/[!.]*.parquet"))]
    if not tables:
        raise InputError(f"{root}/meta/episodes has no parquet file, expected at least 1: {REPAIR}")
    try:
        kinds = {name: pa.float64() if name.endswith(times) else pa.int64() for name in columns}
        table = pa.concat_tables([table.select(columns).cast(pa.schema(kinds)) for table in tables])
    except pa.ArrowException as error:
        raise InputError(f"{root}/meta/episodes: {error}, expected whole numbers and times: {REPAIR}") from error
    if nulls := [name for name in columns[:needed] if table.column(name).null_count]:
        raise InputError(f"{root}/meta/episodes has rows without {nulls}, expected a number in each: {REPAIR}")
    table = table.sort_by("episode_index")
    rows = {name: table.column(name).fill_null(math.nan if name.endswith(times) else -1).to_numpy() for name in columns}

    def files(prefix: str, kind: str, **key) -> Files:
        places = np.stack([rows[f"{prefix}/chunk_index"], rows[f"{prefix}/file_index"]], axis=1)
        unique, of = np.unique(places, axis=0, return_inverse=True)
        paths = [
            NOWHERE if min(chunk, file) < 0 else _path(root, info, kind, chunk_index=chunk, file_index=file, **key)
            for chunk, file in unique.tolist()
        ]
        return Files(paths, of.ravel().astype(np.int32))

    video_files = {key: files(f"videos/{key}", "video_path", video_key=key) for key in videos}
    for key, of in video_files.items():
        of.start, of.stop = (rows[f"videos/{key}/{name}"] for name in times)
    # Older files leave the pandas index, which holds the text, unnamed.
    tasks = [
        (row.get("task_index"), row.get("task", row.get("__index_level_0__")))
        for row in read_parquet(root / "meta/tasks.parquet").to_pylist()
    ]
    layout = Layout(
        *(root, info["codebase_version"], str(info.get("robot_type")), info["fps"], info["features"]),
        *(_in_order(tasks), rows["episode_index"], rows["length"], rows["dataset_from_index"]),
        *(files("data", "data_path"), video_files, "meta/tasks.parquet", "meta/episodes"),
        _twins(tasks, "meta/tasks.parquet"),
    )
    previous = np.append(0, rows["dataset_to_index"][:-1])
    for row in np.flatnonzero(rows["dataset_from_index"] != previous):
        found = (
            f"begins at index {rows['dataset_from_index'][row]}, expected {previous[row]}, where the one before ends"
        )
        layout.faults.append(Fault(layout.episodes_file, f"episode {layout.episodes[row]} {found}", ()))
    for row in np.flatnonzero(rows["dataset_to_index"] - rows["dataset_from_index"] != rows["length"]):
        found = f"length is {rows['length'][row]}, but its indices go from {rows['dataset_from_index'][row]} to "
        found += f"{rows['dataset_to_index'][row]}, expected as many"
        layout.faults.append(Fault(layout.episodes_file, found, (int(layout.episodes[row]),)))
    return layout


def _read_v2(root: Path, info: dict) -> Layout:
    rows = _read_jsonl(root / "meta/episodes.jsonl", episode_index=int, length=int)
    rows.sort(key=lambda row: row["episode_index"])
    episodes = np.array([row["episode_index"] for row in rows], dtype=np.int64)
    lengths = np.array([row["length"] for row in rows], dtype=np.int64)
    each, size = np.arange(len(rows), dtype=np.int32), info.get("chunks_size", 1000)
    if type(size) is not int or size < 1:
        raise InputError(f"{root}/meta/info.json: chunks_size is {size!r}, expected a whole number above 0: {REPAIR}")

    def files(kind: str, **key) -> Files:
        places = [{"episode_chunk": number // size, "episode_index": number, **key} for number in episodes.tolist()]
        return Files([_path(root, info, kind, **place) for place in places], each)

    videos = {}
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            videos[key] = files("video_path", video_key=key)
            videos[key].start = np.zeros(len(rows))
    rows = _read_jsonl(root / "meta/tasks.jsonl", task_index=int, task=str)
    tasks = [(row["task_index"], row["task"]) for row in rows]
    return Layout(
        *(root, info["codebase_version"], str(info.get("robot_type")), info["fps"], info["features"]),
        *(_in_order(tasks), episodes, lengths, None),
        *(files("data_path"), videos, "meta/tasks.jsonl", "meta/episodes.jsonl"),
        _twins(tasks, "meta/tasks.jsonl"),
    )


def _in_order(tasks: list[tuple]) -> list[str]:
    """Texts by task index; empty where there is none."""
    texts = {index: text for index, text in tasks if isinstance(index, int) and isinstance(text, str)}
    return [texts.get(index, "").strip() for index in range(max(texts, default=-1) + 1)]


def _twins(tasks: list[tuple], file: str) -> list[Fault]:
    counts = Counter(index for index, _ in tasks)
    return [
        Fault(file, f"task_index {index} has {count} instructions, expected one")
        for index, count in counts.items()
        if count > 1
    ]


def _check_episodes(layout: Layout, info: dict) -> None:
    episodes, lengths, faults = layout.episodes, layout.lengths, layout.faults
    for row in np.flatnonzero(np.diff(episodes, prepend=-1) != 1):
        before = f"comes after episode {episodes[row - 1]}" if row else "comes first"
        found = f"episode {episodes[row]} {before}, expected numbers 0, 1, 2, … without gaps"
        # Twins cannot be told apart; a gap does no harm.
        twins = row and episodes[row] == episodes[row - 1]
        faults.append(Fault(layout.episodes_file, found, None if twins else ()))
    for row in np.flatnonzero(lengths < 1):
        found = f"length is {lengths[row]}, expected at least 1 frame"
        faults.append(Fault(layout.episodes_file, found, (int(episodes[row]),)))
    layout.lengths = np.maximum(lengths, 0)
    splits = info.get("splits")
    for name, span in splits.items() if isinstance(splits, dict) else ():
        bounds = re.fullmatch(r"(\d+):(\d+)", str(span)) or ("", 0, 0)
        held = tuple(number for number in episodes.tolist() if int(bounds[1]) <= number < int(bounds[2]))
        if name != "train" and held:
            found = f"of split {name!r} ({span}), expected 'train', as training takes no notice of splits"
            faults.append(Fault("meta/info.json", found, held, "other_split"))
    for name, total in (("total_frames", int(lengths.sum())), ("total_episodes", len(episodes))):
        if info.get(name, total) != total:
            faults.append(Fault("meta/info.json", f"{name} is {info[name]}, expected {total} as in its episodes", ()))


def _read_jsonl(path: Path, **kinds: type) -> list[dict]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: texts may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is missing or unreadable ({error}): {REPAIR}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is no JSON ({error}): {REPAIR}") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(key), kinds[key]) for key in kinds):
                expected = " and ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
                raise InputError(f"{path}, line {number} is {line}, expected {expected}: {REPAIR}")
            rows.append(row)
    return rows


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The columns of a small parquet file. Raises InputError if they or the file are missing or unreadable."""
    try:
        with pq.ParquetFile(path) as parquet:
            missing = set(columns or []) - set(_columns(parquet))
            table = parquet.read(columns) if not missing else pa.table({})
        table.validate(full=True)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is missing or unreadable ({error}): {REPAIR}") from error
    if missing:
        raise InputError(f"{path} lacks the columns {sorted(missing)}: {REPAIR}")
    return table


def _columns(parquet: pq.ParquetFile) -> list[str]:
    return parquet.schema_arrow.names
