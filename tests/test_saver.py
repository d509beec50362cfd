"""Saving in the background: a crash, a full disk or a later change of the tensors never costs a checkpoint."""

import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training import after, in_children, steps, train

from vla import InputError, NotSaved, checkpoint
from vla import saver as saving
from vla.config import CheckpointConfig
from vla.optim import EMA
from vla.saver import Saver


@pytest.fixture(autouse=True)
def writer_does_not_wait(monkeypatch):
    """For other tests, which take the processor; as it does for training."""
    monkeypatch.setattr(saving, "_let_training_go_first", lambda: None)


def small_training(dtype=torch.float32):
    """What a Saver takes, after one step: an accelerator, a policy, its optimizer, an average of the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    policy = torch.nn.Linear(2, 2, dtype=dtype)
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters()))
    model(torch.ones(1, 2, dtype=dtype)).sum().backward()
    optimizer.step()
    return accelerator, policy, optimizer, EMA(policy, 0.9)


def new_saver(training, folder, keep=1):
    accelerator, policy, optimizer, ema = training
    return Saver(accelerator, folder, policy, {"policy": "config"}, optimizer, ema, CheckpointConfig(keep=keep))


def state_of(step, **values):
    """The trainer's counters, as far as saving and rotation look at them."""
    return {
        "step": step,
        "best_step": None,
        "evaluated": None,
        "metric": "loss",
        "score": None,
        "bad_in_a_row": 0,
    } | values


def commit(training, folder, step, keep=1, **values):
    saver = new_saver(training, folder, keep)
    saver.save(state_of(step, **values))
    saver.finish()


# ---- Crashes.


def copy_at_every_line(run, copies):
    """Copy the folder to `copies` before each line of vla/checkpoint.py and vla/saver.py and each call that changes the
    file system, in whichever thread, and with half of a large file written; unless it is as it was at the copy before.

    A copy is what kill -9 leaves at that moment. For a child: what it sets stays.
    """
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}
    alone, seen = threading.Lock(), [None]

    def tick(*_):
        if not alone.acquire(blocking=False):  # called by the copying itself
            return
        now = [(str(path), path.stat().st_ino, path.stat().st_size) for path in sorted(run.rglob("*"))]
        if now != seen[-1]:
            shutil.copytree(run, copies / str(len(seen)))
            seen.append(now)
        alone.release()

    def trace(frame, event, _):
        if frame.f_code.co_filename in (checkpoint.__file__, saving.__file__):
            tick()
            return trace
        return None

    def halfway(save):
        def half(content, path):
            Path(path).write_bytes(b"half of it")
            tick()
            save(content, path)

        return half

    saving.save_file, torch.save, os.fsync = halfway(saving.save_file), halfway(torch.save), tick
    sys.addaudithook(lambda event, _: tick() if event in changes else None)
    threading.settrace(trace)
    sys.settrace(trace)


def damage(path):
    """Zeros in place of the weights, as after a power cut."""
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def after_a_crash(folder):
    (folder / "step_00000001").rename(folder / ".replaced_step_00000001")
    shutil.copytree(folder / "step_00000002", folder / ".saving_step_00000003")
    (folder / "step_00000002").rename(folder / ".deleting_step_00000002")


# Steps that are there, what then happens to them, the step that is saved, and which the run may go on from if a crash
# comes in between.
CRASHES = {
    "new": ([1, 2], lambda folder: None, 3, {2, 3}),
    "replaces_a_damaged_one": ([1, 2], lambda folder: damage(folder / "step_00000002"), 2, {1, 2}),
    "replaces_a_good_one": ([1, 2], lambda folder: None, 2, {2}),
    "replaces_the_only_one": ([1], lambda folder: None, 1, {1}),
    "leaves_a_future": ([1, 2, 3], lambda folder: damage(folder / "step_00000003"), 2, {2}),
    "starts_after_a_crash": ([1, 2], after_a_crash, 3, {1, 3}),
}


