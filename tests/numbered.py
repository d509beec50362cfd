"""Small data sets in which every number tells which frame of which data set it is."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.config import ModelConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.mixture import Mixture
from vla.data.stream import Samples
from vla.data.write import LeRobotWriter
from vla.model.backbone import LanguageModel

LENGTHS = (5, 1, 7, 12, 3, 9, 4, 8)  # of the episodes: 49 frames
CAMERAS = ("table", "gripper", "side")
CHUNK, SEED = 4, 3


def write(root: Path, number: int = 0, lengths=LENGTHS, cameras=("table", "gripper"), dims=(2, 1), **options) -> Path:
    """Data set `number`: in frame f dimension d of the state is (d + 1)·v and of the action -(d + 1)·v, v = 1000·number
    + f; pixels of camera n of CAMERAS are (f, n, number); episode e has the instruction "task NUMBER.(e mod 3)".

    dims: of state and action. options: for LeRobotWriter, and size (h, w).
    """
    first, size = 0, options.pop("size", (4, 6))
    names = {"state_names": [f"x{d}" for d in range(dims[0])], "action_names": [f"a{d}" for d in range(dims[1])]}
    sizes, options = dict.fromkeys(cameras, size), {"fps": 10, "robot_type": "numbered"} | names | options
    with LeRobotWriter(root, cameras=sizes, **options) as writer:
        for episode, length in enumerate(lengths):
            frames = np.arange(first, first + length)
            images = {}
            for camera in cameras:
                images[camera] = np.empty((length, 3, *size), np.uint8)
                images[camera][:] = np.array([(f, CAMERAS.index(camera), number) for f in frames])[:, :, None, None]
            value = np.array(1000 * number + frames, np.float32)[:, None]
            writer.add_episode(
                images=images,
                state=value * np.arange(1, dims[0] + 1, dtype=np.float32),
                actions=-value * np.arange(1, dims[1] + 1, dtype=np.float32),
                instruction=f"task {number}.{episode % 3}",
            )
            first += length
    return root


def edit(root: Path, column: str, row: int, value) -> None:
    """Change one value in the first data file."""
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.ParquetFile(path).read()
    values, index = table.column(column).to_pylist(), table.column_names.index(column)
    values[row] = value
    pq.write_table(table.set_column(index, column, pa.array(values, table.column(column).type)), path)


def samples(data: LeRobotDataset | Mixture, episodes=None, shuffle: bool = True, seed: int = SEED) -> Samples:
    """Of these episodes of one data set, or of lists of them for a mixture; by default of all."""
    mixture = data if isinstance(data, Mixture) else Mixture([data])
    episodes = [own.episodes for own in mixture.datasets] if episodes is None else episodes
    episodes = episodes if isinstance(data, Mixture) else np.reshape(episodes, (1, -1))
    instructions = [text for own in mixture.datasets for text in own.instructions]
    tokens = LanguageModel(ModelConfig(max_tokens=12)).tokenize(instructions)
    return Samples(mixture, episodes, tokens, CHUNK, seed, shuffle)


def instruction(batch: dict, row: int) -> str:
    """Read from the tokens of a sample."""
    return bytes(batch["tokens"][row][batch["token_mask"][row]][1:].tolist()).decode()


def equal(batch: dict, other: dict) -> bool:
    """Whether two batches are the same, bit for bit."""
    names = batch.keys() == other.keys()
    return names and all(value.dtype == other[name].dtype and value.equal(other[name]) for name, value in batch.items())
