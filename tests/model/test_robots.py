import numpy as np
import pytest
import torch
from robots import (
    ACTIONS,
    ARM,
    CRANE,
    CRANE_ACTIONS,
    CRANE_STATES,
    HEADS,
    STATES,
    WHICH,
    A,
    B,
    P,
    assert_same,
    edit_config,
    learned,
    mixed_batch,
    observation,
    random_batch,
    rows,
    saved,
    tiny,
)
from torch import nn

from vla import InputError
from vla.config import LossConfig
from vla.model import VLAPolicy

# ---- Learning and prediction

PAIR_HEADS = HEADS | {"regression": {"head": "regression", "gripper_dims": (1,), "loss": LossConfig(l1=1.0, mse=0.5)}}


@pytest.mark.parametrize("head", HEADS)
def test_pixels_of_a_masked_camera_change_no_bit_of_output_or_gradient(head):
    model = PAIR_HEADS[head]
    loss = LossConfig(**{**vars(model.get("loss", LossConfig())), "lm": 0.1})
    policy = tiny((ARM, CRANE), **model | {"loss": loss})
    batch = mixed_batch(policy)
    expected = learned(policy, batch)
    noise = torch.randint(0, 256, batch["images"].shape, dtype=torch.uint8)
    noisy = torch.where(batch["image_mask"][:, :, None, None, None], batch["images"], noise)
    assert_same(learned(policy, batch | {"images": noisy}), expected)
    seen = learned(policy, batch | {"images": noisy, "image_mask": torch.ones_like(batch["image_mask"])})
    assert all((seen[name] != expected[name]).any() for name in ("loss", "lm", "chunk", "vision_encoder.camera"))


def test_camera_that_no_sample_has_learns_nothing():
    policy = tiny((ARM, CRANE), loss=LossConfig(lm=0.1))
    gradient = learned(policy, mixed_batch(policy, torch.ones_like(WHICH)))["vision_encoder.camera"]
    assert not gradient[0].any()
    assert gradient[1].any()


