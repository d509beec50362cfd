import itertools

import numpy as np
import pytest
import torch
from robots import (
    ACTIONS,
    HEADS,
    STATES,
    TEXTS,
    A,
    B,
    H,
    P,
    actions,
    configuration,
    observation,
    random_batch,
    rows,
    tiny,
)
from torch import nn

from vla import InputError, keyed
from vla.config import MODULES, LossConfig, OptimConfig
from vla.data.stats import statistics
from vla.images import resize_with_padding
from vla.model import VLAPolicy
from vla.model.backbone import Block
from vla.optim import parameter_groups

SUBSETS = [names for count in (1, 2) for names in itertools.combinations(MODULES, count)]  # never all


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


@pytest.mark.parametrize("head", HEADS)
def test_attention_by_one_matrix_predicts_the_same(head):
    policy = tiny(**HEADS[head])
    batch = random_batch(policy)
    chunk = policy.predict_chunk(batch)
    blocks = [part for part in policy.modules() if isinstance(part, Block)]
    for attention in (block.attention for block in blocks):
        attention.join(torch.float32)
        nn.init.zeros_(attention.query.weight), nn.init.zeros_(attention.key_value.weight)  # no longer looked at
    assert len(blocks) > 1
    assert ((policy.predict_chunk(batch) - chunk).abs() / span()).max() < 1e-5


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
