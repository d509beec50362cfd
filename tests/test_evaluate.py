"""Held-out loss and error of several robots, overall and of each; a change of measure; rollouts on video."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from policies import ARM, TABLETOP, tiny
from training import after, in_children, rank, result, steps, train

from vla import evaluate, keyed
from vla.log import RunLog
from vla.sim.tabletop import Tabletop

# Of the same robot as TABLETOP, in other units.
MORE = replace(TABLETOP, name="more", cameras=("gripper",))


class Held:
    """Held-out samples, whose data sets are given by their places. which: one for each sample."""

    def __init__(self, policy, which):
        self.policy, self.which = policy, torch.tensor(which)

    def __len__(self):
        return len(self.which)

    def batch(self, positions):
        place = torch.tensor(positions)
        config, generator = self.policy.config, torch.Generator().manual_seed(0)
        dataset, horizon = self.which[place], config.model.chunk_size
        state = torch.rand(len(self), config.state_dim, generator=generator)
        actions = torch.rand(len(self), horizon, config.action_dim, generator=generator)
        for k, spec in enumerate(config.datasets):
            state[self.which == k, len(spec.state_names) :] = 0
            actions[self.which == k, :, len(spec.action_names) :] = 0
        has = torch.tensor([[name in spec.cameras for name in config.cameras] for spec in config.datasets])
        tokens, token_mask = self.policy.tokenize(["go"])
        return {
            "dataset": dataset,
            "image_mask": has[dataset],
            "images": torch.zeros(len(place), len(config.cameras), 3, *config.image_size, dtype=torch.uint8),
            "state": state[place],
            "tokens": tokens.repeat(len(place), 1),
            "token_mask": token_mask.repeat(len(place), 1),
            "actions": actions[place],
            "action_is_pad": torch.arange(horizon) > place[:, None] % horizon,
            "key": keyed.derive(0, place),
        }


def evaluated(datasets, which, processes=1, batch_size=3, limit=100):
    """What each process finds."""

    def evaluate_it(found):
        policy = tiny(datasets=datasets)
        arguments = (Accelerator(cpu=True), policy, Held(policy, which), limit, batch_size)
        found["values"] = evaluate.held_out(*arguments)

    return [child.ok().found["values"] for child in in_children(evaluate_it, processes)]


def by_hand(datasets, which):
    """Loss of each sample, and its mean error in each of its robot's own dimensions over its valid steps."""
    policy = tiny(datasets=datasets)
    batch = Held(policy, which).batch(range(len(which)))
    with torch.no_grad():
        losses = [policy({k: v[i : i + 1] for k, v in batch.items()})["loss"].item() for i in range(len(which))]
    errors, chunk = [], policy.predict_chunk(batch)
    for i, k in enumerate(which):
        dims, valid = len(datasets[k].action_names), ~batch["action_is_pad"][i]
        errors.append((chunk[i, valid, :dims] - batch["actions"][i, valid, :dims]).abs().mean(0))
    return losses, errors


def mean(values):
    return float(sum(values)) / len(values)


WHICH = [0, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_loss_and_error_are_also_given_for_each_robot_in_its_own_dimensions(batch_size):
    datasets = (TABLETOP, ARM)
    (values,) = evaluated(datasets, WHICH, batch_size=batch_size)
    losses, errors = by_hand(datasets, WHICH)
    expected = {"loss": mean(losses), "flow": mean(losses), "action_error": mean([e.mean() for e in errors])}
    for k, spec in enumerate(datasets):
        mine = [i for i, place in enumerate(WHICH) if place == k]
        expected[f"loss/{spec.name}"] = mean([losses[i] for i in mine])
        expected[f"action_error/{spec.name}"] = mean([errors[i].mean() for i in mine])
    assert values == pytest.approx({f"eval/{name}": value for name, value in expected.items()}, rel=1e-5)


def test_error_of_each_dimension_is_given_where_all_robots_have_the_same():
    datasets = (TABLETOP, MORE)
    (values,) = evaluated(datasets, WHICH)
    _, errors = by_hand(datasets, WHICH)
    for i, name in enumerate(TABLETOP.action_names):
        assert values[f"eval/action_error/{name}"] == pytest.approx(mean([error[i] for error in errors]), rel=1e-5)
    assert {name for name in values if name.startswith("eval/action_error")} == {
        "eval/action_error",
        *(f"eval/action_error/{name}" for name in ("tabletop", "more", *TABLETOP.action_names)),
    }


def test_single_robot_has_no_values_of_its_own():
    (values,) = evaluated((TABLETOP,), [0] * 5)
    names = ["loss", "flow", "action_error", *(f"action_error/{name}" for name in TABLETOP.action_names)]
    assert values.keys() == {f"eval/{name}" for name in names}


@pytest.mark.parametrize(("which", "processes"), [(WHICH, 2), (WHICH, 3), ([0, 1], 3), ([1, 0, 1, 0], 2)])
def test_processes_that_see_no_sample_of_a_robot_find_the_same(which, processes):
    (alone,) = evaluated((TABLETOP, ARM), which)
    for values in evaluated((TABLETOP, ARM), which, processes):
        assert values == pytest.approx(alone, rel=1e-5)


def test_robot_without_a_held_out_sample_has_no_value():
    (values,) = evaluated((TABLETOP, ARM), [0, 0, 0])
    assert "eval/loss/tabletop" in values
    assert not [name for name in values if "arm" in name]
    assert values["eval/loss"] == values["eval/loss/tabletop"]


@pytest.mark.parametrize("leaving", [0, 1])
def test_evaluation_that_one_process_has_to_leave_has_no_result_on_any(leaving):
    def evaluate_it(found):
        policy = tiny(datasets=(TABLETOP, ARM))
        arguments = (Accelerator(cpu=True), policy, Held(policy, WHICH), 100, 2)
        found["values"] = evaluate.held_out(*arguments, go_on=lambda: rank() != leaving)

    assert [child.ok().found["values"] for child in in_children(evaluate_it, 2)] == [None, None]


@pytest.mark.parametrize(
    ("changed", "by"),
    [
        (("--eval.metric", "action_error"), "eval/action_error of 5 samples"),
        (("--eval.samples", 1), "eval/loss of 1 samples"),
        (("--eval.metric", "success", "--eval.env", "tabletop", "--eval.episodes", 1), "eval/success of tabletop, 1"),
    ],
    ids=lambda own: own[-2],
)
def test_run_that_is_judged_otherwise_from_a_resume_on_says_so_and_looks_for_its_best_anew(
    changed, by, trained, tmp_path
):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    own = (*changed, "--steps", 20, "--checkpoint.keep", 1)
    before = result(run)["best_step"]
    (child,) = train("--resume_from", run, *own)
    (warning,) = [line for line in child.ok().stderr.splitlines() if "was judged" in line]
    assert warning.startswith(f"warning: this run was judged by eval/loss of 5 samples, and is now by {by}")
    assert f"the best so far, of step {before}, is no longer kept" in warning
    assert (result(run)["best_step"], result(run)["evaluations_since_best"]) == (20, 0)
    assert steps(run) == [20]
    (child,) = train("--resume_from", run, "--steps", 21)
    assert "was judged" not in child.ok().stderr


def test_video_of_a_rollout_runs_as_fast_as_the_environment_does(flags, tmp_path):
    def slow(found):
        Tabletop.fps = 5  # and the data have 10
        after(RunLog, "video", lambda _, log, step, name, frames, fps: found.update(fps=fps))

    own = ["--eval.env", "tabletop", "--eval.episodes", 1, "--steps", 1, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=slow)
    assert child.ok().found["fps"] == 5
