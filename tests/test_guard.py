"""Numbers that are not finite, and spikes: what is learned, what is left out, and that it is the same when resumed."""

import hashlib
import json
import math
import re
import signal
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saving import fill, mounted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import (
    after,
    assert_equal,
    assert_resumes_to,
    at_step,
    both,
    die,
    last,
    metrics,
    of,
    result,
    send,
    series,
    settle,
    steps,
    the,
    train,
    weights,
)

from vla import checkpoint, guard, log
from vla.data.lerobot import LeRobotDataset
from vla.model import VLAPolicy
from vla.saver import Saver

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


def spoil(positions, how="actions"):
    """A hook that spoils the samples at these positions: their "actions" are no numbers, or the "gradient" of their
    batch is none, or their "loss" is 100 times as high. Finds the positions of each batch trained on, and the spoiled
    states.
    """

    def hook(found):
        found["positions"], found["states"] = [], []

        def forward(self, batch, original=VLAPolicy.forward):
            if not self.training:
                return original(self, batch)
            found["positions"].append(batch["position"].tolist())
            bad = torch.isin(batch["position"], torch.tensor(list(positions)))
            found["states"] += batch["state"][bad].tolist()
            if how == "actions":
                batch["actions"][bad] = math.nan
            output = original(self, batch)
            if how == "gradient" and bad.any():
                output["loss"].register_hook(lambda gradient: gradient * math.nan)
            if how == "loss":
                scale = 1 + 99 * bad
                output |= {"loss": output["loss"] * scale.max(), "sample_loss": output["sample_loss"] * scale}
            return output

        VLAPolicy.forward = forward

    return hook


def watch_weights(found):
    """Finds the bits of the weights after each step."""
    found["weights"], policies = [], []

    def keep(*_):
        bits = b"".join(value.numpy().tobytes() for value in policies[0].state_dict().values())
        found["weights"].append(hashlib.sha256(bits).digest())

    after(VLAPolicy, "__init__", lambda _, policy, *rest: policies.append(policy))
    after(log.RunLog, "step", keep)


def skips(child):
    """What was told of each skipped update: (step, why)."""
    return re.findall(r"^step (\d+): update skipped, (.*)$", child.stderr, re.M)


@pytest.mark.parametrize(("how", "micro"), [("actions", 8), ("actions", 2), ("gradient", 2)])
def test_sample_that_is_not_finite_in_one_process_is_named_and_not_learned_by_any(how, micro, data, flags, tmp_path):
    # Of the 16 samples of a step, the last is in the only micro-batch of process 1, or in its fourth.
    own = ["--global_batch_size", 16, "--micro_batch_size", micro, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, before=both(spoil([4 * 16 + 15], how), watch_weights), processes=2)
    first, second = (child.ok().found for child in children)
    assert first["weights"] == second["weights"]
    assert [a == b for a, b in pairwise(first["weights"])] == [step == 5 for step in range(2, 17)]
    assert result(tmp_path / "run")["skipped_updates"] == 1
    assert (len(first["states"]), len(second["states"])) == (0, 1)
    why = "a gradient is not finite; the samples are those at positions 64 to 79"
    if how == "actions":
        dataset = LeRobotDataset(data)
        (frame,) = np.flatnonzero((dataset.state == np.float32(second["states"][0])).all(axis=1))
        episode = np.searchsorted(dataset.episode_to, frame, side="right")
        why = f"position 79 (frame {frame - dataset.episode_from[episode]} of episode {episode})"
        why = f"the loss is not finite for {why}"
    assert skips(children[0]) == [("5", why)]


@pytest.mark.parametrize("micro", [12, 4])
def test_skipped_updates_leave_everything_as_it_was_and_are_counted(micro, flags, tmp_path):
    own = ["--checkpoint.every", 1, "--checkpoint.keep", 99, "--log.every", 2, "--micro_batch_size", micro]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=spoil([3 * 12, 8 * 12 + 11]))
    child.ok()
    counted = {step: (step >= 4) + (step >= 9) for step in range(1, 17)}
    assert series(tmp_path / "run", "train/skipped_updates") == {step: counted[step] for step in range(2, 17, 2)}
    assert result(tmp_path / "run")["skipped_updates"] == 2
    folders = checkpoint.all_steps(tmp_path / "run/checkpoints")
    saved = {step: load_file(path / "model.safetensors") for step, path in folders.items()}
    moments = {step: torch.load(path / "optimizer.bin", weights_only=True)["state"] for step, path in folders.items()}
    for step in range(2, 17):
        assert all(torch.isfinite(value).all() for value in saved[step].values())
        unchanged = all(torch.equal(saved[step][name], saved[step - 1][name]) for name in saved[step])
        assert unchanged == (step in (4, 9))
        assert moments[step][0]["step"] == step - counted[step]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", "ema.safetensors").values())


