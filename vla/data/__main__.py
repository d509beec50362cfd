"""What a data set holds, and what is wrong with it.

python -m vla.data info data/mine            episodes, frames, hours, tasks, cameras, ranges, lengths
python -m vla.data check data/mine           every fault, with its file and episode; exit code 1 if there is one
"""

import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from vla import InputError, told
from vla.data.frames import decode_all
from vla.data.index import Index
from vla.data.lerobot import CACHE
from vla.data.selection import Selection
from vla.data.stats import statistics
from vla.options import at_home, within

TASKS = 20  # that the page names
BARS = 10  # at most, of the histogram of lengths


@dataclass(frozen=True)
class Options:
    """Look at a LeRobot data set, v2.1 or v3.0."""

    # info: what it holds. check: everything that is wrong with it; each picture is decoded.
    command: Annotated[Literal["info", "check"], tyro.conf.Positional]
    # Its folder, or owner/name on the Hugging Face hub.
    path: Annotated[str, tyro.conf.Positional]
    # Cameras to look at, by short name or feature; all by default.
    cameras: tuple[str, ...] = ()
    # Features of the state (by convention observation.state).
    state: tuple[str, ...] = ()
    # Features of the action (by convention action).
    action: tuple[str, ...] = ()
    # Seconds by which the time of a frame may miss frame_index / fps: less than half a frame.
    tolerance_s: float = 1e-4
    # Folder of the index of numbers, if not .vla_cache in the data set's own.
    cache_dir: str = ""


def main(options: Options) -> None:
    within("tolerance_s", options.tolerance_s, 0, None)
    selection = Selection(options.path, cameras=options.cameras, state=options.state, action=options.action)
    layout = selection.layout
    index = Index(selection, options.tolerance_s, Path(options.cache_dir or layout.root / CACHE))
    if options.command == "info":
        print(info(selection, index))
        return
    faults = [*layout.faults, *index.faults]
    lost = {episode for fault in faults if fault.kind == "unreadable" for episode in fault.episodes}
    skipped = np.flatnonzero(np.isin(layout.episodes, list(lost)))  # told already: nothing of them can be decoded
    for camera in selection.cameras.values():
        faults += decode_all(layout, index, camera, layout.image_size(camera), skipped)
    for fault in faults:
        print(fault)
    if faults:
        raise InputError(f"{layout.root} has {len(faults)} fault{'s' if len(faults) > 1 else ''}")
    print(f"{layout.root}: no fault in {len(layout.lengths)} episodes, {index.num_frames} frames")


def info(selection: Selection, index: Index) -> str:
    """A page for people."""
    layout, lengths, tasks = selection.layout, selection.layout.lengths, index.task_index
    hours = index.num_frames / layout.fps / 3600
    first = (np.cumsum(lengths) - lengths)[lengths > 0]
    episodes = np.bincount(tasks[first], minlength=len(layout.instructions))  # of each task, by its first frame
    order = np.argsort(-episodes, kind="stable")
    lines = [
        f"{layout.root}: LeRobot {layout.version}, robot {layout.robot}",
        f"episodes   {len(lengths):,} of {lengths.min():,} to {lengths.max():,} frames, median {np.median(lengths):g}",
        f"frames     {index.num_frames:,} at {layout.fps:g} Hz, {hours:,.2f} hours",
        f"tasks      {len(order):,}, and the episodes of {'each' if len(order) <= TASKS else 'the most frequent'}",
        *(f"           {episodes[task]:6,}  {layout.instructions[task]}" for task in order[:TASKS]),
    ]
    for name, key in selection.cameras.items():
        height, width = layout.image_size(key)
        kind = layout.features[key]["dtype"]
        lines.append(f"camera     {name}: {height} x {width}, {'video' if kind == 'video' else 'images'} ({key})")
    for title, names, values in (
        ("state", selection.state_names, index.state),
        ("action", selection.action_names, index.actions),
    ):
        width = max(map(len, names))
        lines.append(
            f"{title:10} {'':{width}} {'min':>10} {'1 %':>10} {'mean':>10} {'99 %':>10} {'max':>10} {'std':>10}"
        )
        table = statistics(values)
        for i, name in enumerate(names):
            row = (table[statistic][i] for statistic in ("min", "q01", "mean", "q99", "max", "std"))
            lines.append(f"           {name:{width}} " + " ".join(f"{value:10.4g}" for value in row))
    shortest, longest = int(lengths.min()), int(lengths.max())
    step = math.ceil((longest - shortest + 1) / BARS)  # frames for each bar
    counts = np.bincount((lengths - shortest) // step)
    lines.append("lengths    frames            episodes")
    for bar, count in enumerate(counts):
        low, high = shortest + bar * step, min(shortest + (bar + 1) * step - 1, longest)
        frames = f"{low:6,} to {high:6,}" if high > low else f"{low:6,}"
        lines.append(f"           {frames:16}  {count:8,}  {'█' * round(40 * count / counts.max())}".rstrip())
    if faults := len(layout.faults) + len(index.faults):
        lines.append(f"faults     {faults:,} or more: python -m vla.data check {layout.root} lists them")
    return "\n".join(lines)


if __name__ == "__main__":
    with told():
        try:
            main(tyro.cli(Options, args=at_home(sys.argv[1:]), prog="python -m vla.data"))
        except InputError as error:  # train.py's flags have a prefix, and the path is one
            own = "|".join(option.name for option in fields(Options))
            message = re.sub(rf"--data\.({own})\b", r"--\1", str(error)).replace("--path", "the path")
            raise InputError(message) from None
