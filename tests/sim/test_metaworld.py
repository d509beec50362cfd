"""Meta-World under the protocol of the published tables. A picture takes 50 ms without a GPU, so few are drawn."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from policies import tiny

from vla import InputError, collect, rollout, sim
from vla.data.lerobot import LeRobotDataset
from vla.model.spec import DatasetSpec
from vla.sim import metaworld
from vla.sim.metaworld import INSTRUCTIONS, TASKS, TIERS, Metaworld

here = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs Meta-World; see make test-sim")
STILL = np.zeros(4, np.float32)
SPEC = DatasetSpec("mt50", Metaworld.cameras, Metaworld.state_names, Metaworld.action_names, Metaworld.fps)


def solve(world, seed):
    """Let the expert act. Returns success."""
    world.reset(seed)
    done = False
    while not done:
        _, success, done = world.step(world.expert(), look=False)
    return success


@pytest.fixture
def blind(monkeypatch):
    """Nothing is drawn."""
    monkeypatch.setattr(Metaworld, "render", lambda world: np.zeros((*world.image_size, 3), np.uint8))


# ---- Tasks


def test_tiers_are_those_of_the_published_table_and_cover_all_tasks_once():
    assert {tier: len(tasks) for tier, tasks in TIERS.items()} == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    assert sorted(task for tasks in TIERS.values() for task in tasks) == sorted(TASKS)
    assert len(set(TASKS)) == 50


def test_every_task_has_an_instruction_of_its_own():
    assert len({text.lower().strip() for text in INSTRUCTIONS.values()}) == 50
    assert all(text.strip() for text in INSTRUCTIONS.values())


@here
def test_tasks_are_those_of_the_package():
    sim.make("metaworld")  # which says how the package is to draw before it is imported
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS)


@here
def test_task_follows_from_the_seed(blind):
    world = sim.make("metaworld")
    for seed in (0, 49, 50, sim.VALIDATION_SEEDS + 3, sim.TEST_SEEDS + 7):
        world.reset(seed)
        assert (world.task, world.instruction) == (TASKS[seed % 50], INSTRUCTIONS[TASKS[seed % 50]])
    one = sim.make("metaworld/soccer-v3")
    for seed in (0, 7):
        one.reset(seed)
        assert (one.task, one.tasks, one.tiers) == ("soccer-v3", ("soccer-v3",), {})


@here
def test_expert_solves_every_task(blind):
    world = sim.make("metaworld")
    for place in range(50):
        assert any(solve(world, seed) for seed in range(place, 200, 50)), TASKS[place]


@here
def test_scenes_are_random_and_those_for_training_evaluation_and_test_differ(blind):
    world = sim.make("metaworld/pick-place-v3")
    starts = (sim.DEMONSTRATION_SEEDS, sim.VALIDATION_SEEDS, sim.TEST_SEEDS)
    scenes = set()
    for seed in [start + i for start in starts for i in range(5)]:
        world.reset(seed)
        scenes.add(tuple(world._seen[[4, 5, 36, 37, 38]]))  # the puck's place and the goal's
    assert len(scenes) == 15
    assert len({scene[0] for scene in scenes}) == len({scene[2] for scene in scenes}) == 15


# ---- The contract


@here
def test_environment_keeps_the_contract():
    world = sim.make("metaworld", 48)
    observation = world.reset(0)
    assert observation.keys() == {"images", "state", "instruction"}
    assert observation["instruction"] == world.instruction
    assert (observation["state"].shape, observation["state"].dtype) == ((len(world.state_names),), np.float32)
    assert (observation["images"].shape, observation["images"].dtype) == ((1, 3, 48, 48), np.uint8)
    assert world.noise_scale.shape == world.expert().shape == (len(world.action_names),)
    assert (world.expert().dtype, np.abs(world.expert()).max() <= 1) == (np.float32, True)
    assert world.image_size == (48, 48)
    assert (world.render().dtype, world.render().shape) == (np.uint8, (48, 48, 3))
    assert world.step(STILL, look=False)[0] is None


@here
@pytest.mark.parametrize("task", ["reach-v3", "box-close-v3", "door-open-v3", "stick-pull-v3"])
def test_same_seed_is_the_same_episode_bit_for_bit_whatever_was_before(task):
    first, second = sim.make(f"metaworld/{task}", 32), sim.make("metaworld", 32)
    second.reset(1)
    second.step(np.ones(4))
    seed = 1_000_000 + TASKS.index(task)
    second.reset(seed + 50)
    for _ in range(40):
        second.step(second.expert(), look=False)
    a, b = first.reset(seed), second.reset(seed)
    for _ in range(3):
        np.testing.assert_array_equal(a["images"], b["images"])
        np.testing.assert_array_equal(a["state"], b["state"])
        for _ in range(12):
            action = first.expert()
            np.testing.assert_array_equal(action, second.expert())
            for world in (first, second):
                world.step(action, look=False)
        a, b = (world.step(STILL)[0] for world in (first, second))


@here
def test_state_is_hand_and_gripper_and_nothing_of_the_objects(blind):
    world = sim.make("metaworld/push-v3")
    world.reset(0)
    for _ in range(30):
        state = world.step(world.expert())[0]["state"]
        assert state.tolist() == world._seen[:4].astype(np.float32).tolist()
    np.testing.assert_allclose(state[:3], world._env.get_endeff_pos(), atol=1e-6)
    closed = [world.step([0, 0, 0, 1], look=True)[0]["state"][3] for _ in range(20)][-1]
    opened = [world.step([0, 0, 0, -1], look=True)[0]["state"][3] for _ in range(20)][-1]
    assert closed < 0.7 < opened


@here
def test_actions_are_clipped(blind):
    world, received = sim.make("metaworld/reach-v3"), []
    world.reset(0)
    step = world._env.step
    world._env.step = lambda action: received.append(action.tolist()) or step(action)
    world.step(np.array([7.0, -1.5, 0.25, -7.0]))
    assert received == [[1, -1, 0.25, -1]]


@here
def test_first_success_ends_an_episode_and_so_does_the_horizon(blind):
    world = sim.make("metaworld/drawer-close-v3")
    world.reset(0)
    ends = [world.step(STILL, look=False)[1:] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]
    world.reset(0)
    ends = [(False, False)]
    while ends[-1] == (False, False):
        ends.append(world.step(world.expert(), look=False)[1:])
    assert ends[-1] == (True, True)
    assert len(ends) < 300


@pytest.mark.parametrize("task", ["reach", "v3/reach-v3", "reach-v2"])
def test_unknown_task_is_refused(task):
    with pytest.raises(InputError, match=f"Meta-World has no task '{task}'; its tasks: assembly-v3, "):
        sim.make(f"metaworld/{task}")


# ---- Pictures


def seen(world, action, steps=30):
    """State and image [h, w, 3] after an action was repeated."""
    world.reset(0)
    for _ in range(steps - 1):
        world.step(np.array(action), look=False)
    observation = world.step(np.array(action))[0]
    return observation["state"], observation["images"][0].transpose(1, 2, 0).astype(int)


@here
def test_hand_in_the_picture_follows_its_state():
    # The camera looks along -x, so with the world upright in its picture y points right and z up.
    world = sim.make("metaworld/reach-v3", 128)
    moves = {"still": (0, 0, 0, 0), "up": (0, 0, 1, 0), "away": (0, 1, 0, 0), "back": (0, -1, 0, 0)}
    moves |= {"near": (1, 0, 0, 0), "far": (-1, 0, 0, 0)}
    found = {name: seen(world, action) for name, action in moves.items()}
    place = {}
    for name, (_, image) in found.items():
        others = [other for key, (_, other) in found.items() if key != name]
        rows, columns = np.nonzero(np.all([np.abs(image - other).sum(2) > 60 for other in others], axis=0))
        place[name] = rows.mean(), columns.mean()
    state = {name: values for name, (values, _) in found.items()}
    assert state["up"][2] > state["still"][2] + 0.2
    assert place["up"][0] < place["still"][0] - 15
    assert state["away"][1] > state["still"][1] + 0.15 > state["back"][1] + 0.3
    assert place["away"][1] > place["still"][1] + 10 > place["back"][1] + 15
    assert state["near"][0] > state["still"][0] + 0.2 > state["far"][0] + 0.4
    assert place["near"][0] > place["still"][0] + 5 > place["far"][0] + 5


@here
def test_camera_is_that_of_the_protocol_and_what_it_sees_is_turned_around():
    import mujoco

    world = sim.make("metaworld/door-open-v3", 96)
    image = world.reset(3)["images"][0].transpose(1, 2, 0)
    model, data = world._env.model, world._env.data
    assert model.cam_pos[2].tolist() == [0.75, 0.075, 0.7]
    renderer = mujoco.Renderer(model, 96, 96)
    renderer.update_scene(data, "corner2")
    turned = renderer.render()[::-1, ::-1]
    renderer.close()
    assert np.abs(image.astype(int) - turned).mean() < 1
    metaworld._gl.make_current()


@here
def test_goals_and_objects_are_drawn_where_they_are_from_the_first_picture_on():
    def changed(one, other):
        return (np.abs(one.astype(int) - other).sum(1) > 60).sum()

    for task in ("window-close-v3", "coffee-push-v3", "lever-pull-v3"):
        world = sim.make(f"metaworld/{task}", 64)
        first = world.reset(5)["images"]
        assert changed(first, world.step(STILL)[0]["images"]) < 60  # of 4096: the gripper's alone
        assert changed(first, world.reset(6)["images"]) > 60


# ---- What is missing


def test_package_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Meta-World is not installed; pip install -r requirements-sim\.txt"):
        sim.make("metaworld")


@here
def test_machine_that_cannot_draw_is_told(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(metaworld.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(InputError, match=r"neither EGL nor OSMesa works here; install libegl1 .* libosmesa6"):
        sim.make("metaworld")
    monkeypatch.undo()
    monkeypatch.setenv("MUJOCO_GL", "crayon")
    with pytest.raises(InputError, match="MUJOCO_GL is crayon, which does not work here; unset it, or install libegl1"):
        sim.make("metaworld")  # and not at the first picture


@here
def test_way_to_draw_is_tried_once_for_a_process_and_those_that_it_starts(monkeypatch):
    monkeypatch.delenv(metaworld.WORKS, raising=False)
    sim.make("metaworld")
    assert os.environ[metaworld.WORKS] == os.environ["MUJOCO_GL"] != ""
    monkeypatch.setattr(metaworld.subprocess, "run", None)
    sim.make("metaworld")


# ---- Commands


@here
def test_collected_demonstrations_are_those_of_the_expert(tmp_path, capsys):
    options = {"episodes_per_task": 2, "image_size": 32, "workers": 2}
    collect.main(collect.CollectConfig("metaworld/handle-press-v3", str(tmp_path / "set"), **options))
    data = LeRobotDataset(tmp_path / "set", accept=("constant_action",))  # the gripper has nothing to do
    world = sim.make("metaworld/handle-press-v3", 32)
    assert (data.num_episodes, data.cameras, data.image_size, data.fps) == (2, ("corner2",), (32, 32), 80)
    assert (data.state_names, data.action_names) == (world.state_names, world.action_names)
    assert list(data.instructions) == ["press the handle down"]
    for episode in range(2):
        frames = np.arange(data.episode_from[episode], data.episode_to[episode])
        world.reset(episode)
        for frame in frames:
            np.testing.assert_array_equal(data.state[frame], world._seen[:4].astype(np.float32))
            np.testing.assert_array_equal(data.actions[frame], world.expert())
            if frame == frames[0] + 9:
                np.testing.assert_array_equal(data.images(np.array([frame]))[0, 0], world.render().transpose(2, 0, 1))
            _, success, _ = world.step(world.expert(), look=False)
        assert success
    assert "2 episodes" in capsys.readouterr().out


@here
def test_command_tells_of_tasks_and_tiers(tmp_path, capsys):
    config = {"image_size": (32, 32), "cameras": Metaworld.cameras, "datasets": (SPEC,)}
    tiny(**config, chunk_size=100, n_action_steps=100).save_pretrained(tmp_path / "export")
    options = {"out": str(tmp_path / "result.json"), "device": "cpu", "workers": 2, "baselines": True}
    config = rollout.RolloutConfig(str(tmp_path / "export"), "metaworld", 3, sim.TEST_SEEDS + 8, **options)
    rollout.main(config)
    result, told = json.loads(Path(config.out).read_text()), capsys.readouterr().out
    assert list(result["tasks"]) == list(TASKS[8:11]) == ["coffee-button-v3", "coffee-pull-v3", "coffee-push-v3"]
    assert {tier: each["episodes"] for tier, each in result["tiers"].items()} == {"easy": 1, "medium": 2}
    assert "tier_mean" not in result  # of tiers that were not played
    assert result["baselines"]["expert"]["tiers"] == {
        tier: {"success_rate": 1.0, "interval": list(rollout.interval(n, n)), "episodes": n}
        for tier, n in {"easy": 1, "medium": 2}.items()
    }
    assert [line.split()[0] for line in told.splitlines()[4:9]] == ["easy", TASKS[8], "medium", *TASKS[9:11]]


def test_tier_mean_weighs_tiers_equally_and_is_in_percent():
    tiers = {"one": ("a", "b"), "two": ("c",)}
    played = [("a", True), ("a", True), ("b", False), ("b", True), ("c", False), ("c", False), ("c", True)]
    episodes = [rollout.Episode(i, task, success, 1, task=task) for i, (task, success) in enumerate(played)]
    result = rollout.summary(episodes, tiers)
    assert result["tier_mean"] == pytest.approx(100 * (3 / 4 + 1 / 3) / 2)
    assert result["tiers"]["two"] == {"success_rate": 1 / 3, "interval": rollout.interval(1, 3), "episodes": 3}
    assert {task: each["success_rate"] for task, each in result["tasks"].items()} == {"a": 1, "b": 0.5, "c": 1 / 3}
    assert result["success_rate"] == 4 / 7
