"""Read single frames of mp4 videos, fast at random access.

Dimensions: F frames of a file, n frames asked for, S samples of a file (its compressed frames, in the order they are
decoded), h and w of a frame. A frame is named by its place in the order shown, from 0 to F - 1.
"""

import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from vla import InputError

REPAIR = "copy or write the data set again"


class Video:
    """An open video file: when each of its frames is shown, and any of them decoded. One thread uses it at a time.

    path: an mp4 of a codec that FFmpeg decodes. Opening it reads its index alone. Raises InputError if the file is
    missing, unreadable, without video, or cut off. `close()` frees it, and so does dropping the last reference.

    Attributes: path, times float64 [F] (seconds on the file's own clock, ascending), height, width, codec ("av1").
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._container = av.open(str(path))
            self.close = weakref.finalize(self, self._container.close)
            if "mp4" not in self._container.format.name.split(","):
                raise InputError(f"{path} is {self._container.format.long_name}, expected mp4: write it as mp4")
            self._stream = self._container.streams.best("video")
            if self._stream is None or self._stream.codec_context is None:
                raise InputError(f"{path} has no video that FFmpeg decodes, expected AV1 or h264: {REPAIR}")
            pts, key, shown = self._read_index()
        except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is missing or no whole video ({getattr(error, 'strerror', error)}): {REPAIR}"
            ) from error
        if not shown.any():
            raise InputError(f"{path} has no frame, expected at least 1: {REPAIR}")
        self._decoder = self._stream.codec_context
        self._decoder.thread_count = 1  # files are read side by side, and more threads delay a first frame
        self.height, self.width = self._decoder.height, self._decoder.width
        self.codec = self._decoder.codec.canonical_name
        self._pts, first = np.unique(pts[shown], return_index=True)  # [F]
        self.times = self._pts * self._stream.time_base.numerator / self._stream.time_base.denominator
        self._sample = np.flatnonzero(shown)[first]  # [F]
        keys = np.union1d(0, np.flatnonzero(key))
        last_key = np.searchsorted(keys, self._sample, side="right") - 1
        # In an open GOP, a frame shown before its key frame needs the GOP before as well.
        last_key -= (pts[keys[last_key]] > self._pts) & (last_key > 0)
        self._start = pts[keys[last_key]]  # [F], the key frame from which each is decoded

    def read(self, frames: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode frames, each once. Yields them as they come: their places in `frames`, and a picture.

        frames: int64 [n], indices into `times`, in any order, repeats allowed. places: bool [n]. A picture is uint8
        [3, h, w], RGB. Raises InputError, naming file and frame, if one or a frame it builds upon cannot be decoded.
        """
        starts = self._start[frames]  # [n]
        for start in np.unique(starts):  # to seek costs little beside decoding even one frame
            group = np.unique(frames[starts == start])
            wanted = dict(zip(self._pts[group].tolist(), group.tolist(), strict=True))
            last = self._pts[group[self._sample[group].argmax()]]
            try:
                for picture in self._decode(int(start), int(last)):
                    if picture.pts in wanted:
                        yield frames == wanted[picture.pts], self._to_rgb(picture)
                        del wanted[picture.pts]
            except (av.FFmpegError, InputError) as error:
                frame = min(wanted.values(), default=group[-1])
                where = f"{self.path}: frame {frame}, shown at {self.times[frame]:.3f} s"
                reason = getattr(error, "strerror", error)
                raise InputError(f"{where}, cannot be decoded ({reason}): {REPAIR}") from error

    def _decode(self, start: int, last: int) -> Iterator[av.VideoFrame]:
        """The pictures from the key frame at `start` on, as shown, until that of the sample at `last` is among them."""
        due = {last}
        self._container.seek(start, stream=self._stream)
        with closing(self._container.demux(self._stream)) as packets:  # PyAV's generator leaks unless closed
            for packet in packets:
                if packet.pts is None:  # the end of the file
                    break
                if packet.pts >= start and not packet.is_discard:
                    due.add(packet.pts)
                pictures = self._decoder.decode(packet)
                if packet.pts == last:
                    pictures += self._decoder.decode(None)  # those it holds back until later samples come
                for picture in pictures:
                    if picture.is_corrupt:
                        raise InputError("damaged data")
                    due.discard(picture.pts)
                    yield picture
                if packet.pts == last:
                    break
        if due:  # without these, some decoders go on with wrong colours and no error
            raise InputError("missing data")

    def _to_rgb(self, picture: av.VideoFrame) -> np.ndarray:
        """uint8 [3, h, w], by the colour matrix and range that the picture names."""
        if (picture.height, picture.width) != (self.height, self.width):
            found, expected = f"{picture.width} x {picture.height}", f"{self.width} x {self.height} as in the header"
            raise InputError(f"its size is {found}, expected {expected}")
        # Not as "gbrp", whose planes need no transposition: swscale leaves its last columns unset in some widths.
        return picture.to_ndarray(format="rgb24", threads=1).transpose(2, 0, 1)

    def _read_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When each sample is shown, int64 [S] in units of the time base; whether it is a key; whether it is shown."""
        entries = self._stream.index_entries
        rows = [(entry.timestamp, entry.pos + entry.size, entry.is_keyframe, entry.is_discard) for entry in entries]
        dts, end, key, hidden = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        size = self.path.stat().st_size
        if end.max(initial=0) > size:
            raise InputError(f"{self.path} is cut off at {size} bytes, expected {end.max()}: {REPAIR}")
        delays = _delays(self.path, self._stream.index, len(dts))
        if delays is not None and len(dts) == self._stream.frames > 0:
            with closing(self._container.demux(self._stream)) as packets:
                first = next(packets)
            pts = dts + delays + (first.pts - dts[0] - delays[0])
        else:  # in fragments, or with samples cut out: go through them all
            packets = self._container.demux(self._stream)
            rows = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in packets if packet.pts is not None]
            pts, key, hidden = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return pts, key == 1, hidden == 0


class OpenVideos:
    """Opens videos and keeps the `limit` (at least 1) used last; for one thread, and empty again after a fork."""

    def __init__(self, limit: int):
        self._limit, self._videos, self._process = limit, {}, os.getpid()

    def __reduce__(self):  # for a spawned process: it opens its own
        return OpenVideos, (self._limit,)

    def __call__(self, path: str | Path) -> Video:
        """The open video of a file; its errors are those of `Video`."""
        if self._process != os.getpid():  # a forked file has one position for parent and child
            self._videos, self._process = {}, os.getpid()
        video = self._videos.pop(str(path), None)
        if video is None:
            if len(self._videos) >= self._limit:
                del self._videos[next(iter(self._videos))]
            video = Video(path)
        self._videos[str(path)] = video  # the last of the dictionary is the one used last
        return video


def _delays(path: Path, track: int, samples: int) -> np.ndarray | None:
    """How much later than decoded each sample of a track is shown, but for one offset of all (ISO 14496-12, box ctts).

    int64 [S] in units of the time base; None if the header does not tell. FFmpeg's index has times of decoding alone.
    """
    with open(path, "rb") as file:
        span = (0, file.seek(0, os.SEEK_END))
        for kind, which in ((b"moov", 0), (b"trak", track), (b"mdia", 0), (b"minf", 0), (b"stbl", 0)):
            boxes = _boxes(file, span, kind)
            if which >= len(boxes):
                return None
            span = boxes[which]
        tables = _boxes(file, span, b"ctts")
        if not tables:  # all samples are shown in the order they are decoded
            return np.zeros(samples, dtype=np.int64)
        start, stop = tables[0]
        file.seek(start + 8)  # version, flags and number of rows
        table = np.frombuffer(file.read((stop - start) // 8 * 8 - 8), [("samples", ">u4"), ("delay", ">i4")])
    known = table["samples"].sum() == samples
    return np.repeat(table["delay"].astype(np.int64), table["samples"]) if known else None


def _boxes(file: BinaryIO, span: tuple[int, int], kind: bytes) -> list[tuple[int, int]]:
    """Where the contents of the boxes of one kind begin and end, among those directly within a span of an mp4 file."""
    found, (start, stop) = [], span
    while start + 8 <= stop:
        file.seek(start)
        size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        header = 16 if size == 1 else 8
        size = large if size == 1 else size or stop - start  # in 64 bits; up to the end
        if name == kind:
            found.append((start + header, start + size))
        start += max(size, header)
    return found
