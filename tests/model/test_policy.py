import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vla
from vla import InputError, keyed
from vla.config import MODULES, LossConfig, ModelConfig, OptimConfig
from vla.data.stats import statistics
from vla.images import resize_with_padding
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.model.policy import check
from vla.optim import parameter_groups

B, H, A, P = 8, 4, 3, 2
HEADS = {
    "flow": {"head": "flow"},
    "regression": {"head": "regression", "gripper_dims": (2,), "loss": LossConfig(l1=1.0, mse=0.5)},
    "token": {"head": "token", "bins": 16},
}
SUBSETS = [names for count in (1, 2) for names in itertools.combinations(MODULES, count)]  # never all
RANDOM = np.random.default_rng(0)
STATES = RANDOM.normal([3.0, -200.0], [0.1, 50.0], (100, P)).astype(np.float32)
ACTIONS = RANDOM.normal([0.0, 1000.0, 0.0], [0.01, 30.0, 1.0], (100, A)).astype(np.float32)  # in three units
ACTIONS[:, 2] = ACTIONS[:, 2] > 0
ARM = DatasetSpec("arm", ("table", "wrist"), ("x", "y"), ("dx", "dy", "grip"), 10)
# The robot of another data set, which lacks the first camera and the last dimensions, and moves in other units.
CRANE = DatasetSpec("crane", ("wrist",), ("height",), ("lift", "turn"), 5)
CRANE_STATES = RANDOM.normal([7000.0], [90.0], (100, 1)).astype(np.float32)
CRANE_ACTIONS = RANDOM.normal([-20.0, 0.5], [4.0, 1e-3], (100, 2)).astype(np.float32)
VALUES = {"arm": (STATES, ACTIONS), "crane": (CRANE_STATES, CRANE_ACTIONS)}
WHICH = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])  # the data set of each sample of a mixed batch
TEXTS = ["pick", "place", "put the red cube in the", "push it", "turn left", "turn right", "open the drawer", "wait"]


def configuration(datasets=(ARM,), **model):
    sizes = {"chunk_size": H, "n_action_steps": 2, "width": 32, "attention_heads": 2, "language_layers": 2}
    sizes |= {"head_layers": 2, "mlp_ratio": 2, "max_tokens": 32, "vision_stride": 8, "flow_steps": 4}
    return PolicyConfig(ModelConfig(**sizes | model), ("table", "wrist"), (16, 24), datasets)


def tiny(datasets=(ARM,), **model):
    """A small policy with statistics. Its last layer, which starts at 0 and hides all before it, is random."""
    torch.manual_seed(0)
    policy = VLAPolicy(configuration(datasets, **model))
    policy.set_statistics([tuple(map(statistics, VALUES[spec.name])) for spec in datasets])
    nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.1)
    return policy


def mixed_batch(policy, which=WHICH):
    """A batch of the robots ARM and CRANE. which: int64 [B], their places."""
    batch = random_batch(policy) | {"dataset": which}
    for b in torch.nonzero(which)[:, 0].tolist():
        batch["image_mask"][b, 0], batch["images"][b, 0] = False, 0
        batch["state"][b] = torch.tensor([CRANE_STATES[b, 0], 0])
        batch["actions"][b] = torch.from_numpy(np.pad(CRANE_ACTIONS[b * H : (b + 1) * H], [(0, 0), (0, 1)]))
    return batch