def test_optimizer_of_eight_bits_skips_updates_too(flags, tmp_path):
    own = ["--optim.eight_bit", "--checkpoint.every", 1, "--checkpoint.keep", 99, "--model.width", 64]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=spoil([3 * 12]))
    child.ok()
    folders = checkpoint.all_steps(tmp_path / "run/checkpoints")
    saved = {step: load_file(path / "model.safetensors") for step, path in folders.items()}
    same = [all(torch.equal(saved[step][name], saved[step - 1][name]) for name in saved[1]) for step in range(2, 17)]
    assert same == [step == 4 for step in range(2, 17)]


def test_metrics_are_json_even_where_a_loss_is_not_finite(flags, tmp_path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    (child,) = train(*flags, "--log.every", 2, "--run_dir", tmp_path / "run", before=spoil([3 * 12]))
    child.ok()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line, parse_constant=refuse) for line in lines]) > 8


GUARD = ("--guard.bad_steps", 3, "--checkpoint.every", 4, "--checkpoint.keep", 9, "--eval.every", 3)
SPOILED = spoil([7 * 12 + 3, 8 * 12 + 11, 9 * 12])  # one bad sample in each of three steps, counted from 0
STREAKS = {
    "longer than a window": ([7, 8, 9, 10], [[7, 3]]),
    "twice as long": ([7, 8, 9, 10, 11, 12], [[7, 3], [7, 3]]),
    "one after the other": ([7, 8, 9, 14, 15, 16], [[7, 3], [11, 3]]),
}


@pytest.mark.parametrize(("bad", "windows"), STREAKS.values(), ids=STREAKS)
def test_run_goes_back_and_leaves_the_steps_of_a_bad_streak_out(bad, windows, flags, tmp_path):
    run = tmp_path / "run"
    (child,) = train(*flags, *GUARD, "--run_dir", run, before=spoil([12 * step + step % 12 for step in bad]))
    told = result(run) if child.ok() else None
    assert told["left_out"] == windows
    assert told["rollbacks"] == len(windows)
    assert told["skipped_updates"] == len(bad) - 3 * len(windows)
    left_out = bad[: 3 * len(windows)]
    expected = [step for step in range(16 + len(left_out)) if step not in left_out]
    for name in ("train/loss", "train/grad_norm"):
        assert list(series(run, name)) == list(range(1, 17))
    assert [positions[0] // 12 for positions in child.found["positions"]][-5:] == expected[-5:]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6, 9, 12, 15, 16]


def test_checkpoint_right_before_a_streak_is_the_one_to_go_back_to(flags, tmp_path):
    hook = spoil([12 * step for step in (8, 9, 10)])
    (child,) = train(*flags, *GUARD, "--run_dir", tmp_path / "run", before=hook)
    assert f"going back to {of(tmp_path / 'run', 8)}, " in child.ok().stderr


def test_streak_that_is_full_where_the_run_would_save_is_not_saved(flags, tmp_path):
    def keep(found):
        after(Saver, "save", lambda _, saver, state: found["saved"].append(state["bad_in_a_row"]))
        found["saved"] = []

    hook = both(keep, spoil([12 * step for step in (5, 6, 7)]))
    (child,) = train(*flags, *GUARD, "--run_dir", tmp_path / "run", before=hook)
    assert result(tmp_path / "run")["left_out"] == [[5, 3]] if child.ok() else None
    assert child.found["saved"]
    assert max(child.found["saved"]) < 3


def test_checkpoint_before_a_streak_is_kept_while_the_run_may_go_back_to_it(uninterrupted, flags, tmp_path):
    own = ("--guard.bad_steps", 4, "--checkpoint.every", 4, "--checkpoint.keep", 1, "--eval.every", 0)
    hook, run = spoil([12 * step for step in (7, 8, 9, 10)]), tmp_path / "run"
    (stopped,) = train(*flags, *own, "--run_dir", run, before=both(hook, at_step(8, lambda: send(TERM))))
    assert stopped.ok()
    assert 4 in steps(run)
    assert_resumes_to(run, uninterrupted(*own, before=hook), before=hook)


def test_run_goes_back_on_a_full_disk_and_its_log_is_whole_when_there_is_room_again(uninterrupted, flags, tmp_path):
    run, log_file = tmp_path / "run", tmp_path / "run/metrics.jsonl"

    def no_room():
        line = b'{"step": 2, "save/pad": "%s"}\n'
        with log_file.open("ab") as file:  # to the end of its block
            file.write(line % (b"-" * (-(log_file.stat().st_size + len(line) - 2) % 4096)))
        fill(run)

    for folder in (run, tmp_path / "checkpoints"):
        folder.mkdir()
    with mounted(run, "size=20m"):
        (run / "checkpoints").symlink_to(tmp_path / "checkpoints")  # has room
        full = both(at_step(3, no_room), at_step(13, (run / "filler").unlink))
        (child,) = train(*flags, *GUARD, "--run_dir", run, before=both(SPOILED, full))
        assert "going back" in child.ok().stderr
        assert child.stderr.count("warning: metrics wait until ") == 1
        assert metrics(run) == metrics(uninterrupted(*GUARD, before=SPOILED))


def die_at_line(number):
    """A hook as of `die_at`, by the number of steps that were logged, some of them twice."""

    def hook(found):
        logged = []

        def count(_, run_log, step, values):
            if "train/loss" in values:
                logged.append(step)
                if len(logged) == number:
                    settle()
                    die()

        after(log.RunLog, "metrics", count)

    return hook


# The run logs its steps 1 to 11, goes back to 6, and logs 7 to 16. It saves step 8 both times.
@pytest.mark.parametrize("lines", [9, 11, 12, 15], ids=["in", "at_the_end", "gone_back", "saved_again"])
def test_run_that_goes_back_is_the_same_wherever_it_is_killed(lines, uninterrupted, flags, tmp_path):
    run = tmp_path / "run"
    (killed,) = train(*flags, *GUARD, "--run_dir", run, before=both(SPOILED, die_at_line(lines)))
    assert killed.code == -signal.SIGKILL
    assert_resumes_to(run, uninterrupted(*GUARD, before=SPOILED), before=SPOILED)
    assert result(run)["rollbacks"] == 1
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))


