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
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from vla import InputError, sim, told
from vla.data.encode import Pictures, encode
from vla.data.write import LeRobotWriter
from vla.options import at_home, within
from vla.workers import Workers

EPISODES = 400  # unless it is said how many


@dataclass(frozen=True)
class CollectConfig:
    """Record demonstrations of an environment's expert."""

    # Environment: tabletop, metaworld, or metaworld/TASK.
    env: Annotated[str, tyro.conf.Positional]
    # Folder of the new data set.
    out: str
    # Successful episodes to record (default: 400), equally many of each task of the environment; failed ones are
    # discarded.
    episodes: int | None = None
    # First seed of the scenes; those from 500,000 on are kept for evaluations.
    seed: int = sim.DEMONSTRATION_SEEDS
    # Standard deviation of noise on the motions that are executed, as a share of their range: the recorded action is
    # the expert's own, so the policy learns to come back (DART: Laskey et al., 2017). By default 0.3 on the tabletop,
    # none in Meta-World.
    noise: float | None = None
    # Steps that are recorded after the first success, in which the expert goes on: a policy that is not quite there yet
    # then does too.
    after_success: int = 0
    # How images are stored: png keeps every pixel; av1 and h264 write video, which is smaller and loses some detail.
    codec: Literal["png", "av1", "h264"] = "png"
    # Processes that act (0: this one).
    workers: int = len(os.sched_getaffinity(0))
    # Episodes of each task, in place of --episodes.
    episodes_per_task: int = 0
    # Height and width of the images in pixels (0: the environment's own, 64 on the tabletop, 224 in Meta-World).
    image_size: int = 0


make = cache(sim.make)  # an environment takes a while to make


def demonstrate(
    env: str, noise: float, seed: int, number: int, image_size: int = 0, after_success: int = 0
) -> dict | None:
    """Episode `number` of the expert, as LeRobotWriter.add_episode takes it, or None if it failed."""
    world, random = make(env, image_size), np.random.default_rng((seed, number, 1))
    scene, task = divmod(number, world.tasks_per_scene)
    world.reset(seed + scene, task)
    actions, executed, solved, last = [], [], False, world.max_steps
    while len(actions) < last:
        actions.append(world.expert())
        executed.append(actions[-1] + noise * world.noise_scale * random.standard_normal(len(actions[-1])))
        _, success, _ = world.step(executed[-1], look=False)
        if success and not solved:
            solved, last = True, min(last, len(actions) + after_success)
    if not solved:
        return None
    # Once more, to look: failures are the longest episodes, and pictures take the most time.
    seen = [world.reset(seed + scene, task), *(world.step(action)[0] for action in executed[:-1])]
    images = np.stack([observation["images"] for observation in seen], axis=1)  # [N, L, 3, h, w]
    return {
        "images": dict(zip(world.cameras, images, strict=True)),
        "state": np.stack([observation["state"] for observation in seen]),
        "actions": np.stack(actions),
        "instruction": world.instruction,
    }


def kept(numbers: list[int], **options) -> list[Path]:
    """The files of these episodes."""
    return [_kept(number, **options) for number in numbers]


def _kept(number: int, folder: Path, codec: str, env: str, image_size: int, **options) -> Path:
    """The file of episode `number`, made unless it is there; of a failed one it is empty."""
    path = folder / f"{number}.npz"
    if not path.exists():
        episode = demonstrate(env, number=number, image_size=image_size, **options)
        for name, images in episode.pop("images").items() if episode else ():
            pictures = encode(images, codec, make(env, image_size).fps)
            episode |= {f"{field}/{name}": value for field, value in vars(pictures).items()}
        unfinished = path.with_suffix(".partial")
        try:
            with open(unfinished, "wb") as file:
                if episode:
                    np.savez(file, **episode)
            unfinished.rename(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}): make room, or choose another --out") from error
    return path


def read(path: Path, cameras: tuple[str, ...]) -> dict | None:
    """The episode in a file, as LeRobotWriter.add_episode takes it, or None if it failed."""
    if not path.stat().st_size:
        return None
    with np.load(path) as file:
        arrays = {name: value if value.ndim else value.item() for name, value in file.items()}
    images = {}
    for name in cameras:
        fields = {field: arrays.pop(f"{field}/{name}") for field in ("codec", "shape", "data", "ends", "histogram")}
        images[name] = Pictures(**fields | {"shape": tuple(fields["shape"].tolist())})
    return arrays | {"images": images}


