"""Whether videos show the frames of a data set at their times, as far as their own index tells: none is decoded.

Dimensions: F frames of a video, n frames asked for.
"""

import numpy as np

from vla import InputError
from vla.data.faults import Fault
from vla.data.layout import NOWHERE, Files, Layout
from vla.data.video import Video


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The places of those of the ascending times [F] that lie nearest to the wanted ones: float64 [n] -> int64 [n]."""
    after = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
    after = np.minimum(after, len(times) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after)


def check_video(layout: Layout, key: str, file: int, tolerance_s: float) -> list[Fault]:
    """Faults of one video file. tolerance_s: how far the time of a frame may lie from frame_index / fps."""
    files = layout.videos[key]
    path, rows = files.paths[file], files.rows(file)
    if path == NOWHERE:
        text = f"no video of {key} is named, expected one for each episode"
        return [Fault(layout.episodes_file, text, tuple(layout.episodes[rows].tolist()), "unreadable")]
    try:
        video = Video(layout.root / path)
    except InputError as error:
        text = str(error).removeprefix(f"{layout.root / path}").lstrip(": ")
        return [Fault(path, text, tuple(layout.episodes[rows].tolist()), "unreadable")]
    times, faults = video.times, []
    if (video.height, video.width) != (expected := layout.image_size(key)):
        text = (
            f"pictures are {video.height} x {video.width}, expected {expected[0]} x {expected[1]} as in meta/info.json"
        )
        faults.append(Fault(path, text, tuple(layout.episodes[rows].tolist()), "unreadable"))
    video.close()
    misplaced = _misplaced(layout, files, rows)
    for row in rows.tolist():
        if row in misplaced:
            text, kind = misplaced[row]
            faults.append(Fault(layout.episodes_file, f"{key} {text}", (int(layout.episodes[row]),), kind))
            if not kind:
                continue
        wanted = files.start[row] + np.arange(layout.lengths[row]) / layout.fps
        shown = times[nearest(times, wanted)]
        if len(bad := np.flatnonzero(~(np.abs(shown - wanted) <= tolerance_s))):
            due, shown = wanted[bad[0]], shown[bad[0]]
            text = f"frame {bad[0]} should be shown at {due:.4f} s, the nearest one is at {shown:.4f} s"
            if due > times[-1]:
                held = len(wanted) - len(bad)
                text = f"the video ends at {times[-1]:.4f} s and has {held} of its {layout.lengths[row]} frames"
            faults.append(Fault(path, text, (int(layout.episodes[row]),)))
    return faults


def _misplaced(layout: Layout, files: Files, rows: np.ndarray) -> dict[int, tuple[str, str]]:
    """What is wrong with the places that the metadata give to the episodes of one video, by a frame or more.

    Text and kind of fault: the places are true if the video has frames of no episode, but may as well have been moved.
    """
    found: dict[int, tuple[str, str]] = {}
    if files.stop is None:
        return found
    due, half = 0.0, 0.5 / layout.fps
    # Where those before end and those after begin, as far as it is said.
    ends, begins = np.append(0, files.stop[rows][:-1]), np.append(files.start[rows][1:], np.inf)
    for row, end, begin in zip(rows.tolist(), ends, begins, strict=True):
        start, stop, length = files.start[row], files.stop[row], layout.lengths[row]
        lasting = length / layout.fps
        if layout.episodes[row] != (layout.episodes[row - 1] + 1 if row else 0):
            due = start  # nobody knows how long those in between last
        moved = not abs(start - due) < half
        if moved:
            where = "where the one before ends" if due else "the beginning of its file"
            apart = max(due, end) < start + half and stop < begin + half and stop - start > lasting - half
            text = f"begins at {start:.4f} s, expected {due:.4f}, {where}"
            found[row] = text, "video_gap" if apart else ""
        elif not stop - start > lasting - half:
            text = f"lasts from {start:.4f} to {stop:.4f} s, expected {lasting:.4f} s for its {length} frames"
            found[row] = text, ""
        # Which of the two is wrong? The end is right if the start alone was moved.
        right_end = not moved or abs(stop - start - lasting) >= half
        due = stop if right_end and stop - due > lasting - half else due + lasting
    return found
