"""The numbers of a data set (states, actions, tasks), checked and laid out frame by frame in files that are mapped.

Reading them from parquet takes minutes for 10⁸ frames, so it is done once; the result lies in a folder named after
the files it came from (path, size, time of change), and all processes and later runs map it.
Dimensions: E episodes, F frames, P state, A action, R rows of a batch, D numbers of a feature.
"""

import hashlib
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from vla import InputError, in_one_line
from vla.data.cache import allocate, built, place, whole
from vla.data.faults import Fault
from vla.data.layout import Files, Layout
from vla.data.selection import Selection
from vla.data.timing import check_video

VERSION = 2  # of the files written here
ROWS = 1 << 18  # of a parquet file read at once
TAIL_BYTES = 1 << 16  # the end of a parquet or mp4 file has the sizes of all that it holds
NEEDED = ["episode_index", "timestamp", "task_index"]
CHECKED = {"frame_index", "index", "task_id"}  # where there is such a column


class Index:
    """The numbers of all episodes, laid out as long as the metadata say; those of a faulty one may be 0.

    selection: what of the data set is used. tolerance_s: how far the time of a frame, in the data or in a video, may
    lie from frame_index / fps, less than half a frame. folder: holds the index, which is made unless it is there.
    Raises InputError if that cannot be written, and for a larger tolerance.

    Attributes: num_frames F, first_row int64 [E] (of an episode in its data file),
    digest (identifies the content, wherever it lies), faults (in numbers and videos).
    """

    def __init__(self, selection: Selection, tolerance_s: float, folder: Path):
        layout = selection.layout
        if not tolerance_s < (half := 0.5 / layout.fps):
            found = f"{layout.root} has {layout.fps:g} frames a second and tolerance_s is {tolerance_s:g}"
            raise InputError(f"{found}, expected less than {half:.4g}, half a frame: lower it")
        self.num_frames = int(layout.lengths.sum())
        videos = (path for key in selection.cameras.values() for path in _videos(layout, key).paths)
        made_from = [VERSION, selection.state, selection.action, *selection.cameras.values(), tolerance_s]
        found = {path for links in ("**/*.*", "episodes/*/*.*") for path in layout.root.glob(f"meta/{links}")}
        meta = sorted(str(path.relative_to(layout.root)) for path in found)  # ** goes into no linked folder
        made_from.append(layout.stamp([*meta, *layout.data.paths, *videos]))
        self._folder = built(
            folder / f"index-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]}",
            lambda unfinished: _build(unfinished, selection, tolerance_s),
            bytes_needed=self.num_frames * 4 * (len(selection.state_names) + len(selection.action_names) + 1),
            what=f"numbers of {layout.root}",
        )
        with whole(self._folder / "index.json") as file:
            content = json.loads(file.read_text())
        self.digest = content["digest"]
        self.faults = [
            Fault(file, text, episodes if episodes is None else tuple(episodes), kind)
            for file, text, episodes, kind in content["faults"]
        ]
        with whole(self._folder / "first_row.npy") as file:
            self.first_row = np.load(file)
        # Their headers take longer to read than a batch's rows.
        self._places = {name: place(self._folder / f"{name}.npy") for name in ("state", "actions", "task_index")}

    @property
    def state(self) -> np.ndarray:
        """float32 [F, P]."""
        return self._mapped("state")

    @property
    def actions(self) -> np.ndarray:
        """float32 [F, A]."""
        return self._mapped("actions")

    @property
    def task_index(self) -> np.ndarray:
        """int32 [F]."""
        return self._mapped("task_index")

    def _mapped(self, name: str) -> np.ndarray:
        # Anew at each use: a worker inherits a path, forked or spawned, and holds no pages for longer.
        dtype, offset, shape = self._places[name]
        with whole(self._folder / f"{name}.npy") as path, open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, dtype, offset=offset).reshape(shape)


def _videos(layout: Layout, key: str) -> Files:
    return layout.videos.get(key, Files([], np.empty(0)))


