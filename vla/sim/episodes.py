"""Episodes side by side. Knows nothing of what chooses the actions."""

from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from vla import sim

FILM_FPS = 20  # at most, of the frames that an episode keeps


@dataclass
class Episode:
    """How one episode went; frames are kept if asked for, uint8 [L, h, w, 3]."""

    seed: int
    instruction: str
    success: bool = False
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)
    task: str = ""


def film_stride(fps: float) -> int:
    """n, where every n-th frame of an episode is kept."""
    return -(-round(fps) // FILM_FPS)


def film_fps(fps: float) -> int:
    """Of the frames that are kept of a robot that acts at this rate."""
    return round(fps / film_stride(fps))


def act(world, seed: int, expert: bool, film: bool) -> Generator[tuple[int, dict], np.ndarray, Episode]:
    """One episode: gives (steps so far, observation) whenever it needs actions, and is sent them, float [n, A]."""
    observation, done = world.reset(seed), False
    episode = Episode(seed, world.instruction, task=world.task)
    while not done:
        chunk = world.expert()[None] if expert else (yield episode.steps, observation)
        for i, action in enumerate(chunk):
            if film and episode.steps % film_stride(world.fps) == 0:
                episode.frames.append(world.render())
            observation, episode.success, done = world.step(action, look=not expert and i == len(chunk) - 1)
            episode.steps += 1
            if done:
                break
    if film:
        episode.frames.append(world.render())
    return episode


class Lane:
    """The episodes that one process runs, each in a world of its own. expert: it acts, and nobody is asked."""

    def __init__(self, env: str, image_size: int, expert: bool):
        self.env, self.image_size, self.expert = env, image_size, expert
        self.running, self.idle = {}, []

    def __call__(
        self, begin: list[tuple[int, int, bool]], actions: dict[int, np.ndarray]
    ) -> tuple[dict[int, tuple[int, dict]], dict[int, Episode]]:
        """Go on with all episodes, until each needs actions or is done.

        begin: number, seed, and whether to film it, of each new episode. actions: by the numbers of the others.
        Returns what `act` gives by number, and the episodes that are done by number.
        """
        for number, seed, film in begin:
            world = self.idle.pop() if self.idle else sim.make(self.env, self.image_size)
            self.running[number] = world, act(world, seed, self.expert, film)
        waiting, done = {}, {}
        for number, (world, episode) in list(self.running.items()):
            try:
                waiting[number] = episode.send(actions.get(number))
            except StopIteration as end:
                done[number] = end.value
                self.idle.append(world)
                del self.running[number]
        return waiting, done
