"""A run that was killed and resumed is the run that was not, bit for bit."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves
from training import (
    LAUNCH,
    SHARDED,
    TWO_PROCESSES,
    assert_equal,
    die,
    die_at,
    last,
    metrics,
    of,
    result,
    run_module,
    series,
    start,
    steps,
    train,
    wait_for_step,
    weights,
)

from vla import InputError, checkpoint, export, options
from vla.model import VLAPolicy
from vla.saver import Saver

MID_EPOCH, EPOCH_END = 5, 11  # checkpoints after 60 and after 132 samples; an epoch has 132


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stop", [MID_EPOCH, EPOCH_END], ids=["mid_epoch", "epoch_end"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_uninterrupted_run(workers, stop, accumulation, uninterrupted, flags, tmp_path):
    run, micro = tmp_path / "run", ("--micro_batch_size", 12 // accumulation)
    own = ("--data.workers", workers, "--checkpoint.every", stop)
    (killed,) = train(*flags, *micro, *own, "--run_dir", run, before=die_at(stop + 2))
    assert killed.code == -signal.SIGKILL
    assert (steps(run)[-1], metrics(run)[-1]["step"]) == (stop, stop + 2)
    (resumed,) = train("--resume_from", run)
    assert f"resumed from {of(run, stop)}" in resumed.ok().stderr
    assert_equal(run, uninterrupted(*micro))


def test_run_whose_shift_is_less_than_a_pixel_goes_on(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["augment"]["shift"] = 0.01
    (run / "config.json").write_text(json.dumps(settings))
    (resumed,) = train("--resume_from", run, "--steps", 17)
    resumed.ok()
    assert steps(run)[-1] == 17


def test_moments_of_eight_bits_are_resumed_bit_for_bit(uninterrupted, flags, tmp_path):
    own = ("--optim.eight_bit", "--model.width", "64")
    train(*flags, *own, "--run_dir", tmp_path / "run", before=die_at(7))
    (resumed,) = train("--resume_from", tmp_path / "run")
    resumed.ok()
    assert_equal(tmp_path / "run", uninterrupted(*own))
    moments = torch.load(last(tmp_path / "run") / "optimizer.bin", weights_only=True)["state"]
    assert torch.uint8 in {leaf.dtype for leaf in tree_leaves(moments) if isinstance(leaf, torch.Tensor)}


@pytest.mark.parametrize("env", [None, SHARDED], ids=["whole", "sharded"])
def test_momentum_of_muon_is_resumed_bit_for_bit(env, uninterrupted, flags, tmp_path):
    own, processes = ("--optim.muon_lr", 0.01), 2 if env else 1
    train(*flags, *own, "--run_dir", tmp_path / "run", before=die_at(7), processes=processes, env=env)
    for resumed in train("--resume_from", tmp_path / "run", processes=processes, env=env):
        resumed.ok()
    assert_equal(tmp_path / "run", uninterrupted(*own, processes=processes, env=env))
    # What Muon makes of a gradient has the precision of bfloat16.
    assert series(tmp_path / "run", "train/loss") == pytest.approx(series(uninterrupted(*own), "train/loss"), rel=0.01)


def test_run_resumed_with_other_workers_equals_uninterrupted_run(uninterrupted, flags, tmp_path):
    train(*flags, "--data.workers", 2, "--run_dir", tmp_path / "run", before=die_at(7))
    (resumed,) = train("--resume_from", tmp_path / "run", "--data.workers", 1)
    resumed.ok()
    assert_equal(tmp_path / "run", uninterrupted("--micro_batch_size", 12))


def test_run_resumed_with_other_micro_batches_is_the_same_training(uninterrupted, flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, "--micro_batch_size", 4, "--run_dir", run, before=die_at(7))  # it has saved after 5 * 3 of them
    train("--resume_from", run, "--micro_batch_size", 6)[0].ok()
    for name in ("train/loss", "train/grad_norm"):
        assert series(run, name) == pytest.approx(series(uninterrupted(), name), abs=1e-5)
    for name, value in weights(uninterrupted()).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=1e-5)


def test_run_killed_from_outside_and_resumed_equals_uninterrupted_run(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", ("--steps", "80", "--checkpoint.every", "20", "--eval.every", "0")
    process = start([sys.executable, "train.py", *flags, *own, "--run_dir", str(run)])
    wait_for_step(run, 23, process)
    process.kill()
    process.wait()
    assert steps(run)[-1] < metrics(run)[-1]["step"] < 80
    (resumed,) = train("--resume_from", run)
    resumed.ok()
    assert_equal(run, uninterrupted(*own))

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert len(list((run / "tensorboard").iterdir())) == 2
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 81))
    assert logged == pytest.approx(series(run, "train/loss"), rel=1e-6)  # TensorBoard keeps float32


def test_two_processes_killed_and_resumed_equal_uninterrupted_processes(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", ("--steps", "60", "--micro_batch_size", "3", "--checkpoint.every", "20")
    launch = [*LAUNCH, *TWO_PROCESSES, "--main_process_port", "0", "--mixed_precision", "no", "train.py"]
    process = start([*launch, *flags, *own, "--run_dir", str(run)])
    wait_for_step(run, 23, process)
    # Every process at once: the launcher's workers are no members of its process group.
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in everyone:
        one.kill()
    process.wait()
    assert len(everyone) == 3
    assert steps(run)[-1] < metrics(run)[-1]["step"] < 60
    resumed = start([*launch, "--resume_from", str(run)])
    assert resumed.wait(60) == 0
    assert result(run)["processes"] == 2
    assert_equal(run, uninterrupted(*own, processes=2))


def test_three_processes_that_are_resumed_add_gradients_in_the_same_order(uninterrupted, flags, tmp_path):
    train(*flags, "--run_dir", tmp_path / "run", processes=3, before=die_at(7))
    for child in train("--resume_from", tmp_path / "run", processes=3):
        child.ok()
    assert_equal(tmp_path / "run", uninterrupted(processes=3))


def test_run_killed_twice_before_it_logs_again_misses_no_step_in_its_metrics(uninterrupted, flags, tmp_path):
    def die_at_first_forward(found):
        VLAPolicy.forward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    train(*flags, "--run_dir", tmp_path / "run", before=die_at(7))
    (killed,) = train("--resume_from", tmp_path / "run", before=die_at_first_forward)
    assert killed.code == -signal.SIGKILL
    (resumed,) = train("--resume_from", tmp_path / "run")
    resumed.ok()
    assert list(series(tmp_path / "run", "train/loss")) == list(range(1, 17))
    assert_equal(tmp_path / "run", uninterrupted("--micro_batch_size", 12))


def test_going_back_to_an_older_checkpoint_abandons_the_newer_ones(flags, tmp_path):
    run, own = tmp_path / "run", ("--checkpoint.every", "4", "--checkpoint.keep", "9", "--eval.every", "0")
    (whole,) = train(*flags, *own, "--run_dir", run)
    whole.ok()
    assert steps(run) == [4, 8, 12, 16]
    (killed,) = train("--resume_from", run / "checkpoints/step_00000004", "--steps", 15, before=die_at(10))
    assert killed.code == -signal.SIGKILL
    assert "warning: this goes back to before steps 8, 12, 16; the next saves delete" in killed.stderr
    (resumed,) = train("--resume_from", run)
    assert f"resumed from {run}/checkpoints/step_00000008" in resumed.ok().stderr
    assert "goes back" not in resumed.stderr
    assert result(run)["step"] == 15
    assert list(series(run, "train/loss")) == list(range(1, 16))


def test_run_that_goes_back_and_is_killed_before_it_saves_has_lost_nothing(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", ("--checkpoint.keep", 9)
    train(*flags, *own, "--run_dir", run)[0].ok()
    for older in ("checkpoints/step_00000007", "checkpoints/step_00000010"):
        (killed,) = train("--resume_from", run / older, "--checkpoint.every", 99, "--eval.every", 0, before=die_at(14))
        assert killed.code == -signal.SIGKILL

    def die_in_a_save(found):
        Saver._write_tensors = lambda *_: die()

    (killed,) = train("--resume_from", of(run, 10), before=die_in_a_save)
    assert killed.code == -signal.SIGKILL
    (resumed,) = train("--resume_from", run)
    assert f"resumed from {run}/checkpoints/step_00000016" in resumed.ok().stderr
    assert_equal(run, uninterrupted(*own))


def test_run_that_ends_at_an_older_checkpoint_exports_what_it_had_found_by_then(flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, "--checkpoint.keep", 9, "--run_dir", run)[0].ok()
    assert result(run)["best_step"] > 7
    (child,) = train("--resume_from", run / "checkpoints/step_00000007", "--steps", 7)
    assert "the best of 7 steps of 12 samples was step 7" in child.ok().stderr
    assert (result(run)["step"], result(run)["best_step"]) == (7, 7)
    assert result(run)["best"] == series(run, "eval/loss")[7]
    assert steps(run) == [5, 7, 10, 14, 15, 16]
    exported, saved = (load_file(f) for f in (run / "export/model.safetensors", of(run, 7) / "ema.safetensors"))
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


def test_newest_checkpoint_survives_the_rotation_after_going_back(flags, tmp_path):
    run, own = tmp_path / "run", ("--checkpoint.every", "4", "--checkpoint.keep", "9", "--eval.every", "0")
    train(*flags, *own, "--run_dir", run)
    (killed,) = train("--resume_from", run / "checkpoints/step_00000004", "--checkpoint.keep", 1, before=die_at(10))
    assert killed.code == -signal.SIGKILL
    assert 8 in steps(run)


def test_resuming_a_finished_run_leaves_it_as_it_is(flags, tmp_path):
    (whole,) = train(*flags, "--run_dir", tmp_path / "run")
    whole.ok()
    before, lines = result(tmp_path / "run"), metrics(tmp_path / "run")
    (again,) = train("--resume_from", tmp_path / "run")
    assert "steps      16 to 16" in again.ok().stderr
    assert result(tmp_path / "run") == before
    assert metrics(tmp_path / "run") == lines


def test_auto_starts_a_run_and_then_goes_on_with_it(uninterrupted, flags, tmp_path):
    same_command = [*flags, "--micro_batch_size", 12, "--run_dir", tmp_path / "run", "--resume_from", "auto"]
    (killed,) = train(*same_command, before=die_at(7))
    assert "weights from scratch" in killed.stderr
    (resumed,) = train(*same_command)
    assert f"resumed from {tmp_path}/run/checkpoints/step_00000005" in resumed.ok().stderr
    assert_equal(tmp_path / "run", uninterrupted("--micro_batch_size", 12))


def test_run_can_end_before_a_part_of_it_is_trained(flags, tmp_path):
    own = ("--model.freeze", "vision_encoder", "--model.unfreeze", "vision_encoder", 12, "--run_dir", tmp_path / "run")
    train(*flags, *own, before=die_at(7))
    train("--resume_from", tmp_path / "run", "--steps", 10)[0].ok()
    assert result(tmp_path / "run")["step"] == 10


@pytest.mark.parametrize("name", ["best", "step_00000005", "step_by_step"])
def test_run_is_resumed_by_its_name_whatever_that_is(name, flags, tmp_path):
    run = tmp_path / name
    train(*flags, "--steps", 8, "--run_dir", run)[0].ok()
    (resumed,) = train("--resume_from", run, "--steps", 9)
    assert f"resumed from {run}/checkpoints/step_00000008" in resumed.ok().stderr
    run_module("vla.export", run)[0].ok()
    (child,) = train("--resume_from", run / "checkpoints/step_00000099")
    assert child.stderr == f"error: {run}/checkpoints/step_00000099 is not there; there are the steps 8, 9\n"


@pytest.mark.parametrize("name", ["step_4", "step_7777", "step_000000010", "step_00000010.old", "step_00000099"])
def test_name_that_no_checkpoint_has_is_refused_with_those_that_are_there(name, trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    shutil.copytree(of(run, 10), run / "checkpoints/step_00000010.old")
    for path in (run / name, run / "checkpoints" / name):
        with pytest.raises(InputError, match=f"{path} is not there; there are the steps 5, .*16$"):
            checkpoint.find(str(path), run / "checkpoints")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (".", "checkpoints/step_00000010"),
        ("checkpoints", "step_00000010"),
        ("checkpoints/step_00000005", "../step_00000010"),
        ("checkpoints/step_00000010", "."),
        (".", "latest"),
        ("elsewhere", "checkpoints/step_00000010"),
    ],
)
def test_checkpoint_is_found_from_anywhere_in_its_run_and_by_a_link(where, name, trained, tmp_path, monkeypatch):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (run / "latest").symlink_to("checkpoints/step_00000010")
    if where == "elsewhere":  # the checkpoints lie on another disk
        (run / "checkpoints").rename(run.parent / "step_others")
        (run / "checkpoints").symlink_to(run.parent / "step_others")
        assert checkpoint.wanted(str(run / "checkpoints")) == ""
    monkeypatch.chdir(run / where.replace("elsewhere", "."))
    assert Path(options.parse(["--resume_from", name]).run_dir).resolve() == run
    assert checkpoint.find(name, run / "checkpoints").resolve() == of(run, 10).resolve()
    export.main(export.ExportConfig(name))
    assert "Trained for 10 steps." in (run / "export/README.md").read_text()
    VLAPolicy.from_pretrained(name)


def test_change_of_precision_is_said(flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, "--steps", 8, "--run_dir", run, env={"ACCELERATE_MIXED_PRECISION": "bf16"})[0].ok()
    for end, said in ((9, 1), (10, 0)):
        (child,) = train("--resume_from", run, "--steps", end)
        assert child.ok().stderr.count("was trained in precision bf16, and the run goes on in no") == said
