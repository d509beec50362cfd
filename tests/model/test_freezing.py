import pytest
import torch
from backbones import KINDS, batch_of, hidden, learned, policy_on
from robots import assert_same
from tiny import VISIONS
from torch import nn

from vla import InputError
from vla.config import LoraConfig, OptimConfig
from vla.optim import parameter_groups

BOTH = ("vision_encoder", "language_model")
ADAPTERS = LoraConfig(rank=2, modules=BOTH)
FREEZING = {
    "nothing": {},
    "vision": {"freeze": ("vision_encoder",)},
    "both": {"freeze": BOTH},
    "words": {"freeze": ("language_model.model.embed_tokens",)},
    "under adapters": {"lora": ADAPTERS},
    "words, pictures under adapters": {"freeze": BOTH[1:], "lora": LoraConfig(rank=2, modules=BOTH[:1])},
}


def trained(policy, steps=2, lr=1e-2):
    """Take some optimizer steps on a batch."""
    optimizer = torch.optim.AdamW(parameter_groups(policy, OptimConfig(lr=lr, weight_decay=0.1)))
    for _ in range(steps):
        optimizer.zero_grad()
        policy(batch_of(policy))["loss"].backward()
        optimizer.step()
    return policy


def with_random_adapters(policy):
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return policy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freezing", FREEZING)
def test_what_is_trained_gets_gradient_and_moves_and_all_else_stays_the_same_to_the_bit(kind, freezing, originals):
    policy = with_random_adapters(policy_on(originals(kind), **FREEZING[freezing]))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy(batch_of(policy))["loss"].backward()
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    for name, p in policy.named_parameters():
        assert (p.grad is not None) == (name in learning), name
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.any()), name
    policy.zero_grad()
    moved = {name for name, value in trained(policy).state_dict().items() if not torch.equal(value, before[name])}
    assert moved == learning
    parts = {name.partition(".")[0] for name in learning}
    assert parts == {name for name, part in policy.named_children() if any(True for _ in part.parameters())} - set(
        FREEZING[freezing].get("freeze", ())
    )
    if "adapters" in freezing:
        assert all("lora_" in name for name in learning if name.startswith(BOTH))
    elif freezing == "nothing":
        assert {name for name, _ in policy.named_parameters()} - learning == (
            {"vision_encoder.model.embeddings.mask_token"} if "dino" in kind else set()
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", [("vision_encoder",), BOTH], ids="+".join)
def test_frozen_parts_have_no_autograd_graph_and_loss_and_gradients_are_those_of_the_whole(kind, freeze, originals):
    whole, part = policy_on(originals(kind)), policy_on(originals(kind), freeze=freeze)
    graph = {}
    for name in BOTH:
        getattr(part, name).register_forward_hook(
            lambda *call, name=name: graph.update({name: (call[-1][0] if name in BOTH[1] else call[-1]).requires_grad})
        )
    part.train()(batch_of(part))
    composed = kind in VISIONS
    assert graph == {"vision_encoder": False, "language_model": composed or freeze != BOTH}
    found, expected = learned(part, batch_of(part)), learned(whole.train(), batch_of(whole))
    assert_same(found, {name: value for name, value in expected.items() if name in found})
    assert any(name.startswith("projector.") for name in found) == composed


@pytest.mark.parametrize("kind", KINDS)
def test_parts_without_training_drop_nothing(kind, originals):
    policy = policy_on(originals(kind), freeze=BOTH).train()
    assert policy.training
    assert policy.action_head.training
    assert not policy.vision_encoder.training
    assert policy.language_model.training == (kind in VISIONS)  # through which the projector learns


# ---- Weights in bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", [("vision_encoder",), ("language_model",), BOTH], ids="+".join)
def test_frozen_weights_can_be_kept_in_bfloat16(kind, freeze, originals):
    whole, half = (policy_on(originals(kind), freeze=freeze, frozen_dtype=dtype) for dtype in ("float32", "bfloat16"))
    for name, p in half.named_parameters():
        kept = name.startswith(freeze)
        assert p.dtype == (torch.bfloat16 if kept else torch.float32), name
    batch = batch_of(whole)
    (found, mask), (expected, _) = hidden(half, batch), hidden(whole, batch)
    error = (found.float() - expected)[mask].norm() / expected[mask].norm()
    assert 0 < error < 0.03  # measured: 0.006 to 0.021
    assert abs(half(batch)["loss"] - whole(batch)["loss"]) < 0.005  # of 0.5 to 1; measured: up to 0.0022
    frozen = {name: p.clone() for name, p in half.named_parameters() if p.dtype == torch.bfloat16}
    before = half(batch)["loss"]
    trained(half, lr=1e-3)
    assert half(batch)["loss"] < before
    assert_same({name: p for name, p in half.named_parameters() if name in frozen}, frozen)


# ---- Parts that are trained from a step on


def test_parts_are_trained_from_their_step_on(originals):
    words = "language_model.model.embed_tokens"
    policy = policy_on(
        originals("dinov2"),
        freeze=("vision_encoder", words, f"{words[:-12]}layers.1"),
        unfreeze=(("vision_encoder", 3), (words, 5)),
    ).train()
    always = {"vision_encoder.model.embeddings.mask_token"}
    frozen = {name for name, _ in policy.named_parameters() if name.startswith("language_model.model.layers.1.")}
    vision = {name for name, _ in policy.named_parameters() if name.startswith("vision_encoder.")} - always
    for step, changes, expected in (
        (2, False, {*frozen, *vision, f"{words}.weight"}),
        (3, True, {*frozen, f"{words}.weight"}),
        (4, False, {*frozen, f"{words}.weight"}),
        (5, True, frozen),
        (9, False, frozen),
        (0, True, {*frozen, *vision, f"{words}.weight"}),
    ):
        assert policy.freeze_at(step) == changes, step
        assert {name for name, p in policy.named_parameters() if not p.requires_grad} == expected | always, step
        assert policy.vision_encoder.training == (step >= 3)
        assert expected.isdisjoint(learned(policy, batch_of(policy)))
        stored = policy.own_state().keys()
        assert policy.state_dict().keys() - stored == frozen  # for the whole run: what the original has
        assert policy.own_config().base


def test_a_part_of_a_part_that_is_trained_can_stay_frozen(originals):
    words = "language_model.model.embed_tokens"
    policy = policy_on(
        originals("smolvlm"), freeze=("language_model", words), unfreeze=(("language_model", 3),), max_tokens=24
    )
    policy.freeze_at(3)
    still = [name for name, p in policy.named_parameters() if not p.requires_grad]
    assert still == [f"{words}.weight"]


def test_groups_of_parameters_have_the_rate_of_the_longest_name_that_fits(originals):
    policy = policy_on(originals("siglip"), freeze=("language_model.model.layers.2",))
    rates = {"language_model": 1e-5, "language_model.model.layers.1": 2e-5, "projector": 3e-4}
    groups = parameter_groups(policy, OptimConfig(lr=1e-3, module_lrs=tuple(rates.items())))
    named = {p: name for name, p in policy.named_parameters()}
    found = {named[p]: group["lr"] for group in groups for p in group["params"]}
    assert found.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, rate in found.items():
        fitting = [own for own in rates if name.startswith(f"{own}.")]
        assert rate == (rates[max(fitting, key=len)] if fitting else 1e-3), name
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(group["peak_lr"] == group["lr"] for group in groups)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("language_model.nonsense", "--optim.module_lrs names language_model.nonsense, but language_model has no part"),
        ("projector", "--optim.module_lrs names projector, but the policy has no part projector"),
        ("vision_encoder", "--optim.module_lrs gives a rate to vision_encoder, where nothing is trained"),
    ],
)
def test_rates_of_what_is_not_there_or_not_trained_are_refused(name, told, originals):
    policy = policy_on(originals("smolvlm"), freeze=("vision_encoder",))
    with pytest.raises(InputError, match=told):
        parameter_groups(policy, OptimConfig(module_lrs=((name, 1e-4),)))
