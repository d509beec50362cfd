"""Demonstrations: python -m vla.collect."""

import errno
import shutil

import numpy as np
import pytest

from vla import InputError, collect, sim
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter
from vla.sim.tabletop import STEP, Tabletop


def collected(folder, **options):
    collect.main(collect.CollectConfig("tabletop", str(folder), **options))
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_number_of_workers_changes_nothing_of_what_is_recorded(tmp_path, capsys):
    options = {"episodes": 10, "noise": 1.0, "seed": 3}
    first, *others = (collected(tmp_path / str(workers), workers=workers, **options) for workers in (1, 0, 2))
    for other in others:
        assert first.keys() == other.keys()
        assert all(content == other[name] for name, content in first.items())
    data = LeRobotDataset(tmp_path / "1")
    assert (data.num_episodes, data.cameras, data.image_size, data.fps) == (10, Tabletop.cameras, (64, 64), 10)
    assert (tuple(data.state_names), tuple(data.action_names)) == (Tabletop.state_names, Tabletop.action_names)
    left_out = int(capsys.readouterr().out.split("(")[1].split()[0])
    assert left_out > 0  # so that failed episodes were replaced, by the same ones both times


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_collection_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch, codec):
    options, add = {"episodes": 10, "workers": 1, "codec": codec}, LeRobotWriter.add_episode

    def stopped(folder, after):
        def added(writer, **episode):
            if writer._num_episodes == after:
                raise KeyboardInterrupt
            add(writer, **episode)

        monkeypatch.setattr(LeRobotWriter, "add_episode", added)
        with pytest.raises(KeyboardInterrupt):
            collected(folder, **options)
        monkeypatch.setattr(LeRobotWriter, "add_episode", add)
        return folder.with_name(f".{folder.name}.episodes")

    expected = collected(tmp_path / "whole", **options)
    stopped(tmp_path / "stopped", 4)
    stopped(tmp_path / "stopped", 7)
    assert collected(tmp_path / "stopped", **options) == expected
    kept = stopped(tmp_path / "other flags", 4)
    options["seed"] = 50
    assert collected(tmp_path / "other flags", **options) == collected(tmp_path / "other", **options) != expected
    assert not kept.exists()
    del options["seed"]
    kept = stopped(tmp_path / "taken", 4)
    assert sorted(path.suffix for path in kept.iterdir())[:4] == [".json", ".npz", ".npz", ".npz"]
    shutil.copy(kept / "2.npz", kept / "3.npz")  # what is there is not made again
    collected(tmp_path / "taken", **options)
    whole, taken = (LeRobotDataset(tmp_path / name) for name in ("whole", "taken"))
    ends = np.diff(whole.episode_to, prepend=0)
    ends[3] = ends[2]
    np.testing.assert_array_equal(np.diff(taken.episode_to, prepend=0), ends)


