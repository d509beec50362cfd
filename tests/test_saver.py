"""Saving in the background: a full disk or a later change of the tensors never costs a checkpoint."""

import contextlib
import os
import pickle
import random
import re
import resource
import shutil
import stat
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saving import broken, commit, fill, mounted, new_saver, small_training, state_of
from training import after, in_children, steps, train

import vla.saver
from vla import NotSaved, checkpoint, restore
from vla.saver import Saver

# ---- The disk.


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a run's checkpoints, on a disk of its own of 4 MB."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    with mounted(folder, "size=4m"):
        yield folder


def full_after(step, folder, freed=True, checked=True):
    """A hook for training: the disk is full from the save of this step on, until, if `freed`, one has failed.

    checked: the lack of space is seen ahead; else in the midst of writing.
    """

    def hook(found):
        if not checked:
            vla.saver.shutil = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda _: SimpleNamespace(free=1e12)})

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
    assert re.search("^error: a checkpoint could not be saved .* the newest is of step 15$", child.stderr, re.M)
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


@pytest.mark.parametrize("place", ["below_a_file", "read_only", "full"])
def test_folder_that_cannot_be_written_is_refused_at_start(place, flags, tmp_path):
    run = tmp_path / "place/run"
    if place == "below_a_file":
        run.parent.touch()
        (child,) = train(*flags, "--run_dir", run)
    else:
        run.parent.mkdir()
        with mounted(run.parent, "ro" if place == "read_only" else "size=1m"):
            fill(run.parent)
            (child,) = train(*flags, "--run_dir", run)
    assert child.code == 1
    (line,) = child.stderr.splitlines()
    assert line.startswith(f"error: cannot write to {run}/checkpoints")
    assert "--run_dir" in line


def test_disk_that_is_full_while_the_run_starts_is_told_in_one_line(flags, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with mounted(run, "size=1m"):
        (child,) = train(*flags, "--run_dir", run, before=lambda _: after(checkpoint, "prepare", lambda *_: fill(run)))
        assert child.code == 1
        (line,) = child.stderr.splitlines()
        assert re.search(f"^error: {run}/config.json cannot be written .*No space left on device.*make room", line)
        assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoints", "filler"]


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
        _, policy, _, ema = training = small_training()
        policy.bias.requires_grad_(False)  # until the second save
        ema.follow(policy)
        saver = new_saver(training, tmp_path, keep=9)
        buffer, weights = saver.buffer.result(), {}
        for step in (1, 2, 3):
            weights[step] = policy.weight.detach().clone()
            saver.save(state_of(step))
            policy.weight.data += 1
            policy.bias.requires_grad_(True)
            ema.follow(policy)
        saver.finish()
        assert saver.buffer.result() is buffer
        for step, path in checkpoint.all_steps(tmp_path).items():
            assert torch.equal(load_file(path / "model.safetensors")["weight"], weights.pop(step))
        assert not weights

    in_children(save)[0].ok()


def test_memory_is_locked_by_the_own_gpu_and_unlocked_before_it_is_given_back(monkeypatch):
    lock, locked, gpus = lambda address, *_: locked.append(address) or SimpleNamespace(value=0), [], []
    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=locked.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: contextlib.nullcontext(gpus.append(gpu)))
    copied = torch.from_numpy(vla.saver._buffer(1000, torch.device("cuda", 1))[100:200])
    assert locked
    assert gpus == [torch.device("cuda", 1)]
    del copied
    assert not locked


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
        with pytest.raises(NotSaved, match=r"could not be saved.*could not be saved"):  # neither was reported
            saver.finish()

    in_children(save)[0].ok()


def test_last_save_that_fails_ends_every_process(tmp_path):
    def save(found):
        training = small_training()
        if training[0].is_main_process:
            vla.saver.save_file = broken
        with pytest.raises(NotSaved) as raised:
            commit(training, tmp_path, 1)
        found["error"] = str(raised.value)

    first, second = in_children(save, processes=2)
    assert "first line" in first.ok().found["error"]
    assert second.ok().found["error"] == first.found["error"]  # so that it is said once


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


@pytest.mark.parametrize(("precision", "scale"), [("fp16", 8.0), ("bf16", 2.0)])
def test_scaler_of_fp16_is_that_of_the_checkpoint_or_begins_anew(precision, scale, tmp_path):
    def save_and_load(found):
        commit(scaled_training(scale=8.0) if precision == "fp16" else small_training(), tmp_path, 1)
        accelerator, *_ = training = scaled_training(scale=2.0)
        restore.load(*training, tmp_path / "step_00000001")
        found["scale"] = accelerator.scaler.get_scale()

    (child,) = in_children(save_and_load)
    assert child.ok().found["scale"] == scale


def test_pickle_planted_as_the_scaler_is_refused_and_never_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    def load(_):
        training = scaled_training(scale=8.0)
        commit(training, tmp_path, 1)
        torch.save(Payload(), tmp_path / "step_00000001/scaler.pt")
        with pytest.raises(pickle.UnpicklingError, match="posix"):
            restore.load(*training, tmp_path / "step_00000001")

    in_children(load)[0].ok()
    assert not (tmp_path / "mark").exists()
