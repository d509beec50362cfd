"""Acting with a policy: python -m vla.rollout."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from policies import ARM, TABLETOP, tiny

from vla import InputError, collect, evaluate, rollout, sim
from vla.rollout import RolloutConfig, check_fits, interval
from vla.sim.tabletop import Tabletop

# ---- Acting


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_expert_solves_every_episode_in_whatever_batch(batch_size):
    seeds = list(range(sim.TEST_SEEDS, sim.TEST_SEEDS + 20))
    episodes = rollout.rollout("expert", "tabletop", seeds, batch_size=batch_size)
    assert [episode.seed for episode in episodes] == seeds
    assert all(episode.success for episode in episodes)
    assert rollout.summary(episodes, {})["success_rate"] == 1.0
    for episode in episodes:
        world = Tabletop()
        world.reset(episode.seed)
        assert episode.instruction == world.instruction
        assert not any(world.step(world.expert())[1] for _ in range(episode.steps - 1))
        assert world.step(world.expert())[1]


def chunks_of(policy, seeds, batch_size):
    """Episodes, and every chunk that the policy predicted in them by its key."""
    chunks, predict = {}, policy.predict_chunk

    def recorded(batch):
        found = predict(batch)
        chunks.update(zip(batch["key"].tolist(), found, strict=True))
        return found

    policy.predict_chunk = recorded
    episodes = rollout.rollout(policy, "tabletop", seeds, batch_size=batch_size)
    policy.predict_chunk = predict
    return [(e.seed, e.instruction, e.success, e.steps) for e in episodes], chunks


def test_episodes_of_a_policy_do_not_depend_on_the_batch_that_they_run_in():
    policy, seeds = tiny(), [1_000_000, 1_000_001, 5, 1_000_003, 1_000_004]
    expected, chunks = chunks_of(policy, seeds, batch_size=1)
    assert len(chunks) == 5 * 5  # of 8 steps each, so no two keys are equal
    for batch_size in (2, 5):
        episodes, found = chunks_of(policy, seeds, batch_size)
        assert episodes == expected
        assert found.keys() == chunks.keys()
        for key, chunk in chunks.items():
            torch.testing.assert_close(found[key], chunk, rtol=1e-3, atol=1e-3)


class Counting:
    """An environment that is solved by the actions seed + 0, seed + 1, … alone, in 1 to 5 steps by its seed."""

    task, fps = "count", 10

    def reset(self, seed):
        self.seed, self.count, self.good, self.instruction = seed, 0, True, f"count from {seed}"
        return {"next": seed}

    def step(self, action, look):
        self.good &= action.tolist() == [self.seed + self.count]
        self.count += 1
        done = self.count == self.seed % 5 + 1
        return {"next": self.seed + self.count}, bool(self.good and done), done

    def render(self):
        return np.full((2, 2, 3), self.count, np.uint8)


class Counter:
    """A policy that counts on from each observation, in chunks of which two actions are executed."""

    config = SimpleNamespace(model=SimpleNamespace(n_action_steps=2))
    driven = SimpleNamespace(action_names=("number",))  # of a policy that has a robot with two
    device = "cpu"

    def parameters(self):
        return iter([torch.zeros(1, device=self.device)])

    def collate(self, observations, key):
        return {"next": torch.tensor([observation["next"] for observation in observations]), "key": key}

    def predict_chunk(self, batch):
        return torch.tensor(
            [[[start, 0], [start + 1, 0], [-1, 0]] for start in batch["next"].tolist()], dtype=torch.float32
        )


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_every_world_gets_the_actions_predicted_for_it_while_others_end(monkeypatch, batch_size):
    monkeypatch.setattr(sim, "make", lambda name, image_size: Counting())
    seeds = [0, 4, 3, 14, 11, 20, 7, 8, 29, 33, 41]
    episodes = rollout.rollout(Counter(), "counting", seeds, batch_size=batch_size, record=range(4))
    assert [(e.seed, e.instruction) for e in episodes] == [(seed, f"count from {seed}") for seed in seeds]
    assert all(episode.success for episode in episodes)
    assert [episode.steps for episode in episodes] == [seed % 5 + 1 for seed in seeds]
    for episode in episodes[:4]:
        assert [frame[0, 0, 0] for frame in episode.frames] == list(range(episode.steps + 1))
    assert not any(episode.frames for episode in episodes[4:])


@pytest.mark.parametrize(("device", "sizes"), [("meta", {4}), ("cpu", {2, 3, 4})])
def test_batches_of_a_policy_on_another_device_are_of_one_size_while_worlds_end(monkeypatch, device, sizes):
    monkeypatch.setattr(sim, "make", lambda name, image_size: Counting())
    policy, found = Counter(), set()
    predict, policy.device = policy.predict_chunk, device  # which takes batches from the CPU, as a captured one
    policy.predict_chunk = lambda batch: (found.add(len(batch["key"])), predict(batch))[1]
    episodes = rollout.rollout(policy, "counting", [5, 12, 14, 19], batch_size=4)
    assert all(episode.success for episode in episodes)
    assert found == sizes


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_see_changes_what_the_policy_sees_of_an_episode_and_not_the_world(monkeypatch, batch_size):
    monkeypatch.setattr(sim, "make", lambda name, image_size: Counting())
    wrong = {1: 1, 3: -5}  # what is added to the observations of these episodes, by their place among the seeds

    def see(episode, seen):
        return {"next": seen["next"] + wrong.get(episode, 0)}

    episodes = rollout.rollout(Counter(), "counting", [8, 9, 23, 34, 2], batch_size, see=see)
    assert [episode.success for episode in episodes] == [True, False, True, False, True]
    assert [episode.instruction for episode in episodes] == [f"count from {seed}" for seed in (8, 9, 23, 34, 2)]


def test_ensemble_executes_the_weighted_mean_of_all_that_was_predicted_for_a_step(monkeypatch):
    acted = {}

    class Noted(Counting):
        def step(self, action, look):
            acted[self.seed, self.count] = action
            return super().step(action, look)

    def predicted(start):
        return [[start, 0], [10 * start, 0], [100 * start, 0]]

    policy = Counter()
    policy.predict_chunk = lambda batch: torch.tensor(
        [predicted(start) for start in batch["next"].tolist()], dtype=torch.float32
    )
    monkeypatch.setattr(sim, "make", lambda name, image_size: Noted())
    rollout.rollout(policy, "counting", [4, 9], batch_size=1, ensemble=0.5)
    assert len(acted) == 10
    for (seed, step), action in acted.items():
        first = max(0, step - 2)  # chunks are of three
        weights = [math.exp(-0.5 * i) for i in range(step - first + 1)]
        actions = [predicted(seed + then)[step - then][0] for then in range(first, step + 1)]
        mean = sum(w * a for w, a in zip(weights, actions, strict=True)) / sum(weights)
        assert action.tolist() == pytest.approx([mean])


def test_untrained_policy_solves_next_to_nothing():
    episodes = rollout.rollout(tiny(), "tabletop", list(range(sim.TEST_SEEDS, sim.TEST_SEEDS + 20)))
    assert rollout.summary(episodes, {})["success_rate"] <= 0.1
    assert all(episode.steps == Tabletop.max_steps or episode.success for episode in episodes)


@pytest.mark.parametrize(
    ("successes", "episodes", "expected"),
    [(8, 10, (0.490, 0.943)), (0, 10, (0.0, 0.278)), (10, 10, (0.722, 1.0)), (50, 100, (0.404, 0.596))],
)
def test_interval_equals_published_values_of_wilson(successes, episodes, expected):
    low, high = interval(successes, episodes)
    assert (round(low, 3), round(high, 3)) == expected
    assert 0 <= low <= successes / episodes <= high + 1e-12
    assert high <= 1


def test_recorded_episodes_stand_side_by_side_until_the_last_ends_and_show_how_they_ended():
    lengths, successes = (1, 4, 2), (True, False, True)
    frames = [[np.full((12, 18, 3), 10 * n + i, np.uint8) for i in range(n)] for n in lengths]
    episodes = [rollout.Episode(0, "go", s, frames=f) for s, f in zip(successes, frames, strict=True)]
    video = rollout.grid(episodes)
    height, width = (size // 2 for size in video.shape[1:3])  # of one episode's picture, two in a row and a column
    assert video.dtype == np.uint8
    assert len(video) == 4 + 5
    inside = video[:, height - 10 :: height, 10::width, 0].reshape(9, 4)
    assert inside[:6].tolist() == [[10, 40, 20, 0], [10, 41, 21, 0], [10, 42, 21, 0], *[[10, 43, 21, 0]] * 3]
    edges = video[:, ::height, ::width].reshape(9, 4, 3).astype(int)
    for episode, length in enumerate(lengths):
        red, green, _ = edges[length:, episode].T
        assert ((green > red + 50) if successes[episode] else (red > green + 50)).all()
        assert (np.ptp(edges[:length, episode], axis=1) < 20).all()  # grey until it has ended


def test_demonstrations_validation_and_tests_take_their_scenes_apart():
    assert RolloutConfig(policy="", env="tabletop").seed == sim.TEST_SEEDS
    demonstrations = collect.CollectConfig(env="tabletop", out="")
    assert demonstrations.seed == sim.DEMONSTRATION_SEEDS
    first, evaluations, tests = sim.DEMONSTRATION_SEEDS, sim.VALIDATION_SEEDS, sim.TEST_SEEDS
    assert first + collect.EPISODES < evaluations < evaluations + 100_000 < tests


OTHER_ROBOTS = {
    "cameras": ("gripper",),
    "state_names": ("tip_x", "tip_y"),
    "action_names": ("dx", "dy", "dz"),
}


@pytest.mark.parametrize("name", OTHER_ROBOTS)
def test_policy_of_other_robots_is_refused_telling_how_each_differs(name):
    other = replace(TABLETOP, name="other", **{name: OTHER_ROBOTS[name]})
    with pytest.raises(InputError) as refusal:
        check_fits(tiny(datasets=(ARM, other)).config, "tabletop")
    told = (
        f"the {name} of other: {', '.join(OTHER_ROBOTS[name])}; those of tabletop: {', '.join(getattr(Tabletop, name))}"
    )
    assert told in str(refusal.value)
    assert "the action_names of arm: joint_0, joint_1, joint_2, claw; those of tabletop: dx, dy, gripper" in str(
        refusal.value
    )


def test_robot_of_the_environment_is_found_among_those_of_the_policy():
    assert check_fits(tiny().config, "tabletop") == "tabletop"
    pair = tiny(datasets=(ARM, TABLETOP)).config
    assert check_fits(pair, "tabletop") == check_fits(pair, "tabletop", "tabletop") == "tabletop"
    with pytest.raises(InputError, match=r"^the cameras of arm: gripper; .*; act in the environment that"):
        check_fits(pair, "tabletop", "arm")
    with pytest.raises(
        InputError, match="data set 'table' is unknown to the policy, which was trained on arm, tabletop"
    ):
        check_fits(pair, "tabletop", "table")


def test_one_of_several_data_sets_of_the_environments_robot_has_to_be_chosen():
    config = tiny(datasets=(TABLETOP, ARM, replace(TABLETOP, name="more"))).config
    with pytest.raises(InputError, match="tabletop has the robot of tabletop and of more; choose one with --dataset"):
        check_fits(config, "tabletop")
    assert check_fits(config, "tabletop", "more") == "more"


def test_policy_that_sees_larger_images_acts_on_those_of_the_environment():
    policy = tiny(image_size=(96, 128))
    assert check_fits(policy.config, "tabletop") == "tabletop"
    (episode,) = rollout.rollout(policy, "tabletop", [sim.TEST_SEEDS])
    assert episode.steps > 0


@pytest.mark.parametrize(("given", "size"), [((), 48), ((96,), 96)])
def test_evaluation_in_training_draws_what_the_policy_sees_or_what_it_is_told(given, size):
    policy, sizes = tiny(image_size=(48, 48)), set()
    collate = policy.collate
    policy.collate = lambda seen, key: (sizes.add(seen[0]["images"].shape), collate(seen, key))[1]
    evaluate.closed_loop(Accelerator(cpu=True), policy, "tabletop", 1, *given)
    assert sizes == {(2, 3, size, size)}
