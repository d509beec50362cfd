"""Signals, and processes that die: the run ends in time, and nothing is lost."""

import json
import os
import re
import signal
import threading
import time

import psutil
import pytest
from tqdm import tqdm
from training import (
    LAUNCH,
    ON_CPU,
    ROOT,
    TWO_PROCESSES,
    after,
    assert_resumes_to,
    assert_stopped,
    at_step,
    both,
    command,
    die,
    last,
    metrics,
    once,
    rank,
    send,
    series,
    settle,
    start,
    steps,
    the,
    train,
    wait_for_step,
)

from vla import InputError, checkpoint, guard
from vla.data.lerobot import LeRobotDataset
from vla.data.stream import Samples
from vla.saver import Saver
from vla.sim.tabletop import Tabletop

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


# ---- Signals.


@pytest.mark.parametrize(
    ("number", "processes", "ranks", "workers"),
    [(TERM, 1, [0], 2), (INT, 1, [0], 0), (HUP, 1, [0], 2), (TERM, 2, [0, 1], 2), (INT, 2, [0], 0), (USR1, 2, [1], 0)],
)
def test_signalled_run_saves_and_goes_on_bit_for_bit(number, processes, ranks, workers, uninterrupted, flags, tmp_path):
    run = tmp_path / "run"
    hook = at_step(6, lambda: send(number, number), ranks)  # twice, as a launcher adds its own: no stop at once
    own = ["--data.workers", workers, "--run_dir", run]
    children = train(*flags, *own, before=hook, processes=processes)
    assert_stopped(run, children, 6)
    assert signal.Signals(number).name in children[0].stderr or "a signal to another process" in children[0].stderr
    assert_resumes_to(run, uninterrupted(processes=processes), processes)


def test_signal_at_the_last_step_leaves_the_last_evaluation_to_the_resumed_run(uninterrupted, flags, tmp_path):
    children = train(*flags, "--run_dir", tmp_path / "run", before=at_step(16, lambda: send(TERM)))
    assert_stopped(tmp_path / "run", children, 16)
    assert_resumes_to(tmp_path / "run", uninterrupted())


def test_signal_again_before_that_evaluation_leaves_the_checkpoint_as_it_is(uninterrupted, flags, tmp_path):
    def hook(found):
        after(guard.Guard, "load", lambda *_: send(TERM))  # before the loop begins

    run = tmp_path / "run"
    train(*flags, "--run_dir", run, before=at_step(16, lambda: send(TERM)))
    saved = last(run).stat().st_ino
    assert_stopped(run, train("--resume_from", run, before=hook), 16)
    assert last(run).stat().st_ino == saved
    assert_resumes_to(run, uninterrupted())