@pytest.mark.parametrize("case", CRASHES)
def test_crash_at_any_line_of_a_save_leaves_a_good_checkpoint(case, tmp_path):
    there, happens, step, allowed = CRASHES[case]
    run, crashes = tmp_path / "run", tmp_path / "crashes"

    def save(_):
        training, folder = small_training(), run / "checkpoints"
        folder.mkdir(parents=True)
        for earlier in there:
            commit(training, folder, earlier, keep=9)
        happens(folder)
        copy_at_every_line(run, crashes)
        checkpoint.prepare(run, True, 0)
        sys.settrace(None)  # from here on it is the other thread that works
        commit(training, folder, step)

    def go_on(found):
        training, saved = small_training(), f"step_{step:08d}"
        checkpoint.lock = lambda _: None  # of so many runs in one process
        for crashed in crashes.iterdir():
            folder = checkpoint.prepare(crashed, True, 0)
            assert not list(folder.glob(".*"))
            for path in checkpoint.all_steps(folder).values():
                if any((path / "model.safetensors").read_bytes()):  # not damaged before
                    checkpoint.verify(path)
            found[crashed.name] = checkpoint.find(str(crashed), folder).name
            commit(training, folder, step)
            assert [path.name for path in folder.iterdir()] == [saved]
            checkpoint.verify(folder / saved)

    in_children(save)[0].ok()
    (child,) = in_children(go_on)
    assert len(child.ok().found) > 20
    assert set(child.found.values()) == {f"step_{step:08d}" for step in allowed}


def test_everything_is_on_the_disk_before_the_rename_commits(tmp_path):
    def watch(found):
        training, events, opened = small_training(), [], {}
        open_, fsync, rename = os.open, os.fsync, Path.rename

        def watched_open(path, *arguments, **named):
            handle = open_(path, *arguments, **named)
            opened[handle] = Path(path).name
            return handle

        def watched_fsync(handle):
            fsync(handle)
            events.append((opened[handle], os.fstat(handle).st_size))

        def watched_rename(self, target):
            events.append((f"rename to {target.name}", 0))
            return rename(self, target)

        os.open, os.fsync, Path.rename = watched_open, watched_fsync, watched_rename
        commit(training, tmp_path, 1)
        found["events"] = events

    (child,) = in_children(watch)
    names, sizes = zip(*child.ok().found["events"], strict=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "step_00000001").iterdir()}
    assert len(files) == 7
    assert sorted(names) == sorted([*files, ".saving_step_00000001", "rename to step_00000001", tmp_path.name])
    assert set(names[:6]) == files.keys() - {"MANIFEST.json"}
    assert names[6:] == ("MANIFEST.json", ".saving_step_00000001", "rename to step_00000001", tmp_path.name)
    assert all(files.get(name, size) == size for name, size in zip(names, sizes, strict=True))


# ---- The disk.


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a run's checkpoints, on a disk of its own of 4 MB."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    with mounted(folder, "size=4m"):
        yield folder


@contextlib.contextmanager
def mounted(folder, options):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("a disk can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def full_after(step, folder, freed=True, checked=True):
    """A hook for training: the disk is full from the save of this step on, until, if `freed`, one has failed.

    checked: the lack of space is seen ahead; else in the midst of writing.
    """

    def hook(found):
        if not checked:
            saving.shutil = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda _: SimpleNamespace(free=1e12)})

        def saved(_, saver, state):
            saver.settle()
            if state["step"] == step and saver.accelerator.is_main_process:
                fill(folder)

        def reported(result, _):
            if result[1]:
                found["left"] = sorted(path.name for path in folder.iterdir())
                if freed:
                    (folder / "filler").unlink()

        after(Saver, "save", saved)
        after(Saver, "report", reported)

    return hook