def test_collection_that_is_interrupted_leaves_the_rest_undone(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LeRobotWriter, "add_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "set", episodes=400, workers=1)
    assert len(list((tmp_path / ".set.episodes").glob("*.npz"))) < 200


class Tasks(Tabletop):
    """The table with three tasks that follow from the seed; of the second every other scene fails."""

    tasks, tasks_per_scene = ("one", "two", "three"), 1

    def reset(self, seed, task=0):
        self.task, self.max_steps = self.tasks[seed % 3], 1 if seed % 6 == 4 else 40
        return super().reset(seed, task) | {"state": np.array([seed, 0, 0], np.float32)}


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("options", [{"episodes": 9}, {"episodes_per_task": 3}], ids=str)
def test_equally_many_episodes_of_each_task_are_recorded(tmp_path, monkeypatch, capsys, seed, options):
    monkeypatch.setattr(sim, "make", lambda name, image_size: Tasks())
    monkeypatch.setattr(collect, "make", sim.make)
    collected(tmp_path / "set", seed=seed, noise=0.0, workers=0, **options)
    data = LeRobotDataset(tmp_path / "set")
    seeds = data.state[data.episode_from, 0].astype(int).tolist()
    ones, twos, threes = ([s for s in seeds if s % 3 == task] for task in range(3))
    first = {task: next(s for s in range(seed, seed + 3) if s % 3 == task) for task in range(3)}
    assert ones == [first[0] + 3 * i for i in range(3)]
    assert threes == [first[2] + 3 * i for i in range(3)]
    assert twos == [s for s in range(first[1], 100, 3) if s % 6 != 4][:3]
    failed = (twos[-1] - first[1]) // 3 - 2
    assert f"({failed} failed episodes left out: {failed} of two)" in capsys.readouterr().out


def numbers(count):
    """Scenes' seeds and tasks, in the order in which they are demonstrated."""
    return [(number, *divmod(number, Tabletop.tasks_per_scene)) for number in range(count)]


def test_demonstration_without_noise_is_what_the_expert_does():
    for number, scene, task in numbers(6):
        episode = collect.demonstrate("tabletop", 0.0, 40, number)
        world = Tabletop()
        observation = world.reset(40 + scene, task)
        assert episode["instruction"] == world.instruction
        for turn, action in enumerate(episode["actions"]):
            np.testing.assert_array_equal(episode["state"][turn], observation["state"])
            np.testing.assert_array_equal(action, world.expert())
            for camera, image in zip(world.cameras, observation["images"], strict=True):
                np.testing.assert_array_equal(episode["images"][camera][turn], image)
            observation, success, done = world.step(action)
        assert (success, done) == (True, True)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_demonstration_goes_on_after_success_for_as_long_as_it_is_told(monkeypatch, noise):
    short = collect.demonstrate("tabletop", noise, 0, 1)
    steps = len(short["actions"])
    monkeypatch.setattr(Tabletop, "max_steps", steps + 5)
    for more in (3, 5, 6):
        long = collect.demonstrate("tabletop", noise, 0, 1, after_success=more)
        assert len(long["actions"]) == len(long["state"]) == steps + min(more, 5)
        np.testing.assert_array_equal(long["actions"][:steps], short["actions"])
        np.testing.assert_array_equal(long["state"][:steps], short["state"])
        assert not long["actions"][steps:].any()  # it leaves alone what lies where it should


def test_demonstrations_record_the_experts_actions_and_not_their_noise():
    for number, _, _ in numbers(10):
        episode = collect.demonstrate("tabletop", 0.3, 0, number)
        actions, state = episode["actions"], episode["state"].astype(np.float64)
        assert np.abs(actions[:, :2]).max() <= 1
        assert set(actions[:, 2]) == {0, 1}
        np.testing.assert_array_equal(state[1:, 2], actions[:-1, 2])  # the gripper does as it is told
        executed = np.diff(state[:, :2], axis=0) / STEP
        assert np.abs(executed - actions[:-1, :2]).mean() > 0.05
        np.testing.assert_array_equal(actions, collect.demonstrate("tabletop", 0.3, 0, number)["actions"])


def test_noise_differs_between_the_tasks_of_a_scene_and_between_scenes():
    moved = []
    for number, _, _ in numbers(8):
        episode = collect.demonstrate("tabletop", 0.3, 0, number)
        moved.append(tuple(np.diff(episode["state"][:2, :2], axis=0)[0] / STEP - episode["actions"][0, :2]))
    assert len(set(moved)) == 8


@pytest.mark.parametrize("name", ["seed", "noise", "after_success", "workers", "image_size", "episodes_per_task"])
def test_options_of_collection_that_cannot_work_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"--{name} is -1; expected at least 0"):
        collected(tmp_path / "set", **{name: -1})


def test_images_too_small_to_draw_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"images of 16 pixels are too small .* an --image_size of at least 17"):
        collected(tmp_path / "set", image_size=16)
    collected(tmp_path / "set", image_size=17, episodes=1, workers=0)


def test_full_disk_is_told_in_one_line_and_leaves_no_part_of_an_episode(tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match=r"0.npz cannot be written \(.*No space left.*: make room, or choose another"):
        collected(tmp_path / "set", workers=0)
    assert not list(tmp_path.rglob("*.npz"))


def test_noise_that_the_expert_cannot_overcome_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"the expert solved \d of \d+ episodes of tabletop with --noise 20.0; lower it"
    ):
        collected(tmp_path / "set", episodes=20, noise=20.0, workers=1)
    assert not (tmp_path / "set").exists()
    with pytest.raises(InputError, match="--episodes is 0; expected at least 1"):
        collected(tmp_path / "set", episodes=0)
    monkeypatch.setattr(sim, "make", lambda name, image_size: Tasks())
    with pytest.raises(
        InputError, match="--episodes is 10; expected a multiple of its 3 tasks, or --episodes_per_task"
    ):
        collected(tmp_path / "set", episodes=10)


@pytest.mark.parametrize("seed", [sim.TEST_SEEDS, sim.VALIDATION_SEEDS, sim.VALIDATION_SEEDS - 1])
def test_demonstrations_of_evaluation_scenes_are_refused(tmp_path, seed):
    with pytest.raises(InputError, match=r"scene [0-9]+ is needed, but from 500000 on they are for evaluations"):
        collect.main(collect.CollectConfig("tabletop", str(tmp_path / "set"), 5, seed, workers=1))
    assert not list(tmp_path.iterdir())
