"""The losses by hand, in numpy and explicit loops, from what the decoder gave."""

import math

import numpy as np
import pytest
import torch
from head_inputs import (
    ACTIONS,
    GRIPPER,
    ROBOTS,
    SHORT,
    A,
    B,
    D,
    Fixed,
    H,
    S,
    chunks,
    close,
    head,
    inputs,
    mean_of_valid,
    normal,
    scale,
)

from vla import keyed
from vla.config import LossConfig
from vla.model.heads import HEADS, sample_mean


@pytest.mark.parametrize("robots", ROBOTS)
def test_absolute_and_squared_error_are_means_of_the_valid_entries(robots):
    out, actions = normal(B, H, A), normal(B, H, A, seed=4)
    regression = head("regression", loss=LossConfig(l1=1.0, mse=2.0))
    regression.decoder = Fixed(out)
    terms = regression.loss(**inputs(actions, robots))
    difference = (out - actions).numpy()
    assert terms.keys() == {"l1", "mse"}
    close(terms["l1"], mean_of_valid(lambda b, h, a: abs(float(difference[b, h, a])), robots))
    close(terms["mse"], mean_of_valid(lambda b, h, a: float(difference[b, h, a]) ** 2, robots))


@pytest.mark.parametrize(("weights", "terms"), [({}, {"l1"}), ({"l1": 0, "mse": 1}, {"mse"})])
def test_term_of_no_weight_is_not_computed(weights, terms):
    regression = head("regression", loss=LossConfig(**weights))
    assert regression.loss(**inputs(normal(B, H, A))).keys() == terms


def test_gripper_is_learned_by_binary_cross_entropy_and_leaves_the_other_terms():
    out, actions = normal(B, H, A) * 3, chunks()
    regression = head("regression", gripper_dims=(GRIPPER,))
    regression.decoder = Fixed(out)
    terms = regression.loss(**inputs(scale().normalize(actions)))

    def binary(b, h, a):
        if a != GRIPPER:
            return None
        probability = 1 / (1 + math.exp(-float(out[b, h, a])))
        return -math.log(probability if actions[b, h, a] > 0.5 else 1 - probability)

    normalized = scale().normalize(actions)
    assert terms.keys() == {"l1", "bce"}
    assert len(actions[..., GRIPPER].unique()) == 2
    close(terms["bce"], mean_of_valid(binary))
    close(
        terms["l1"],
        mean_of_valid(lambda b, h, a: None if a == GRIPPER else abs(float(out[b, h, a] - normalized[b, h, a]))),
    )


