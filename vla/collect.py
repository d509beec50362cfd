"""Record demonstrations of an environment's expert as a LeRobot v3.0 data set.

python -m vla.collect tabletop --out data/tabletop --episodes 400
python -m vla.collect metaworld --out data/mt50 --episodes_per_task 50

Killed and started again with the same flags it goes on: until the data set is whole, each episode also lies in a file
of its own beside it. What is recorded depends on the flags alone, not on the number of processes.
"""

import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from operator import sub
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from vla import InputError, sim
from vla.data.write import LeRobotWriter, Pictures, encode


@dataclass(frozen=True)
class CollectConfig:
    """Record demonstrations of an environment's expert."""

    # Environment: tabletop, metaworld, or metaworld/TASK.
    env: Annotated[str, tyro.conf.Positional]
    # Folder of the new data set.
    out: str
    # Successful episodes to record, equally many of each task of the environment; failed ones are discarded.
    episodes: int = 400
    # Of each task, in place of episodes.
    episodes_per_task: int = 0
    # First seed of the scenes; those from 500,000 on are kept for evaluations.
    seed: int = sim.DEMONSTRATION_SEEDS
    # Standard deviation of noise on the motions that are executed, as a share of their range: the recorded action is
    # the expert's own, so the policy learns to come back (DART: Laskey et al., 2017). By default 0.3 on the tabletop,
    # none in Meta-World.
    noise: float | None = None
    # Height and width of the images in pixels (0: the environment's own, 64 on the tabletop, 224 in Meta-World).
    image_size: int = 0
    # How images are stored: png keeps every pixel; av1 and h264 write video, which is smaller and loses some detail.
    codec: Literal["png", "av1", "h264"] = "png"
    # Processes that act.
    workers: int = os.cpu_count() or 1


make = cache(sim.make)  # an environment takes a while to make


def demonstrate(env: str, noise: float, seed: int, number: int, image_size: int = 0) -> tuple[dict, bool]:
    """Episode `number` of the expert, as LeRobotWriter.add_episode takes it, and whether it succeeded."""
    world, random = make(env, image_size), np.random.default_rng((seed, number, 1))
    scene, task = divmod(number, world.tasks_per_scene)
    observation, done = world.reset(seed + scene, task), False
    images, states, actions = [], [], []
    while not done:
        action = world.expert()
        images.append(observation["images"])
        states.append(observation["state"])
        actions.append(action)
        observation, success, done = world.step(
            action + noise * world.noise_scale * random.standard_normal(len(action))
        )
    stacked = np.stack(images, axis=1)  # [N, L, 3, h, w]
    episode = {
        "images": dict(zip(world.cameras, stacked, strict=True)),
        "state": np.stack(states),
        "actions": np.stack(actions),
        "instruction": world.instruction,
    }
    return episode, success


def keep(folder: Path, env: str, noise: float, seed: int, image_size: int, codec: str, number: int) -> Path:
    """The file of episode `number`, which is empty of all but `success` if it failed; made unless it is there."""
    path = folder / f"{number}.npz"
    if not path.exists():
        episode, success = demonstrate(env, noise, seed, number, image_size)
        arrays = {"success": np.array(success)}
        if success:
            arrays |= {name: np.array(episode[name]) for name in ("state", "actions", "instruction")}
            for name, images in episode["images"].items():
                pictures = encode(images, codec, make(env, image_size).fps)
                arrays |= {f"{field}/{name}": np.array(value) for field, value in vars(pictures).items()}
        unfinished = path.with_suffix(".partial")
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        unfinished.rename(path)
    return path


def kept(path: Path, cameras: tuple[str, ...]) -> dict | None:
    """The episode in a file of `keep`, as LeRobotWriter.add_episode takes it, or None if it failed."""
    with np.load(path) as arrays:
        if not arrays["success"]:
            return None
        pictures = {}
        for name in cameras:
            shape = tuple(arrays[f"shape/{name}"].tolist())
            data, ends, histogram = (arrays[f"{field}/{name}"] for field in ("data", "ends", "histogram"))
            pictures[name] = Pictures(str(arrays[f"codec/{name}"]), shape, data, ends, histogram)
        episode = {"state": arrays["state"], "actions": arrays["actions"], "instruction": str(arrays["instruction"])}
        return episode | {"images": pictures}


def begun(folder: Path, flags: dict) -> None:
    """Make the folder of the episodes' files; what a run with other flags left there is removed."""
    path, text = folder / "flags.json", json.dumps(flags)
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(text)


def main(config: CollectConfig) -> None:
    world = sim.make(config.env, config.image_size)
    kinds, per_scene, noise = len(world.tasks), world.tasks_per_scene, config.noise
    noise = world.noise if noise is None else noise
    each, rest = divmod(config.episodes, kinds)
    if config.episodes_per_task:
        each, rest = config.episodes_per_task, 0
    if each < 1 or rest:
        expected = "at least 1" if kinds == 1 else f"a multiple of the {kinds} tasks, or --episodes_per_task"
        raise InputError(f"--episodes is {config.episodes}; expected {expected}")
    writer = LeRobotWriter(
        config.out,
        fps=world.fps,
        cameras=dict.fromkeys(world.cameras, world.image_size),
        state_names=world.state_names,
        action_names=world.action_names,
        robot_type=config.env.split("/")[0],
        codec=config.codec,
    )
    folder = writer.root.parent / f".{writer.root.name}.episodes"
    flags = {"env": config.env, "noise": noise, "seed": config.seed, "image_size": world.image_size[0]}
    flags |= {"codec": config.codec}
    act, frames = partial(keep, folder, *flags.values()), 0
    # Episode n is of task n % kinds; as many more of a task as failed are tried, so the same are recorded every time.
    tried, solved = [0] * kinds, [0] * kinds
    with (
        ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool,
        writer,
        tqdm(total=each * kinds, unit="episode") as bar,
    ):
        while min(solved) < each:
            numbers = [t + kinds * (tried[t] + i) for t in range(kinds) for i in range(each - solved[t])]
            last = config.seed + max(numbers) // per_scene
            if last >= sim.VALIDATION_SEEDS:
                raise InputError(f"scene {last} is needed, but from {sim.VALIDATION_SEEDS} on they are for evaluations")
            begun(folder, flags)
            together = max(1, min(8, len(numbers) // (2 * config.workers)))  # of one task, which is quicker
            for number, path in zip(numbers, pool.map(act, numbers, chunksize=together), strict=True):
                tried[number % kinds] += 1
                if (episode := kept(path, world.cameras)) is not None:
                    writer.add_episode(**episode)
                    solved[number % kinds] += 1
                    frames += len(episode["actions"])
                    bar.update()
            for task, attempts, successes in zip(world.tasks, tried, solved, strict=True):
                if attempts >= 20 and successes < attempts / 20:
                    what = f"{successes} of {attempts} episodes" + (f" of {task}" if kinds > 1 else "")
                    raise InputError(f"the expert solved {what} with --noise {noise}; lower it")
    shutil.rmtree(folder)
    failed = ", ".join(f"{n} of {t}" for t, n in zip(world.tasks, map(sub, tried, solved), strict=True) if n)
    left_out = f"{sum(tried) - sum(solved)} failed episodes left out" + (f": {failed}" if kinds > 1 and failed else "")
    print(f"{config.out}: {each * kinds} episodes, {frames} frames ({left_out})")


if __name__ == "__main__":
    try:
        main(tyro.cli(CollectConfig, prog="python -m vla.collect"))
    except InputError as error:
        sys.exit(f"error: {error}")