def begin(folder: Path, flags: dict) -> None:
    """Make the folder of the episodes' files; what a run with other flags left there is removed."""
    path, text = folder / "flags.json", json.dumps(flags)
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(text)


def main(config: CollectConfig) -> None:
    for name in ("seed", "noise", "after_success", "workers", "image_size", "episodes_per_task"):
        within(name, getattr(config, name) or 0, 0, None)
    world = sim.make(config.env, config.image_size)
    tasks, noise = world.tasks, world.noise if config.noise is None else config.noise
    if config.episodes is not None and config.episodes_per_task:
        both = f"--episodes {config.episodes} and --episodes_per_task {config.episodes_per_task}"
        raise InputError(f"found {both}; give one of them")
    total = config.episodes_per_task * len(tasks) or (EPISODES if config.episodes is None else config.episodes)
    each, rest = divmod(total, len(tasks))
    if each < 1 or rest:
        expected = f"a multiple of its {len(tasks)} tasks, or --episodes_per_task" if len(tasks) > 1 else "at least 1"
        raise InputError(f"--episodes is {total}; expected {expected}")
    writer = LeRobotWriter(
        config.out,
        fps=world.fps,
        cameras=dict.fromkeys(world.cameras, world.image_size),
        state_names=world.state_names,
        action_names=world.action_names,
        robot_type=config.env.split("/")[0],
        codec=config.codec,
    )
    folder = writer.root.with_name(f".{writer.root.name}.episodes")
    flags = {"env": config.env, "noise": noise, "seed": config.seed, "codec": config.codec}
    flags |= {"image_size": world.image_size[0], "after_success": config.after_success}
    make_keep = partial(partial, kept, folder=folder, **flags)
    tried, solved, frames = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0), 0
    with Workers(make_keep, config.workers) as workers, writer, tqdm(total=total, unit="episode") as bar:
        while missing := {task: each - solved[task] for task in tasks if solved[task] < each}:
            # As many more of a task as failed, in order: the same are recorded every time.
            asked = [
                (task, (tasks.index(task) - config.seed) % len(tasks) + len(tasks) * (tried[task] + i))
                for task, count in missing.items()
                for i in range(count)
            ]
            last = config.seed + max(number for _, number in asked) // world.tasks_per_scene
            if last >= sim.VALIDATION_SEEDS:
                raise InputError(f"scene {last} is needed, but from {sim.VALIDATION_SEEDS} on they are for evaluations")
            begin(folder, flags)
            together = max(1, min(8, len(asked) // (4 * max(1, config.workers))))  # as changing the task takes a while
            numbers = [number for _, number in asked]
            files = workers.map([numbers[i : i + together] for i in range(0, len(numbers), together)])
            for (task, _), file in zip(asked, chain.from_iterable(files), strict=True):
                tried[task] += 1
                if (episode := read(file, world.cameras)) is not None:
                    writer.add_episode(**episode)
                    solved[task], frames = solved[task] + 1, frames + len(episode["actions"])
                    bar.update()
            for task in missing:
                if tried[task] >= 20 and solved[task] < tried[task] / 20:
                    found = f"{solved[task]} of {tried[task]} episodes of {task}"
                    raise InputError(f"the expert solved {found} with --noise {noise}; lower it")
    shutil.rmtree(folder)
    failed = {task: tried[task] - each for task in tasks if tried[task] > each}
    of = f": {', '.join(f'{count} of {task}' for task, count in failed.items())}" if len(tasks) > 1 and failed else ""
    left_out = f"{sum(failed.values())} failed episodes left out{of}"
    print(f"{config.out}: {total} episodes, {frames} frames ({left_out})")


if __name__ == "__main__":
    from vla import collect  # by the name that other processes know it by

    with told():
        collect.main(tyro.cli(collect.CollectConfig, args=at_home(sys.argv[1:]), prog="python -m vla.collect"))