@pytest.mark.parametrize("checked", [True, False], ids=["seen_ahead", "while_writing"])
def test_run_goes_on_with_a_warning_when_the_disk_is_full_and_saves_again_when_it_is_not(
    checked, small_disk, flags, tmp_path
):
    own = ["--eval.every", 0, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=full_after(5, small_disk, checked=checked))
    warnings = [line for line in child.ok().stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "a checkpoint could not be saved" in warnings[0]
    assert "the newest is of step 5; 1 of 3 failures" in warnings[0]
    assert ("are free on the disk" in warnings[0]) == checked
    assert child.found["left"] == ["filler", "step_00000005"]
    assert steps(tmp_path / "run") == [15, 16]


def test_run_whose_saves_fail_three_times_in_a_row_stops_on_all_processes_and_can_be_resumed(
    small_disk, flags, tmp_path
):
    own = ["--eval.every", 0, "--checkpoint.every", 3, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, before=full_after(3, small_disk, freed=False), processes=2)
    assert [child.code for child in children] == [1, 1]
    assert sum(child.stderr.count("warning: a checkpoint could not be saved") for child in children) == 3
    assert sum(child.stderr.count("error: ") for child in children) == 1
    assert "error: stopped at step 14: 3 saves in a row failed" in children[0].stderr
    assert children[0].found["left"] == ["filler", "step_00000003"]
    (small_disk / "filler").unlink()
    for child in train("--resume_from", tmp_path / "run", processes=2):
        child.ok()
    assert steps(tmp_path / "run") == [15, 16]


def test_final_save_that_fails_is_told_and_ends_the_run_as_failed(small_disk, flags, tmp_path):
    own = ["--eval.every", 0, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=full_after(15, small_disk))
    assert child.code == 1
    assert re.search("error: a checkpoint could not be saved .* the newest is of step 15", child.stderr)
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "step_00000010", "step_00000015"]
    assert not (tmp_path / "run/result.json").exists()
    (small_disk / "filler").unlink()
    train("--resume_from", tmp_path / "run")[0].ok()
    assert steps(tmp_path / "run") == [15, 16]


