import itertools

import numpy as np
import pytest

from vla import InputError, sim
from vla.sim.tabletop import COLOURS, GRASP_RADIUS, OBJECT_RADIUS, PHRASINGS, STEP, ZONE_RADIUS, Tabletop

STILL = np.array([0, 0, 0], np.float32)
CLOSE = np.array([0, 0, 1], np.float32)


def scene(seed=0, task=0, **options):
    world = Tabletop(**options)
    world.reset(seed, task)
    return world


def solve(world, noise=0.0, random=None):
    """Let the expert act. Returns success and the actions that were executed."""
    executed, done = [], False
    while not done:
        action = world.expert()
        if noise:
            action = action + noise * world.noise_scale * random.standard_normal(3)
        executed.append(action)
        _, success, done = world.step(action)
    return success, executed


def layout(world):
    return [(item.colour, item.shape, *item.place) for item in world.objects + world.zones]


def look(world):
    """The observation of now: a step that moves nothing."""
    return world.step(CLOSE if world.closed else STILL)[0]


def distance(a, b):
    return np.max(np.abs(a.place - b.place))


# ---- Scenes


def test_environment_keeps_the_contract():
    world = sim.make("tabletop")
    observation = world.reset(0)
    assert observation.keys() == {"images", "state", "instruction"}
    assert observation["instruction"] == world.instruction
    assert observation["state"].shape == (len(world.state_names),)
    assert observation["state"].dtype == np.float32
    assert observation["images"].shape[:2] == (len(world.cameras), 3)
    assert world.noise_scale.shape == world.expert().shape == (len(world.action_names),)
    assert world.expert().dtype == np.float32
    assert (world.render().dtype, world.render().shape) == (np.uint8, (192, 192, 3))
    with pytest.raises(InputError, match="environment 'tabeltop' is unknown; known: tabletop"):
        sim.make("tabeltop")


def test_same_seed_and_task_are_the_same_scene_bit_for_bit():
    for seed, task in [(0, 0), (7, 2), (1_000_000, 0)]:
        first, second = Tabletop(), Tabletop()
        second.reset(seed + 1)
        second.step(CLOSE)  # what was before leaves no trace
        a, b = first.reset(seed, task), second.reset(seed, task)
        for turn in range(12):
            assert a["instruction"] == b["instruction"]
            np.testing.assert_array_equal(a["images"], b["images"])
            np.testing.assert_array_equal(a["state"], b["state"])
            a, b = (world.step(np.array([0.3, -0.2, turn % 5 == 0]))[0] for world in (first, second))
        np.testing.assert_array_equal(first.render(), second.render())


def test_other_seeds_are_other_scenes():
    worlds = [scene(seed) for seed in range(50)]
    assert len({str(layout(world)) for world in worlds}) == 50
    assert len({tuple(world.tip) for world in worlds}) == 50
    assert len({world.instruction for world in worlds}) > 40
    assert {p for p in PHRASINGS if any(p.split("{")[0] == w.instruction[: p.index("{")] for w in worlds)} == {
        *PHRASINGS
    }


def test_tasks_of_one_scene_differ_in_what_is_asked_for_and_not_in_what_is_there():
    for seed in range(20):
        worlds = [scene(seed, task) for task in range(Tabletop.tasks_per_scene)]
        assert len({str(layout(world)) for world in worlds}) == 1
        assert len({(world.target.colour, world.zone.colour) for world in worlds}) == len(worlds)
        assert len({world.instruction for world in worlds}) == len(worlds)


def test_objects_and_zones_lie_apart_on_the_table_and_colours_tell_them_apart():
    for seed in range(200):
        world = scene(seed)
        radii = [OBJECT_RADIUS] * 3 + [ZONE_RADIUS] * 3
        items = list(zip(world.objects + world.zones, radii, strict=True))
        for (a, r), (b, q) in itertools.combinations(items, 2):
            assert distance(a, b) > r + q, seed
        for item, radius in items:
            assert (item.place > radius).all()
            assert (item.place < 1 - radius).all()
        for group in (world.objects, world.zones):
            assert len({item.colour for item in group}) == len(group) == 3
        assert any(world.target is item for item in world.objects)
        assert any(world.zone is item for item in world.zones)


def test_instruction_names_object_and_zone_in_every_phrasing():
    world = scene()
    for target, zone, phrasing in itertools.product(range(3), range(3), range(len(PHRASINGS))):
        world.set_task(target, zone, phrasing)
        words = world.instruction.split()
        thing, place = world.objects[target], world.zones[zone]
        assert words[words.index(thing.shape) - 1] == thing.colour
        assert place.colour in (words[i - 1] for i, word in enumerate(words) if word in ("zone", "area"))


