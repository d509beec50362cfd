"""Several data sets as one: which of them a sample comes from, their cameras matched, their dimensions made equal.

Dimensions: K data sets, B batch.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from vla import InputError, hub, keyed
from vla.config import DataConfig
from vla.data.index import Index
from vla.data.lerobot import CACHE, LeRobotDataset
from vla.data.selection import Selection

LARGEST_BLOCK = 10_000
BLOCKS = -1 << 61  # keys of the blocks' orders are derived from counters down from here (see vla/data/stream.py)


class Mixture:
    """Data sets that are trained on together, at fixed shares.

    datasets: [K], with different names. weights: how many samples come from each, in proportion; none for one data set.
    cameras: all that they have, in the policy's order; by default as they are found.
    In each block of `block` consecutive positions of the stream data set k has exactly counts[k] samples.
    Raises InputError where they cannot be one.
    """

    def __init__(self, datasets: list[LeRobotDataset], weights: tuple[float, ...] = (), cameras: tuple[str, ...] = ()):
        self.datasets = datasets
        self.cameras = all_cameras(datasets, cameras)
        self.image_size = datasets[0].image_size
        self.counts = _whole_numbers(weights or (1.0,) * len(datasets))
        self.block = sum(self.counts)

    def draw(self, position: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The data set of each position of the stream, and the position in that data set's own endless stream.

        int64 [B] -> int64 [B], int64 [B]. Each position of each own stream is drawn once, in order of the blocks.
        """
        if len(self.counts) == 1:
            return torch.zeros_like(position), position
        block, place = position // self.block, position % self.block
        place = keyed.permute(place, self.block, keyed.derive(seed, BLOCKS - block))
        counts = torch.tensor(self.counts)
        ends = counts.cumsum(0)
        dataset = torch.searchsorted(ends, place, right=True)
        return dataset, block * counts[dataset] + place - (ends - counts)[dataset]


def _whole_numbers(weights: tuple[float, ...]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights, as they were written: 0.7 0.3 -> 7, 3."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > LARGEST_BLOCK:
        raise InputError(
            f"--data.weights {' '.join(map(str, weights))} repeat after {sum(counts)} samples only, expected at most "
            f"{LARGEST_BLOCK}: round them"
        )
    return counts


def all_cameras(parts: list[Selection] | list[LeRobotDataset], chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Those of all data sets in the policy's order: as they were chosen, or else as they are found."""
    return chosen or tuple(dict.fromkeys(camera for part in parts for camera in part.cameras))


def select(config: DataConfig) -> list[Selection]:
    """What --data says, of which the metadata alone are read.

    Raises InputError, naming the flag, where data sets and flags do not fit together.
    """
    if len(config.weights) != len(config.path) and (config.weights or len(config.path) > 1):
        raise InputError(
            f"--data.path names {len(config.path)} data sets and --data.weights {len(config.weights)} shares; give one "
            "for each, such as 0.7 0.3"
        )
    if bad := [weight for weight in config.weights if not 0 < weight < math.inf]:
        raise InputError(f"--data.weights has {bad[0]}; expected more than 0 (leave the data set out)")
    names = config.names or tuple(map(hub.dataset_name, config.path))
    if len(set(names)) < len(config.path) or len(names) > len(config.path):
        found = f"--data.path has {len(config.path)} data sets, called {', '.join(names)}"
        raise InputError(f"{found}: give each a name of its own by --data.names")
    chosen = {"cameras": config.cameras, "some_cameras": len(names) > 1, "image_size": config.image_size or None}
    chosen |= {"state": config.state, "action": config.action}
    renames = [{camera: name for dataset, camera, name in _camera_map(config) if dataset in ("", own)} for own in names]
    named = zip(config.path, names, renames, strict=True)
    parts = [Selection(path, name=name, rename=rename, **chosen) for path, name, rename in named]
    _check_fit(config, parts)
    return parts


def digests(parts: list[Selection], config: DataConfig) -> list[str]:
    """What identifies the content of each, for which numbers are read and no pictures are decoded."""
    folders = [Path(config.cache_dir or part.layout.root / CACHE) for part in parts]
    return [Index(part, config.tolerance_s, folder).digest for part, folder in zip(parts, folders, strict=True)]


def open_datasets(parts: list[Selection], config: DataConfig) -> Mixture:
    """Open what was selected, which may decode all pictures. Raises InputError for faults of the data."""
    opened = {"cache": config.cache, "cache_dir": config.cache_dir or None, "tolerance_s": config.tolerance_s}
    opened |= {"skip_bad": config.skip_bad, "accept": config.accept}
    return Mixture([LeRobotDataset(part, **opened) for part in parts], config.weights, config.cameras)


def _camera_map(config: DataConfig) -> Iterator[tuple[str, str, str]]:
    """Data set ("" for all), its camera, the new name."""
    for entry in config.camera_map:
        own, _, name = entry.partition("=")
        dataset, _, camera = own.rpartition(":")
        if not camera or not name:
            raise InputError(f"--data.camera_map has {entry!r}; expected camera=name or dataset:camera=name")
        yield dataset, camera, name


def _check_fit(config: DataConfig, parts: list[Selection]) -> None:
    names = ", ".join(part.name for part in parts)
    if missing := sorted(set(config.cameras) - {camera for part in parts for camera in part.cameras}):
        raise InputError(f"--data.cameras names {', '.join(missing)}, which none of {names} has: correct it")
    for dataset, camera, name in _camera_map(config):
        meant = [part for part in parts if dataset in ("", part.name)]
        if not any(camera in (*part.own_cameras, *part.layout.cameras()) for part in meant):
            found = {part.name: ", ".join(part.own_cameras) for part in meant} or f"data sets {names}"
            raise InputError(f"--data.camera_map calls {camera!r} {name!r}, but found {found}; correct it")
    pad = "name features with --data.state and --data.action, or give --data.pad_dims"
    for what, cure, found in (
        ("image size", "give --data.image_size", {part.name: part.image_size for part in parts}),
        ("number of states", pad, {part.name: len(part.state_names) for part in parts}),
        ("number of actions", pad, {part.name: len(part.action_names) for part in parts}),
    ):
        if len(set(found.values())) > 1 and not (cure == pad and config.pad_dims):
            raise InputError(f"the data sets differ in their {what}, {found}, expected one value: {cure}")
