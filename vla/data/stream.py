"""The order in which training reads frames, as arithmetic: any position of an endless stream is found in O(1), with
no state.

Optimizer step s consumes positions [s·G, (s + 1)·G), G the global batch; micro-batch m of process r takes its own
slice of them. So one integer, the step, resumes a run, and any number of processes and workers reads the same
samples with the same keys.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vla import InputError, keyed
from vla.data.lerobot import LeRobotDataset
from vla.data.mixture import Mixture
from vla.data.stats import statistics

# Counters that keys are derived from. Training positions count up from 0; held-out samples from HELD_OUT; the orders
# of epochs count down from EPOCHS, those of the next data set from DATASETS below.
HELD_OUT, EPOCHS, DATASETS = 1 << 62, -1, 1 << 40


def split(episodes: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out whole episodes. Returns those to train on and those to validate on, int64, ascending.

    At least one episode is held out if val_fraction > 0. Raises InputError if none is left to train on.
    """
    count = len(episodes)
    held_out = max(1, round(count * val_fraction)) if val_fraction > 0 else 0
    if held_out >= count:
        raise InputError(
            f"the data set has {count} episodes and --data.val_fraction {val_fraction} would hold out {held_out}; "
            "record more, or give --data.val_fraction 0"
        )
    order = keyed.permute(torch.arange(count), count, torch.full((count,), seed)).numpy()
    return np.sort(episodes[order[held_out:]]), np.sort(episodes[order[:held_out]])


class Samples:
    """The frames of some episodes of a mixture as training samples, fetched in whole batches by their positions.

    episodes: of each data set, rows as in LeRobotDataset. tokens: what VLAPolicy.tokenize makes of all instructions,
    those of one data set after those of the other, int64 and bool [tasks, T]. With `shuffle` the positions are those of
    the endless training stream; without, position i is frame i of these episodes. Batches are as VLAPolicy takes them,
    with position and key int64 [B].
    """

    def __init__(
        self,
        mixture: Mixture,
        episodes: Sequence[np.ndarray],
        tokens: tuple[Tensor, Tensor],
        chunk_size: int,
        seed: int,
        shuffle: bool,
    ):
        self.mixture, self.chunk_size, self.seed, self.shuffle = mixture, chunk_size, seed, shuffle
        self.parts = [_Part(data, rows) for data, rows in zip(mixture.datasets, episodes, strict=True)]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)  # of each data set's frames
        self.first_task = np.cumsum([0, *(len(data.instructions) for data in mixture.datasets)])
        self.tokens, self.token_mask = tokens
        self.slots = [[mixture.cameras.index(camera) for camera in data.cameras] for data in mixture.datasets]
        self.camera_mask = torch.zeros(len(self.parts), len(mixture.cameras), dtype=torch.bool)  # [K, N]
        for mask, slots in zip(self.camera_mask, self.slots, strict=True):
            mask[slots] = True

    def __len__(self) -> int:
        return int(self.ends[-1])

    def frames(self, position: Tensor) -> tuple[Tensor, np.ndarray]:
        """The data set at each of these positions, and the frame number in it. int64 [B] -> int64 [B], int64 [B]."""
        if self.shuffle:
            dataset, index = self.mixture.draw(position, self.seed)
        else:
            dataset = torch.searchsorted(self.ends, position, right=True)
            index = position - torch.nn.functional.pad(self.ends, (1, 0))[dataset]
        frames = np.empty(len(position), dtype=np.int64)
        for k, part in enumerate(self.parts):
            own = index[chosen := dataset == k]
            if self.shuffle and len(own):
                epoch = own // len(part)
                own = keyed.permute(own % len(part), len(part), keyed.derive(self.seed, EPOCHS - epoch - k * DATASETS))
            frames[chosen.numpy()] = part.frames(own.numpy())
        return dataset, frames

    def describe(self, positions: list[int]) -> str:
        """Where the samples at these positions of the stream lie in the data."""
        named = []
        for position, dataset, frame in zip(positions, *self.frames(torch.tensor(positions)), strict=True):
            data = self.mixture.datasets[dataset]
            row = np.searchsorted(data.episode_to, frame, side="right")
            where = f"frame {frame - data.episode_from[row]} of episode {data.episode_numbers[row]}"
            named.append(f"position {position} ({where}{f' of {data.name}' if len(self.parts) > 1 else ''})")
        return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")

    def statistics(self) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """For each data set, of the states and of the actions of these frames and of no others (see vla.data.stats)."""
        return [part.statistics() for part in self.parts]

    def batch(self, positions: Sequence[int], images: np.ndarray | None = None) -> dict[str, Tensor]:
        """The samples at these positions. images: where to put theirs, uint8 [B, N, 3, h, w]; new memory by default."""
        position = torch.tensor(positions)
        dataset, frames = self.frames(position)
        mixture, B = self.mixture, len(position)
        if images is None:
            images = np.empty((B, len(mixture.cameras), 3, *mixture.image_size), np.uint8)
        state = np.zeros((B, max(data.state_dim for data in mixture.datasets)), np.float32)
        actions = np.zeros((B, self.chunk_size, max(data.action_dim for data in mixture.datasets)), np.float32)
        action_is_pad, task = np.empty((B, self.chunk_size), bool), np.empty(B, np.int64)
        image_mask = self.camera_mask[dataset]  # [B, N]
        for k, data in enumerate(mixture.datasets):
            chosen = np.flatnonzero(dataset.numpy() == k)
            own = frames[chosen]
            data.read_images(own, images, chosen, self.slots[k])
            state[chosen, : data.state_dim] = data.state[own]
            actions[chosen, :, : data.action_dim], action_is_pad[chosen] = data.windows(own, self.chunk_size)
            task[chosen] = self.first_task[k] + data.task_index[own]
        images[~image_mask.numpy()] = 0
        return {
            "dataset": dataset,
            "images": torch.from_numpy(images),
            "image_mask": image_mask,
            "state": torch.from_numpy(state),
            "tokens": self.tokens[task],
            "token_mask": self.token_mask[task],
            "actions": torch.from_numpy(actions),
            "action_is_pad": torch.from_numpy(action_is_pad),
            "position": position,
            "key": keyed.derive(self.seed, position if self.shuffle else position + HELD_OUT),
        }


