"""Act in an environment with an exported policy, and count successes.

python -m vla.rollout --policy runs/demo/export --env tabletop
"""

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from vla import InputError, in_one_line, keyed, sim, told
from vla.config import MovedConfig
from vla.images import gif
from vla.model.policy import VLAPolicy
from vla.model.spec import PolicyConfig
from vla.options import at_home, check_policy, run_folder, within
from vla.sim.episodes import Episode, Lane, film_fps
from vla.workers import Workers

WORLDS = 8  # at most in each of several processes: one of Meta-World takes 130 MB


def rollout(
    policy: VLAPolicy | Literal["expert"],
    env: str,
    seeds: list[int],
    batch_size: int = 128,
    record: Collection[int] = (),
    progress: bool = False,
    see: Callable[[int, dict], dict] = lambda episode, observation: observation,
    go_on: Callable[[], bool] = lambda: True,
    image_size: int = 0,
    ensemble: float | None = None,
    workers: int = 0,
) -> list[Episode]:
    """One episode for each seed, about batch_size at once, in one batch of inference those that wait for actions.

    Once go_on() is false no further action is taken, and only the episodes that are done are returned.

    A policy executes the first n_action_steps of each chunk; or with `ensemble` one action, the mean of all that were
    predicted for this step, the one i predictions younger than the oldest weighing exp(-ensemble * i) (Zhao et al.,
    2023, "Learning fine-grained bimanual manipulation with low-cost hardware"). Episodes of the places in `record` keep
    their frames. `see` makes of an episode's place and observation what the policy sees. image_size: see sim.make.
    workers: processes that the environments run in (0: in this one). Results do not depend on batch_size and workers
    but for rounding.
    """
    episodes: list[Episode | None] = [None] * len(seeds)
    to_begin = deque((i, seed, i in record) for i, seed in enumerate(seeds))
    workers = min(workers, len(seeds))
    lanes = max(1, workers)
    each = -(-min(batch_size, len(seeds)) // lanes)
    size = lanes * (min(each, WORLDS) if workers else each)
    predicted: dict[int, deque[tuple[int, np.ndarray]]] = {}  # with `ensemble`: the step of each chunk, and the chunk

    def actions(waiting: dict[int, tuple[int, dict]]) -> dict[int, np.ndarray]:
        """What each of these executes next, float [n, A]."""
        seen = [see(i, observation) for i, (_, observation) in waiting.items()]
        # Noise by (seed, steps so far), so that an episode is the same in whatever batch it runs.
        counters = [seeds[i] * 10_000 + steps for i, (steps, _) in waiting.items()]
        batch = policy.collate(seen, keyed.derive(0, torch.tensor(counters)))
        # Of one shape, that of compiled layers and of a captured graph; and who waits with whom, which is chance among
        # processes, changes nothing. With neither it would only cost time.
        if workers or next(policy.parameters()).device.type != "cpu":
            batch = {name: torch.cat([v, v[:1].expand(size - len(v), *v.shape[1:])]) for name, v in batch.items()}
        chunks = policy.predict_chunk(batch)[: len(seen)].float().cpu().numpy()
        chunks = dict(zip(waiting, chunks[:, :, : len(policy.driven.action_names)], strict=True))
        if ensemble is None:
            return {i: chunk[: policy.config.model.n_action_steps] for i, chunk in chunks.items()}
        means = {}
        for i, chunk in chunks.items():
            now, past = waiting[i][0], predicted.setdefault(i, deque(maxlen=len(chunk)))
            past.append((now, chunk))
            weights = np.exp(-ensemble * np.arange(len(past)))
            means[i] = np.average([chunk[now - step] for step, chunk in past], axis=0, weights=weights)[None]
        return means

    crew = Workers(partial(Lane, env, image_size, policy == "expert"), workers)
    with crew, tqdm(total=len(seeds), unit="episode", disable=not progress) as bar:
        first = [to_begin.popleft() for _ in range(min(size, len(seeds)))]
        for lane in range(lanes):
            crew.send(lane, first[lane::lanes], {})
        while crew.busy and go_on():
            answers = crew.receive()
            waiting = {i: each for _, (own, _) in answers for i, each in own.items()}
            chosen = actions(waiting) if waiting else {}
            for lane, (own, done) in answers:
                for i, episode in done.items():
                    episodes[i] = episode
                    predicted.pop(i, None)
                bar.update(len(done))
                begin = [to_begin.popleft() for _ in range(min(len(done), len(to_begin)))]
                if own or begin:
                    crew.send(lane, begin, {i: chosen[i] for i in own})
    return [episode for episode in episodes if episode]


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate (1927)."""
    z, rate = 1.959964, successes / episodes
    middle = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) / (1 + z * z / episodes)
    return max(0.0, middle - half), min(1.0, middle + half)


def grid(episodes: list[Episode]) -> np.ndarray:
    """Recorded episodes side by side under their instructions, each held at its end until the last one ends.

    A green edge marks success, a red one failure. Returns uint8 [L, rows, columns, 3].
    """
    length = max(len(episode.frames) for episode in episodes) + 5
    videos = []
    for episode in episodes:
        frames = [_captioned(frame, episode.instruction, None) for frame in episode.frames]
        last = _captioned(episode.frames[-1], episode.instruction, episode.success)
        videos.append(np.stack(frames + [last] * (length - len(frames))))
    columns = math.ceil(math.sqrt(len(videos)))
    videos += [np.zeros_like(videos[0])] * (-len(videos) % columns)
    rows = [np.concatenate(videos[i : i + columns], axis=2) for i in range(0, len(videos), columns)]
    return np.concatenate(rows, axis=1)


def _captioned(frame: np.ndarray, instruction: str, success: bool | None) -> np.ndarray:
    height, width = frame.shape[:2]
    edge = (70, 70, 76) if success is None else (30, 160, 70) if success else (200, 40, 40)
    picture = Image.new("RGB", (width + 8, height + 36), edge)
    draw = ImageDraw.Draw(picture)
    draw.rectangle([4, 4, width + 3, 31], fill=(255, 255, 255))
    draw.multiline_text((8, 4), textwrap.fill(instruction, width // 6), fill=(20, 20, 20), font_size=11, spacing=1)
    picture.paste(Image.fromarray(frame), (4, 32))
    return np.asarray(picture)


def check_fits(policy: PolicyConfig, env: str, dataset: str = "") -> str:
    """The name of the policy's data set whose robot the environment has; `dataset` chooses one.

    Raises InputError where no robot is that of the environment, and where several are and none is chosen.
    """
    world, fitting, differences = sim.make(env), [], []
    for spec in (policy.datasets[policy.place(dataset)],) if dataset else policy.datasets:
        differing = [
            f"the {name} of {spec.name}: {', '.join(getattr(spec, name))}; those of {env}: "
            f"{', '.join(getattr(world, name))}"
            for name in ("cameras", "state_names", "action_names")
            if tuple(getattr(spec, name)) != tuple(getattr(world, name))
        ]
        differences += differing
        fitting += [] if differing else [spec.name]
    if not fitting:
        raise InputError(f"{'; '.join(differences)}; act in the environment that the policy's data came from")
    if len(fitting) > 1:
        names = " and of ".join(fitting)
        raise InputError(f"{env} has the robot of {names}; choose one with --dataset (in training --eval.dataset)")
    return fitting[0]


@dataclass(frozen=True)
class RolloutConfig(MovedConfig):
    """Act with an exported policy."""

    # Folder that VLAPolicy.from_pretrained takes: an export, a checkpoint, or a name on the Hugging Face hub.
    policy: str
    # Environment to act in: tabletop, metaworld, or metaworld/TASK.
    env: str
    # Episodes, on the seeds from `seed` on (default: 10 of each task, where the environment has several; else 100).
    episodes: int | None = None
    # First seed; training never sees scenes from this one on.
    seed: int = sim.TEST_SEEDS
    # Actions executed of each chunk (0: as the policy was configured).
    n_action_steps: int = 0
    # Predict at every step, and execute the mean of all that was predicted for it, the one i predictions younger than
    # the oldest weighing exp(-i * this), such as 0.01 (temporal ensembling: Zhao et al., 2023).
    ensemble: float | None = None
    # Data set of the policy whose robot acts (default: the one that fits the environment).
    dataset: str = ""
    # Also act with the expert, with an untrained policy, and with this policy blinded or misled.
    baselines: bool = False
    # Write the results here, as JSON.
    out: str = ""
    # Write a moving picture of some episodes here.
    gif: str = ""
    # Which ones, by their place.
    gif_episodes: tuple[int, ...] = tuple(range(9))
    # Episodes at once.
    batch_size: int = 128
    # Processes for the environments (default: one for each core in Meta-World; 0, which is this one, on the tabletop).
    workers: int | None = None
    # Height and width of what the environment draws: those of the data, where training resized its images (0: those of
    # the policy).
    image_size: int = 0
    # Where the policy runs.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(config: RolloutConfig) -> None:
    check_policy(config.policy)
    within("image_size", config.image_size, 0, None)
    world = sim.make(config.env, config.image_size)
    tasks, tiers = world.tasks, world.tiers
    count = config.episodes
    if count is None:
        count = 10 * len(tasks) if len(tasks) > 1 else 100
    within("episodes", count, 1, None)
    within("batch_size", config.batch_size, 1, None)
    within("seed", config.seed, 0, 2**32 - 1)
    for name in ("n_action_steps", "workers"):
        within(name, getattr(config, name) or 0, 0, None)
    within("ensemble", config.ensemble or 0, -1, None)
    shown = [i for i in config.gif_episodes if 0 <= i < count] if config.gif else []
    found = " ".join(map(str, config.gif_episodes))
    if config.gif_episodes != RolloutConfig.gif_episodes and not config.gif:
        raise InputError(f"--gif_episodes {found} has no effect without --gif; give a file, or leave it out")
    if config.gif and not shown:
        raise InputError(f"--gif_episodes {found} is none of the {count} episodes, which are counted from 0")
    if config.ensemble is not None and config.n_action_steps:
        raise InputError("--ensemble executes one action of each chunk; leave out --n_action_steps")
    if config.out and config.gif and Path(config.out).resolve() == Path(config.gif).resolve():
        raise InputError(f"--out and --gif are both {config.gif}; give each a file of its own")
    for file in filter(None, (config.out, config.gif)):
        if Path(file).is_dir():
            raise InputError(f"{file} is a folder, expected the name of a file")
        with _writing(file):  # tried now, and not when there is something to lose
            path = Path(file).resolve()  # a link stays
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
    try:
        torch.zeros(1, device=config.device).item()  # of which some hold none
    except (AssertionError, ImportError, RuntimeError) as failure:
        reason = in_one_line(failure).partition(". ")[0]
        raise InputError(f"--device {config.device} cannot be used ({reason}); give cpu, or leave it out") from None
    policy = VLAPolicy.from_pretrained(config.policy, **config.moved()).to(config.device)
    dataset = check_fits(policy.config, config.env, config.dataset)
    policy.drive(dataset)
    within("n_action_steps", config.n_action_steps, 0, policy.config.model.chunk_size)
    steps = config.n_action_steps or policy.config.model.n_action_steps
    policy.config = replace(policy.config, model=replace(policy.config.model, n_action_steps=steps))

    seeds = list(range(config.seed, config.seed + count))
    workers = processes(world) if config.workers is None else config.workers
    options = {"env": config.env, "seeds": seeds, "batch_size": config.batch_size, "workers": workers}
    options |= {"ensemble": config.ensemble, "image_size": config.image_size or max(policy.config.image_size)}
    started = time.perf_counter()
    episodes = rollout(policy, record=shown, progress=True, **options)
    result = summary(episodes, tiers) | {
        "env": config.env,
        "policy": config.policy,
        "dataset": dataset,
        "episodes_per_task": count / len(tasks),
        "n_action_steps": steps if config.ensemble is None else 1,
        "ensemble": config.ensemble,
        "image_size": options["image_size"],
        "seconds": time.perf_counter() - started,
        **origin(Path(config.policy), config.device),
    }
    if config.baselines:
        untrained = policy.untrained().to(config.device).eval()
        untrained.drive(dataset)
        words = [episode.instruction for episode in episodes]
        baselines = {
            "expert": rollout("expert", **options),
            "untrained": rollout(untrained, **options),
            "images blanked": rollout(policy, see=lambda i, seen: seen | {"images": 0 * seen["images"]}, **options),
            "told another scene's instruction": rollout(
                policy, see=lambda i, seen: seen | {"instruction": words[i - 1]}, **options
            ),
        }
        result["baselines"] = {name: rate(done, tiers) for name, done in baselines.items()}
    for name, baseline in result.get("baselines", {}).items():
        mean = f", mean of the {len(tiers)} tiers {baseline['tier_mean']:.1f} %" if "tier_mean" in baseline else ""
        print(f"{name}: {_percent(baseline)}{mean}")
    if tiers:
        print(table(result, tiers))
    if "tier_mean" in result:
        print(f"mean of the {len(tiers)} tiers: {result['tier_mean']:.1f} %")
    scenes = "scenes never seen in training" if config.seed >= sim.TEST_SEEDS else "scenes"
    print(f"success rate in {config.env}: {_percent(result)} on {count} {scenes}", flush=True)
    if config.out:
        with _writing(config.out):
            Path(config.out).write_text(json.dumps(result, indent=2) + "\n")
    if config.gif:
        film = gif(grid([episodes[i] for i in shown]), film_fps(world.fps))
        with _writing(config.gif):
            Path(config.gif).write_bytes(film)


@contextlib.contextmanager
def _writing(file: str):
    try:
        yield
    except OSError as failure:
        raise InputError(f"{file} cannot be written ({failure}); make room, or choose another file") from None


def processes(world) -> int:
    """How many processes its episodes are worth here, where this machine's cores are shared by LOCAL_WORLD_SIZE."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if world.own_process else 0


def origin(policy: Path, device: str) -> dict:
    """Where a result comes from: train_seconds (None if unknown), command, commit (None if unknown), hardware."""
    run = run_folder(policy.parent if policy.name == "export" else policy) / "result.json"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    accelerator = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    return {
        "train_seconds": json.loads(run.read_text())["seconds"] if run.is_file() else None,
        "command": shlex.join(["python", "-m", "vla.rollout", *sys.argv[1:]]),
        "commit": commit,
        "hardware": f"{accelerator}{os.cpu_count()} CPU cores",
    }


def rate(episodes: list[Episode], tiers: dict[str, tuple[str, ...]] | None = None) -> dict:
    """success_rate, its 95 % interval, and the number of episodes, together and in each of the tiers that was played.

    With episodes of all tiers also tier_mean, the mean of their rates in percent.
    """
    successes, count = sum(episode.success for episode in episodes), len(episodes)
    whole = {"success_rate": successes / count, "interval": interval(successes, count), "episodes": count}
    if not tiers:
        return whole
    played = {tier: [episode for episode in episodes if episode.task in tasks] for tier, tasks in tiers.items()}
    by_tier = {tier: rate(each) for tier, each in played.items() if each}
    if len(by_tier) == len(tiers):
        whole["tier_mean"] = 100 * sum(each["success_rate"] for each in by_tier.values()) / len(tiers)
    return whole | {"tiers": by_tier}


def grouped(episodes: list[Episode], key: Callable[[Episode], str]) -> dict[str, list[Episode]]:
    """Episodes by what the key gives, in its order."""
    groups: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=key):
        groups.setdefault(key(episode), []).append(episode)
    return groups


