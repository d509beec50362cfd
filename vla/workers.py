"""Functions that work at the same time, in processes of their own. Knows nothing of what they do."""

import contextlib
import os
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread

from vla import InputError

WORKER = "VLA_WORKER"  # in the environment of each process: its number


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
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        for worker in range(count):
            ours, theirs = Pipe()
            # Not by multiprocessing, which would import the main script in each, and all that it needs.
            command = [sys.executable, "-m", "vla.workers", str(theirs.fileno())]
            options = {
                "env": environment | {WORKER: str(worker)},
                "pass_fds": [theirs.fileno()],
                "start_new_session": True,
            }
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, **options))
            self.connections.append(ours)
            theirs.close()
        for connection in self.connections:  # all have started: what is large waits until a process reads
            connection.send(make)
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
