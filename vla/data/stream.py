"""The order in which training reads frames, as arithmetic: any position of an endless stream is found in O(1), with
no state.

Optimizer step s consumes positions [s·G, (s + 1)·G), G the global batch; micro-batch m of process r takes its own
slice of them. So one integer, the step, resumes a run, and any number of processes and workers reads the same
samples with the same keys.
"""

import atexit
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vla import InputError, keyed
from vla.data.lerobot import LeRobotDataset
from vla.data.stats import statistics

ROUNDS = 6  # of the Feistel network
HELD_OUT = 1 << 62  # held-out samples are keyed from here on, where no training position comes


def permute(index: Tensor, size: int, key: Tensor) -> Tensor:
    """Shuffle: the place of each index in a pseudorandom permutation of range(size), one permutation for each key.

    A Feistel network over the next power of four, walked until the result lies in range (Black and Rogaway, 2002),
    so that no permutation is ever stored. index: int64 [B] in [0, size), key: int64 [B] -> int64 [B].
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def shuffle(x: Tensor, key: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (keyed.mix(key + turn * size + right) & mask)
        return left << half | right

    result = shuffle(index, key)
    while (outside := result >= size).any():
        result[outside] = shuffle(result[outside], key[outside])
    return result


def split(episodes: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out whole episodes. Returns training and validation episode numbers, int64, ascending.

    At least one episode is held out if val_fraction > 0. Raises InputError if none is left to train on.
    """
    held_out = max(1, round(episodes * val_fraction)) if val_fraction > 0 else 0
    if held_out >= episodes:
        raise InputError(
            f"the data set has {episodes} episodes and --data.val_fraction {val_fraction} would hold out {held_out}; "
            "record more, or give --data.val_fraction 0"
        )
    order = permute(torch.arange(episodes), episodes, torch.full((episodes,), seed)).numpy()
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Samples(Dataset):
    """The frames of some episodes as training samples, fetched in whole batches by their positions.

    With `shuffle` the positions are those of the endless training stream; without, position i is frame i of these
    episodes. Batches are as VLAPolicy takes them, with position and key int64 [B].
    """

    def __init__(
        self,
        data: LeRobotDataset,
        episodes: np.ndarray,
        tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
        chunk_size: int,
        seed: int,
        shuffle: bool,
    ):
        self.data, self.chunk_size, self.seed, self.shuffle = data, chunk_size, seed, shuffle
        first = data.episode_from[episodes]
        lengths = data.episode_to[episodes] - first
        self.ends = np.cumsum(lengths)  # of each episode, in frames of these episodes
        self.offset = first - (self.ends - lengths)  # from frames of these episodes to frames of the data set
        self.tokens, self.token_mask = tokenize(data.instructions)  # [tasks, T]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def frames(self, position: Tensor) -> np.ndarray:
        """Frame numbers of the data set at these positions. int64 [B] -> int64 [B]."""
        index = position
        if self.shuffle:
            epoch = position // len(self)
            index = permute(position % len(self), len(self), keyed.derive(self.seed, -1 - epoch))
        index = index.numpy()
        episode = np.searchsorted(self.ends, index, side="right")
        return index + self.offset[episode]

    def describe(self, positions: list[int]) -> str:
        """Where the samples at these positions of the stream lie in the data set."""
        frames = self.frames(torch.tensor(positions))
        episodes = np.searchsorted(self.data.episode_to, frames, side="right")
        named = [
            f"position {position} (frame {frame - self.data.episode_from[episode]} of episode {episode})"
            for position, frame, episode in zip(positions, frames, episodes, strict=True)
        ]
        return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")

    def statistics(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Of the states and of the actions of these frames, and of no others (see vla.data.stats)."""
        index = np.arange(len(self))
        frames = index + self.offset[np.searchsorted(self.ends, index, side="right")]
        return statistics(self.data.state[frames]), statistics(self.data.actions[frames])

    def __getitems__(self, positions) -> dict[str, Tensor]:
        position = torch.tensor(positions)
        frames = self.frames(position)
        actions, action_is_pad = self.data.windows(frames, self.chunk_size)
        task = torch.from_numpy(self.data.task_index[frames])
        return {
            "images": torch.from_numpy(self.data.images(frames)),
            "state": torch.from_numpy(self.data.state[frames]),
            "tokens": self.tokens[task],
            "token_mask": self.token_mask[task],
            "actions": torch.from_numpy(actions),
            "action_is_pad": torch.from_numpy(action_is_pad),
            "position": position,
            "key": keyed.derive(self.seed, position if self.shuffle else position + HELD_OUT),
        }


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


def loader(samples: Samples, positions, workers: int, pin_memory: bool) -> DataLoader:
    """Batches at these positions (an iterable of ranges), in order whatever the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=positions,
        collate_fn=_whole,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from training's generator
        worker_init_fn=_ignore_signals,
    )


def _whole(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _ignore_signals(worker: int) -> None:
    # Schedulers signal the whole process group; workers must outlive the save that the main process makes of it.
    import signal

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # After an error Python ends its children with SIGTERM, which workers ignore, and would wait for them for ever.
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each of them as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