@pytest.mark.parametrize("head", HEADS)
def test_dimensions_that_a_robot_lacks_carry_and_teach_nothing(head):
    policy = tiny((ARM, CRANE), **PAIR_HEADS[head])
    batch = mixed_batch(policy, torch.ones_like(WHICH))
    expected = learned(policy, batch)
    assert not expected["chunk"][..., 2].any()
    per_dim = {
        "action_head.decoder.state.weight": expected["action_head.decoder.state.weight"].T,
        "action_head.decoder.out.1.weight": expected["action_head.decoder.out.1.weight"].unflatten(0, (A, -1)),
        "action_head.decoder.out.1.bias": expected["action_head.decoder.out.1.bias"].unflatten(0, (A, -1)),
    }
    if head == "flow":
        per_dim["action_head.action.weight"] = expected["action_head.action.weight"].T
    for name, gradient in per_dim.items():
        assert not gradient[-1].any(), name
        assert all(gradient[d].any() for d in range(len(gradient) - 1)), name
    batch["state"][:, 1:], batch["actions"][..., 2:] = 1e3, -1e3
    assert_same(learned(policy, batch), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("spec", [ARM, CRANE], ids=lambda spec: spec.name)
def test_robot_of_a_mixture_learns_and_predicts_as_with_a_policy_of_its_own(head, spec):
    pair, place = tiny((ARM, CRANE), **PAIR_HEADS[head]), (ARM, CRANE).index(spec)
    alone, batch = tiny((spec,), **PAIR_HEADS[head]), rows(mixed_batch(pair), place == WHICH)
    dims = {"state": len(spec.state_names), "actions": len(spec.action_names)}
    own = alone.state_dict()
    for name, value in pair.state_dict().items():
        if "_norm." not in name:  # weights of dimensions that it lacks are left out
            own[name] = value[: len(own[name])] if value.ndim < 2 else value[: len(own[name]), : own[name].shape[1]]
    alone.load_state_dict(own)
    only = batch | {name: batch[name][..., :count] for name, count in dims.items()}
    only |= {"dataset": torch.zeros_like(batch["dataset"])}
    if spec == ARM:
        assert_same(learned(pair, batch), learned(alone, only))
    elif head != "flow":  # whose noise depends on the number of dimensions
        for name, value in learned(alone, only).items():
            if name in ("loss", "sample_loss", "chunk"):
                found = learned(pair, batch)[name]
                torch.testing.assert_close(found[..., : dims["actions"]] if name == "chunk" else found, value)


def test_robots_predict_each_in_their_own_units():
    policy = tiny((ARM, CRANE), head="regression")
    nn.init.zeros_(policy.action_head.decoder.out[-1].weight)
    nn.init.zeros_(policy.action_head.decoder.out[-1].bias)
    chunk = policy.predict_chunk(mixed_batch(policy))
    for place, values in enumerate((ACTIONS, CRANE_ACTIONS)):
        middle = torch.tensor(np.quantile(values, (0.01, 0.99), axis=0).mean(0), dtype=torch.float32)
        found = chunk[place == WHICH][..., : len(middle)]
        torch.testing.assert_close(found, middle.expand_as(found))


@pytest.mark.parametrize("head", HEADS)
def test_sample_learns_and_predicts_the_same_whatever_robots_are_in_its_batch(head):
    policy = tiny((ARM, CRANE), **PAIR_HEADS[head])
    batch = mixed_batch(policy)
    together, chunk = policy(batch)["sample_loss"], policy.predict_chunk(batch)
    assert together.isfinite().all()
    for b in range(B):
        own = rows(batch, slice(b, b + 1))
        torch.testing.assert_close(policy(own)["sample_loss"], together[b : b + 1])
        torch.testing.assert_close(policy.predict_chunk(own), chunk[b : b + 1], rtol=1e-4, atol=1e-4)


# ---- Acting


def of_crane(seed=0, height=16, width=24, **changed):
    images = np.random.default_rng(seed).integers(0, 256, (1, 3, height, width), dtype=np.uint8)
    return {"images": images, "state": CRANE_STATES[seed], "instruction": "lift"} | changed


def test_policy_of_several_robots_acts_only_once_it_is_told_which_it_drives():
    policy, crane = tiny((ARM, CRANE), n_action_steps=3), tiny((ARM, CRANE), n_action_steps=3)
    for act in (policy.select_action, lambda seen: policy.collate([seen], torch.tensor([0]))):
        with pytest.raises(InputError, match=r"trained on arm, crane: say with policy.drive\(name\) whose robot acts"):
            act(observation())
    with pytest.raises(InputError, match="data set 'boat' is unknown to the policy, which was trained on arm, crane"):
        policy.drive("boat")
    policy.drive("arm")
    assert policy.driven == ARM
    assert policy.select_action(observation()).shape == (3,)
    policy.drive("crane")  # in the middle of the chunk of the other
    policy.reset()
    crane.drive("crane")
    assert policy.driven == CRANE
    action = policy.select_action(of_crane())
    assert action.shape == (2,)
    np.testing.assert_array_equal(action, crane.select_action(of_crane()))
    low, high = CRANE_ACTIONS.min(0), CRANE_ACTIONS.max(0)
    assert (np.abs(action - (low + high) / 2) < 2 * (high - low)).all()


def test_robot_that_is_driven_anew_gets_no_action_of_the_one_before():
    policy = tiny((ARM, CRANE), n_action_steps=3)
    policy.drive("arm")
    policy.select_action(observation())
    policy.drive("crane")
    assert policy.select_action(of_crane()).shape == (2,)


def test_single_robot_is_driven_without_being_told():
    policy = tiny()
    assert policy.driven == ARM
    policy.drive("arm")
    with pytest.raises(InputError, match="data set 'crane' is unknown to the policy, which was trained on arm"):
        policy.drive("crane")


def test_collate_fills_what_the_driven_robot_lacks():
    policy = tiny((ARM, CRANE))
    policy.drive("crane")
    seen = [of_crane(0), of_crane(1)]
    batch = policy.collate(seen, torch.tensor([5, 6]))
    assert batch["dataset"].tolist() == [1, 1]
    assert batch["image_mask"].tolist() == [[False, True], [False, True]]
    for row, each in enumerate(seen):
        assert not batch["images"][row, 0].any()
        np.testing.assert_array_equal(batch["images"][row, 1].numpy(), each["images"][0])
        assert batch["state"][row].tolist() == [each["state"][0], 0]


PIXELS = np.zeros((3, 16, 24), np.uint8)
WRONG_OBSERVATIONS = {
    "a camera less": ({"images": PIXELS[None]}, "1 images, expected those of the cameras of arm: table, wrist"),
    "a camera more": (
        {"images": np.stack([PIXELS] * 3)},
        "3 images, expected those of the cameras of arm: table, wrist",
    ),
    "a name less": (
        {"images": {"table": PIXELS}},
        "images of table, expected those of the cameras of arm: table, wrist",
    ),
    "a name more": (
        {"images": dict.fromkeys(("table", "wrist", "front"), PIXELS)},
        "images of table, wrist, front, expected those of the cameras of arm: table, wrist",
    ),
    "colours last": (
        {"images": {"table": PIXELS, "wrist": PIXELS.transpose(1, 2, 0)}},
        r"image of wrist is uint8 \[16, 24, 3\], expected uint8 \[3, height, width\]",
    ),
    "floats": ({"images": np.zeros((2, 3, 16, 24))}, r"image of table is float64 \[3, 16, 24\], expected uint8 "),
    "a state less": (
        {"state": STATES[0, :1]},
        r"state has shape \[1\], expected the 2 numbers of arm: x, y",
    ),
    "a state that is no number": (
        {"state": np.array([np.nan, 0])},
        "state has x nan, expected finite numbers",
    ),
    "a state that is infinite": ({"state": np.array([0, -np.inf])}, "state has y -inf, expected finite numbers"),
    "no pixels": (
        {"images": np.zeros((2, 3, 0, 24), np.uint8)},
        r"image of table is uint8 \[3, 0, 24\], expected uint8",
    ),
    "no instruction": ({"instruction": None}, "instruction is None, expected a str"),
    "several instructions": ({"instruction": ["pick"]}, r"instruction is \['pick'\], expected a str"),
    "a state of a batch": ({"state": STATES[:1]}, r"state has shape \[1, 2\], expected the 2 numbers of arm: x, y"),
}


@pytest.mark.parametrize("wrong", WRONG_OBSERVATIONS)
def test_observation_of_another_robot_is_refused(wrong):
    changed, told = WRONG_OBSERVATIONS[wrong]
    for datasets in ((ARM,), (CRANE, ARM)):
        policy = tiny(datasets)
        policy.drive("arm")
        with pytest.raises(InputError, match=told):
            policy.select_action(observation() | changed)


@pytest.mark.parametrize("name", ["images", "state", "instruction"])
def test_observation_that_lacks_an_entry_is_refused(name):
    seen = observation()
    del seen[name]
    with pytest.raises(InputError, match=f"the observation lacks {name}; expected images, state and instruction"):
        tiny().select_action(seen)


# Of other shapes, which would be repeated to fit, and images of other numbers.
WRONG_BATCHES = {
    "images that are scaled": (lambda b: {"images": b["images"] / 255}, r"images torch.float32 \[8, 2, 3, 16, 24\], "),
    "one image of two": (
        lambda b: {"images": b["images"][:, :1]},
        r"\[8, 1, 3, 16, 24\], expected .*\[8, 2, 3, 16, 24\]",
    ),
    "images of another size": (
        lambda b: {"images": b["images"][..., :16]},
        r"images torch.uint8 \[8, 2, 3, 16, 16\], ",
    ),
    "a mask of one camera": (lambda b: {"image_mask": b["image_mask"][:, :1]}, r"image_mask torch.bool \[8, 1\], "),
    "one number of the state": (lambda b: {"state": b["state"][:, :1]}, r"state torch.float32 \[8, 1\], expected"),
    "one key": (lambda b: {"key": b["key"][:1]}, r"key torch.int64 \[1\], expected torch.int64 \[8\]"),
    "one action": (lambda b: {"actions": b["actions"][:, :1]}, r"actions torch.float32 \[8, 1, 3\], expected"),
    "one step's padding": (
        lambda b: {"action_is_pad": b["action_is_pad"][:, :1]},
        r"action_is_pad torch.bool \[8, 1\], ",
    ),
    "no tokens": (lambda b: {"tokens": None}, r"the batch lacks tokens, torch.int64 \[8, 32\]"),
}


@pytest.mark.parametrize("wrong", WRONG_BATCHES)
def test_batch_of_other_shapes_or_numbers_is_refused(wrong):
    change, told = WRONG_BATCHES[wrong]
    policy = tiny()
    batch = random_batch(policy)
    batch = {name: value for name, value in (batch | change(batch)).items() if value is not None}
    with pytest.raises(InputError, match=told):
        policy(batch)
    if "action" not in told:
        with pytest.raises(InputError, match=told):
            policy.predict_chunk(batch)


# ---- Save and load


def test_loaded_policy_of_several_robots_is_whole_and_asks_again_which_to_drive(tmp_path):
    original = tiny((ARM, CRANE), head="regression", gripper_dims=(1,))
    original.drive("crane")
    original.save_pretrained(tmp_path / "export")
    policy = VLAPolicy.from_pretrained(tmp_path / "export")
    assert policy.config == original.config
    assert (policy.config.state_dim, policy.config.action_dim) == (P, A)
    assert policy.state_dict().keys() == original.state_dict().keys()
    with pytest.raises(InputError, match="say with policy"):
        policy.select_action(of_crane())
    policy.drive("crane")
    np.testing.assert_array_equal(policy.select_action(of_crane()), original.select_action(of_crane()))
    batch = mixed_batch(policy)
    assert torch.equal(policy.predict_chunk(batch), original.predict_chunk(batch))


WRONG_DATASETS = {
    "no list": (lambda config: config.update(datasets={"name": "arm"}), "has datasets .*, expected a list"),
    "no entries": (
        lambda config: config.update(datasets=["arm"]),
        "has 'arm' in place of the entries of a DatasetSpec",
    ),
    "an entry too many": (lambda config: config["datasets"][0].update(units="mm"), "has unknown entries units"),
    "an entry too few": (lambda config: config["datasets"][0].pop("fps"), "lacks fps"),
    "none": (lambda config: config.update(datasets=[]), "the data sets are named .*; expected at least one"),
}


@pytest.mark.parametrize("wrong", WRONG_DATASETS)
def test_configuration_with_wrong_data_sets_is_refused(tmp_path, wrong):
    change, told = WRONG_DATASETS[wrong]
    folder = saved(tmp_path)
    edit_config(folder, change)
    with pytest.raises(InputError, match=told):
        VLAPolicy.from_pretrained(folder)
