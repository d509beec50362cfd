"""Act in an environment with an exported policy, and count successes.

python -m vla.rollout --policy runs/demo/export --env tabletop
"""

import json
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from vla import InputError, keyed, sim
from vla.log import gif
from vla.model.policy import VLAPolicy
from vla.model.spec import PolicyConfig, check


@dataclass
class Episode:
    """How one episode went; frames are kept if asked for, uint8 [L, h, w, 3]."""

    seed: int
    instruction: str
    success: bool = False
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)


def rollout(
    policy: VLAPolicy | Literal["expert"],
    env: str,
    seeds: list[int],
    batch_size: int = 128,
    record: int = 0,
    progress: bool = False,
    see: Callable[[int, dict], dict] = lambda episode, observation: observation,
    go_on: Callable[[], bool] = lambda: True,
) -> list[Episode]:
    """One episode for each seed, up to batch_size at once with their inference in one batch.

    Once go_on() is false no further action is taken, and only the episodes that are done are returned.

    A policy executes the first n_action_steps of each chunk. The first `record` episodes keep their frames. `see` makes
    of an episode's number and observation what the policy sees. Results do not depend on batch_size but for rounding.
    """
    episodes = []
    bar = tqdm(total=len(seeds), unit="episode", disable=not progress)
    for start in range(0, len(seeds), batch_size):
        worlds = [sim.make(env) for _ in seeds[start : start + batch_size]]
        observations = [world.reset(seed) for world, seed in zip(worlds, seeds[start:], strict=False)]
        batch = [Episode(seed, world.instruction) for world, seed in zip(worlds, seeds[start:], strict=False)]
        running = list(range(len(worlds)))
        while running:
            if not go_on():
                return [*episodes, *(episode for i, episode in enumerate(batch) if i not in running)]
            if policy == "expert":
                chunks = np.stack([worlds[i].expert() for i in running])[:, None]  # [running, 1, A]
            else:
                seen = [see(start + i, observations[i]) for i in running]
                # Noise by (seed, steps so far), so that an episode is the same in whatever batch it runs.
                key = keyed.derive(0, torch.tensor([batch[i].seed * 10_000 + batch[i].steps for i in running]))
                chunks = policy.predict_chunk(policy.collate(seen, key)).float().cpu().numpy()
                chunks = chunks[:, : policy.config.model.n_action_steps, : len(policy.driven.action_names)]
            for i, chunk in zip(list(running), chunks, strict=True):
                for action in chunk:
                    if start + i < record:
                        batch[i].frames.append(worlds[i].render())
                    observations[i], batch[i].success, done = worlds[i].step(action)
                    batch[i].steps += 1
                    if done:
                        if start + i < record:
                            batch[i].frames.append(worlds[i].render())
                        running.remove(i)
                        bar.update()
                        break
        episodes += batch
    bar.close()
    return episodes


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
class RolloutConfig:
    """Act with an exported policy."""

    # Folder that VLAPolicy.from_pretrained takes: an export, a checkpoint, or a name on the Hugging Face hub.
    policy: str
    # Environment to act in.
    env: Literal["tabletop"]
    # Episodes, on the seeds from `seed` on.
    episodes: int = 100
    # First seed; training never sees scenes from this one on.
    seed: int = sim.TEST_SEEDS
    # Actions executed of each chunk (0: as the policy was configured).
    n_action_steps: int = 0
    # Data set of the policy whose robot acts (default: the one that fits the environment).
    dataset: str = ""
    # Also act with the expert, with an untrained policy, and with this policy blinded or misled.
    baselines: bool = False
    # Write the results here, as JSON.
    out: str = ""
    # Write a moving picture of the first 9 episodes here.
    gif: str = ""
    # Where the policy runs.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(config: RolloutConfig) -> None:
    if not Path(config.policy, "config.json").is_file() and (
        Path(config.policy).exists() or config.policy.count("/") != 1
    ):
        raise InputError(
            f"--policy {config.policy} is no folder with a config.json; give an export, such as runs/NAME/export"
        )
    if config.episodes < 1:
        raise InputError(f"--episodes is {config.episodes}; expected at least 1")
    for file in filter(None, (config.out, config.gif)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # now, and not when there is something to lose
    policy = VLAPolicy.from_pretrained(config.policy).to(config.device)
    dataset = check_fits(policy.config, config.env, config.dataset)
    policy.drive(dataset)
    steps = config.n_action_steps or policy.config.model.n_action_steps
    policy.config = replace(policy.config, model=replace(policy.config.model, n_action_steps=steps))
    check(policy.config)

    seeds = list(range(config.seed, config.seed + config.episodes))
    episodes = rollout(policy, config.env, seeds, record=9 if config.gif else 0, progress=True)
    result = summary(episodes) | {
        "env": config.env,
        "policy": config.policy,
        "dataset": dataset,
        "n_action_steps": steps,
    }
    if config.baselines:
        untrained = policy.untrained().to(config.device).eval()
        untrained.drive(dataset)
        words = [episode.instruction for episode in episodes]
        baselines = {
            "expert": rollout("expert", config.env, seeds),
            "untrained": rollout(untrained, config.env, seeds),
            "images blanked": rollout(
                policy, config.env, seeds, see=lambda i, seen: seen | {"images": 0 * seen["images"]}
            ),
            "told another scene's instruction": rollout(
                policy, config.env, seeds, see=lambda i, seen: seen | {"instruction": words[i - 1]}
            ),
        }
        result["baselines"] = {
            name: {key: summary(done)[key] for key in ("success_rate", "interval")} for name, done in baselines.items()
        }
    if config.gif:
        Path(config.gif).write_bytes(gif(grid([e for e in episodes if e.frames]), sim.make(config.env).fps))
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=2) + "\n")
    for name, baseline in result.get("baselines", {}).items():
        print(f"{name}: {_percent(baseline)}")
    scenes = "scenes never seen in training" if config.seed >= sim.TEST_SEEDS else "scenes"
    print(f"success rate in {config.env}: {_percent(result)} on {config.episodes} {scenes}")


def summary(episodes: list[Episode]) -> dict:
    """success_rate, its 95 % interval, and all that it comes from."""
    by_instruction: dict[str, list[bool]] = {}
    for episode in episodes:
        by_instruction.setdefault(episode.instruction, []).append(episode.success)
    successes = sum(episode.success for episode in episodes)
    return {
        "success_rate": successes / len(episodes),
        "interval": interval(successes, len(episodes)),
        "episodes": len(episodes),
        "mean_steps": sum(episode.steps for episode in episodes) / len(episodes),
        "seeds": [episode.seed for episode in episodes],
        "successes": [episode.success for episode in episodes],
        "instructions": {
            text: {"success_rate": sum(s) / len(s), "episodes": len(s)} for text, s in sorted(by_instruction.items())
        },
    }


def _percent(result: dict) -> str:
    low, high = result["interval"]
    return f"{100 * result['success_rate']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(RolloutConfig, prog="python -m vla.rollout"))
    except InputError as error:
        sys.exit(f"error: {error}")