def summary(train: Samples, held_out: Samples) -> str:
    """What is trained on and what is held out: a line for each data set."""
    lines = []
    for data, count, mine, theirs in zip(
        train.mixture.datasets, train.mixture.counts, train.parts, held_out.parts, strict=True
    ):
        share = f"{count / train.mixture.block:.4g} of the samples, " if len(train.parts) > 1 else ""
        bad = len(data.episode_to) - len(data.episodes)
        left_out = f"; left out for faults: {bad}" if bad else ""
        lines.append(
            f"data       {data.name}: {share}{len(mine)} frames of {len(mine.ends)} episodes to train on, "
            f"{len(theirs)} frames of {len(theirs.ends)} held out{left_out}"
        )
    rates = {data.name: data.fps for data in train.mixture.datasets}
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{name} {fps:g}" for name, fps in rates.items())
        lines.append(f"warning: frames a second differ, {found}: so does the time that the actions of a chunk take")
    return "\n".join(lines)


class _Part:
    """The frames of some episodes of one data set, numbered from 0."""

    def __init__(self, data: LeRobotDataset, episodes: np.ndarray):
        first, end = data.episode_from[episodes], data.episode_to[episodes]
        lengths = end - first
        self.data, self.episodes = data, episodes
        self.ends = np.cumsum(lengths)  # of each episode, in frames of these episodes
        self.offset = first - (self.ends - lengths)  # from frames of these episodes to frames of the data set

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def frames(self, index: np.ndarray) -> np.ndarray:
        return index + self.offset[np.searchsorted(self.ends, index, side="right")]

    def statistics(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        first, end = self.data.episode_from[self.episodes], self.data.episode_to[self.episodes]
        apart = np.flatnonzero(first[1:] != end[:-1])  # where an episode does not follow on the one before
        spans = list(zip(first[np.append(0, apart + 1)], end[np.append(apart, -1)], strict=True))
        return statistics(self.data.state, spans), statistics(self.data.actions, spans)


def training_positions(
    first_step: int,
    steps: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> Iterator[range]:
    """The positions of this process's micro-batches, from `first_step` on, in order.

    left_out: windows (first step, number of steps) whose positions no step takes, in the order they were found.
    """
    for turn in range(first_step, steps):
        step = turn
        for first, count in reversed(left_out):
            step += count if step >= first else 0
        for start in range(
            step * global_batch + rank * micro_batch, (step + 1) * global_batch, world_size * micro_batch
        ):
            yield range(start, start + micro_batch)
