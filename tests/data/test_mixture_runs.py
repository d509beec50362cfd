"""From several data sets by train.py to a policy that acts."""

import io
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered import edit, write
from PIL import Image
from training import assert_equal, die_at, series, steps, train

from vla import InputError
from vla.data.lerobot import LeRobotDataset
from vla.model import VLAPolicy
from vla.sim.tabletop import Tabletop


def again(root, lengths):
    shutil.rmtree(root, ignore_errors=True)
    return write(root, 1, lengths, ("side", "table"), (2, 4), size=(64, 64))


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A robot with other dimensions than the table's, a camera of the same name and one of another."""
    return again(tmp_path_factory.mktemp("arm") / "arm", (9, 5, 8))


@pytest.fixture(scope="module")
def both(data, arm):
    return ["--data.path", data, arm, "--data.weights", "0.7", "0.3", "--data.pad_dims", "--data.val_fraction", "0.2"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_on_two_data_sets_equals_the_uninterrupted_one(workers, both, flags, uninterrupted, tmp_path):
    run = tmp_path / "run"
    (killed,) = train(*flags, *both, "--data.workers", workers, "--run_dir", run, before=die_at(7))
    assert killed.code == -signal.SIGKILL
    assert "0.7 of the samples" in killed.stderr
    (resumed,) = train("--resume_from", run)
    assert f"resumed from {run}/checkpoints/step_00000005" in resumed.ok().stderr
    assert_equal(run, uninterrupted(*both))


def test_of_two_data_sets_of_one_robot_one_is_chosen_to_act_in_training(data, flags, tmp_path):
    own = ["--data.path", data, shutil.copytree(data, tmp_path / "again"), "--data.weights", "0.5", "0.5"]
    own += ["--eval.env", "tabletop", "--eval.episodes", "1", "--eval.dataset", "again", "--steps", "1"]
    train(*flags, *own, "--run_dir", tmp_path / "run")[0].ok()
    assert series(tmp_path / "run", "eval/success").keys() == {1}


def test_policy_of_two_data_sets_acts_as_either_robot(both, arm, uninterrupted):
    run = uninterrupted(*both)
    losses = [series(run, f"eval/loss/{name}") for name in ("tabletop", "arm")]
    assert all(np.isfinite(list(loss.values())).all() for loss in losses)
    policy, world = VLAPolicy.from_pretrained(run / "export"), Tabletop()
    observation = world.reset(7)
    with pytest.raises(InputError, match=r"trained on tabletop, arm: say with policy.drive"):
        policy.select_action(observation)
    policy.drive("tabletop")
    action = policy.select_action(observation)
    assert action.shape == (len(world.action_names),)
    assert np.isfinite(action).all()
    data = LeRobotDataset(arm)
    images = dict(zip(data.cameras, data.images(np.array([3]))[0], strict=True))
    frame = {"images": images, "state": data.state[3], "instruction": "task 1.0"}
    policy.drive("arm")
    assert policy.driven.cameras == ("table", "side")  # in the policy's order, not the data set's
    action = policy.select_action(frame)
    assert action.shape == (4,)
    low, high = np.sort(data.actions, axis=0)[[0, -1]]
    assert ((low - 1000 <= action) & (action <= high + 1000)).all()  # in units of its own: thousands


@pytest.fixture(scope="module")
def stopped(both, flags, tmp_path_factory):
    """A run on two data sets that was killed after step 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(*flags, *both, "--run_dir", run, before=die_at(7))
    assert steps(run) == [5]
    return run


def paint(root):
    png = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(png, "png")
    edit(root, "observation.images.side", 2, {"bytes": png.getvalue(), "path": None})


def rename_task(root, name="a"):
    pq.write_table(pa.table({"task_index": [0, 1, 2], "task": [name, "b", "c"]}), root / "meta/tasks.parquet")


CHANGES = {
    "an action": lambda root: edit(root, "action", 2, [0.5, 0.0, 0.0, 0.0]),
    "a state": lambda root: edit(root, "observation.state", 2, [0.5, 0.0]),
    "a picture": paint,
    "an instruction": rename_task,
    "an instruction, to one that is too long": lambda root: rename_task(root, "a" * 999),
    "an episode appended": lambda root: again(root, (9, 5, 8, 2)),
    "an episode less": lambda root: again(root, (9, 5)),
    "frames of an episode in another": lambda root: again(root, (9, 6, 7)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_run_whose_data_have_changed_is_not_gone_on_with(change, stopped, data, arm, tmp_path):
    run, moved = shutil.copytree(stopped, tmp_path / "run"), shutil.copytree(arm, tmp_path / "arm")
    CHANGES[change](moved)
    (resumed,) = train("--resume_from", run, "--data.path", data, moved)
    assert resumed.code == 1
    (error,) = [line for line in resumed.stderr.splitlines() if line.startswith("error: ")]
    for text in (
        f"the data of --data.path are not those that {run}",
        "was trained on",
        "bring them back",
        "--init_from",
    ):
        assert text in error
    assert "Traceback" not in resumed.stderr


def test_run_whose_data_have_moved_goes_on(both, stopped, data, arm, uninterrupted, tmp_path):
    run, moved = shutil.copytree(stopped, tmp_path / "run"), shutil.copytree(arm, tmp_path / "elsewhere/arm")
    (resumed,) = train("--resume_from", run, "--data.path", data, moved, "--data.cache_dir", tmp_path / "cache")
    resumed.ok()
    assert_equal(run, uninterrupted(*both))


def test_run_whose_data_have_another_name_goes_on_and_calls_them_as_before(
    both, stopped, data, arm, uninterrupted, tmp_path
):
    run, moved = shutil.copytree(stopped, tmp_path / "run"), shutil.copytree(arm, tmp_path / "renamed")
    (resumed,) = train("--resume_from", run, "--data.path", data, moved)
    resumed.ok()
    assert_equal(run, uninterrupted(*both))
    VLAPolicy.from_pretrained(run / "export").drive("arm")


def test_run_whose_data_are_given_in_another_order_is_not_gone_on_with(stopped, data, arm, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (resumed,) = train("--resume_from", run, "--data.path", arm, data)
    assert resumed.code == 1
    assert "the data of --data.path are not those that" in resumed.stderr
