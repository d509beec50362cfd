"""The losses by hand, in numpy and explicit loops, from what the decoder gave."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vla import keyed
from vla.config import LossConfig, ModelConfig
from vla.data.stats import statistics
from vla.model.heads import HEADS, sample_mean
from vla.model.normalize import Normalizer

B, H, A, P, D, S = 5, 4, 3, 2, 16, 6
GRIPPER = 2
ACTIONS = np.random.default_rng(1).normal([0.0, 5.0, 0.0], [0.02, 2.0, 1.0], (400, A)).astype(np.float32)
ACTIONS[:, GRIPPER] = np.where(ACTIONS[:, GRIPPER] > 0.3, 0.8, 0.2)  # two values, neither 0 nor 1
SHORT = torch.arange(H)[None] < torch.tensor([1, 2, 3, 4, 4])[:, None]  # valid steps of each sample
# The data set of each sample: the second one's robot lacks the last action dimension.
ROBOTS = {"one robot": torch.zeros(B, dtype=torch.int64), "two robots": torch.tensor([0, 1, 1, 0, 1])}


class Fixed(nn.Module):
    """A decoder that always gives the same."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def keys_values(self, hidden):
        return hidden

    def forward(self, *_):
        return self.out


def scale(mode="quantile", dataset=ROBOTS["one robot"][:1]):
    """By default of any number of samples of the first data set."""
    norm = Normalizer({"whole": A, "smaller": A - 1}, mode)
    norm.set_statistics([statistics(ACTIONS), statistics(ACTIONS[:, :-1])])
    return norm.of(dataset)


def head(kind, action_dim=A, **model):
    torch.manual_seed(0)
    sizes = {"chunk_size": H, "width": D, "attention_heads": 2, "head_layers": 1, "mlp_ratio": 2, "bins": 8}
    made = HEADS[kind](ModelConfig(head=kind, **sizes | model), D, P, action_dim)
    nn.init.normal_(made.decoder.out[-1].weight)  # it starts at 0, where the loss depends on nothing else
    return made


def inputs(normalized, robots="one robot"):
    """What every loss takes, for these normalized actions."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[:, -2:] = False
    return {
        "hidden": torch.randn(B, S, D, generator=generator),
        "mask": mask,
        "state": torch.randn(B, P, generator=generator),
        "actions": normalized,
        "valid": valid(robots),
        "key": keyed.derive(0, torch.arange(B)),
        "scale": scale(dataset=ROBOTS[robots]),
    }


def valid(robots="one robot"):
    return SHORT[:, :, None] & scale(dataset=ROBOTS[robots]).real  # [B, H, A]


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunks():
    """Chunks of the data's own actions, [B, H, A], in the robot's units."""
    return torch.from_numpy(ACTIONS[: B * H]).view(B, H, A)


def mean_of_valid(error, robots="one robot"):
    """The mean of the valid entries of each sample, one after the other. error(b, h, a) -> [B]."""
    means = []
    for b in range(B):
        dims = A - ROBOTS[robots][b].item()
        entries = [error(b, h, a) for h in range(H) if SHORT[b, h] for a in range(dims)]
        entries = [entry for entry in entries if entry is not None]
        means.append(sum(entries) / len(entries))
    return torch.tensor(means)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.double(), expected.double(), **{"rtol": 1e-5, "atol": 1e-6} | tolerance)


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

    flow.velocity = decoder
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


def test_flow_time_has_the_beta_distribution():
    flow, count, seen = head("flow"), 40_000, []
    flow.velocity = lambda hidden, mask, state, noisy, t, visible: seen.append(t) or noisy
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

    flow.velocity, flow.decoder = record, Fixed(None)
    return norm.normalize(flow.sample(None, None, None, key, norm)), torch.stack(times)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_sampling_goes_from_noise_to_actions_in_even_steps(steps):
    key = keyed.derive(0, torch.arange(B))
    noise = keyed.normal(key, keyed.FLOW_NOISE, (H, A))
    slope = normal(H, A)
    found, times = flow_sample(lambda x, t: slope * x + t, key, steps)
    close(times, (1 - torch.arange(steps) / steps)[:, None].expand(steps, B))
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