def test_file_that_cannot_grow_fails_the_save_and_nothing_else(tmp_path):
    def save(found):
        saver = new_saver(small_training(), tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # optimizer.bin is larger
        saver.save(state_of(1))
        saver.settle()
        found["problems"], found["left"] = saver.report()[1], list(tmp_path.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        saver.save(state_of(2))
        saver.finish()

    (child,) = in_children(save)
    (problem,) = child.ok().found["problems"]
    assert "a checkpoint could not be saved" in problem
    assert "\n" not in problem
    assert child.found["left"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("place", ["below_a_file", "read_only"])
def test_folder_that_cannot_be_written_is_refused_at_start(place, flags, tmp_path):
    run = tmp_path / "place/run"
    if place == "below_a_file":
        run.parent.touch()
        (child,) = train(*flags, "--run_dir", run)
    else:
        run.parent.mkdir()
        with mounted(run.parent, "ro"):
            (child,) = train(*flags, "--run_dir", run)
    assert child.code == 1
    (line,) = child.stderr.splitlines()
    assert line.startswith(f"error: cannot write to {run}/checkpoints")
    assert "--run_dir" in line


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_files_have_the_modes_that_the_umask_leaves(umask, tmp_path):
    def save(found):
        os.umask(umask)
        commit(small_training(), tmp_path, 1)

    in_children(save)[0].ok()
    folder = tmp_path / "step_00000001"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


# ---- Rotation.


def checkpoints_of(folder, found):
    """Small checkpoints that verify: `found` has their counters by step."""
    for step, values in found.items():
        temporary = folder / ".saving"
        temporary.mkdir(parents=True)
        for name in checkpoint.NEEDED - {"trainer_state.json"}:
            (temporary / name).touch()
        (temporary / "trainer_state.json").write_text(json.dumps(state_of(step, **values) | {"versions": {}}))
        checkpoint.commit(temporary, folder / f"step_{step:08d}")


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "damaged", "kept"),
    [
        (1, 0, None, [], [12]),
        (2, 0, 3, [], [3, 10, 12]),
        (2, 5, 3, [], [3, 5, 10, 12]),
        (1, 6, 12, [], [6, 12]),
        (9, 0, None, [], [3, 5, 6, 10, 12]),
        (2, 0, None, [10], [6, 12]),
        (1, 0, None, [10, 12], [6]),
        (1, 0, None, [3, 5, 6, 10, 12], [3, 5, 6, 10, 12, 15]),
    ],
)
def test_rotation_keeps_the_newest_good_the_best_and_every_kth(keep, keep_every, best, damaged, kept, tmp_path):
    checkpoints_of(tmp_path, {step: {} for step in (3, 5, 6, 10, 12, 15)})  # 15: of a future that was left
    (tmp_path / "notes").touch()

    def is_good(path):
        return int(path.name[5:]) not in damaged

    checkpoint.rotate(tmp_path, state_of(12, best_step=best), CheckpointConfig(1, keep, keep_every), is_good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *(f"step_{step:08d}" for step in kept)]


JUDGED = {step: {"evaluated": step, "score": score} for step, score in ((1, 0.3), (2, 0.1), (3, 0.2))}


@pytest.mark.parametrize(
    ("found", "state", "best"),
    [
        (JUDGED, {"best_step": 3}, 3),
        (JUDGED, {"best_step": 4}, 2),  # its save failed, or it is damaged
        (JUDGED, {"best_step": None, "metric": "success"}, None),  # it was changed when the run was resumed
        (JUDGED | {4: {"evaluated": 3, "score": 0.0}}, {"best_step": 9}, 2),  # the score of another step's weights
        (JUDGED | {4: {"evaluated": 4, "score": None}}, {"best_step": 9}, 2),  # was not finite
        ({1: {}, 2: {}}, {"best_step": None}, None),
    ],
)
def test_best_is_the_one_named_or_else_the_best_on_the_disk(found, state, best, tmp_path):
    checkpoints_of(tmp_path, found)
    paths = checkpoint.all_steps(tmp_path)
    assert checkpoint.best(state_of(9, **state), list(paths.values())) == paths.get(best)


def test_damaged_checkpoints_do_not_count_as_good_ones_when_a_save_rotates(tmp_path):
    def save(_):
        training = small_training()
        for step in (1, 2, 3):
            commit(training, tmp_path, step, keep=9)
        damage(tmp_path / "step_00000003")
        commit(training, tmp_path, 4, keep=2)

    (child,) = in_children(save)
    assert f"{tmp_path / 'step_00000003/model.safetensors'} is damaged" in child.ok().stderr
    assert list(checkpoint.all_steps(tmp_path)) == [2, 4]


@pytest.mark.parametrize("case", ["older", "replaced"])
def test_nothing_is_deleted_if_the_new_checkpoint_does_not_verify(case, tmp_path):
    def save(_):
        training = small_training()
        commit(training, tmp_path, 1)

        def flush(path, original=checkpoint._flush):
            original(path)
            if path.name == "MANIFEST.json":  # all is written
                damage(path.parent)

        checkpoint._flush = flush
        with pytest.raises(NotSaved, match="damaged"):
            commit(training, tmp_path, {"older": 2, "replaced": 1}[case])

    in_children(save)[0].ok()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_checkpoint_that_was_to_be_replaced_is_put_back_when_the_commit_fails(tmp_path):
    def save(_):
        training = small_training()
        commit(training, tmp_path, 1)

        def rename(self, target, original=Path.rename):
            if self.name.startswith(".saving_"):
                raise OSError("broken")
            return original(self, target)

        Path.rename = rename
        with pytest.raises(NotSaved, match="broken"):
            commit(training, tmp_path, 1)

    in_children(save)[0].ok()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


# ---- In the background.


def held(saver):
    """Let the writer wait. Returns what lets it go on when set."""
    go_on = threading.Event()
    saver.thread.submit(go_on.wait)
    return go_on


def test_what_changes_right_after_a_save_is_not_in_the_checkpoint(tmp_path):
    def save(found):
        _, policy, optimizer, ema = training = small_training()
        saver, state = new_saver(training, tmp_path), state_of(1)
        moments = [dict(values) for values in optimizer.optimizer.state.values()]
        live = [*policy.state_dict().values(), *ema.average.values(), *(t for m in moments for t in m.values())]
        expected = [tensor.clone() for tensor in live]
        assert {*moments[0]} == {"step", "exp_avg", "exp_avg_sq"}
        go_on = held(saver)
        saver.save(state)
        for tensor in live:
            tensor.detach().add_(1)
        state["step"] = 2
        go_on.set()
        saver.finish()
        path = tmp_path / "step_00000001"
        weights, average = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
        saved = [weights[name] for name in policy.state_dict()] + [average[name] for name in ema.average]
        moments = torch.load(path / "optimizer.bin", weights_only=True)["state"].values()
        saved += [tensor for values in moments for tensor in values.values()]
        assert all(map(torch.equal, saved, expected))
        assert len(saved) == len(expected) == 10
        assert checkpoint.read_state(path) == state_of(1)

    in_children(save)[0].ok()


def test_saves_share_one_buffer_and_leave_each_other_alone(tmp_path):
    def save(_):
        _, policy, *_ = training = small_training()
        saver = new_saver(training, tmp_path, keep=9)
        buffer, weights = saver.buffer.result(), {}
        for step in (1, 2, 3):
            weights[step] = policy.weight.detach().clone()
            saver.save(state_of(step))
            policy.weight.data += 1
        saver.finish()
        assert saver.buffer.result() is buffer
        for step, path in checkpoint.all_steps(tmp_path).items():
            assert torch.equal(load_file(path / "model.safetensors")["weight"], weights.pop(step))
        assert not weights

    in_children(save)[0].ok()


def test_one_save_is_in_flight_and_only_the_next_waits_for_it(tmp_path):
    def save(_):
        saver = new_saver(small_training(), tmp_path, keep=9)
        go_on = held(saver)
        saver.save(state_of(1))  # returns while the writer is held
        second = threading.Thread(target=saver.save, args=[state_of(2)])
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert not any(tmp_path.iterdir())
        go_on.set()
        second.join()
        assert 1 in checkpoint.all_steps(tmp_path)
        saver.finish()
        assert list(checkpoint.all_steps(tmp_path)) == [1, 2]

    in_children(save)[0].ok()


def test_finish_waits_until_the_last_save_is_committed(tmp_path):
    def save(_):
        saver = new_saver(small_training(), tmp_path)
        go_on = held(saver)
        saver.save(state_of(1))
        threading.Timer(0.2, go_on.set).start()
        saver.finish()
        assert go_on.is_set()
        checkpoint.verify(tmp_path / "step_00000001")

    in_children(save)[0].ok()


def broken(*_, **__):
    raise OSError("first line\nsecond line")


def test_failed_save_is_reported_once_and_the_next_that_succeeds_makes_up_for_it(tmp_path):
    def save(_):
        saver, torch_save = new_saver(small_training(), tmp_path), torch.save
        assert saver.report() == ([], [])
        for step in (1, 2):
            torch.save = broken
            saver.save(state_of(step))
            saver.pending.exception()  # waits
            metrics, (problem,) = saver.report()
            assert metrics == []
            assert "first line" in problem
            assert "second line" not in problem
            assert f"{step} of 3 failures" in problem
            assert saver.report() == ([], [])
            assert not any(tmp_path.iterdir())
        torch.save = torch_save
        saver.save(state_of(3))
        saver.save(state_of(4))
        saver.finish()
        metrics, problems = saver.report()
        assert len(metrics) == 2
        assert problems == []
        assert not saver.given_up
        torch.save = broken
        saver.save(state_of(5))
        saver.save(state_of(6))
        with pytest.raises(NotSaved, match=r"1 of 3 failures.*2 of 3 failures"):  # neither was reported
            saver.finish()

    in_children(save)[0].ok()


def test_last_save_that_fails_ends_every_process(tmp_path):
    def save(found):
        training = small_training()
        if training[0].is_main_process:
            saving.save_file = broken
        with pytest.raises(NotSaved) as raised:
            commit(training, tmp_path, 1)
        found["error"] = str(raised.value)

    first, second = in_children(save, processes=2)
    assert "first line" in first.ok().found["error"]
    assert "the main process could not save" in second.ok().found["error"]


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_checkpoint_loads_with_plain_load_state_on_every_process(tmp_path):
    def save_and_load(found):
        accelerator, policy, optimizer, _ = training = small_training()
        rank = accelerator.process_index
        random.seed(rank)
        np.random.seed(rank)  # noqa: NPY002
        torch.manual_seed(rank)
        commit(training, tmp_path, 1)
        accelerator.wait_for_everyone()
        tensors = [*policy.parameters(), *(t for values in optimizer.state.values() for t in values.values())]
        expected, found["draws"] = [tensor.detach().clone() for tensor in tensors], draws()
        for tensor in tensors:
            tensor.detach().add_(1)
        accelerator.load_state(str(tmp_path / "step_00000001"))
        assert draws() == found["draws"]
        tensors = [*policy.parameters(), *(t for values in optimizer.state.values() for t in values.values())]
        assert len(tensors) == 8
        assert all(map(torch.equal, tensors, expected))

    first, second = in_children(save_and_load, processes=2)
    assert not set(first.ok().found["draws"]) & set(second.ok().found["draws"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_that_is_not_finite_is_never_committed(dtype, tmp_path):
    def save(_):
        _, policy, optimizer, ema = training = small_training(dtype)
        largest = torch.finfo(dtype).max
        moment = optimizer.state[policy.weight]["exp_avg"]
        assert {policy.weight.dtype, moment.dtype} == {dtype}
        for tensor in (policy.weight, moment, ema.average["bias"]):
            for value in (torch.nan, torch.inf, -torch.inf):
                last, kept = tensor.data.view(-1)[-1:], tensor.data.view(-1)[-1:].clone()
                last.fill_(value)
                with pytest.raises(NotSaved, match="not finite"):
                    commit(training, tmp_path, 1)
                assert not any(tmp_path.iterdir())
                last.copy_(kept)
        policy.weight.data.fill_(largest)
        moment.fill_(-largest)
        commit(training, tmp_path, 1)

    in_children(save)[0].ok()
    checkpoint.verify(tmp_path / "step_00000001")


def scaled_training(scale):
    """Small training with the scaler of fp16."""
    training = small_training()
    training[0].scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return training


def test_scaler_of_fp16_is_in_the_checkpoint(tmp_path):
    def save_and_load(found):
        commit(scaled_training(scale=8.0), tmp_path, 1)
        accelerator, *_, ema = scaled_training(scale=2.0)
        checkpoint.load(accelerator, tmp_path / "step_00000001", ema)
        found["scale"] = accelerator.scaler.get_scale()

    (child,) = in_children(save_and_load)
    assert child.ok().found["scale"] == 8.0


def test_pickle_planted_as_the_scaler_is_refused_and_never_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    def load(_):
        accelerator, *_, ema = training = scaled_training(scale=8.0)
        commit(training, tmp_path, 1)
        torch.save(Payload(), tmp_path / "step_00000001/scaler.pt")
        with pytest.raises(pickle.UnpicklingError, match="posix"):
            checkpoint.load(accelerator, tmp_path / "step_00000001", ema)

    in_children(load)[0].ok()
    assert not (tmp_path / "mark").exists()


# ---- Who may use a run's folder.


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


def test_job_that_waited_for_another_does_not_begin_anew_what_that_has_saved(tmp_path):
    def second(_):
        def saved_meanwhile(_, run_dir):
            checkpoints_of(run_dir / "checkpoints", {1: {}})

        after(checkpoint, "lock", saved_meanwhile)
        with pytest.raises(InputError, match="already holds checkpoints"):
            checkpoint.prepare(tmp_path, False, 0)

    in_children(second)[0].ok()
