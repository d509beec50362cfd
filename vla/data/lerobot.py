"""A LeRobot data set, v2.1 or v3.0, opened for training: checked, its numbers indexed and its pictures at hand.

Dimensions: F frames of the data set, E episodes, B batch, N cameras, H action horizon, P state, A action, h and w of an
image. A frame is named by its row in the whole data set, from 0 to F - 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vla import InputError
from vla.data.faults import left_out
from vla.data.frames import open_frames
from vla.data.index import Index
from vla.data.selection import Selection

CACHE = ".vla_cache"  # in the data set's folder


class LeRobotDataset:
    """A data set on the disk, of which memory holds only where its episodes begin and end.

    root, selected: which part of which data set, as Selection takes it; or a Selection.
    cache: decoded pictures on the disk, in memory, or none, so that they are decoded as they are read. cache_dir: where
    that and the index of numbers lie, by default in the data set's folder.
    tolerance_s: how far a frame's time may lie from frame_index / fps.
    skip_bad: leave out episodes with faults. accept: kinds of faults to live with (see vla.data.faults).
    Opening checks everything and raises InputError at any fault that is neither accepted nor left out.

    Attributes: name, fps, cameras, image_size, largest_side (of pictures as they are stored), state_dim, state_names,
    action_dim, action_names, instructions (by task index), num_frames, episode_from and episode_to (exclusive) int64
    [E], episode_numbers int64 [E] (their names in the data set), episodes int64 (rows of those that are not left out),
    num_episodes (of them).
    """

    def __init__(
        self,
        root: str | Path | Selection,
        *,
        cache: Literal["disk", "memory", "none"] = "disk",
        cache_dir: str | Path | None = None,
        tolerance_s: float = 1e-4,
        skip_bad: bool = False,
        accept: tuple[str, ...] = (),
        **selected,
    ):
        selection = root if isinstance(root, Selection) else Selection(root, **selected)
        layout = selection.layout
        self.name, self.fps, self.instructions = selection.name, layout.fps, layout.instructions
        self.cameras, self.image_size = tuple(selection.cameras), selection.image_size
        self.largest_side = max(max(layout.image_size(key)) for key in selection.cameras.values())
        self.state_names, self.action_names = selection.state_names, selection.action_names
        self.state_dim, self.action_dim = len(self.state_names), len(self.action_names)
        folder = Path(cache_dir or layout.root / CACHE)
        self._index = index = Index(selection, tolerance_s, folder)
        self.num_frames, self.digest = index.num_frames, index.digest
        self.episode_to, self.episode_numbers = np.cumsum(layout.lengths), layout.episodes
        self.episode_from = self.episode_to - layout.lengths

        self.faults = [*layout.faults, *index.faults]
        skipped = self._without(left_out(layout.root, self.faults, accept, skip_bad))
        self._pictures, faults = open_frames(selection, index, skipped, cache, folder)
        self.faults += faults
        skipped = self._without(left_out(layout.root, self.faults, accept, skip_bad))
        self.episodes = np.delete(np.arange(len(self.episode_to)), skipped)
        self.num_episodes = len(self.episodes)
        if not self.num_episodes:
            raise InputError(f"{layout.root}: every episode has a fault, expected some to train on: mend them")

    @property
    def state(self) -> np.ndarray:
        """float32 [F, P]."""
        return self._index.state

    @property
    def actions(self) -> np.ndarray:
        """float32 [F, A]."""
        return self._index.actions

    @property
    def task_index(self) -> np.ndarray:
        """int32 [F]."""
        return self._index.task_index

    def windows(self, frames: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions of each frame and of those after it, the episode's last one repeated past its end.

        frames: int64 [B]. Returns actions float32 [B, H, A] and action_is_pad bool [B, H], H = chunk_size.
        """
        wanted = frames[:, None] + np.arange(chunk_size)  # [B, H]
        last = self.episode_to[np.searchsorted(self.episode_to, frames, side="right")] - 1  # [B]
        clamped = np.minimum(wanted, last[:, None])
        return self.actions[clamped], wanted > clamped

    def images(self, frames: np.ndarray) -> np.ndarray:
        """The images of all cameras, in the order of `cameras`: int64 [B] -> uint8 [B, N, 3, h, w]."""
        out = np.empty((len(frames), len(self.cameras), 3, *self.image_size), dtype=np.uint8)
        self.read_images(frames, out, np.arange(len(frames)), range(len(self.cameras)))
        return out

    def read_images(self, frames: np.ndarray, out: np.ndarray, rows: np.ndarray, slots: Sequence[int]) -> None:
        """Image i of camera n goes to out[rows[i], slots[n]]. frames: int64 [B], out: uint8 [≥ B, ≥ N, 3, h, w]."""
        for slot, pictures in zip(slots, self._pictures, strict=True):
            pictures.read(frames, out[:, slot], rows)

    def _without(self, numbers: list[int]) -> np.ndarray:
        return np.flatnonzero(np.isin(self.episode_numbers, numbers))
