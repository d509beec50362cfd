import itertools
import math
import sys

import pytest
import torch

from vla import InputError
from vla.config import MODULES, LossConfig, ModelConfig, OptimConfig
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.optim import EMA, Muon, make_optimizer, parameter_groups, schedule
from vla.shards import Rows

# Parameters of two and more dimensions that are no weights of linear maps or convolutions.
LEARNED_PLACES = {
    "vision_encoder.camera",
    "language_model.embedding.weight",
    "language_model.position",
    "action_head.decoder.slot",
}


def tiny(head="flow", **model):
    torch.manual_seed(0)
    sizes = {"chunk_size": 4, "n_action_steps": 2, "width": 16, "attention_heads": 2, "vision_stride": 4}
    sizes |= {"language_layers": 1, "head_layers": 1, "mlp_ratio": 2, "max_tokens": 16, "bins": 8}
    config = ModelConfig(head=head, **sizes | model)
    spec = DatasetSpec("arm", ("table",), ("x", "y"), ("dx", "dy"), 10)
    return VLAPolicy(PolicyConfig(config, spec.cameras, (8, 8), (spec,)))


def names_of(policy, groups):
    """Of the parameters of each group."""
    names = {id(p): name for name, p in policy.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("head", ["flow", "regression", "token"])
def test_every_trained_parameter_is_in_exactly_one_group(head):
    policy = tiny(head, loss=LossConfig(lm=0.1))
    names = names_of(policy, parameter_groups(policy, OptimConfig()))
    assert sorted(name for group in names.values() for name in group) == sorted(n for n, _ in policy.named_parameters())
    assert list(names) == [name + suffix for name in MODULES for suffix in ("", "/no_decay")]
    for group, members in names.items():
        assert all(name.startswith(group.removesuffix("/no_decay") + ".") for name in members)


@pytest.mark.parametrize("head", ["flow", "regression", "token"])
def test_biases_norms_embeddings_and_learned_places_do_not_decay_and_all_else_does(head):
    policy = tiny(head)
    decay = {}
    for group in parameter_groups(policy, OptimConfig(weight_decay=0.25)):
        decay |= {id(p): group["weight_decay"] for p in group["params"]}
    assert {name for name, _ in policy.named_parameters()} >= LEARNED_PLACES
    for name, p in policy.named_parameters():
        assert decay[id(p)] == (0.0 if p.ndim < 2 or name in LEARNED_PLACES else 0.25), name
    parameters = dict(policy.named_parameters())
    for name in ("vision_encoder.convolutions.1.weight", "language_model.letters.weight"):
        assert decay[id(parameters[name])] == 0.25
    for name in ("action_head.decoder.blocks.0.cross_attention.query_norm.weight", "language_model.norm.bias"):
        assert decay[id(parameters[name])] == 0.0


def test_decay_shrinks_weights_without_gradient_and_nothing_else():
    policy = tiny()
    optimizer = torch.optim.AdamW(parameter_groups(policy, OptimConfig(lr=0.1, weight_decay=0.5)))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in policy.named_parameters():
        shrinks = p.ndim >= 2 and name not in LEARNED_PLACES
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if shrinks else 1.0), rtol=1e-6, atol=0)


def test_modules_have_their_own_rates():
    rates = {"vision_encoder": 1e-4, "action_head": 5e-4}
    for group in parameter_groups(tiny(), OptimConfig(lr=3e-4, module_lrs=rates)):
        expected = rates.get(group["name"].removesuffix("/no_decay"), 3e-4)
        assert (group["lr"], group["peak_lr"]) == (expected, expected)


def test_rate_of_a_layer_is_not_that_of_one_whose_number_begins_alike():
    policy = tiny(language_layers=11)
    groups = parameter_groups(policy, OptimConfig(lr=1e-3, module_lrs=(("language_model.blocks.1", 1e-4),)))
    found = {p: group["lr"] for group in groups for p in group["params"]}
    for layer, block in enumerate(policy.language_model.blocks):
        assert {found[p] for p in block.parameters()} == {1e-4 if layer == 1 else 1e-3}


@pytest.mark.parametrize("kind", [{}, {"muon_lr": 0.02}, {"eight_bit": True}], ids=str)
def test_every_kind_of_optimizer_has_the_betas_that_were_asked_for(kind):
    config = OptimConfig(betas=(0.5, 0.7), **kind)
    optimizer = make_optimizer(parameter_groups(tiny(), config), config)
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.5, 0.7)}