def test_signal_in_an_evaluation_leaves_it_to_the_resumed_run(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", ("--eval.samples", 12, "--micro_batch_size", 2)

    def hook(found):
        signalled = once(lambda: rank() == 1 and send(TERM))
        after(Samples, "batch", lambda _, samples, *positions: samples.shuffle or signalled())

    children = train(*flags, *own, "--run_dir", run, before=hook, processes=2)
    assert_stopped(run, children, 7)
    assert not series(run, "eval/loss")
    assert_resumes_to(run, uninterrupted(*own, processes=2), processes=2)


def test_evaluation_that_was_left_to_the_resumed_run_is_logged_once_if_that_is_killed(uninterrupted, flags, tmp_path):
    def die_before_saving(found):
        Saver.save = lambda *_: die()

    run, own = tmp_path / "run", ("--optim.lr", 0)  # so that it is not the best, for which it would be saved
    assert_stopped(run, train(*flags, *own, "--run_dir", run, before=at_step(14, lambda: send(TERM))), 14)
    for _ in range(2):
        (killed,) = train("--resume_from", run, before=die_before_saving)
        assert killed.code == -signal.SIGKILL
    train("--resume_from", run, before=at_step(15, lambda: (settle(), die())))
    assert json.loads((last(run) / "trainer_state.json").read_text())["evaluated"] == 14
    assert_resumes_to(run, uninterrupted(*own))


def test_signal_while_acting_in_an_evaluation_leaves_it_to_the_resumed_run(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", ("--eval.env", "tabletop", "--eval.episodes", 2, "--eval.every", 0, "--steps", 8)

    def hook(found):
        found["acted"] = 0

        def act(*_):
            found["acted"] += 1
            if found["acted"] == 5 and rank() == 1:
                send(INT)

        after(Tabletop, "step", act)

    children = train(*flags, *own, "--run_dir", run, before=hook, processes=2)
    assert_stopped(run, children, 8)
    assert children[1].found["acted"] == 6  # two actions of each chunk
    assert_resumes_to(run, uninterrupted(*own, processes=2), processes=2)


def test_signal_while_a_save_is_in_flight_waits_for_it(uninterrupted, flags, tmp_path):
    def hook(found):
        def until_signalled():
            while not the(guard.Signals).received:
                time.sleep(0.01)
            time.sleep(0.3)

        checkpoint.commit = with_first(until_signalled, checkpoint.commit)

    children = train(*flags, "--run_dir", tmp_path / "run", before=both(hook, at_step(6, lambda: send(USR1))))
    assert_stopped(tmp_path / "run", children, 6)
    assert steps(tmp_path / "run")[0] == 5
    assert_resumes_to(tmp_path / "run", uninterrupted())


def with_first(before, function):
    def call(*arguments):
        before()
        return function(*arguments)

    return call


def test_signal_before_there_is_anything_to_save_ends_the_process_at_once(flags, tmp_path):
    def hook(found):
        after(LeRobotDataset, "__init__", lambda *_: (os.kill(os.getpid(), TERM), time.sleep(30)))

    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=hook)
    assert child.code == 128 + TERM
    assert (tmp_path / "run/REQUEUE").read_text() == "stopped at once by SIGTERM\n"


@pytest.mark.parametrize("lost", ["the run's folder", "the terminal"])
def test_second_signal_ends_a_process_that_can_write_nothing_any_more(lost, flags, tmp_path):
    def hang():
        if lost == "the terminal":
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 2)
        else:
            (tmp_path / "run").rename(tmp_path / "moved")
        for _ in range(2):
            os.kill(os.getpid(), TERM)
            time.sleep(guard.COPIES + 0.5)
        time.sleep(30)

    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=at_step(8, hang))
    assert child.code == 128 + TERM
    if lost == "the run's folder":
        assert re.search("^warning: .*REQUEUE cannot be written", child.stderr, re.M)


@pytest.mark.parametrize(("first", "second"), [(TERM, TERM), (USR1, INT), (INT, INT)])
def test_second_signal_ends_even_a_process_that_waits_for_another_at_once(first, second, flags, tmp_path):
    def hook(found):
        def signals():
            for number, pause in ((first, 0.1), (first, guard.COPIES + 0.5), (second, 30)):
                os.kill(os.getpid(), number)
                time.sleep(pause)

        def hang(*_):
            threading.Thread(target=signals, daemon=True).start()
            if rank() == 1:
                time.sleep(30)  # and the other waits in the library that sums the gradients

        at_step(8, hang)(found)

    run = tmp_path / "run"
    children = train(*flags, "--run_dir", run, before=hook, processes=2)
    assert [child.code for child in children] == [128 + second] * 2, children[0].stderr
    assert (run / "REQUEUE").read_text() == f"stopped at once by {second.name}\n"
    assert steps(run)[-1] == 7  # the best so far
    checkpoint.verify(last(run))


def test_another_signal_does_not_end_the_save_that_the_first_has_asked_for(flags, tmp_path):
    def hook(found):
        def commit(*arguments, original=checkpoint.commit):
            time.sleep(guard.COPIES + 0.2)
            os.kill(os.getpid(), TERM)
            time.sleep(0.3)
            return original(*arguments)

        def signalled():
            checkpoint.commit = commit
            send(USR1)

        at_step(3, signalled)(found)

    assert_stopped(tmp_path / "run", train(*flags, "--run_dir", tmp_path / "run", before=hook), 3)


def test_signal_that_nohup_ignores_ends_nothing(flags, tmp_path):
    def hook(found):
        signal.signal(HUP, signal.SIG_IGN)
        at_step(3, lambda: os.kill(os.getpid(), HUP))(found)

    train(*flags, "--run_dir", tmp_path / "run", before=hook)[0].ok()
    assert steps(tmp_path / "run")[-1] == 16


@pytest.mark.parametrize(
    ("processes", "number"), [(1, TERM), (2, TERM), (2, signal.SIGKILL)], ids=["one", "two", "two_orphans"]
)
def test_signal_to_the_launcher_alone_makes_its_processes_save_and_stop(processes, number, flags, tmp_path):
    run = tmp_path / "run"
    where = [*TWO_PROCESSES, "--main_process_port", "0", "--mixed_precision", "no"] if processes > 1 else ["--cpu"]
    own = ["--steps", "5000", "--eval.every", "0", "--checkpoint.every", "1000000", "--run_dir", str(run)]
    launcher = start([*LAUNCH, *where, "train.py", *flags, *own])
    wait_for_step(run, 5, launcher, checkpoints=0)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) == processes
    launcher.send_signal(number)
    _, left = psutil.wait_procs(workers, timeout=25)
    for process in left:
        process.kill()
    assert not left
    launcher.wait(25)
    assert 5 <= steps(run)[-1] == metrics(run)[-1]["step"] < 5000
    checkpoint.verify(last(run))
    assert (run / "REQUEUE").exists()


