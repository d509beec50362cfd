"""Processes that hang: all end, and say which one it was. What only takes long goes on."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time

import pytest
from test_guard import spoil
from test_signals import with_first
from training import (
    assert_equal,
    at_step,
    both,
    rank,
    the,
    train,
)

from vla import checkpoint, export, guard, restore
from vla.data.stream import Samples
from vla.model import VLAPolicy


def sleep_in(owner, name, step, seconds, hanging=(0,)):
    """A hook: the first call of an attribute after `step` steps takes this long, in the processes of these ranks."""

    def hook(found):
        due = []
        at_step(step, lambda: due.append(1), hanging)(found)

        def doze(*_):
            if due:
                due.clear()
                time.sleep(seconds)

        setattr(owner, name, with_first(doze, getattr(owner, name)))

    return hook


NO_PROGRESS = "error: no progress for 2 seconds (--guard.hang_seconds), so this run ends:"


@pytest.mark.parametrize(
    ("owner", "name", "doing"),
    [(Samples, "batch", "waiting for the data of step 6"), (VLAPolicy, "forward", "computing step 6")],
    ids=["data", "forward"],
)
def test_process_that_hangs_is_named_and_all_end(owner, name, doing, flags, tmp_path):
    own = ["--guard.hang_seconds", 2, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, before=sleep_in(owner, name, 5, 300, [1]), processes=2)
    assert [child.code for child in children] == [1, 1]
    assert NO_PROGRESS in children[1].stderr
    assert "in doze" in children[1].stderr  # where it stands
    for told in (child.stderr for child in children if NO_PROGRESS in child.stderr):
        assert re.search(r"^  process 0: computing step 6, backward, for \d s$", told, re.M)
        assert re.search(rf"^  process 1: {doing}, for \d s   <- behind the others$", told, re.M)


@pytest.mark.parametrize("stopped", [0, 1])
def test_process_that_is_stopped_is_named_and_the_other_ends(stopped, flags, tmp_path):
    # The main process holds the store through which the others hear of it: then they hear nothing.
    def stop():
        other = f"ps -o stat= -p $(cat {tmp_path}/{1 - stopped}) | grep -q '^[^Z]'"
        subprocess.Popen(["sh", "-c", f"while {other}; do sleep 0.1; done; kill -9 {os.getpid()}"])
        while b"step 6" not in the(guard.Watchdog).store.get(f"alive/{stopped}"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGSTOP)

    def hook(found):
        (tmp_path / str(rank())).write_text(str(os.getpid()))
        at_step(6, stop, [stopped])(found)

    own = ["--guard.hang_seconds", 2, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, before=hook, processes=2)
    assert children[stopped].code == -signal.SIGKILL
    assert children[1 - stopped].code == 1
    told = children[1 - stopped].stderr
    assert NO_PROGRESS in told
    known = "no word from it" if stopped == 0 else r"step 6, for \d s, then silent for \d s: stopped or dead"
    assert re.search(f"^  process {stopped}: {known}", told, re.M)


def test_single_process_that_hangs_ends_and_says_where(flags, tmp_path):
    own = ["--guard.hang_seconds", 1, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=sleep_in(VLAPolicy, "forward", 5, 300))
    assert child.code == 1
    assert re.search(r"^  process 0: computing step 6, for \d s$", child.stderr, re.M)
    assert "in doze" in child.stderr


def test_watchdog_can_be_turned_off(flags, tmp_path):
    hook = both(
        sleep_in(VLAPolicy, "forward", 5, 1.5),
        at_step(5, lambda: [thread.name for thread in threading.enumerate()].index("signals")),
    )
    (child,) = train(*flags, "--guard.hang_seconds", 0, "--run_dir", tmp_path / "run", before=hook)
    child.ok()


def test_long_evaluation_and_slow_step_that_move_are_no_hang(flags, tmp_path):
    def slow(found):
        due = []

        def doze(*_):
            if len(due) < 8:  # four micro-batches and four batches of an evaluation
                due.append(time.sleep(0.6))

        VLAPolicy.forward = with_first(doze, VLAPolicy.forward)

    own = ["--guard.hang_seconds", 2, "--micro_batch_size", 3, "--eval.samples", 12, "--steps", 1]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=slow)
    child.ok()


@pytest.mark.parametrize("processes", [1, 2])
def test_long_export_and_a_checkpoint_that_is_long_read_are_no_hang(processes, flags, tmp_path):
    def slow(found):
        def load(*arguments, original=restore.load):
            time.sleep(3)
            return original(*arguments)

        def write(*arguments, original=export.export, **named):
            time.sleep(3)
            original(*arguments, **named)

        restore.load, export.export = load, write

    own = ("--guard.hang_seconds", 2, "--guard.bad_steps", 3, "--checkpoint.every", 4, "--checkpoint.keep", 9)
    hook = both(spoil([12 * step for step in (7, 8, 9)]), slow)
    children = train(*flags, *own, "--run_dir", tmp_path / "run", before=hook, processes=processes)
    assert [child.code for child in children] == [0] * processes, children[0].stderr
    assert "going back" in children[0].stderr
    hangs = sleep_in(VLAPolicy, "forward", 13, 300, [processes - 1])  # watched as before, once it has gone back
    children = train(*flags, *own, "--run_dir", tmp_path / "other", before=both(hook, hangs), processes=processes)
    assert NO_PROGRESS in children[-1].stderr
    assert "going back" in children[0].stderr


def test_run_is_watched_again_after_an_error_in_what_is_not(flags, tmp_path):
    def unwatched(found):
        def leave():
            with contextlib.suppress(KeyError), the(guard.Guard).unwatched():
                raise KeyError
            time.sleep(300)

        at_step(3, leave)(found)

    (child,) = train(*flags, "--guard.hang_seconds", 2, "--run_dir", tmp_path / "run", before=unwatched)
    assert child.code == 1
    assert NO_PROGRESS in child.stderr


def test_save_that_is_long_waited_for_is_no_hang(flags, tmp_path):
    def slow(found):
        def commit(temporary, final, others, original=checkpoint.commit):
            time.sleep(5)
            return original(temporary, final, others)

        checkpoint.commit = commit

    own = ("--guard.hang_seconds", 3, "--steps", 6, "--checkpoint.every", 3, "--eval.every", 0)
    for child in train(*flags, *own, "--run_dir", tmp_path / "run", before=slow, processes=2):
        child.ok()


def test_signs_of_life_change_nothing_in_the_training(uninterrupted, flags, tmp_path):
    def often(found):
        found["signs"] = 0

        def watch(self, original=guard.Watchdog._watch):
            self.tick = 0.005
            original(self)
            found["signs"] = int(self.store.get("alive/1").split()[0])

        guard.Watchdog._watch = watch

    runs = {"off": tmp_path / "off", "often": tmp_path / "often"}
    for child in train(*flags, "--guard.hang_seconds", 0, "--run_dir", runs["off"], processes=2):
        child.ok()
    for child in train(*flags, "--run_dir", runs["often"], before=often, processes=2):
        assert child.ok().found["signs"] > 16
    assert_equal(runs["off"], runs["often"])