# ---- The task


def test_expert_solves_every_scene():
    steps = []
    for seed in range(200):
        world = scene(seed)
        success, executed = solve(world)
        assert success, seed
        steps.append(len(executed))
    assert max(steps) <= Tabletop.max_steps / 2  # which leaves as much again to come back from mistakes


@pytest.mark.parametrize("task", [1, 2, 3])
def test_expert_solves_every_task_of_a_scene(task):
    assert all(solve(scene(seed, task))[0] for seed in range(40))


def test_expert_comes_back_from_noise():
    random = np.random.default_rng(0)
    solved = [solve(scene(seed), noise=0.3, random=random)[0] for seed in range(200)]
    assert np.mean(solved) >= 0.95


def test_expert_recovers_from_a_wrong_object_and_from_an_empty_grasp():
    world = scene()
    wrong = next(item for item in world.objects if item is not world.target)
    world.tip = wrong.place.copy()
    world.step(CLOSE)
    assert world.held is wrong
    assert solve(world)[0]
    world = scene(1)
    world.tip = np.array([0.0, 0.0])
    world.step(CLOSE)
    assert world.closed
    assert world.held is None
    assert solve(world)[0]


@pytest.mark.parametrize("seed", range(8))
def test_what_solves_one_task_solves_no_other_of_the_same_scene(seed):
    world = scene(seed)
    for target, zone in itertools.product(range(3), range(3)):
        world.reset(seed)
        world.set_task(target, zone)
        success, executed = solve(world)
        assert success
        for other in itertools.product(range(3), range(3)):
            world.reset(seed)
            world.set_task(*other)
            results = [world.step(action)[1] for action in executed]
            assert any(results) == (other == (target, zone))


def test_state_holds_tip_and_gripper_and_never_the_objects():
    world = scene()
    world.tip = np.array([0.25, 0.75])
    before = look(world)
    np.testing.assert_array_equal(before["state"], np.array([0.25, 0.75, 0], np.float32))
    for item in world.objects + world.zones:
        item.place = 1 - item.place
        after = look(world)
        np.testing.assert_array_equal(after["state"], before["state"])
        assert (after["images"][0] != before["images"][0]).any()
        before = after
    closed, _, _ = world.step(CLOSE)
    np.testing.assert_array_equal(closed["state"], np.array([0.25, 0.75, 1], np.float32))
    assert (closed["images"] != before["images"]).any(axis=(1, 2, 3)).all()  # both cameras see the gripper close


def test_motion_is_clipped_to_one_step_and_to_the_table():
    for asked, moved in [([0.5, -0.25], [0.5, -0.25]), ([7, -7], [1, -1]), ([-1, 0], [-1, 0])]:
        world = scene()
        world.tip = np.array([0.5, 0.5])
        world.step(np.array([*asked, 0]))
        np.testing.assert_allclose(world.tip, 0.5 + STEP * np.array(moved), rtol=1e-12)
    for _ in range(20):
        state = world.step(np.array([1, 1, 0]))[0]["state"]
    assert state.tolist() == [1, 1, 0]


@pytest.mark.parametrize(("share", "grasped"), [(0.0, True), (0.95, True), (1.05, False)])
def test_grasping_needs_closeness(share, grasped):
    for angle in np.linspace(0, 6, 5):
        world = scene()
        world.tip = world.target.place + share * GRASP_RADIUS * np.array([np.cos(angle), np.sin(angle)])
        world.step(CLOSE)
        assert (world.held is world.target) == grasped
        world.step(np.array([1, 1, 1]))
        assert np.array_equal(world.target.place, world.tip) == grasped  # it comes along


def test_gripper_that_is_closed_already_grasps_nothing():
    world = scene()
    world.tip = np.array([0.0, 0.0])
    world.step(CLOSE)
    world.tip = world.target.place.copy()
    world.step(CLOSE)
    assert world.held is None
    world.step(STILL)
    world.step(CLOSE)
    assert world.held is world.target


def test_of_two_objects_the_nearest_is_grasped():
    world = scene()
    near, far, _ = world.objects
    world.tip = np.array([0.5, 0.5])
    near.place, far.place = np.array([0.51, 0.5]), np.array([0.5, 0.48])
    world.step(CLOSE)
    assert world.held is near