# ---- A run that fails is not to be started again, whatever signals come.


def fail(*_):
    raise InputError("a picture is broken")


@pytest.mark.parametrize(("early", "copies", "code"), [(True, 1, 1), (False, 1, 1), (False, 2, 128 + TERM)])
def test_signal_to_a_process_that_has_failed_leaves_no_mark(early, copies, code, flags, tmp_path):
    def hook(found):
        def signals(_, text, **named):
            for _ in range(copies * text.startswith("error: ")):
                os.kill(os.getpid(), TERM)
                time.sleep(guard.COPIES + 0.5)

        after(tqdm, "write", signals)
        after(LeRobotDataset, "__init__", fail) if early else at_step(8, fail)(found)

    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=hook)
    assert (child.code, child.stderr.count("error: a picture is broken")) == (code, 1)
    assert ("stopped at once by SIGTERM" in child.stderr) == (copies == 2)
    assert "will save and stop" not in child.stderr
    assert not (tmp_path / "run/REQUEUE").exists()


def test_signalled_run_that_cannot_save_fails_and_leaves_no_mark(flags, tmp_path):
    def hook(found):
        def commit(*_):
            raise OSError("no space")

        checkpoint.commit = commit
        at_step(3, lambda: send(TERM))(found)

    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=hook)
    assert (child.code, child.stderr.count("error: a checkpoint could not be saved")) == (1, 1)
    assert not (tmp_path / "run/REQUEUE").exists()


@pytest.mark.parametrize("case", ["all fail", "one fails early", "one dies early", "one fails late"])
def test_launcher_that_ends_a_run_for_it_has_failed_leaves_no_mark(case, flags, tmp_path):
    script, place = tmp_path / "train_with_hook.py", '"step"' if "late" in case else '"__init__"'
    act = "os._exit(9)" if "dies" in case else "fail()"
    script.write_text(
        "import os, runpy, sys, time\n"
        "from test_signals import fail\n"
        "from training import ROOT, after, rank\n"
        "from vla import log\n"
        f"after(log.RunLog, {place}, lambda *_: {act} if rank() or {case == 'all fail'} else time.sleep(5))\n"
        "runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')\n"
    )
    launched = [*LAUNCH, *TWO_PROCESSES, "--main_process_port", "0", script, *flags, "--run_dir", tmp_path / "run"]
    done = command(*launched, env=ON_CPU | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 1
    told = "error: process 1: a picture is broken" if "one fails" in case else "error: a picture is broken"
    assert done.stderr.count(told) == ("dies" not in case)
    assert "will save and stop" not in done.stderr
    assert done.stderr.count("stopped at once by SIGTERM, as another process has ended;") == ("early" in case)
    assert not (tmp_path / "run/REQUEUE").exists()


# ---- Other processes.


def test_death_of_a_process_ends_the_other_and_the_run_goes_on_from_its_last_checkpoint(uninterrupted, flags, tmp_path):
    run = tmp_path / "run"
    children = train(*flags, "--run_dir", run, before=both(at_step(6, settle), at_step(9, die, [1])), processes=2)
    assert [child.code for child in children] == [1, -signal.SIGKILL]
    assert_resumes_to(run, uninterrupted(processes=2), processes=2)


@pytest.mark.parametrize("dying", [0, 1])
def test_death_of_a_process_while_a_save_is_in_flight_leaves_whole_checkpoints_alone(
    dying, uninterrupted, flags, tmp_path
):
    run = tmp_path / "run"

    def hook(found):
        def commit(temporary, final, others, original=checkpoint.commit):
            if final.name == "step_00000007":  # the main process dies in it, or still writes when the other one is dead
                die() if dying == 0 else time.sleep(0.5)
            return original(temporary, final, others)

        checkpoint.commit = commit
        both(at_step(6, settle), at_step(8, die, {1} & {dying}))(found)

    children = train(*flags, "--run_dir", run, before=hook, processes=2)
    assert children[dying].code == -signal.SIGKILL
    assert children[1 - dying].code == 1
    assert steps(run) == [5]
    checkpoint.verify(last(run))
    assert_resumes_to(run, uninterrupted(processes=2), processes=2)
    assert not list((run / "checkpoints").glob(".saving*"))