def test_processes_that_go_back_and_are_killed_then_equal_those_that_were_not(uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", (*GUARD, "--data.workers", 1)
    killed = train(*flags, *own, "--run_dir", run, before=both(SPOILED, die_at_line(12)), processes=2)
    assert [child.code for child in killed] == [-signal.SIGKILL] * 2
    assert_resumes_to(run, uninterrupted(*GUARD, processes=2, before=SPOILED), processes=2, before=SPOILED)
    assert result(run)["rollbacks"] == 1


def test_signal_when_the_run_goes_back_leaves_that_to_the_resumed_run(uninterrupted, flags, tmp_path):
    hook = both(SPOILED, at_step(11, lambda: send(TERM)))
    children = train(*flags, *GUARD, "--run_dir", tmp_path / "run", before=hook)
    assert "going back" in children[0].ok().stderr
    assert_resumes_to(tmp_path / "run", uninterrupted(*GUARD, before=SPOILED), before=SPOILED)


def test_run_that_goes_back_to_before_its_measure_was_changed_forgets_the_best_of_the_old_one(flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, *GUARD, "--run_dir", run, before=both(SPOILED, at_step(5, lambda: send(TERM))))
    (resumed,) = train("--resume_from", run, "--eval.metric", "action_error", before=SPOILED)
    assert "going back" in resumed.ok().stderr
    errors = series(run, "eval/action_error")
    assert (result(run)["metric"], result(run)["best"]) == ("action_error", errors[result(run)["best_step"]])


def test_run_that_never_becomes_finite_stops_in_one_line_and_keeps_its_last_checkpoint(flags, tmp_path):
    run, own = tmp_path / "run", (*GUARD, "--guard.rollbacks", 2, "--run_dir", tmp_path / "run")
    first, second = train(*flags, *own, before=spoil(range(7 * 12, 99 * 12)), processes=2)
    assert (first.code, second.code) == (1, 1)
    assert first.stderr.count("going back to") == 2
    (told,) = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert "3 updates in a row, up to step 10, were skipped, and the run has gone back 2 times before" in told
    assert "Traceback" not in first.stderr
    assert "error" not in second.stderr
    checkpoint.verify(last(run))
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    (resumed,) = train("--resume_from", run)
    assert result(run)["step"] == 16 if resumed.ok() else None


def test_run_that_has_gone_back_more_often_than_it_now_may_stops(flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, *GUARD, "--run_dir", run, before=spoil([12 * step for step in (3, 4, 5, 8, 9, 10)]))[0].ok()
    assert result(run)["rollbacks"] == 2
    (child,) = train("--resume_from", run, "--steps", 24, "--guard.rollbacks", 1, before=spoil(range(16 * 12, 999)))
    assert child.code == 1
    assert "and the run has gone back 2 times before" in child.stderr
    assert "going back to" not in child.stderr


@pytest.mark.parametrize(("every", "saved"), [(99, []), (4, [4])], ids=["never_saved", "saved_too_late"])
def test_run_that_has_nothing_to_go_back_to_stops_in_one_line(every, saved, flags, tmp_path):
    own = ["--guard.bad_steps", 3, "--checkpoint.every", every, "--eval.every", 0, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=spoil(range(24, 999)))
    assert child.code == 1
    (told,) = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert "3 updates in a row, up to step 5, were skipped, and there is nothing to go back to" in told
    assert "(nothing was saved before them): look at the samples named above" in told
    assert steps(tmp_path / "run") == saved


def test_state_that_is_not_finite_is_never_saved_and_the_run_goes_back_from_it(flags, tmp_path):
    def spoil_weights():
        torch._foreach_mul_([parameter.data for parameter in the(VLAPolicy).parameters()], math.nan)

    run, own = tmp_path / "run", ["--guard.bad_steps", 3, "--checkpoint.every", 2, "--eval.every", 0]
    (child,) = train(*flags, *own, "--checkpoint.keep", 9, "--run_dir", run, before=at_step(5, spoil_weights))
    assert "weights or moments are not finite" in child.ok().stderr
    assert result(run)["left_out"] == [[5, 3]]
    assert steps(run) == [2, 4, 6, 8, 10, 12, 14, 16]
    for path in checkpoint.all_steps(run / "checkpoints").values():
        saved = [*load_file(path / "model.safetensors").values(), *load_file(path / "ema.safetensors").values()]
        assert all(torch.isfinite(value).all() for value in saved)


SPIKES = ("--guard.spike_factor", 4)
SPIKE = spoil([8 * 12 + 4], "loss")


def test_guard_against_spikes_changes_nothing_where_there_is_none(uninterrupted, flags, tmp_path):
    run = tmp_path / "run"
    (child,) = train(*flags, *SPIKES, "--run_dir", run)
    child.ok()
    for name, value in weights(uninterrupted()).items():
        assert torch.equal(weights(run)[name], value)
    assert metrics(run) == metrics(uninterrupted())
    assert result(run)["loss_average"] == pytest.approx(1.8, abs=0.5)  # of the losses of its steps


@pytest.mark.parametrize("micro", [12, 3])
def test_spike_is_told_and_not_learned_and_the_average_goes_on_when_resumed(micro, uninterrupted, flags, tmp_path):
    run, own = tmp_path / "run", (*SPIKES, "--micro_batch_size", micro, "--checkpoint.every", 6, "--eval.every", 0)
    whole = uninterrupted(*own, before=SPIKE)
    (killed,) = train(*flags, *own, "--run_dir", run, before=both(SPIKE, watch_weights, die_at_line(8)))
    assert killed.code == -signal.SIGKILL
    assert "update skipped" not in killed.stderr
    (resumed,) = train("--resume_from", run, before=both(SPIKE, watch_weights))
    assert_equal(run, whole)
    assert [a == b for a, b in pairwise(resumed.ok().found["weights"])] == [step == 9 for step in range(8, 17)]
    ((step, why),) = skips(resumed)
    assert (step, result(run)["skipped_updates"]) == ("9", 1)
    assert why.startswith("the loss is beyond 4 times its running average (--guard.spike_factor); it is highest for ")
    assert "position 100 (" in why


def test_running_average_is_that_of_what_was_learned(flags, tmp_path):
    own = ["--guard.spike_factor", 3, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=spoil([8 * 12], "loss"))
    assert result(tmp_path / "run")["skipped_updates"] == 1 if child.ok() else None
    first, *rest = [loss for step, loss in series(tmp_path / "run", "train/loss").items() if step != 9]
    for loss in rest:
        first += 0.02 * (loss - first)
    assert result(tmp_path / "run")["loss_average"] == pytest.approx(first, rel=1e-5)


def test_spike_is_one_of_the_whole_step_and_not_of_a_micro_batch(flags, tmp_path):
    # A micro-batch has 100 times its loss, all four of the step together 26 times theirs.
    own = ["--guard.spike_factor", 50, "--micro_batch_size", 3, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=spoil([8 * 12], "loss"))
    assert result(tmp_path / "run")["skipped_updates"] == 0 if child.ok() else None
    losses = series(tmp_path / "run", "train/loss")
    assert losses[9] > 10 * losses[8]


def test_spike_is_learned_like_the_rest_by_default(flags, tmp_path):
    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=both(SPIKE, watch_weights))
    assert "skipped" not in child.ok().stderr
    assert len(set(child.found["weights"])) == 16


def test_run_goes_back_from_spikes_in_a_row(flags, tmp_path):
    run = tmp_path / "run"
    hook = spoil([12 * step for step in (7, 8, 9)], "loss")
    for child in train(*flags, *GUARD, *SPIKES, "--run_dir", run, before=hook, processes=2):
        child.ok()
    assert result(run)["left_out"] == [[7, 3]]
    first, *others = series(run, "train/loss").values()
    average = reduce(lambda average, loss: average + guard.SPIKE_WEIGHT * (loss - average), others, first)
    assert result(run)["loss_average"] == pytest.approx(average, rel=1e-5)  # over all processes