def learned(policy, batch):
    """What the policy makes of a batch, and the gradients of its loss, by name."""
    policy.zero_grad()
    output = policy(batch)
    output["loss"].backward()
    found = {name: value.detach() for name, value in output.items()} | {"chunk": policy.predict_chunk(batch)}
    return found | {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def random_batch(policy, texts=tuple(TEXTS)):
    generator, size = torch.Generator().manual_seed(1), len(texts)
    tokens, token_mask = policy.tokenize(list(texts))
    return {
        "dataset": torch.zeros(size, dtype=torch.int64),
        "image_mask": torch.ones(size, 2, dtype=torch.bool),
        "images": torch.randint(0, 256, (size, 2, 3, 16, 24), generator=generator, dtype=torch.uint8),
        "state": torch.from_numpy(STATES[:size]).clone(),
        "tokens": tokens,
        "token_mask": token_mask,
        "actions": torch.from_numpy(ACTIONS[: size * H]).view(size, H, A).clone(),
        "action_is_pad": torch.arange(H)[None] > torch.arange(size)[:, None],
        "key": keyed.derive(0, torch.arange(size)),
    }


def observation(seed=0, text="pick"):
    random = np.random.default_rng(seed)
    return {
        "images": random.integers(0, 256, (2, 3, 16, 24), dtype=np.uint8),
        "state": STATES[seed],
        "instruction": text,
    }


def rows(batch, which):
    return {name: value[which] for name, value in batch.items()}


def span():
    return torch.from_numpy(np.ptp(ACTIONS, axis=0))


# ---- Learning


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lm", [0.0, 0.1])
def test_every_trainable_parameter_gets_gradient(head, lm):
    model = HEADS[head]
    loss = LossConfig(**{**vars(model.get("loss", LossConfig())), "lm": lm})
    policy = tiny(**model | {"loss": loss})
    policy(random_batch(policy))["loss"].backward()
    for name, p in policy.named_parameters():
        assert p.requires_grad, name
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


@pytest.mark.parametrize("head", HEADS)
def test_every_trainable_parameter_gets_more_gradient_than_rounding_makes(head):
    policy = tiny(**HEADS[head])
    policy(random_batch(policy))["loss"].backward()
    assert [name for name, p in policy.named_parameters() if p.grad.abs().max() < 1e-6] == []


@pytest.mark.parametrize("head", HEADS)
def test_head_overfits_one_batch_and_then_predicts_its_actions(head):
    policy = tiny(**HEADS[head])
    nn.init.zeros_(policy.action_head.decoder.out[-1].weight)
    batch, steps = random_batch(policy), 200
    batch["action_is_pad"][:] = False
    optimizer = torch.optim.AdamW(parameter_groups(policy, OptimConfig()), betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, (steps - step) / 100)
        batch["key"] = keyed.derive(0, torch.arange(step * B, (step + 1) * B))
        loss = policy(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    error = (policy.predict_chunk(batch) - batch["actions"]).abs() / span()
    assert np.mean(losses[-10:]) < losses[0] / 10
    assert error.mean() < 0.05
    if head == "regression":
        assert torch.equal(policy.predict_chunk(batch)[..., 2], batch["actions"][..., 2])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", SUBSETS, ids="+".join)
def test_frozen_parts_get_no_gradient_and_stay_bitwise_the_same_while_the_others_move(head, frozen):
    policy = tiny(**HEADS[head], freeze=frozen)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(policy, OptimConfig(lr=1e-2, weight_decay=0.1)))
    for _ in range(2):
        policy(random_batch(policy))["loss"].backward()
        optimizer.step()
    for name, p in policy.named_parameters():
        if name.startswith(frozen):
            assert not p.requires_grad, name
            assert p.grad is None, name
            assert torch.equal(p, before[name]), name
        else:
            assert not torch.equal(p, before[name]), name
    scales = {
        name: value for name, value in policy.state_dict().items() if name.startswith(("state_norm", "action_norm"))
    }
    assert all(torch.equal(value, before[name]) for name, value in scales.items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", SUBSETS, ids="+".join)
def test_freezing_changes_neither_the_loss_nor_the_gradient_of_what_is_trained(head, frozen):
    whole, part = tiny(**HEADS[head]), tiny(**HEADS[head], freeze=frozen)
    part.load_state_dict(whole.state_dict())
    first, second = (policy(random_batch(policy)) for policy in (whole, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first["loss"].backward()
    second["loss"].backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    for name, p in part.named_parameters():
        if not name.startswith(frozen):
            assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("frozen", [("vision_encoder",), ("language_model",), ("vision_encoder", "language_model")])
def test_autograd_reaches_down_to_the_lowest_trained_part_and_no_further(frozen):
    policy, graph = tiny(freeze=frozen), {}
    policy.vision_encoder.register_forward_hook(lambda *call: graph.update(images=call[-1].requires_grad))
    policy.language_model.register_forward_hook(lambda *call: graph.update(hidden=call[-1][0].requires_grad))
    policy(random_batch(policy))
    assert graph == {"images": "vision_encoder" not in frozen, "hidden": len(frozen) == 1}
    with torch.no_grad():
        assert not policy(random_batch(policy))["loss"].requires_grad
    assert graph == {"images": False, "hidden": False}


# ---- The loss


def test_loss_is_the_weighted_sum_of_its_terms():
    weights = {"l1": 0.5, "mse": 2.0, "bce": 3.0, "lm": 0.25}
    policy = tiny(head="regression", gripper_dims=(2,), loss=LossConfig(**weights))
    output = policy(random_batch(policy))
    assert output.keys() == {"loss", "sample_loss", *weights}
    torch.testing.assert_close(output["loss"], sum(weight * output[name] for name, weight in weights.items()))
    assert output["loss"].requires_grad
    assert not any(output[name].requires_grad for name in ("sample_loss", *weights))


@pytest.mark.parametrize("head", HEADS)
def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_samples(head):
    policy = tiny(**HEADS[head])
    batch = random_batch(policy)  # whose samples have between one and all steps valid
    together = policy(batch)
    alone = [policy(rows(batch, slice(b, b + 1))) for b in range(B)]
    halves = [policy(rows(batch, slice(b, b + 4))) for b in (0, 4)]
    sample_loss = together.pop("sample_loss")
    for name in together:
        for parts in (alone, halves):
            torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), together[name])
    torch.testing.assert_close(sample_loss, torch.stack([part["loss"] for part in alone]).detach())


def test_language_loss_equals_a_loop_over_the_bytes_of_each_instruction():
    policy = tiny(loss=LossConfig(lm=1.0))
    batch, logits = random_batch(policy), []
    policy.language_model.next_bytes.register_forward_hook(lambda *call: logits.append(call[-1].detach()))
    found = policy(batch)["lm"]
    expected = []
    for b, text in enumerate(TEXTS):
        ids = [257, *text.encode()]
        each = logits[0][b].view(-1, 258).log_softmax(-1)  # row 0 is of byte 4: the first patch is given
        errors = [-each[place - 4, ids[place]].item() for place in range(4, len(ids))]
        expected.append(sum(errors) / len(errors))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("byte", [1, 3, 4, 5, 11, 12, 19, 23])
def test_language_loss_predicts_a_byte_from_nothing_but_the_patches_before_it(byte):
    policy, logits = tiny(loss=LossConfig(lm=1.0)), []
    policy.language_model.next_bytes.register_forward_hook(lambda *call: logits.append(call[-1].detach()))
    text = "put the red cube in the"
    other = text[: byte - 1] + "Q" + text[byte:]  # byte 0 is the beginning mark
    for words in (text, other):
        policy(random_batch(policy, [words]))
    first, second = (each[0] for each in logits)  # [patches - 1, 4 * 258]: row p predicts patch p + 1
    patch = byte // 4
    torch.testing.assert_close(first[:patch], second[:patch], rtol=0, atol=1e-6)
    assert (first[patch:6] - second[patch:6]).abs().amax(-1).gt(1e-4).all()  # all six patches of text


def test_language_loss_depends_on_the_images():
    policy = tiny(loss=LossConfig(lm=1.0))
    batch = random_batch(policy)
    changed = policy(batch | {"images": 255 - batch["images"]})["lm"]
    assert abs(changed - policy(batch)["lm"]) > 1e-4
    loss = policy(batch | {"images": batch["images"]})["lm"]
    assert torch.equal(loss, policy(batch)["lm"])


# ---- Several data sets

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


# ---- Prediction


@pytest.mark.parametrize("head", HEADS)
def test_padding_of_the_instruction_changes_no_prediction(head):
    short, long = tiny(**HEADS[head], max_tokens=48), tiny(**HEADS[head], max_tokens=64)
    weights = short.state_dict()
    position = torch.cat([weights["language_model.position"], torch.full((4, 32), 1e3)])  # of the extra patches
    long.load_state_dict(weights | {"language_model.position": position})
    texts = [*TEXTS, "an instruction of 47 bytes, which is the longest"[:47], "1234567", "12345678"]
    first, second = (policy.predict_chunk(random_batch(policy, texts)) for policy in (short, long))
    assert ((first - second).abs() / span()).max() < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_prediction_of_a_sample_does_not_depend_on_its_batch(head):
    policy = tiny(**HEADS[head])
    batch = random_batch(policy)
    together = policy.predict_chunk(batch)
    alone = torch.cat([policy.predict_chunk(rows(batch, slice(b, b + 1))) for b in range(B)])
    assert ((together - alone).abs() / span()).max() < 1e-5


def test_prediction_is_in_the_robots_own_units():
    policy = tiny(head="regression")
    batch = random_batch(policy)
    chunk = policy.predict_chunk(batch)
    assert (chunk.shape, chunk.dtype, chunk.requires_grad) == ((B, H, A), torch.float32, False)
    seen = []
    policy.action_head.decoder.register_forward_hook(lambda *call: seen.append(call[-1]))
    policy.predict_chunk(batch)
    low, high = torch.tensor(np.quantile(ACTIONS, (0.01, 0.99), axis=0), dtype=torch.float32)
    torch.testing.assert_close(chunk, (seen[0] + 1) / 2 * (high - low) + low, rtol=1e-5, atol=1e-6)
    nn.init.zeros_(policy.action_head.decoder.out[-1].weight)
    nn.init.zeros_(policy.action_head.decoder.out[-1].bias)
    torch.testing.assert_close(policy.predict_chunk(batch), ((low + high) / 2).expand(B, H, A))


def test_state_is_normalized_before_the_policy_sees_it():
    policy = tiny()
    batch, twice = random_batch(policy), tiny()
    twice.set_statistics([(statistics(STATES * 2), statistics(ACTIONS))])
    again = twice.predict_chunk(batch | {"state": batch["state"] * 2})
    torch.testing.assert_close(again, policy.predict_chunk(batch), rtol=1e-4, atol=1e-4)


PERTURBED = {
    "the first camera": lambda batch: batch["images"][:, 0].bitwise_not_(),
    "the second camera": lambda batch: batch["images"][:, 1].bitwise_not_(),
    "the order of the cameras": lambda batch: batch["images"].copy_(batch["images"].flip(1)),
    "the instruction": lambda batch: batch["tokens"].__setitem__((slice(None), 2), ord("z")),
    "the state": lambda batch: batch["state"].__setitem__((slice(None), 1), -100.0),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("part", PERTURBED)
def test_prediction_depends_on(head, part):
    policy = tiny(**HEADS[head])
    out = []
    policy.action_head.decoder.register_forward_hook(lambda *call: out.append(call[-1]))
    for perturb in (lambda batch: None, PERTURBED[part]):
        batch = random_batch(policy)
        perturb(batch)
        policy.predict_chunk(batch)
    first, last = out[0], out[len(out) // 2]  # of each call's first pass through the head
    assert (first - last).abs().amax((1, 2)).min() > 1e-4  # of every sample


def test_prediction_depends_on_the_order_of_the_words():
    policy = tiny()
    texts = ["red in the blue", "blue in the red"]
    batch = rows(random_batch(policy), slice(2)) | dict(
        zip(("tokens", "token_mask"), policy.tokenize(texts), strict=True)
    )
    batch = {name: value if "token" in name else value[:1].expand_as(value) for name, value in batch.items()}
    first, second = policy.predict_chunk(batch)
    assert ((first - second).abs() / span()).max() > 1e-4


def test_noise_of_a_flow_comes_from_the_key_alone():
    policy = tiny()
    batch = random_batch(policy)
    chunk = policy.predict_chunk(batch)
    torch.manual_seed(99)
    assert torch.equal(policy.predict_chunk(batch), chunk)
    other = policy.predict_chunk(batch | {"key": batch["key"] + 1})
    assert ((other - chunk).abs() / span()).amax((1, 2)).min() > 1e-3


# ---- Acting


@pytest.mark.parametrize("n_action_steps", [1, 3, 4])
def test_select_action_executes_its_steps_of_a_chunk_and_then_looks_again(monkeypatch, n_action_steps):
    policy, chunks = tiny(n_action_steps=n_action_steps), []
    predict = policy.predict_chunk

    def recorded(batch):
        chunks.append(predict(batch))
        return chunks[-1]

    monkeypatch.setattr(policy, "predict_chunk", recorded)
    for turn in range(3 * n_action_steps):
        action = policy.select_action(observation(turn))
        assert (action.shape, action.dtype) == ((A,), np.float32)
        assert len(chunks) == turn // n_action_steps + 1
        np.testing.assert_array_equal(action, chunks[-1][0, turn % n_action_steps].numpy())
    looked = policy.collate([observation(n_action_steps)], keyed.derive(0, torch.tensor([1])))
    assert torch.equal(chunks[1], predict(looked))  # at what there was to see by then, with noise of its own


def actions(policy, count=5):
    return np.stack([policy.select_action(observation(turn)) for turn in range(count)])


def test_reset_forgets_the_queue_and_the_seed_fixes_the_noise():
    policy = tiny(n_action_steps=3)
    first = actions(policy)  # stops within the second chunk
    policy.reset()
    np.testing.assert_array_equal(actions(policy), first)
    policy.reset(seed=1)
    assert not np.allclose(actions(policy), first)
    policy.reset(seed=0)
    np.testing.assert_array_equal(actions(policy), first)


def test_collate_makes_the_batch_of_the_contract():
    policy = tiny()
    seen = [observation(0, "pick"), observation(1, "place")]
    batch = policy.collate(seen, torch.tensor([5, 6]))
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    assert shapes == {
        "dataset": (torch.int64, (2,)),
        "image_mask": (torch.bool, (2, 2)),
        "images": (torch.uint8, (2, 2, 3, 16, 24)),
        "state": (torch.float32, (2, P)),
        "tokens": (torch.int64, (2, 32)),
        "token_mask": (torch.bool, (2, 32)),
        "key": (torch.int64, (2,)),
    }
    np.testing.assert_array_equal(batch["images"][1].numpy(), seen[1]["images"])
    assert batch["image_mask"].all()
    assert shapes.keys() == random_batch(policy).keys() - {"actions", "action_is_pad"}


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


@pytest.mark.filterwarnings("error")
def test_images_by_name_and_of_any_size_are_brought_to_the_policys_as_in_training():
    policy, random = tiny(), np.random.default_rng(0)
    table, wrist = (random.integers(0, 256, (3, *size), dtype=np.uint8) for size in ((30, 40), (16, 24)))
    named = {"wrist": wrist, "table": table.transpose(1, 2, 0).copy().transpose(2, 0, 1)}  # in memory as PIL has it
    wrist.setflags(write=False)
    batch = policy.collate([observation() | {"images": named}], torch.tensor([0]))
    resized = resize_with_padding(torch.tensor(table)[None], (16, 24))[0]
    assert torch.equal(batch["images"][0, 0], resized)
    assert torch.equal(batch["images"][0, 1], torch.tensor(wrist))
    both = np.stack([table, table[:, ::-1]])
    batch = policy.collate([observation() | {"images": both}], torch.tensor([0]))
    assert torch.equal(batch["images"][0, 0], resized)
    assert batch["images"].shape == (1, 2, 3, 16, 24)


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


def test_instruction_becomes_its_bytes_after_a_beginning_mark():
    policy = tiny()
    texts = ["pick", "Würfel 立方体 🤖"]
    tokens, mask = policy.tokenize(texts)
    assert mask.sum(1).tolist() == [1 + len(text.encode()) for text in texts]
    for row, valid, text in zip(tokens, mask, texts, strict=True):
        assert row[0] == 257
        assert bytes(row[valid][1:].tolist()).decode() == text
        assert (row[~valid] == 256).all()
    chunk = policy.predict_chunk(random_batch(policy, texts))
    assert chunk.isfinite().all()


def test_instruction_that_does_not_fit_is_refused():
    policy = tiny()
    longest = "x" * 31
    assert policy.tokenize([longest])[1].all()
    with pytest.raises(InputError, match=r"'x{32}' has 32 bytes; --model.max_tokens 32 holds 31"):
        policy.tokenize(["short", longest + "x"])
    with pytest.raises(InputError, match="has 33 bytes"):  # bytes, not letters
        policy.tokenize(["ä" * 16 + "x"])
    with pytest.raises(InputError, match="has 40 bytes"):
        policy.select_action(observation(text="y" * 40))


def test_cure_for_an_instruction_that_does_not_fit_works():
    with pytest.raises(InputError) as refusal:
        tiny(max_tokens=8).tokenize(["x" * 20])
    cure = int(str(refusal.value).split("raise it to ")[1].split()[0])
    assert tiny(max_tokens=cure).tokenize(["x" * 20])[1].sum() == 21


@pytest.mark.parametrize("part", ["state_norm", "action_norm"])
def test_policy_without_statistics_refuses_to_act(part):
    policy = VLAPolicy(configuration())
    with pytest.raises(InputError, match="no normalization statistics"):
        policy.select_action(observation())
    other = "action_norm" if part == "state_norm" else "state_norm"
    policy = VLAPolicy(configuration())
    getattr(policy, other).set_statistics([statistics(STATES if other == "state_norm" else ACTIONS)])
    with pytest.raises(InputError, match="no normalization statistics"):
        policy.predict_chunk(random_batch(policy))


# ---- Save and load

PREDICT = """
import sys, torch
from safetensors.torch import load_file, save_file
from vla.model import VLAPolicy
torch.set_num_threads(int(sys.argv[1]))
for head in sys.argv[2:]:
    policy = VLAPolicy.from_pretrained(head)
    save_file({"chunk": policy.predict_chunk(load_file("batch.safetensors"))}, f"{head}.chunk")
"""


def test_saved_policy_predicts_the_same_to_the_bit_in_a_new_process(tmp_path):
    policies = {head: tiny(**model) for head, model in HEADS.items()}
    batch = random_batch(policies["flow"])
    save_file(batch, tmp_path / "batch.safetensors")
    for head, policy in policies.items():
        policy.save_pretrained(tmp_path / head)
    subprocess.run(
        [sys.executable, "-c", PREDICT, str(torch.get_num_threads()), *HEADS],
        env=os.environ | {"PYTHONPATH": str(Path(vla.__file__).parents[1])},
        cwd=tmp_path,
        check=True,
    )
    for head, policy in policies.items():
        assert torch.equal(load_file(tmp_path / f"{head}.chunk")["chunk"], policy.predict_chunk(batch))


def saved(tmp_path, **model):
    tiny(**model).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def test_loaded_policy_is_whole_and_ready_to_act(tmp_path):
    model = {"head": "regression", "gripper_dims": (2,), "freeze": ("vision_encoder",), "loss": LossConfig(lm=0.3)}
    policy = VLAPolicy.from_pretrained(saved(tmp_path, **model))
    original = tiny(**model)
    assert policy.config == original.config
    assert not policy.training
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == {
        n: p.requires_grad for n, p in original.named_parameters()
    }
    expected = original.state_dict()
    assert policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())
    np.testing.assert_array_equal(actions(policy), actions(original))


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


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["action_head.decoder.slot", "action_norm.high", "vision_encoder.camera"])
def test_missing_weights_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=rf"does not fit its config.json: missing \['{name}'\], left over nothing"):
        VLAPolicy.from_pretrained(folder)


def test_weights_that_are_left_over_are_refused(tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights.update({"language_model.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"missing nothing, left over \['language_model.extra'\]"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize("name", ["state_norm.offset", "action_norm.scale", "action_norm.low"])
def test_weights_without_statistics_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights[name].__setitem__(0, torch.nan))
    with pytest.raises(InputError, match="no normalization statistics"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize("part", ["model", "loss"])
def test_configuration_of_another_version_is_refused(tmp_path, part):
    folder = saved(tmp_path)
    edit_config(
        folder, lambda config: (config["model"] if part == "model" else config["model"]["loss"]).update(dropout=0.1)
    )
    with pytest.raises(InputError, match=r"config.json has unknown entries dropout"):
        VLAPolicy.from_pretrained(folder)


def test_configuration_with_an_unknown_entry_at_its_top_is_refused(tmp_path):
    folder = saved(tmp_path)
    edit_config(folder, lambda config: config.update(action_units="mm"))
    with pytest.raises(InputError, match=r"config.json has unknown entries action_units"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize("entry", ["image_size", "model", "datasets"])
def test_configuration_that_lacks_an_entry_is_refused(tmp_path, entry):
    folder = saved(tmp_path)
    edit_config(folder, lambda config: config.pop(entry))
    with pytest.raises(InputError, match=f"lacks {entry}"):
        VLAPolicy.from_pretrained(folder)


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


# ---- Configurations that cannot be built

WRONG = {
    "a stride that is no power of two": ({"vision_stride": 6}, "--model.vision_stride 6 does not fit images of 16x24"),
    "a stride that divides one side only": (
        {"vision_stride": 16},
        "--model.vision_stride 16 does not fit images of 16x24",
    ),
    "a stride of one": ({"vision_stride": 1}, "--model.vision_stride 1 does not fit"),
    "a width that heads do not divide": (
        {"width": 40},
        "--model.width 40 is no multiple of 8 x --model.attention_heads 2",
    ),
    "tokens that patches do not divide": ({"max_tokens": 30}, "--model.max_tokens is 30; expected a multiple of 4"),
    "too few tokens": ({"max_tokens": 4}, "--model.max_tokens is 4; .* at least 8"),
    "no step of a chunk": ({"n_action_steps": 0}, "--model.n_action_steps is 0; expected 1 to --model.chunk_size 4"),
    "more steps than a chunk has": (
        {"n_action_steps": 5},
        "--model.n_action_steps is 5; expected 1 to --model.chunk_size 4",
    ),
    "a gripper that is no action": (
        {"head": "regression", "gripper_dims": (1, 3)},
        r"--model.gripper_dims names \[3\], but actions of arm have the dimensions 0 to 2",
    ),
    "a gripper that only one robot has": (
        {"datasets": (ARM, CRANE), "head": "regression", "gripper_dims": (2,)},
        r"--model.gripper_dims names \[2\], but actions of crane have the dimensions 0 to 1; .* in every data set",
    ),
    "a data set twice": (
        {"datasets": (ARM, ARM)},
        r"the data sets are named \['arm', 'arm'\]; expected .* another name",
    ),
    "a data set named like an action": (
        {"datasets": (ARM, replace(CRANE, name="grip"))},
        "data set grip is named like an action, so that its metrics are too; rename it",
    ),
    "a camera that the policy lacks": (
        {"datasets": (ARM, replace(CRANE, cameras=("wrist", "hook")))},
        r"data set crane has the cameras \['wrist', 'hook'\]; expected .* of \['table', 'wrist'\], in this order",
    ),
    "cameras in another order": (
        {"datasets": (replace(ARM, cameras=("wrist", "table")),)},
        r"data set arm has the cameras \['wrist', 'table'\]; expected",
    ),
    "a robot without a camera": (
        {"datasets": (ARM, replace(CRANE, cameras=()))},
        r"data set crane has the cameras \[\]; expected one or more",
    ),
    "a gripper counted from the end": (
        {"head": "regression", "gripper_dims": (-1,)},
        r"--model.gripper_dims names \[-1\]",
    ),
    "a gripper without regression": (
        {"gripper_dims": (2,)},
        "--model.gripper_dims has no effect with --model.head flow",
    ),
    "a weight below zero": ({"loss": LossConfig(flow=-1)}, "--model.loss.flow is -1; expected 0 or more"),
    "a weight of another head": ({"loss": LossConfig(mse=1)}, "--model.loss.mse has no effect with --model.head flow"),
    "a weight of a gripper that is not there": (
        {"head": "regression", "loss": LossConfig(bce=2)},
        "--model.loss.bce has no effect with --model.head regression",
    ),
    "no weight at all": ({"loss": LossConfig(flow=0)}, "the loss weights flow are all 0"),
    "nothing but language": ({"head": "token", "loss": LossConfig(ce=0, lm=1)}, "the loss weights ce are all 0"),
    "language of a frozen model": (
        {"loss": LossConfig(lm=1), "freeze": ("language_model",)},
        "--model.loss.lm trains the language_model, which --model.freeze freezes",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_policy_that_cannot_be_built_is_refused_naming_the_flag(wrong):
    model, told = WRONG[wrong]
    for build in (VLAPolicy, check):
        with pytest.raises(InputError, match=told):
            build(configuration(**model))


UNCHECKED = {
    "no flow step: noise is what it does": {"flow_steps": 0},
    "one bin: it learns nothing": {"head": "token", "bins": 1},
    "no bin: fails in the first step": {"head": "token", "bins": 0},
    "smoothing above one: fails in the first step": {"head": "token", "label_smoothing": 2.0},
    "smoothing below zero": {"head": "token", "label_smoothing": -0.1},
    "smoothing without bins: no effect": {"head": "flow", "label_smoothing": 0.1},
    "no attention head: ZeroDivisionError": {"attention_heads": 0},
    "a width of 8: fails in the first step": {"width": 8, "attention_heads": 1},
    "an unknown part to freeze: AttributeError": {"freeze": ("head",)},
    "only grippers and no weight for them: it learns nothing": {
        "head": "regression",
        "gripper_dims": (0, 1, 2),
        "loss": LossConfig(bce=0.0),
    },
    "a weight that is no number": {"loss": LossConfig(flow=float("nan"))},
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("wrong", UNCHECKED)
def test_policy_that_cannot_learn_or_act_is_refused_before_the_first_step(wrong):
    with pytest.raises(InputError):
        VLAPolicy(configuration(**UNCHECKED[wrong]))
