"""Work in processes of their own: episodes, and anything else."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from policies import tiny

from vla import InputError, rollout, sim
from vla.workers import WORKER, Workers


@pytest.mark.parametrize("film", [(), (0, 3)])
def test_number_of_processes_changes_no_episode(film):
    policy, seeds = tiny(), list(range(sim.TEST_SEEDS, sim.TEST_SEEDS + 5))
    found = [rollout.rollout(policy, "tabletop", seeds, 4, film, workers=workers) for workers in (0, 1, 2)]
    for episodes in found[1:]:
        for episode, expected in zip(episodes, found[0], strict=True):
            assert vars(episode) | {"frames": []} == vars(expected) | {"frames": []}
            assert np.array_equal(episode.frames, expected.frames)
    assert [bool(episode.frames) for episode in found[0]] == [i in film for i in range(5)]


def test_policy_sees_one_shape_whoever_waits(monkeypatch):
    policy, shapes = tiny(), set()
    predict = policy.predict_chunk
    policy.predict_chunk = lambda batch: (shapes.add(batch["state"].shape), predict(batch))[1]
    rollout.rollout(policy, "tabletop", list(range(5)), batch_size=4, workers=2)
    assert shapes == {(4, len(policy.driven.state_names))}


def test_expert_acts_in_processes():
    episodes = rollout.rollout("expert", "tabletop", list(range(7)), workers=2)
    assert [(e.seed, e.success) for e in episodes] == [(seed, True) for seed in range(7)]


def test_no_action_is_taken_once_it_is_not_to_go_on():
    calls = iter([True, True, False])
    episodes = rollout.rollout("expert", "tabletop", list(range(9)), 2, workers=2, go_on=lambda: next(calls))
    assert 1 <= len(episodes) < 9


def test_each_process_knows_its_number():
    with Workers(partial(partial, os.getenv), 2) as workers:
        for worker in 0, 1:
            workers.send(worker, WORKER)
            assert workers.receive() == [(worker, str(worker))]


def test_what_goes_wrong_in_a_process_is_told():
    with pytest.raises(InputError, match="environment 'nowhere' is unknown"):
        rollout.rollout("expert", "nowhere", [1], workers=1)
    with Workers(partial(partial, os._exit), 2) as workers:
        workers.send(1, 3)
        with pytest.raises(RuntimeError, match="process 1 of 2 ended by itself, code 3"):
            workers.receive()


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_process_that_was_killed_is_told_whatever_it_did(sent):
    with Workers(partial(partial, time.sleep), 1) as workers:
        workers.send(0, 0)
        workers.receive()
        for _ in range(sent):  # of two, one is still to be read
            workers.send(0, 1000)
        workers.processes[0].kill()
        workers.processes[0].wait()
        workers.send(0, 0)
        with pytest.raises(RuntimeError, match="process 0 of 1 ended by itself, code -9"):
            workers.receive()


class Odd(Exception):
    """It can be sent, but not be read again."""

    def __init__(self, text, number):
        super().__init__(text)


def refuse():
    raise InputError("no such thing")


def oddly():
    raise Odd("an odd failure", 1)


def test_what_goes_wrong_before_a_process_is_called_is_told():
    with Workers(refuse, 1) as workers:
        workers.processes[0].wait()
        workers.send(0)
        with pytest.raises(InputError, match=r"^no such thing$"):
            workers.receive()


def test_any_exception_of_a_process_is_told_with_its_traceback():
    with Workers(partial(partial, oddly), 1) as workers:
        workers.send(0)
        with pytest.raises(RuntimeError, match=r"in oddly\n(.*\n)*.*Odd: an odd failure"):
            workers.receive()


def halve(number):
    time.sleep(0.1 * (number % 3 == 0))
    return number / 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_what_they_are_made_of(count):
    with Workers(partial(partial, halve), count) as workers:
        assert list(workers.map(list(range(12)))) == [i / 2 for i in range(12)]
        assert list(workers.map([7])) == [3.5]
        assert list(workers.map([])) == []


def test_processes_end_with_the_block_whatever_they_do():
    with Workers(partial(partial, time.sleep), 2) as workers:
        workers.send(0, 1000)
    assert workers.processes[0].poll() == -9
    assert workers.processes[1].poll() is not None


ENDLESS = {
    "collect": "collect.main(collect.CollectConfig('tabletop', sys.argv[1], 400_000, workers=2))",
    "workers": "w = Workers(partial(partial, time.sleep), 2); w.send(0, 1000); w.send(1, 1000)",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_processes_end_with_one_that_is_killed(tmp_path, what):
    imports = "import sys, time; from functools import partial; from vla import collect; from vla.workers import *"
    (tmp_path / "script.py").write_text(f"{imports}\nif __name__ == '__main__':\n    {ENDLESS[what]}\n    input()\n")
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "set")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def running(pids):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        return [state for state in states if state.exists() and ") Z" not in state.read_text()]

    children, deadline = [], time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = [child.pid for child in psutil.Process(process.pid).children()]
    time.sleep(1)
    assert len(running(children)) >= 2
    process.kill()
    process.wait()
    while running(children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(children)


def test_interrupted_collection_ends_at_once(tmp_path):
    command = [sys.executable, "-c", "from vla import collect; from vla.collect import *; "]
    command[-1] += "collect.main(CollectConfig('tabletop', sys.argv[1], 400_000, workers=2))"
    command[-1] = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + command[-1]
    options = {"cwd": Path(__file__).parents[1], "stderr": subprocess.PIPE, "text": True}
    process, deadline = subprocess.Popen([*command, str(tmp_path / "set")], **options), time.monotonic() + 30
    while len(list(tmp_path.glob(".set.episodes/*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    made = len(list(tmp_path.glob(".set.episodes/*.npz")))
    time.sleep(0.5)
    assert len(list(tmp_path.glob(".set.episodes/*.npz"))) == made > 2
