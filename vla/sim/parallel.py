"""Episodes side by side, in this process or in others. Knows nothing of what chooses the actions."""

import contextlib
import os
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread

import numpy as np

from vla import InputError, sim

WORKER = "VLA_WORKER"  # in the environment of each process of Workers: its number
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
    """Every how manieth frame of an episode is kept."""
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


class Workers:
    """Functions that work at the same time, each in a process of its own; or one in this process.

    make: called without arguments in each process, gives the function that is called there; pickled, so that neither
    what it is of nor what that imports should be heavy. count: processes; 0 for this one alone.
    An exception in a function is raised by `receive`: from another process an InputError, or else a RuntimeError that
    holds its traceback. The processes end at once with this object's block, or with this process.
    """

    def __init__(self, make: Callable[[], Callable], count: int):
        self.here = None if count else make()
        self.answers, self.connections, self.processes = deque(), [], []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        for worker in range(count):
            ours, theirs = Pipe()
            # Not by multiprocessing, which would import the main script in each, and all that it needs.
            command = [sys.executable, "-m", "vla.sim.parallel", str(theirs.fileno())]
            options = {
                "env": environment | {WORKER: str(worker)},
                "pass_fds": [theirs.fileno()],
                "start_new_session": True,
            }
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, **options))
            self.connections.append(ours)
            theirs.close()
            ours.send(make)
        self.busy: list[int] = []  # those that have not answered, as often as they were called

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            with process:
                process.kill()

    def send(self, worker: int, *arguments) -> None:
        """Have its function called with these, after what it was sent before."""
        self.busy.append(worker)
        if self.here:
            self.answers.append((worker, self.here(*arguments)))
        else:
            with contextlib.suppress(ConnectionError):  # it has ended: `receive` tells why
                self.connections[worker].send(arguments)

    def receive(self) -> list[tuple[int, object]]:
        """Worker and what its function returned, of those that are ready; waits for one."""
        if self.here:
            answers, self.answers = list(self.answers), deque()
        else:
            ready = wait([self.connections[worker] for worker in set(self.busy)])
            answers = sorted(map(self._answer, map(self.connections.index, ready)))
        for worker, answer in answers:
            self.busy.remove(worker)
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def map(self, items: list) -> Iterator:
        """What a function returns of each of these, in their order."""
        coming, given, found = enumerate(items), [deque() for _ in self.processes or [None]], {}

        def give(worker: int) -> None:
            for number, item in islice(coming, 1):
                given[worker].append(number)
                self.send(worker, item)

        for worker in 2 * list(range(len(given))):  # so that none waits while a result is made use of
            give(worker)
        for number in range(len(items)):
            while number not in found:
                for worker, answer in self.receive():
                    found[given[worker].popleft()] = answer
                    give(worker)
            yield found.pop(number)

    def _answer(self, worker: int) -> tuple[int, object]:
        try:
            return worker, self.connections[worker].recv()
        except (EOFError, ConnectionError):
            code = self.processes[worker].wait()
            raise RuntimeError(f"process {worker} of {len(self.processes)} ended by itself, code {code}") from None


def main(connection: Connection) -> None:
    """What a process of Workers does."""
    Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()  # where the process that began it ends
    with contextlib.suppress(EOFError, ConnectionError):  # the other end was closed
        try:
            work = connection.recv()()
            while True:
                connection.send(work(*connection.recv()))
        except (EOFError, ConnectionError):
            raise
        except InputError as error:
            connection.send(error)
        except Exception:  # told in words: not each can be sent
            connection.send(RuntimeError(traceback.format_exc()))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
