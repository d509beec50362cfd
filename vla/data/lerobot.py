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
from vla.data.hub import dataset_name, downloaded
from vla.data.index import Index
from vla.data.layout import Layout, read_layout

CACHE = ".vla_cache"  # in the data set's folder
# Features by convention, of LeRobot and of openpi.
STATE, ACTION = ("observation.state", "state"), ("action", "actions")


class LeRobotDataset:
    """A data set on the disk, of which memory holds only where its episodes begin and end.

    root: the data set's folder, or owner/name on the Hugging Face hub. cameras: those wanted, in this order, by short
    name ("table" for "observation.images.table") or feature; all by default. rename: either of them -> another name.
    some_cameras: it may lack some of `cameras`. state, action: features, whose numbers are joined; by default those
    that convention names. image_size: (h, w) to bring all pictures to, aspect kept; by default their own.
    cache: decoded pictures on the disk, in memory, or none, so that they are decoded as they are read. cache_dir: where
    that and the index of numbers lie, by default in the data set's folder.
    tolerance_s: how far a frame's time may lie from frame_index / fps.
    skip_bad: leave out episodes with faults. accept: kinds of faults to live with (see vla.data.faults).
    Opening checks everything and raises InputError at any fault that is neither accepted nor left out.

    Attributes: name, fps, cameras, image_size, state_dim, state_names, action_dim, action_names, instructions (by task
    index), num_frames, episode_from and episode_to (exclusive) int64 [E], episode_numbers int64 [E] (their names in
    the data set), episodes int64 (rows of those that are not left out), num_episodes (of them).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cameras: tuple[str, ...] = (),
        rename: dict[str, str] | None = None,
        some_cameras: bool = False,
        state: tuple[str, ...] = (),
        action: tuple[str, ...] = (),
        image_size: tuple[int, int] | None = None,
        cache: Literal["disk", "memory", "none"] = "disk",
        cache_dir: str | Path | None = None,
        tolerance_s: float = 1e-4,
        skip_bad: bool = False,
        accept: tuple[str, ...] = (),
    ):
        self.name = dataset_name(root)
        layout = read_layout(downloaded(root))
        keys = choose_cameras(layout, cameras, rename or {}, some_cameras)
        self.cameras, self.fps, self.instructions = tuple(keys), layout.fps, layout.instructions
        self.image_size = image_size or _common_size(layout, keys)
        folder = Path(cache_dir or layout.root / CACHE)
        state, action = choose_numbers(layout, state, action)
        self._index = index = Index(layout, state, action, list(keys.values()), tolerance_s, folder)
        self.state_names, self.action_names = index.state_names, index.action_names
        self.state_dim, self.action_dim = len(self.state_names), len(self.action_names)
        self.num_frames, self.digest = index.num_frames, index.digest
        self.episode_to, self.episode_numbers = np.cumsum(layout.lengths), layout.episodes
        self.episode_from = self.episode_to - layout.lengths

        self.faults = [*layout.faults, *index.faults]
        skipped = self._without(left_out(layout.root, self.faults, accept, skip_bad))
        opened = {"layout": layout, "index": index, "size": self.image_size, "cache": cache, "folder": folder}
        self._pictures = []
        for key in keys.values():
            pictures, faults = open_frames(camera=key, skipped=skipped, **opened)
            self._pictures.append(pictures)
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


def choose_cameras(layout: Layout, wanted: tuple[str, ...], rename: dict[str, str], some: bool) -> dict[str, str]:
    """Features of the cameras by short name. Raises InputError where one is missing, or all of them if `some` do."""
    keys = layout.cameras()
    short = {key: key.removeprefix("observation.").removeprefix("images.").removeprefix("image.") for key in keys}
    available = {rename.get(key, rename.get(short[key], short[key])): key for key in keys}
    if len(available) < len(keys):
        raise InputError(
            f"{layout.root}: cameras {keys} have names in common, {list(available)}: rename one, such as "
            f"--data.camera_map {max(keys, key=len)}=other"
        )
    names = {**available, **{key: key for key in keys}}
    chosen = {name: names[name] for name in wanted or available if name in names}
    if not chosen or (len(chosen) < len(wanted) and not some):
        expected = list(wanted) or "at least one (a feature of dtype image or video)"
        raise InputError(f"{layout.root} has cameras {list(available)}, expected {expected}: correct --data.cameras")
    return chosen


def _common_size(layout: Layout, keys: dict[str, str]) -> tuple[int, int]:
    sizes = {name: layout.image_size(key) for name, key in keys.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"{layout.root}: cameras have sizes {sizes}, expected one size: give --data.image_size, or choose with "
            "--data.cameras"
        )
    return next(iter(sizes.values()))


def choose_numbers(
    layout: Layout, state: tuple[str, ...], action: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Features of state and action: those given, else the first that convention names and the data set has."""

    def conventional(names: tuple[str, ...]) -> tuple[str, ...]:
        return next(((name,) for name in names if name in layout.features), names[:1])

    return state or conventional(STATE), action or conventional(ACTION)
