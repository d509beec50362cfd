"""What a robot observes, as a batch of the policy.

Dimension key: B batch, N cameras, H action horizon, A action dimension and P state dimension of the policy, T text
tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vla import InputError
from vla.images import resize_with_padding
from vla.model.spec import DatasetSpec, PolicyConfig


def collate(
    config: PolicyConfig,
    dataset: int,
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
    observations: list[dict],
    key: Tensor,
    pinned: bool = False,
) -> dict[str, Tensor]:
    """What VLAPolicy takes, on the CPU, of what the robot of this data set observes (see VLAPolicy.collate).

    tokenize: -> int64 [B, T], bool [B, T]. key: int64 [B]. pinned: images lie where a GPU fetches them itself, in
    memory that torch gives to nobody else before it has. Raises InputError.
    """
    robot, size = config.datasets[dataset], len(observations)
    for seen in observations:
        if missing := sorted({"images", "state", "instruction"} - seen.keys()):
            raise InputError(f"the observation lacks {', '.join(missing)}; expected images, state and instruction")
        if not isinstance(seen["instruction"], str):
            raise InputError(f"the observation's instruction is {seen['instruction']!r}, expected a str")
    tokens, token_mask = tokenize([seen["instruction"] for seen in observations])
    has = torch.tensor([camera in robot.cameras for camera in config.cameras])
    images = torch.empty(size, len(has), 3, *config.image_size, dtype=torch.uint8, pin_memory=pinned)
    for view, seen in zip(images.numpy(), observations, strict=True):
        _look(view, seen["images"], robot, config)
    return {
        "dataset": torch.full((size,), dataset),
        "images": images,
        "image_mask": has.repeat(size, 1),
        "state": torch.from_numpy(np.stack([_state(seen["state"], robot, config) for seen in observations])),
        "tokens": tokens,
        "token_mask": token_mask,
        "key": key,
    }


def check_batch(config: PolicyConfig, batch: dict[str, Tensor], training: bool) -> None:
    """Raises InputError for a batch that lacks something, or has it in another shape or dtype; no value is read."""
    B, N, T = len(batch.get("images", ())), len(config.cameras), config.model.max_tokens
    expected = {
        "dataset": (torch.int64, B),
        "images": (torch.uint8, B, N, 3, *config.image_size),
        "image_mask": (torch.bool, B, N),
        "state": (torch.float32, B, config.state_dim),
        "tokens": (torch.int64, B, T),
        "token_mask": (torch.bool, B, T),
        "key": (torch.int64, B),
    }
    if training:
        expected["actions"] = (torch.float32, B, config.model.chunk_size, config.action_dim)
        expected["action_is_pad"] = (torch.bool, B, config.model.chunk_size)
    for name, (dtype, *shape) in expected.items():
        if name not in batch:
            raise InputError(f"the batch lacks {name}, {dtype} {shape}")
        found = batch[name]
        same = found.dtype == dtype or (dtype.is_floating_point and found.is_floating_point())
        if not same or [*found.shape] != shape:
            raise InputError(f"the batch has {name} {found.dtype} {[*found.shape]}, expected {dtype} {shape}")


def nothing(config: PolicyConfig, tokenize: Callable, size: int) -> dict[str, Tensor]:
    """What `collate` makes of so many observations of the first data set's robot in which all is 0."""
    robot = config.datasets[0]
    images = np.zeros((len(robot.cameras), 3, *config.image_size), np.uint8)
    seen = {"images": images, "state": np.zeros(len(robot.state_names)), "instruction": ""}
    return collate(config, 0, tokenize, [seen] * size, torch.arange(size))


def _look(view: np.ndarray, seen: np.ndarray | dict[str, np.ndarray], robot: DatasetSpec, config: PolicyConfig) -> None:
    """Write what the robot sees as all of the policy's cameras, 0 where it has none. view: uint8 [N, 3, h, w]."""
    images = seen
    if not isinstance(seen, dict) and len(seen) == len(robot.cameras):
        images = dict(zip(robot.cameras, seen, strict=True))
    if not isinstance(images, dict) or images.keys() != set(robot.cameras):
        found = f"images of {', '.join(seen)}" if isinstance(seen, dict) else f"{len(seen)} images"
        expected = f"those of the cameras of {robot.name}: {', '.join(robot.cameras)}"
        raise InputError(f"the observation has {found}, expected {expected}")
    for camera, own in zip(config.cameras, view, strict=True):
        own[:] = _pixels(images[camera], camera, config.image_size) if camera in images else 0


def _pixels(image: np.ndarray, camera: str, size: tuple[int, int]) -> np.ndarray:
    """What a camera sees, in the policy's size, uint8 [3, h, w]."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3 or not pixels.size:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"the observation's image of {camera} is {found}, expected uint8 [3, height, width]")
    if pixels.shape[1:] != size:  # from a copy: torch warns of memory that it may not write
        pixels = resize_with_padding(torch.from_numpy(pixels.copy())[None], size)[0].numpy()
    return pixels


def _state(state: np.ndarray, robot: DatasetSpec, config: PolicyConfig) -> np.ndarray:
    """The robot's state with 0 in the dimensions that it lacks, float32 [P]."""
    names, own = robot.state_names, np.asarray(state, np.float32)
    if own.shape != (len(names),):
        expected = f"the {len(names)} numbers of {robot.name}: {', '.join(names)}"
        raise InputError(f"the observation's state has shape {list(own.shape)}, expected {expected}")
    if not np.isfinite(own).all():
        wrong = ", ".join(f"{name} {value}" for name, value in zip(names, own, strict=True) if not np.isfinite(value))
        raise InputError(f"the observation's state has {wrong}, expected finite numbers; do not act on it")
    return np.pad(own, (0, config.state_dim - len(names)))
