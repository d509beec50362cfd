"""The pictures of one camera, at the size of training: decoded once into a cache, or as they are asked for.

Decoding a picture takes over ten times as long as reading its pixels, and training reads each of them once an epoch.
Dimensions: E episodes, F frames of the data set, B batch, h and w of a picture in training, H and W in the data set.
"""

import hashlib
import io
import json
import math
import os
from collections import OrderedDict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from vla import InputError, in_one_line
from vla.data.cache import allocate, built, place, size_of, whole
from vla.data.faults import Fault
from vla.data.index import Index
from vla.data.layout import Layout
from vla.data.selection import Selection
from vla.data.timing import nearest
from vla.data.video import OpenVideos
from vla.images import resize_with_padding
from vla.workers import Workers

VERSION = 2  # of the files written here
OPEN_FILES = 16  # of a camera in each process
JOB = 256  # frames at least that one process decodes in a row
PIECE = 64  # encoded pictures that are read at once


class Broken(InputError):
    """A picture that cannot be decoded."""

    def __init__(self, fault: Fault):
        super().__init__(f"{fault}: mend it, or give --data.skip_bad with --data.cache disk to leave out the episode")
        self.fault = fault


class Decoder:
    """Pictures decoded as they are asked for, those of one file together.

    layout: of the data set, with each episode's first_row in its file (see Index). camera: its feature. size: (h, w) of
    training.
    """

    def __init__(self, layout: Layout, first_row: np.ndarray, camera: str, size: tuple[int, int]):
        self.layout, self.first_row, self.size = layout, first_row, size
        self.ends = np.cumsum(layout.lengths)
        self.video = layout.videos.get(camera)
        self.files = self.video or layout.data
        self.open = OpenVideos(OPEN_FILES) if self.video else _Parquet(camera, layout.image_size(camera))

    def read(self, frames: np.ndarray, out: np.ndarray | None, rows: np.ndarray) -> None:
        """Frame i goes to out[rows[i]], if there is an out. frames, rows: int64 [B], out: uint8 [≥ B, 3, h, w].

        Raises Broken if a picture cannot be decoded.
        """
        row = np.searchsorted(self.ends, frames, side="right")  # [B], the episode
        within = frames - (self.ends - self.layout.lengths)[row]
        of = self.files.of[row]
        for file in np.unique(of):
            chosen = np.flatnonzero(of == file)
            path = self.layout.root / self.files.paths[file]
            try:
                for places, picture in self._decode(path, row[chosen], within[chosen]):
                    if out is not None:
                        out[rows[chosen[places]]] = self._fitted(picture)
            except InputError as error:
                broken = self._traced(path, row[chosen], within[chosen])
                if broken is None:  # it was no picture's fault
                    raise
                raise broken from error

    def _decode(self, path: Path, row: np.ndarray, within: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not self.video:
            return self.open.read(path, self.first_row[row] + within)
        video = self.open(path)
        return video.read(nearest(video.times, self.video.start[row] + within / self.layout.fps))

    def _fitted(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [3, H, W] -> [3, h, w]"""
        if picture.shape[1:] == self.size:
            return picture
        return resize_with_padding(torch.from_numpy(picture)[None], self.size)[0].numpy()

    def _traced(self, path: Path, row: np.ndarray, within: np.ndarray) -> Broken | None:
        """Which of the frames is broken."""
        for i in range(len(row)):
            try:
                deque(self._decode(path, row[[i]], within[[i]]), maxlen=0)
            except InputError as error:
                file = str(path.relative_to(self.layout.root))
                return Broken(Fault(file, str(error).removeprefix(f"{path}: "), (int(self.layout.episodes[row[i]]),)))
        return None


class _Parquet:
    """Pictures in parquet files: a row group, usually an episode, is read at once, and kept until the next."""

    def __init__(self, camera: str, size: tuple[int, int]):
        self.camera, self.size = camera, size
        self.files: OrderedDict[Path, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self.last: tuple[Path, int] | None = None
        self.encoded: pa.ChunkedArray | None = None

    def read(self, path: Path, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """rows: int64 [n] of the file. Yields as Video.read does."""
        _, ends = self._opened(path)
        if rows.max() >= ends[-1]:
            raise InputError(f"{path}: row {rows.max()} is missing, it has {ends[-1]}")
        group = np.searchsorted(ends, rows, side="right")
        for g in np.unique(group).tolist():
            self._load(path, g)
            first = ends[g] - len(self.encoded)
            for row in np.unique(rows[group == g]):
                where = f"{path}: row {row}"
                try:
                    picture = Image.open(io.BytesIO(self.encoded[row - first].as_py()))
                    mode, picture = picture.mode, picture.convert("RGB")
                except Exception as error:  # Pillow raises half a dozen types for a broken image
                    reason = type(error).__name__  # its text may be an address in memory
                    raise InputError(f"{where}: no readable image of {self.camera} ({reason})") from error
                if mode.startswith(("I", "F")):  # of 16 or 32 bits, which turn white
                    found = f"the image of {self.camera} has pixels of mode {mode}, expected 8 bits for each colour"
                    raise InputError(f"{where}: {found}: if it is a depth map, leave it out with --data.cameras")
                if (picture.height, picture.width) != self.size:
                    found, expected = f"{picture.height} x {picture.width}", f"{self.size[0]} x {self.size[1]}"
                    raise InputError(
                        f"{where}: the image of {self.camera} is {found}, expected {expected} as in meta/info.json"
                    )
                yield rows == row, np.array(picture).transpose(2, 0, 1)

    def _opened(self, path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
        """The file, and where its row groups end."""
        if path not in self.files:
            try:
                parquet = pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{path}: missing or unreadable ({in_one_line(error)})") from error
            lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self.files[path] = parquet, np.cumsum(lengths)
            if len(self.files) > OPEN_FILES:
                self.files.popitem(last=False)[1][0].close()
        self.files.move_to_end(path)
        return self.files[path]

    def _load(self, path: Path, group: int) -> None:
        if self.last == (path, group):
            return
        try:
            # In pieces, as a column of over 2 GiB cannot be read as one.
            pieces = self._opened(path)[0].iter_batches(PIECE, [group], [self.camera], use_threads=False)
            self.encoded = pa.chunked_array([pc.struct_field(piece.column(0), "bytes") for piece in pieces])
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: row group {group} is unreadable ({in_one_line(error)})") from error
        self.last = path, group


class Stored:
    """Decoded pictures in a .npy file, or in memory: uint8 [F, 3, h, w]. Raises InputError if the file is damaged."""

    def __init__(self, source: Path | np.ndarray):
        self.source = source
        if not isinstance(source, np.ndarray):
            _, self.header, (_, *shape) = place(source)
            self.size = math.prod(shape)  # of a picture, in bytes

    def read(self, frames: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Frame i goes to out[rows[i]]. frames, rows: int64 [B], out: uint8 [≥ B, 3, h, w]."""
        if isinstance(self.source, np.ndarray):
            for row, frame in zip(rows, frames, strict=True):
                out[row] = self.source[frame]
            return
        # Not through the map: that is slower by half, and its pages would count as this process's memory.
        with whole(self.source) as path, open(path, "rb") as file:
            for row, frame in zip(rows.tolist(), frames.tolist(), strict=True):
                if os.preadv(file.fileno(), [out[row]], self.header + frame * self.size) < self.size:
                    raise ValueError(f"it ends before frame {frame}")


def open_frames(
    selection: Selection, index: Index, skipped: np.ndarray, cache: Literal["disk", "memory", "none"], folder: Path
) -> tuple[list[Decoder] | list[Stored], list[Fault]]:
    """The pictures of each camera, and what is wrong with them, as far as they were decoded.

    skipped: rows in [0, E) of episodes that are left out; their pictures are undefined. folder: holds the cache of
    decoded pictures (disk). Raises InputError if there is no room for all of them.
    """
    layout, size, cameras = selection.layout, selection.image_size, list(selection.cameras.values())
    if cache == "none":
        return [Decoder(layout, index.first_row, camera, size) for camera in cameras], []
    shape, pictures, faults = (index.num_frames, 3, *size), [], []
    if cache == "memory":
        # Others of this machine may have taken theirs already, so their shares are of all that it has.
        share = _memory("MemTotal") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        needed, free = len(cameras) * math.prod(shape), min(_memory("MemAvailable"), share)
        if needed > free:
            found = f"decoded pictures need {size_of(needed)} of memory in each process, {size_of(free)} are free"
            raise InputError(f"{found}: give --data.cache disk or none, or a smaller --data.image_size")
        for camera in cameras:
            with open(os.memfd_create(camera)) as file:  # a file in memory, so that processes can share it
                path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
                pictures.append(Stored(allocate(path, np.uint8, shape)))
                faults += decode_all(layout, index, camera, size, skipped, path)
        return pictures, faults

    def build(camera: str, unfinished: Path) -> None:
        allocate(unfinished / "frames.npy", np.uint8, shape)
        rows = decode_all(layout, index, camera, size, skipped, unfinished / "frames.npy")
        (unfinished / "faults.json").write_text(json.dumps([(row.file, row.text, row.episodes) for row in rows]))

    left_out, done = layout.episodes[skipped].tolist(), {}
    for camera in cameras:
        # Not from all of meta/: a corrected instruction should not cost hours.
        files = layout.videos.get(camera, layout.data)
        first = index.first_row if files is layout.data else files.start
        made_from = [VERSION, camera, size, left_out, layout.fps, layout.features[camera], layout.stamp(files.paths)]
        key = hashlib.sha256(json.dumps(made_from).encode())
        for array in (layout.episodes, layout.lengths, files.of, first):
            key.update(array.tobytes())
        done[camera] = folder / f"frames-{key.hexdigest()[:16]}"
    missing = [camera for camera in cameras if not done[camera].exists()]
    for camera, cached in done.items():
        # Room for all that follow, too: the last should not be refused when hours were spent on the first.
        following = missing[missing.index(camera) :] if camera in missing else []
        what = f"decoded pictures of {', '.join(following)}"
        built(cached, partial(build, camera), len(following) * math.prod(shape), what)
        pictures.append(Stored(cached / "frames.npy"))
        rows = json.loads((cached / "faults.json").read_text())
        faults += [Fault(file, text, tuple(episodes)) for file, text, episodes in rows]
    return pictures, faults


def _memory(kind: str) -> int:
    """Bytes of this machine."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


def decode_all(
    layout: Layout, index: Index, camera: str, size: tuple[int, int], skipped: np.ndarray, file: Path | None = None
) -> list[Fault]:
    """Decode each episode that is not skipped, into the array uint8 [F, 3, h, w] of a .npy file if one is given.

    Returns what is broken. In processes, as threads would wait for each other between two pictures.
    """
    good = layout.lengths > 0
    good[skipped] = False
    of = layout.videos.get(camera, layout.data).of
    jobs: list[list[int]] = []
    frames, last = JOB, -1
    for row in np.flatnonzero(good).tolist():
        if frames >= JOB or of[row] != last:
            jobs.append([])
            frames, last = 0, of[row]
        jobs[-1].append(row)
        frames += layout.lengths[row]
    total, faults = int(layout.lengths[good].sum()), []
    # A process takes a second to start.
    workers = 0 if total < 8 * JOB else min(len(os.sched_getaffinity(0)), len(jobs))
    make = partial(_Job, layout, index.first_row, camera, size, file)
    with (
        Workers(make, workers) as crew,
        tqdm(total=total, desc=f"decoding {camera}", unit="frame", delay=1) as progress,
    ):
        for rows, broken in zip(jobs, crew.map(jobs), strict=True):
            faults += broken
            progress.update(int(layout.lengths[rows].sum()))
    return faults


class _Job:
    """Decodes some episodes, by their rows, and tells what is broken."""

    def __init__(self, layout: Layout, first_row: np.ndarray, camera: str, size: tuple[int, int], file: Path | None):
        self.decoder = Decoder(layout, first_row, camera, size)
        self.pictures = None if file is None else np.load(file, mmap_mode="r+")

    def __call__(self, rows: list[int]) -> list[Fault]:
        ends, lengths, faults = self.decoder.ends, self.decoder.layout.lengths, []
        for row in rows:
            frames = np.arange(ends[row] - lengths[row], ends[row])
            out = None if self.pictures is None else self.pictures[frames[0] : frames[-1] + 1]
            try:
                self.decoder.read(frames, out, frames - frames[0])
            except Broken as broken:
                faults.append(broken.fault)
        return faults