def carry(world, item, place):
    """Grasp an item, and hold it at a place. Returns what the last step told of success."""
    world.tip = item.place.copy()
    world.step(CLOSE)
    assert world.held is item
    world.tip = np.array(place, dtype=np.float64)
    return world.step(CLOSE)[1]


def test_holding_the_object_in_the_zone_is_no_success_until_it_is_released():
    world = scene()
    assert not carry(world, world.target, world.zone.place)
    assert not world.step(CLOSE)[1]
    assert world.step(STILL)[1:] == (True, True)


@pytest.mark.parametrize(("share", "success"), [(0.95, True), (1.05, False)])
@pytest.mark.parametrize("corner", [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1)])
def test_releasing_is_success_within_the_edge_of_the_zone_alone(share, success, corner):
    world = scene()
    world.zone.place = np.array([0.5, 0.5])
    carry(world, world.target, world.zone.place + share * ZONE_RADIUS * np.array(corner))
    assert world.step(STILL)[1:] == (success, success)


@pytest.mark.parametrize("zone", range(3))
@pytest.mark.parametrize("item", range(3))
def test_only_the_named_object_in_the_named_zone_is_success(item, zone):
    world = scene()
    asked = world.objects[item] is world.target and world.zones[zone] is world.zone
    carry(world, world.objects[item], world.zones[zone].place)
    assert world.step(STILL)[1] == asked


def test_episode_ends_at_its_horizon():
    world = scene()
    ends = [world.step(STILL)[1:] for _ in range(world.max_steps)]
    assert ends == [(False, False)] * (world.max_steps - 1) + [(False, True)]


# ---- Pictures


def bare(**options):
    """A table with nothing on it."""
    world = scene(**options)
    for item in world.objects + world.zones:
        item.place = np.array([5.0, 5.0])
    return world


def dark(image):
    """Where the gripper is in an image [3, h, w] of a bare table: the centre of its darkness, x and y in pixels."""
    darkness = np.clip(225.0 - image.max(0), 0, None)
    y, x = np.indices(darkness.shape)
    return np.array([(darkness * x).sum(), (darkness * y).sum()]) / darkness.sum() + 0.5


@pytest.mark.parametrize("size", [64, 96])
def test_x_points_right_and_y_points_down_in_the_picture(size):
    world = bare(image_size=size)
    world.tip = np.array([0.4, 0.4])
    start = dark(look(world)["images"][0])
    right = dark(world.step(np.array([1, 0, 0]))[0]["images"][0])
    below = dark(world.step(np.array([0, 1, 0]))[0]["images"][0])
    np.testing.assert_allclose(start, size * 0.4, atol=1)
    np.testing.assert_allclose(right - start, [size * STEP, 0], atol=1)
    np.testing.assert_allclose(below - right, [0, size * STEP], atol=1)


def test_gripper_camera_goes_with_the_tip():
    world = bare()
    for tip in ([0.5, 0.5], [0.3, 0.6]):
        world.tip = np.array(tip)
        np.testing.assert_allclose(dark(look(world)["images"][1]), 32, atol=0.5)  # it sees itself in the middle
    item = world.objects[0]
    item.place, item.shape = np.array([0.5, 0.5]), "cube"
    colour = np.array(COLOURS[item.colour])[:, None, None]
    for tip, offset in (([0.4, 0.5], [0.1, 0]), ([0.6, 0.5], [-0.1, 0]), ([0.5, 0.65], [0, -0.15])):
        world.tip = np.array(tip)
        y, x = np.nonzero((look(world)["images"][1] == colour).all(0))
        seen = np.array([x.mean(), y.mean()]) + 0.5 - 32
        np.testing.assert_allclose(seen, np.array(offset) * 128, atol=1)  # at twice the table camera's scale


@pytest.mark.parametrize("size", [64, 96])
def test_images_are_bytes_of_the_size_asked_for(size):
    world = Tabletop(image_size=size)
    images = world.reset(3)["images"]
    assert (images.dtype, images.shape) == (np.uint8, (2, 3, size, size))
    for image in images:
        assert image.std() > 10
    assert solve(world)[0]


def test_every_object_and_zone_is_seen_in_its_colour_and_place():
    world = scene(4)
    world.tip = np.array([0.0, 0.0])
    image = world.render(200)
    for item in world.objects:
        x, y = (item.place * 200).astype(int)
        assert tuple(image[y, x]) == COLOURS[item.colour]
    for zone in world.zones:
        x, y = ((zone.place + np.array([ZONE_RADIUS - 0.007, 0])) * 200).astype(int)  # in the middle of its edge
        assert tuple(image[y, x]) == COLOURS[zone.colour]
