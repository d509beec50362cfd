"""Actions from what the decoder gave: in range, exact where they can be, and by Euler's method."""

import math

import numpy as np
import pytest
import torch
from head_inputs import ACTIONS, GRIPPER, ROBOTS, A, B, Fixed, H, close, head, inputs, normal, scale

from vla import keyed
from vla.data.stats import statistics
from vla.model.heads import HEADS
from vla.model.normalize import Normalizer


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantile"])
def test_sampled_gripper_is_exactly_one_of_its_two_values(mode):
    out, norm = normal(B, H, A), scale(mode)
    regression = head("regression", gripper_dims=(GRIPPER,))
    regression.decoder = Fixed(out)
    given = inputs(normal(B, H, A))
    actions = regression.sample(given["hidden"], given["mask"], given["state"], given["key"], norm)
    low, high = np.float32(0.2), np.float32(0.8)
    expected = np.where(out[..., GRIPPER] > 0, high, low)
    np.testing.assert_array_equal(actions[..., GRIPPER].numpy(), expected)
    close(actions[..., :GRIPPER], norm.inverse(out)[..., :GRIPPER])


def test_regression_without_gripper_samples_what_the_decoder_says_in_the_robots_units():
    regression, given, norm = head("regression"), inputs(normal(B, H, A)), scale("min_max")
    regression.decoder = Fixed(normal(B, H, A))
    actions = regression.sample(given["hidden"], given["mask"], given["state"], given["key"], norm)
    low, high = ACTIONS.min(0), ACTIONS.max(0)
    close(actions, torch.from_numpy((normal(B, H, A).numpy() + 1) / 2 * (high - low) + low))


@pytest.mark.parametrize("kind", HEADS)
def test_sample_is_zero_in_a_dimension_that_its_robot_lacks(kind):
    made, given = head(kind), inputs(normal(B, H, A), "two robots")
    made.decoder = Fixed(normal(B, H, A * 8 if kind == "token" else A))
    own = made.sample(*(given[name] for name in ("hidden", "mask", "state", "key", "scale")))
    whole = made.sample(*(given[name] for name in ("hidden", "mask", "state", "key")), scale())
    smaller = ROBOTS["two robots"] == 1
    assert not own[smaller][..., -1].any()
    assert torch.equal(own[smaller][..., :-1], whole[smaller][..., :-1])
    assert torch.equal(own[~smaller], whole[~smaller])


def token_round_trip(actions, norm, bins):
    """What the token head samples in place of actions [N, A], once its decoder says what its loss asks for."""
    token = head("token", actions.shape[1], bins=bins)
    logits = torch.zeros(len(actions), 1, actions.shape[1] * bins, requires_grad=True)
    token.decoder = Fixed(logits)
    every = torch.ones(len(actions), 1, actions.shape[1], dtype=torch.bool)
    loss = token.loss(None, None, None, norm.normalize(actions[:, None]), every, None, norm)["ce"].sum()
    token.decoder = Fixed(-torch.autograd.grad(loss, logits)[0])  # downhill from 0: only the targets rise
    return token.sample(None, None, None, None, norm)[:, 0]


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantile"])
@pytest.mark.parametrize("bins", [2, 8, 256])
def test_token_sample_inverts_its_bins_within_half_a_bin(mode, bins):
    norm = scale(mode)
    low, span = norm.low[0], (norm.high - norm.low)[0]
    actions = low + span * torch.linspace(0, 1, 1001)[:, None]
    error = (token_round_trip(actions, norm, bins) - actions).abs() / span * bins
    place = (actions - low) / span * bins
    outermost = (place < 1.001) | (place > bins - 1.001)  # these bins stand for the extremes
    assert (error[~outermost] <= 0.501).all()
    assert (error[outermost] <= 1.001).all()


def test_token_sample_of_unseen_actions_stays_within_the_extremes():
    norm = scale()
    far = torch.cat([norm.low - 10, norm.high + 10])[:, 0]
    close(token_round_trip(far, norm, 8), torch.cat([norm.low, norm.high])[:, 0])


@pytest.mark.parametrize(
    "extreme",
    [
        "low",
        "high",
    ],
)
@pytest.mark.parametrize("bins", [2, 256])
def test_token_sample_hits_the_extremes_exactly(extreme, bins):
    values = np.random.default_rng(5).normal(size=(50, 64)).astype(np.float32)
    norm = Normalizer({"robot": 64}, "quantile")
    norm.set_statistics([statistics(values)])
    expected = getattr(norm, extreme)  # [1, 64]
    assert torch.equal(token_round_trip(expected, norm.of(torch.tensor([0])), bins), expected)


def flow_sample(velocity, key, steps):
    """What Euler's method makes of a velocity field, normalized, and the times at which it asked."""
    flow, times, norm = head("flow", flow_steps=steps), [], scale()

    def record(hidden, mask, state, noisy, t):
        times.append(t)
        return velocity(noisy, t[:, None, None])

    flow.embed_time = lambda t: t
    flow.velocity, flow.decoder = record, Fixed(None)
    return norm.normalize(flow.sample(None, None, None, key, norm)), torch.stack(times)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_sampling_goes_from_noise_to_actions_in_even_steps(steps):
    key = keyed.derive(0, torch.arange(B))
    noise = keyed.normal(key, keyed.FLOW_NOISE, (H, A))
    slope = normal(H, A)
    found, times = flow_sample(lambda x, t: slope * x + t, key, steps)
    close(times, (1 - torch.arange(steps) / steps)[:, None])  # the same ones for all samples
    expected = noise.double()
    for step in range(steps):
        expected = expected - (slope * expected + (1 - step / steps)) / steps
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])  # each sample has its own noise


def test_euler_sampling_of_straight_paths_is_exact_in_any_number_of_steps():
    key, goal = keyed.derive(0, torch.arange(B)), normal(B, H, A, seed=6)
    for steps in (1, 3, 10):
        found, _ = flow_sample(lambda x, t: (x - goal) / t, key, steps)  # the field whose paths all end at the goal
        close(found, goal, rtol=1e-4, atol=1e-5)


def test_euler_sampling_converges_to_the_solution():
    key = keyed.derive(0, torch.arange(B))
    noise = keyed.normal(key, keyed.FLOW_NOISE, (H, A))
    errors = [(flow_sample(lambda x, t: 2 * x, key, n)[0] - noise * math.exp(-2)).abs().max() for n in (10, 100, 1000)]
    assert errors[1] < errors[0] / 8
    assert errors[2] < errors[1] / 8