@pytest.mark.parametrize("robots", ROBOTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bins_are_learned_by_cross_entropy_with_smoothed_labels(smoothing, robots):
    bins, actions = 8, chunks()
    logits = normal(B, H, A * bins).double()
    token = head("token", bins=bins, label_smoothing=smoothing)
    token.decoder = Fixed(logits.float())
    low, high = ACTIONS.min(0).astype(np.float64), ACTIONS.max(0).astype(np.float64)

    def cross_entropy(b, h, a):
        scores = logits[b, h].view(A, bins)[a].tolist()
        total = math.log(sum(math.exp(score) for score in scores))
        share = (float(actions[b, h, a]) - low[a]) / (high[a] - low[a])
        target = min(int(share * bins), bins - 1)
        goal = [smoothing / bins + (1 - smoothing) * (k == target) for k in range(bins)]
        return -sum(p * (score - total) for p, score in zip(goal, scores, strict=True))

    terms = token.loss(**inputs(scale().normalize(actions), robots))
    assert terms.keys() == {"ce"}
    close(terms["ce"], mean_of_valid(cross_entropy, robots))


@pytest.mark.parametrize("robots", ROBOTS)
def test_slots_of_valid_steps_are_visible_whatever_dimensions_the_robot_has(robots):
    flow, seen = head("flow"), []
    flow.velocity = lambda hidden, mask, state, noisy, t, visible: seen.append(visible) or noisy
    flow.loss(**inputs(normal(B, H, A), robots))
    assert torch.equal(seen[0], SHORT)


def test_flow_target_is_noise_minus_actions_on_the_straight_path_between_them():
    flow, actions, velocity = head("flow"), normal(B, H, A, seed=4), normal(B, H, A)
    given, seen = inputs(actions), {}

    def decoder(hidden, mask, state, noisy, t, visible):
        seen.update(noisy=noisy, t=t)
        return velocity

    flow.velocity, flow.embed_time = decoder, lambda t: t
    terms = flow.loss(**given)
    noise = keyed.normal(given["key"], keyed.FLOW_NOISE, (H, A))
    t = 0.001 + 0.999 * keyed.uniform(given["key"], keyed.FLOW_TIME).double() ** (2 / 3)
    assert terms.keys() == {"flow"}
    close(
        terms["flow"], mean_of_valid(lambda b, h, a: float(velocity[b, h, a] - noise[b, h, a] + actions[b, h, a]) ** 2)
    )
    close(seen["t"], t)
    for b in range(B):
        close(seen["noisy"][b], t[b] * noise[b] + (1 - t[b]) * actions[b])


@pytest.mark.parametrize("robots", ROBOTS)
def test_flow_loss_compares_the_decoders_own_output(robots):
    flow, given, out = head("flow"), inputs(normal(B, H, A, seed=4), robots), normal(B, H, A)
    flow.decoder = Fixed(out)
    target = keyed.normal(given["key"], keyed.FLOW_NOISE, (H, A)) - given["actions"]
    close(flow.loss(**given)["flow"], mean_of_valid(lambda b, h, a: float(out[b, h, a] - target[b, h, a]) ** 2, robots))


def test_flow_time_is_seen_as_sines_and_cosines_of_periods_from_0_004_to_4():
    flow, t = head("flow"), torch.tensor([0.001, 0.3, 1.0])
    seen = []
    flow.time.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    embedded = flow.embed_time(t)
    angles = [[2 * math.pi * float(x) / (0.004 * 1000 ** (i / 31)) for i in range(32)] for x in t]
    expected = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    close(seen[0], torch.tensor(expected), atol=2e-4)  # the fastest goes round 250 times, in float32
    assert not torch.allclose(embedded[0], embedded[1])
    flow.decoder.forward = lambda hidden, mask, state, slots, visible: slots
    noisy = normal(3, H, A)
    assert torch.equal(flow.velocity(None, None, None, noisy, embedded), flow.action(noisy) + embedded[:, None])


def test_flow_time_has_the_beta_distribution():
    flow, count, seen = head("flow"), 40_000, []
    flow.velocity = lambda hidden, mask, state, noisy, t, visible: seen.append(t) or noisy
    flow.embed_time = lambda t: t
    key = keyed.derive(0, torch.arange(count))
    flow.loss(None, None, None, torch.zeros(count, H, A), torch.ones(count, H, A, dtype=torch.bool), key, scale())
    t = seen[0].double()
    assert t.shape == (count,)
    assert t.min() >= 0.001
    assert t.max() <= 1
    x = (t - 0.001) / 0.999  # of Beta(1.5, 1): mean 3/5, variance 12/175, and P(X <= x) = x^1.5
    assert abs(x.mean() - 0.6) < 4 * (12 / 175 / count) ** 0.5
    assert abs(x.var() - 12 / 175) < 0.001
    share = (torch.arange(count) + 0.5) / count
    assert (x.sort().values ** 1.5 - share).abs().max() < 1.63 / count**0.5  # Kolmogorov and Smirnov, 1 %


@pytest.mark.parametrize("kind", HEADS)
def test_action_of_a_padded_step_changes_nothing_in_what_is_compared(kind):
    model = {"gripper_dims": (GRIPPER,), "loss": LossConfig(mse=1.0)} if kind == "regression" else {}
    made, actions = head(kind, **model), scale().normalize(chunks())
    out = normal(B, H, A * 8 if kind == "token" else A)
    made.decoder = Fixed(out)
    expected = made.loss(**inputs(actions))
    elsewhere = torch.where(SHORT[:, :, None], actions, actions + 7)
    made.decoder = Fixed(torch.where(SHORT[:, :, None], out, out - 9))  # nor does what the decoder says there
    found = made.loss(**inputs(elsewhere))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    opened = made.loss(**inputs(elsewhere) | {"valid": torch.ones(B, H, A, dtype=torch.bool)})
    assert all(not torch.allclose(opened[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "kind",
    [
        "regression",
        "token",
        "flow",
    ],
)
def test_action_of_a_padded_step_changes_nothing_through_the_decoder(kind):
    made, actions = head(kind), scale().normalize(chunks())
    expected = made.loss(**inputs(actions))
    found = made.loss(**inputs(torch.where(SHORT[:, :, None], actions, actions + 7)))
    for name, term in expected.items():
        close(found[name], term)


def test_sample_without_a_valid_step_counts_nothing():
    assert sample_mean(torch.ones(2, H, A), torch.zeros(2, H, A, dtype=torch.bool)).tolist() == [0, 0]


@pytest.mark.parametrize("kind", HEADS)
def test_dimension_that_a_robot_lacks_gets_no_loss_and_no_gradient(kind):
    made, smaller = head(kind, loss=LossConfig(mse=float(kind == "regression"))), ROBOTS["two robots"] == 1
    out = normal(B, H, A * 8 if kind == "token" else A).requires_grad_()
    made.decoder = Fixed(out)
    actions = scale(dataset=ROBOTS["two robots"]).normalize(chunks())
    terms = made.loss(**inputs(actions, "two robots"))
    sum(term.sum() for term in terms.values()).backward()
    gradient = out.grad.unflatten(-1, (A, -1))  # [B, H, A, 1 or bins]
    assert not gradient[smaller][..., -1, :].any()
    assert gradient[smaller][:, 0, :-1].any(-1).all()
    assert gradient[~smaller][:, 0].any(-1).all()
    with torch.no_grad():
        out.unflatten(-1, (A, -1))[smaller, :, -1] += 9
    again = made.loss(**inputs(actions, "two robots"))
    assert all(torch.equal(again[name], terms[name]) for name in terms)


def test_flow_carries_nothing_in_a_dimension_that_a_robot_lacks():
    flow, seen, smaller = head("flow", flow_steps=3), [], ROBOTS["two robots"] == 1
    flow.action.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    given = inputs(scale(dataset=ROBOTS["two robots"]).normalize(chunks()), "two robots")
    flow.loss(**given)
    flow.sample(*(given[name] for name in ("hidden", "mask", "state", "key", "scale")))
    assert len(seen) == 1 + 3
    for noisy in seen:
        assert not noisy[smaller][..., -1].any()
        assert noisy[smaller][..., :-1].all()
        assert noisy[~smaller].all()


@pytest.mark.parametrize("kind", HEADS)
def test_loss_of_a_sample_does_not_depend_on_its_batch(kind):
    model = {"gripper_dims": (0,), "loss": LossConfig(mse=1.0)} if kind == "regression" else {}
    made, given = head(kind, **model), inputs(scale().normalize(chunks()), "two robots")
    together = made.loss(**given)
    for b in range(B):
        own = {name: value[b : b + 1] for name, value in given.items() if name != "scale"}
        alone = made.loss(**own, scale=scale(dataset=ROBOTS["two robots"][b : b + 1]))
        for name, term in together.items():
            assert term.shape == (B,)
            close(alone[name], term[b : b + 1])


def test_decoder_takes_hidden_states_or_their_keys_and_values():
    decoder, given = head("flow").decoder, inputs(normal(B, H, A))
    hidden, mask, state = (given[name] for name in ("hidden", "mask", "state"))
    known = decoder.keys_values(hidden)
    for slots in (normal(B, H, D), normal(B, H, D, seed=5)):
        assert torch.equal(decoder(known, mask, state, slots), decoder(hidden, mask, state, slots))


@pytest.mark.parametrize("kind", HEADS)
def test_masked_prefix_tokens_are_not_seen(kind):
    made, given = head(kind), inputs(scale().normalize(chunks()))
    expected = made.loss(**given)
    hidden = torch.where(given["mask"][:, :, None], given["hidden"], 100.0)
    assert all(torch.equal(term, expected[name]) for name, term in made.loss(**given | {"hidden": hidden}).items())
    hidden = given["hidden"] + (torch.arange(S) == 0)[:, None] * normal(S, D)
    found = made.loss(**given | {"hidden": hidden})
    assert all((term != expected[name]).all() for name, term in found.items())
