"""Who may use a run's folder, and what it finds there."""

import contextlib
import errno
import os
import shutil
import signal
import socket

import pytest
from saving import checkpoints_of, fill, mounted
from training import after, in_children, train

from vla import InputError, checkpoint


def test_what_a_crash_left_half_done_is_removed_by_the_next_start(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints_of(folder, {1: {}, 2: {}})
    for name in (".saving_step_00000003", ".deleting_step_00000001", ".replaced_step_00000002"):
        shutil.copytree(folder / "step_00000001", folder / name)
    (folder / "notes").touch()
    before = (folder / "step_00000002/trainer_state.json").read_text()
    in_children(lambda _: checkpoint.prepare(tmp_path, True, 1))[0].ok()
    assert len(list(folder.iterdir())) == 6  # that is left to the main process
    in_children(lambda _: checkpoint.prepare(tmp_path, True, 0))[0].ok()
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step_00000001", "step_00000002"]
    assert (folder / "step_00000002/trainer_state.json").read_text() == before


def test_half_a_save_that_filled_the_disk_makes_room_for_the_next_start(tmp_path):
    with mounted(tmp_path, "size=1m"):
        half = tmp_path / "checkpoints/.saving_step_00000008"
        half.mkdir(parents=True)
        fill(half)
        in_children(lambda _: checkpoint.prepare(tmp_path, False, 0))[0].ok()
        assert not half.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_run_whose_only_checkpoint_was_being_replaced_is_resumed_and_not_begun_anew(rank, tmp_path):
    checkpoints_of(tmp_path / "checkpoints", {1: {}})
    (tmp_path / "checkpoints/step_00000001").rename(tmp_path / "checkpoints/.replaced_step_00000001")
    with pytest.raises(InputError, match="already holds checkpoints"):
        checkpoint.prepare(tmp_path, False, rank)
    in_children(lambda _: checkpoint.prepare(tmp_path, True, rank))[0].ok()


@contextlib.contextmanager
def job_with_a_worker(run):
    """A process that uses a run and has forked another, which outlives it."""
    read, write = os.pipe()
    if (job := os.fork()) == 0:
        checkpoint.prepare(run, False, 0)
        if (worker := os.fork()) != 0:
            os.write(write, str(worker).encode())
        signal.pause()
    worker = int(os.read(read, 20))
    try:
        yield job
    finally:
        for process in (job, worker):
            os.kill(process, signal.SIGKILL)
        os.waitpid(job, 0)


def impatient(found):
    checkpoint.lock.__defaults__ = (0.3,)


def test_second_job_on_the_same_run_is_refused_and_told_of_the_first(flags, tmp_path):
    run = tmp_path / "run"
    with job_with_a_worker(run) as job:
        (child,) = train(*flags, "--run_dir", run, before=impatient)
    assert child.code == 1
    (line,) = child.stderr.splitlines()
    assert line.startswith(f"error: {run} is in use by process {job} on {socket.gethostname()}")


def test_refused_job_touches_nothing_of_the_first(tmp_path):
    with job_with_a_worker(tmp_path):
        checkpoints_of(tmp_path / "checkpoints", {1: {}})
        for name in (".replaced_step_00000002", ".saving_step_00000002"):  # the first job is about to commit
            shutil.copytree(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints" / name)
        before = sorted(tmp_path.rglob("*"))

        def second(found):
            impatient(found)
            with pytest.raises(InputError, match="in use"):
                checkpoint.prepare(tmp_path, True, 0)

        in_children(second)[0].ok()
        assert sorted(tmp_path.rglob("*")) == before


def test_killed_job_frees_its_run_at_once_even_if_its_workers_live_on(tmp_path):
    with job_with_a_worker(tmp_path) as job:
        os.kill(job, signal.SIGKILL)
        os.waitid(os.P_PID, job, os.WEXITED | os.WNOWAIT)

        def next_job(found):
            impatient(found)
            checkpoint.prepare(tmp_path, False, 0)

        in_children(next_job)[0].ok()


def test_run_on_a_full_disk_can_be_locked(tmp_path):
    with mounted(tmp_path, "size=1m"):
        fill(tmp_path)
        in_children(lambda _: checkpoint.lock(tmp_path))[0].ok()


def test_job_that_waited_for_another_does_not_begin_anew_what_that_has_saved(tmp_path):
    def second(_):
        def saved_meanwhile(_, run_dir):
            checkpoints_of(run_dir / "checkpoints", {1: {}})

        after(checkpoint, "lock", saved_meanwhile)
        with pytest.raises(InputError, match="already holds checkpoints"):
            checkpoint.prepare(tmp_path, False, 0)

    in_children(second)[0].ok()


def test_folder_that_cannot_be_locked_is_refused_at_once_naming_why(flags, tmp_path):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def hook(found):
        checkpoint.fcntl.lockf = no_locks

    (child,) = train(*flags, "--run_dir", tmp_path, before=hook)
    assert child.code == 1
    assert child.stderr.startswith(f"error: {tmp_path} cannot be kept from other jobs (OSError: [Errno 37] No locks")