def _build(folder: Path, selection: Selection, tolerance_s: float) -> None:
    layout, cameras = selection.layout, list(selection.cameras.values())
    reader = _Reader(folder, selection, tolerance_s)
    images = [key for key in cameras if layout.features[key]["dtype"] == "image"]
    for file in tqdm(range(len(layout.data.paths)), desc="reading numbers", unit="file", mininterval=1, delay=1):
        reader.read(file, images)
    faults = reader.finish()
    videos = [(key, file) for key in cameras for file in range(len(_videos(layout, key).paths))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = partial(check_video, layout, tolerance_s=tolerance_s)
        found = pool.map(check, *zip(*videos, strict=True)) if videos else []
        for of_one in tqdm(found, total=len(videos), desc="checking videos", unit="file", mininterval=1, delay=1):
            faults += of_one
    pictures = layout.data.paths if images else []
    for path in [*pictures, *(path for key in cameras for path in _videos(layout, key).paths)]:
        reader.digest.update(f"{path} ".encode() + _tail(layout.root / path))
    rows = [(fault.file, fault.text, fault.episodes, fault.kind) for fault in faults]
    np.save(folder / "first_row.npy", reader.first_row)
    (folder / "index.json").write_text(json.dumps({"digest": reader.digest.hexdigest(), "faults": rows}))


def _tail(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return f"{size} ".encode() + file.read()
    except OSError:
        return b"missing"


class _Reader:
    """Reads the data files one after the other, in bounded memory, and notes what is wrong with each episode."""

    def __init__(self, folder: Path, selection: Selection, tolerance: float):
        self.layout, self.tolerance = selection.layout, tolerance
        self.columns = {"state": selection.state, "actions": selection.action}
        self.names = {"state": selection.state_names, "actions": selection.action_names}
        layout, num_frames = self.layout, int(self.layout.lengths.sum())
        shapes = {name: (np.float32, (num_frames, len(names))) for name, names in self.names.items()}
        shapes["task_index"] = np.int32, (num_frames,)
        self.files = {name: folder / f"{name}.npy" for name in shapes}
        for name, shape in shapes.items():
            allocate(self.files[name], *shape)
        self.start = np.cumsum(layout.lengths) - layout.lengths  # [E]
        self.seen, self.last_row = np.zeros_like(self.start), np.zeros_like(self.start)
        self.first_row = np.zeros_like(self.start)
        self.index_from = np.zeros_like(self.start) if layout.index_from is None else layout.index_from
        self.digest = hashlib.sha256(json.dumps([layout.fps, *self.columns.values(), *self.names.values()]).encode())
        self.digest.update(json.dumps(layout.instructions).encode())
        self.digest.update(layout.lengths)
        self.found: dict[tuple[str, str, str], list[int]] = {}  # episodes by (file, column, text)
        self.noted: set[tuple[str, int]] = set()  # (column, episode): one fault of a kind for each
        self.low = np.full(len(selection.action_names), np.inf)
        self.high = -self.low
        self.tasks_of: dict[int, set[int]] = {}  # values of the column task_id by task_index
        self.empty: dict[int, set[int]] = {}  # episodes by task_index whose instruction is empty

    def note(self, file: str, column: str, row: int, text: str) -> None:
        """Of one fault in many frames of an episode the first is told."""
        if (column, row) not in self.noted:
            self.noted.add((column, row))
            self.found.setdefault((file, column, text), []).append(int(self.layout.episodes[row]))

    def read(self, file: int, images: list[str]) -> None:
        layout, path = self.layout, self.layout.data.paths[file]
        of_file = layout.data.rows(file)
        features = [*self.columns["state"], *self.columns["actions"]]
        # Mapped anew for each file, as pages that were written would count as this process's memory.
        self.arrays = {name: np.load(file, mmap_mode="r+") for name, file in self.files.items()}
        try:
            with pq.ParquetFile(layout.root / path) as parquet:
                has = parquet.schema_arrow.names
                if missing := sorted({*features, *NEEDED, *images} - set(has)):
                    raise InputError(f"lacks the columns {missing}, expected them as in meta/info.json")
                for key in images:
                    kind = parquet.schema_arrow.field(key).type
                    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                        raise InputError(f"has {key} as {kind}, expected each image's bytes in a struct")
                wanted = [*features, *NEEDED, *(CHECKED & set(has) - set(features))]
                rows = 0
                for batch in parquet.iter_batches(ROWS, columns=wanted):
                    self._take(path, of_file, batch, rows)
                    rows += len(batch)
        except (OSError, pa.ArrowException, UnicodeDecodeError, InputError) as error:
            reason = in_one_line(error)
            if not isinstance(error, InputError):
                reason = f"is unreadable ({reason})" if (layout.root / path).exists() else "is missing"
            for row in of_file:
                self.note(path, "", row, reason)
            return
        for row in of_file[self.seen[of_file] != layout.lengths[of_file]]:
            self.note(path, "", row, f"has {self.seen[row]} rows, expected {layout.lengths[row]}")
        apart = self.last_row[of_file] - self.first_row[of_file] + 1 != self.seen[of_file]
        for row in of_file[apart & (self.seen[of_file] > 0)]:
            self.note(path, "", row, "its rows lie apart, expected one after the other")

    def _take(self, path: str, of_file: np.ndarray, batch: pa.RecordBatch, rows_before: int) -> None:
        layout = self.layout
        number = _integers(batch, "episode_index")
        row = of_file[np.searchsorted(layout.episodes[of_file], number).clip(max=len(of_file) - 1)]  # [R] in [0, E)
        known = layout.episodes[row] == number
        for stranger in np.unique(number[~known]):
            self.found[path, "episode_index", f"has rows of episode {stranger}, expected none here"] = []
        batch, row, in_file = batch.filter(pa.array(known)), row[known], rows_before + np.flatnonzero(known)
        if not len(row):
            return
        # The place of each row in its episode, whose rows may have begun in the batch before.
        order = np.argsort(row, kind="stable")
        bounds = np.flatnonzero(np.diff(row[order], prepend=-1))
        counts = np.diff(bounds, append=len(row))
        present = row[order][bounds]
        within = np.empty(len(row), dtype=np.int64)
        within[order] = np.arange(len(row)) - np.repeat(bounds - self.seen[present], counts)
        begins = self.seen[present] == 0
        starting, first = present[begins], order[bounds[begins]]
        self.first_row[starting] = in_file[first]
        self.last_row[present] = in_file[order][bounds + counts - 1]
        self.seen[present] += counts
        fits = within < layout.lengths[row]
        place = (self.start[row] + within)[fits]

        def check(column: str, good: np.ndarray, tell) -> None:
            bad = np.flatnonzero(~good)
            for first in bad[np.unique(row[bad], return_index=True)[1]]:  # of each episode
                self.note(path, column, row[first], f"frame {within[first]}: {column} is {tell(first)}")

        tasks = _integers(batch, "task_index")
        times = _single(batch["timestamp"]).cast(pa.float64()).to_numpy(zero_copy_only=False)
        due = within / layout.fps
        # A float32 of an hour is exact to 0.1 ms only.
        on_time = np.abs(times - due) <= self.tolerance + np.abs(due) * 2.0**-23
        if "frame_index" in batch.schema.names:
            frame = _integers(batch, "frame_index")
            check("frame_index", frame == within, lambda i: f"{frame[i]}, expected {within[i]}")
        check("timestamp", on_time, lambda i: f"{times[i]:.6g} s, expected {due[i]:.6g} within {self.tolerance:g}")
        if "index" in batch.schema.names:
            index = _integers(batch, "index")
            if layout.index_from is None:  # some count on over all episodes, and some anew in each
                self.index_from[starting] = index[first]
            due_index = self.index_from[row] + within
            check("index", index == due_index, lambda i: f"{index[i]}, expected {due_index[i]}")
        task_good = (tasks >= 0) & (tasks < len(layout.instructions))
        expected = f"0 to {len(layout.instructions) - 1} as in {layout.tasks_file}"
        check("task_index", task_good, lambda i: f"{tasks[i]}, expected {expected}")
        self.arrays["task_index"][place] = np.where(task_good, tasks, 0)[fits]
        for task in np.unique(tasks[task_good]):
            if not layout.instructions[task]:
                self.empty.setdefault(int(task), set()).update(layout.episodes[row[tasks == task]].tolist())
        if "task_id" in batch.schema.names:
            pairs = pa.table({"task": tasks, "kind": batch["task_id"]}).group_by(["task", "kind"]).aggregate([])
            for pair in pairs.to_pylist():
                self.tasks_of.setdefault(pair["task"], set()).add(str(pair["kind"]))

        for name, features in self.columns.items():
            parts = []
            for feature in features:
                dim = layout.features[feature]["shape"][0]
                values, lengths = _vectors(batch[feature], dim)
                check(
                    feature,
                    lengths == dim,
                    lambda i, n=lengths, d=dim: f"{n[i]} numbers, expected {d} as in meta/info.json",
                )
                names = self.names[name][sum(part.shape[1] for part in parts) :]
                check(feature, np.isfinite(values).all(1), lambda i, v=values, n=names: _not_finite(v[i], n))
                parts.append(values)
            values = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            self.digest.update(np.ascontiguousarray(values))
            self.arrays[name][place] = np.nan_to_num(values[fits], posinf=0, neginf=0)
            if name == "actions":
                finite = np.where(np.isfinite(values), values, np.nan)
                self.low = np.fmin(self.low, np.fmin.reduce(finite))
                self.high = np.fmax(self.high, np.fmax.reduce(finite))
        self.digest.update(np.ascontiguousarray(tasks))

    def finish(self) -> list[Fault]:
        layout = self.layout
        faults = [
            Fault(path, text, tuple(episodes), "" if column else "unreadable")
            for (path, column, text), episodes in self.found.items()
        ]
        for task, episodes in sorted(self.empty.items()):
            text = f"the instruction of task_index {task} is empty, expected words"
            faults.append(Fault(layout.tasks_file, text, tuple(sorted(episodes))))
        same: dict[str, list[int]] = {}
        for task, text in enumerate(layout.instructions):
            if text:
                same.setdefault(" ".join(text.lower().split()), []).append(task)
        expected = "expected one instruction for each task"
        for tasks in same.values():
            if len(tasks) > 1:
                found = (
                    f"task_index {', '.join(map(str, tasks))} share the instruction {layout.instructions[tasks[0]]!r}"
                )
                faults.append(Fault(layout.tasks_file, f"{found}, {expected}", None, "shared_instruction"))
        for task, kinds in sorted(self.tasks_of.items()):
            if len(kinds) > 1 and 0 <= task < len(layout.instructions):
                found = f"task_id {', '.join(sorted(kinds))} share the instruction {layout.instructions[task]!r}"
                faults.append(Fault(layout.tasks_file, f"{found}, {expected}", None, "shared_instruction"))
        for i in np.flatnonzero(self.low == self.high):
            text = f"action {self.names['actions'][i]} is {self.low[i]:g} in all frames, expected values that vary"
            faults.append(Fault("data", text, None, "constant_action"))
        return faults


def _integers(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A column as int64 [R], -1 where it is null."""
    return pc.fill_null(_single(batch[column]).cast(pa.int64()), -1).to_numpy(zero_copy_only=False)


def _single(column: pa.Array) -> pa.Array:
    """Numbers, of which each may be in a list of its own."""
    return pc.list_element(column, 0) if pa.types.is_nested(column.type) else column


def _vectors(column: pa.Array, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists, or of single numbers, as float32 [R, dim] and the number in each row, int64 [R].

    Rows of another number, and what is null, become NaN.
    """
    if not pa.types.is_nested(column.type):
        values = column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)[:, None]
        return (values if dim == 1 else np.full((len(values), dim), np.nan, np.float32)), np.ones(len(values), np.int64)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    good = lengths == dim
    flat = pc.list_flatten(column if good.all() else column.filter(pa.array(good))).cast(pa.float32(), safe=False)
    values = np.full((len(lengths), dim), np.nan, np.float32)
    values[good] = flat.to_numpy(zero_copy_only=False).reshape(-1, dim)
    return values, lengths


def _not_finite(values: np.ndarray, names: tuple[str, ...]) -> str:
    i = int(np.flatnonzero(~np.isfinite(values))[0])
    return f"{values[i]} in {names[i]}, expected a finite number"