def summary(episodes: list[Episode], tiers: dict[str, tuple[str, ...]]) -> dict:
    """Their rate, in tiers too, all that it comes from, and the rate of each task and instruction."""
    return {
        **rate(episodes, tiers),
        "tasks": {task: rate(each) for task, each in grouped(episodes, lambda e: e.task).items()},
        "mean_steps": sum(episode.steps for episode in episodes) / len(episodes),
        "seeds": [episode.seed for episode in episodes],
        "successes": [episode.success for episode in episodes],
        "instructions": {
            text: {"success_rate": rate(each)["success_rate"], "episodes": len(each)}
            for text, each in grouped(episodes, lambda e: e.instruction).items()
        },
    }


def table(result: dict, tiers: dict[str, tuple[str, ...]]) -> str:
    """Tiers, and under each its tasks that were played, with their rates."""
    lines = []
    for tier in result["tiers"]:
        tasks = {f"  {task}": result["tasks"][task] for task in tiers[tier] if task in result["tasks"]}
        lines += [f"{name:32}{_percent(each)}" for name, each in ({tier: result["tiers"][tier]} | tasks).items()]
    return "\n".join(lines)


def _percent(result: dict) -> str:
    low, high = result["interval"]
    return f"{100 * result['success_rate']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


if __name__ == "__main__":
    import tyro

    with told():
        main(tyro.cli(RolloutConfig, args=at_home(sys.argv[1:]), prog="python -m vla.rollout"))
