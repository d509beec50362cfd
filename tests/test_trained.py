"""The policy that `make demo` trained (tests/assets/tabletop) looks and reads; without either it is down to chance."""

from pathlib import Path

import pytest
import torch

from vla import sim
from vla.model import VLAPolicy
from vla.rollout import rollout

SEEDS = list(range(sim.TEST_SEEDS + 500, sim.TEST_SEEDS + 540))
CHANCE = 0.25  # of picking one of nine pairs of object and zone: 1 in 9; an upper bound over 40 episodes


@pytest.fixture(scope="module")
def policy():
    return VLAPolicy.from_pretrained(Path(__file__).parent / "assets/tabletop")


def successes(policy, **options) -> float:
    torch.set_num_threads(1)
    return sum(episode.success for episode in rollout(policy, "tabletop", SEEDS, **options)) / len(SEEDS)


def test_trained_policy_solves_scenes_it_has_never_seen(policy):
    assert successes(policy) >= 0.9


def test_trained_policy_that_cannot_look_falls_to_chance(policy):
    assert successes(policy, see=lambda episode, seen: seen | {"images": 0 * seen["images"]}) <= CHANCE


def test_trained_policy_whose_instructions_are_shuffled_falls_to_chance(policy):
    words = [sim.make("tabletop").reset(seed)["instruction"] for seed in SEEDS]
    assert successes(policy, see=lambda episode, seen: seen | {"instruction": words[episode - 1]}) <= CHANCE


def test_same_scene_with_another_instruction_gets_another_behaviour(policy):
    world = sim.make("tabletop")
    solved = 0
    for seed in SEEDS[:5]:
        for task in range(4):
            observation, done = world.reset(seed, task), False
            policy.reset()
            while not done:
                observation, success, done = world.step(policy.select_action(observation))
            solved += success
    assert solved >= 17  # of 20: five scenes, four tasks in each
