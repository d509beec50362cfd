"""Record demonstrations of an environment's expert as a LeRobot v3.0 data set.

python -m vla.collect tabletop --out data/tabletop --episodes 400
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from vla import InputError, sim
from vla.data.write import LeRobotWriter


@dataclass(frozen=True)
class CollectConfig:
    """Record demonstrations of an environment's expert."""

    # Environment.
    env: Annotated[Literal["tabletop"], tyro.conf.Positional]
    # Folder of the new data set.
    out: str
    # Successful episodes to record; failed ones are discarded.
    episodes: int = 400
    # First seed of the scenes; those from 500,000 on are kept for evaluations.
    seed: int = sim.DEMONSTRATION_SEEDS
    # Standard deviation of noise on the motions that are executed, as a share of their range: the recorded action is
    # the expert's own, so the policy learns to come back (DART: Laskey et al., 2017).
    noise: float = 0.3
    # How images are stored: png keeps every pixel; av1 and h264 write video, which is smaller and loses some detail.
    codec: Literal["png", "av1", "h264"] = "png"
    # Processes that act.
    workers: int = os.cpu_count() or 1


def demonstrate(env: str, noise: float, seed: int, number: int) -> tuple[dict, bool]:
    """Episode `number` of the expert, as LeRobotWriter.add_episode takes it, and whether it succeeded."""
    world, random = sim.make(env), np.random.default_rng((seed, number, 1))
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


def main(config: CollectConfig) -> None:
    world = sim.make(config.env)
    if config.episodes < 1:
        raise InputError(f"--episodes is {config.episodes}; expected at least 1")
    writer = LeRobotWriter(
        config.out,
        fps=world.fps,
        cameras=dict.fromkeys(world.cameras, world.image_size),
        state_names=world.state_names,
        action_names=world.action_names,
        robot_type=config.env,
        codec=config.codec,
    )
    kept = tried = frames = 0
    act = partial(demonstrate, config.env, config.noise, config.seed)
    with (
        ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool,
        writer,
        tqdm(total=config.episodes, unit="episode") as bar,
    ):
        while kept < config.episodes:
            wanted = config.episodes - kept  # as many more as failed, in order: the same are recorded every time
            last = config.seed + (tried + wanted - 1) // world.tasks_per_scene
            if last >= sim.VALIDATION_SEEDS:
                raise InputError(f"scene {last} is needed, but from {sim.VALIDATION_SEEDS} on they are for evaluations")
            for episode, success in pool.map(act, range(tried, tried + wanted), chunksize=8):
                tried += 1
                if success:
                    writer.add_episode(**episode)
                    kept, frames = kept + 1, frames + len(episode["actions"])
                    bar.update()
            if tried >= 20 and kept < tried / 20:
                raise InputError(f"the expert solved {kept} of {tried} episodes with --noise {config.noise}; lower it")
    print(f"{config.out}: {kept} episodes, {frames} frames ({tried - kept} failed episodes left out)")


if __name__ == "__main__":
    try:
        main(tyro.cli(CollectConfig, prog="python -m vla.collect"))
    except InputError as error:
        sys.exit(f"error: {error}")