@pytest.mark.parametrize("frozen", [("vision_encoder",), ("language_model",), ("vision_encoder", "action_head")])
def test_frozen_modules_are_in_no_group(frozen):
    policy = tiny(freeze=frozen)
    names = names_of(policy, parameter_groups(policy, OptimConfig()))
    assert {group.removesuffix("/no_decay") for group in names} == set(MODULES) - set(frozen)
    expected = [name for name, _ in policy.named_parameters() if not name.startswith(frozen)]
    assert sorted(name for group in names.values() for name in group) == sorted(expected)


def test_moments_in_eight_bits_without_the_library_for_them_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = OptimConfig(eight_bit=True)
    with pytest.raises(InputError, match=r"--optim\.eight_bit needs bitsandbytes"):
        make_optimizer(parameter_groups(tiny(), config), config)


def moved_by(make, rates, steps=3):
    """Weights [6, 4], [4, 6] and a convolution [8, 3, 3, 3], after steps with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (4, 6), (4, 6), (8, 3, 3, 3)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = make(weights, **rates)
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return weights, optimizer


def ours(weights, **rates):
    return Muon([{"params": weights, "muon": True, **rates}])


def torchs(weights, **rates):
    flat = [p if p.ndim == 2 else p.data.view(len(p), -1).requires_grad_() for p in weights]
    optimizer = torch.optim.Muon(flat, momentum=0.95, nesterov=True, **rates)
    step = optimizer.step

    def with_gradients():
        for view, p in zip(flat, weights, strict=True):
            view.grad = p.grad.view_as(view)
        step()

    optimizer.step = with_gradients
    return optimizer


@pytest.mark.parametrize("together", [2**27, 30])
def test_muon_is_that_of_torch_with_convolutions_as_matrices(monkeypatch, together):
    """However many weights it moves at once."""
    monkeypatch.setattr(Muon, "TOGETHER", together)
    rates = {"lr": 0.1, "weight_decay": 0.2}
    for mine, theirs in zip(moved_by(ours, rates)[0], moved_by(torchs, rates)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)  # a step has entries of about 0.04
        assert (mine - theirs).norm() < 3e-3 * theirs.norm()  # both round to bfloat16


def test_muon_moves_hidden_weights_and_adamw_all_else():
    """A step of Muon is about as long in every direction."""
    policy = tiny("regression")
    optimizer = make_optimizer(parameter_groups(policy, config := OptimConfig(lr=1e-3, muon_lr=0.01)), config)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for p in policy.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    by_muon = set()
    for name, p in policy.named_parameters():
        step = (p.detach() - before[name]) if p.ndim < 2 else (p.detach() - before[name]).flatten(1)
        if "momentum" in optimizer.state[p]:
            by_muon.add(name)
            length = 0.01 * max(1, step.shape[0] / step.shape[1]) ** 0.5
            lengths = torch.linalg.svdvals(step + 0.01 * config.weight_decay * before[name].flatten(1))
            assert lengths.max() < 1.3 * length, name
            assert lengths.median() > 0.6 * length, name
        else:
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-3), rtol=0.05, atol=1e-4)
    names = ("action_head.decoder.blocks.0.mlp.1.weight", "language_model.blocks.0.attention.query.weight")
    assert by_muon > {*names, "vision_encoder.convolutions.1.weight"}
    others = {"action_head.decoder.out.1.weight", "action_head.decoder.state.weight", "language_model.letters.weight"}
    assert not by_muon & (others | LEARNED_PLACES | {name for name, p in policy.named_parameters() if p.ndim < 2})


def test_rates_of_modules_hold_for_muon_in_proportion():
    config = OptimConfig(lr=1e-3, muon_lr=0.02, module_lrs=(("vision_encoder", 5e-4),))
    rates = {group["name"]: group["peak_lr"] for group in parameter_groups(tiny(), config)}
    assert (rates["vision_encoder/muon"], rates["action_head/muon"]) == (0.01, 0.02)
    assert (rates["vision_encoder/no_decay"], rates["action_head"]) == (5e-4, 1e-3)


def test_muon_leaves_everything_alone_where_the_gradient_is_not_finite():
    weights, optimizer = moved_by(ours, {"lr": 0.1, "weight_decay": 0.2})
    moments = [optimizer.state[p]["momentum"] for p in weights]
    before = [value.detach().clone() for value in (*weights, *moments)]
    for p in weights:
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip((*weights, *moments), before, strict=True))
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(now, then) for now, then in zip((*weights, *moments), before, strict=True))


QUARTER = (1 + math.sqrt(0.5)) / 2  # of a half cosine that is left at a quarter of the way
# Share of the peak at some steps of a run of 110, of which 10 warm up; 0.1 is left at the end.
EXPECTED = {
    "constant": {10: 1, 60: 1, 109: 1},
    "linear": {10: 1, 35: 0.775, 60: 0.55, 109: 0.109, 110: 0.1},
    "cosine": {10: 1, 35: 0.1 + 0.9 * QUARTER, 60: 0.55, 85: 0.1 + 0.9 * (1 - QUARTER), 110: 0.1},
    "step": {10: 1, 65: 1, 66: 0.1, 93: 0.1, 94: 0.01, 109: 0.01},  # at 0.6 · 110 and 0.85 · 110
    "wsd": {10: 1, 60: 1, 88: 1, 93: 1 - 0.9 * 5 / 22, 99: 0.55, 109: 0.1 + 0.9 / 22, 110: 0.1},  # falls from 88 on
}


@pytest.mark.parametrize("shape", EXPECTED)
def test_schedule_equals_values_by_hand(shape):
    config = OptimConfig(schedule=shape, warmup_steps=10, final_ratio=0.1, milestones=(0.6, 0.85), decay_share=0.2)
    for step, share in {0: 0.1, 4: 0.5, 8: 0.9, 9: 1.0, **EXPECTED[shape]}.items():
        assert schedule(config, step, 110) == pytest.approx(share, rel=1e-12), step


@pytest.mark.parametrize(("warmup", "steps"), [(45, 50), (500, 550)])
def test_decay_of_wsd_begins_at_the_peak_where_the_warm_up_ends_late(warmup, steps):
    config = OptimConfig(schedule="wsd", warmup_steps=warmup, decay_share=0.2, final_ratio=0.0)
    for step in range(warmup, steps):
        assert schedule(config, step, steps) == pytest.approx((steps - step) / (steps - warmup), rel=1e-12)


@pytest.mark.parametrize("shape", EXPECTED)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 50), (1, 1), (7, 50), (49, 50), (50, 50)])
def test_schedule_rises_through_the_warm_up_and_never_again(shape, warmup, steps):
    config = OptimConfig(schedule=shape, warmup_steps=warmup)
    shares = [schedule(config, step, steps) for step in range(steps)]
    rising, falling = shares[:warmup], shares[max(0, warmup - 1) :]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(0 < share <= 1 for share in shares)
    assert falling[0] == 1


def random_steps(policy, count):
    """Move the trained weights at random, in place, and yield the number of each step."""
    generator = torch.Generator().manual_seed(7)
    for step in range(count):
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p += torch.randn(p.shape, generator=generator) * 0.1
        yield step


@pytest.mark.parametrize("decay", [0.3, 0.999])  # below and above the rising decay of the first steps
def test_average_equals_one_kept_by_hand(decay):
    policy = tiny()
    ema = EMA(policy, decay)
    expected = {name: p.detach().double().clone() for name, p in policy.named_parameters()}
    for step in random_steps(policy, 6):
        ema.update(step)
        keep = min(decay, (1 + step) / (10 + step))
        for name, p in policy.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * p.detach().double()
    assert ema.average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name].double(), value, rtol=1e-5, atol=1e-6)
        assert ema.average[name].dtype == torch.float32


def test_average_leaves_out_frozen_weights():
    policy = tiny(freeze=("language_model", "vision_encoder"))
    assert EMA(policy, 0.9).average.keys() == {n for n, _ in policy.named_parameters() if n.startswith("action_head")}


@pytest.mark.parametrize("fails", [False, True])
def test_applied_gives_the_average_and_then_the_own_weights_back_bit_for_bit(fails):
    policy = tiny()
    ema = EMA(policy, 0.9)
    for step in random_steps(policy, 3):
        ema.update(step)
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    average = {name: value.clone() for name, value in ema.average.items()}

    def look():
        with ema.applied():
            assert all(torch.equal(p, average[name]) for name, p in policy.named_parameters())
            assert not any(torch.equal(p, own[name]) for name, p in policy.named_parameters())
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            look()
    else:
        look()
    assert all(torch.equal(p, own[name]) for name, p in policy.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in ema.average.items())
    assert all(p.requires_grad for p in policy.parameters())


def test_saved_average_is_taken_whole_and_goes_on_alike():
    policy = tiny()
    ema, other = EMA(policy, 0.9), EMA(policy, 0.9)
    for step in random_steps(policy, 3):
        ema.update(step)
    other.load(Rows({name: [value.clone()] for name, value in ema.average.items()}))
    for step in random_steps(policy, 2):
        ema.update(step + 3)
        other.update(step + 3)
    assert all(torch.equal(value, other.average[name]) for name, value in ema.average.items())
    lacking = {name: [value] for name, value in ema.average.items() if name != "action_head.decoder.slot"}
    with pytest.raises(KeyError, match=r"action_head\.decoder\.slot"):
        other.load(Rows(lacking))
