import numpy as np
import pytest
import torch
from robots import ACTIONS, random_batch, tiny

from vla import InputError
from vla.data.stats import statistics
from vla.model.normalize import Normalizer

MODES = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99")}
NEEDED = {mode: {*names, "min", "max"} for mode, names in MODES.items()}
NEEDED["quantile"] |= {"std"}
VALUES = np.random.default_rng(0).gamma(2.0, [0.01, 1.0, 300.0], (500, 3)) - [0.0, 5.0, 100.0]  # skewed, far apart
OTHERS = np.random.default_rng(1).gamma(2.0, [70.0, 0.1], (500, 2))  # of a robot with a dimension less


def normalizer(mode, *robots):
    """Of the data set of each robot, named a, b, …"""
    robots = robots or (VALUES,)
    norm = Normalizer({name: values.shape[1] for name, values in zip("abc", robots, strict=False)}, mode)
    norm.set_statistics([statistics(values) for values in robots])
    return norm


def scale(mode, values=VALUES):
    """Of any number of samples of one data set."""
    return normalizer(mode, values).of(torch.tensor([0]))


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_inverse_undoes_the_map_for_any_number_of_steps(mode):
    own, x = scale(mode), tensor(VALUES).view(5, 100, 3)
    scaled = own.normalize(x)
    assert scaled.shape == x.shape
    span = tensor(np.ptp(VALUES, axis=0))
    assert ((own.inverse(scaled) - x).abs() / span).max() < 1e-6
    assert torch.equal(own.normalize(x[2:3, 3:4])[0, 0], scaled[2, 3])


def test_mean_and_deviation_become_zero_and_the_unit():
    scaled = scale("mean_std").normalize(tensor(VALUES)[:, None])[:, 0]
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mode", "quantiles"), [("min_max", (0, 1)), ("quantile", (0.01, 0.99))])
def test_bounds_become_minus_one_and_one(mode, quantiles):
    low, high = np.quantile(VALUES, quantiles, axis=0)
    bounds = scale(mode).normalize(tensor(np.stack([low, high, (low + high) / 2]))[:, None])[:, 0]
    expected = torch.tensor([-1.0, 1.0, 0.0])[:, None].expand(3, 3)
    torch.testing.assert_close(bounds, expected, rtol=0, atol=1e-5)
    inside = (scale(mode).normalize(tensor(VALUES)[:, None]).abs() <= 1 + 1e-6).float().mean()
    assert inside == 1 if mode == "min_max" else 0.97 < inside < 1  # outliers are not cut off


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [0.0, 1.0, -1234.5])
def test_dimension_that_does_not_vary_is_only_shifted(mode, constant):
    values = np.stack([VALUES[:, 1], np.full(500, constant)], axis=1)
    own, every = scale(mode, values), tensor(VALUES)[None]
    assert (own.normalize(tensor(values)[None])[..., 1] == 0).all()
    moved = own.normalize(tensor([[[0.0, constant + 0.5]]]))
    assert moved[0, 0, 1] == 0.5  # a robot that moves it after all is told so, not a million
    assert (own.inverse(tensor([[[0.0, 0.0], [0.0, -0.7]]]))[..., 1] == constant).all()  # whatever a network says
    torch.testing.assert_close(own.normalize(tensor(values)[None])[..., 0], scale(mode).normalize(every)[..., 1])


@pytest.mark.parametrize("jitter", [0.0, 1e-3])
def test_dimension_that_moves_in_less_frames_than_quantiles_leave_out_is_scaled_by_its_extremes(jitter):
    values, random = np.zeros((20_000, 2)), np.random.default_rng(0)
    values[:, 0] = random.normal(size=20_000)
    values[5, 0] = 300  # a single frame changes nothing of the others
    values[:, 1] = random.normal(size=20_000) * jitter
    values[:150, 1] = random.uniform(50, 800, 150)  # a force, in contact
    ends = np.stack([np.quantile(values[:, 0], (0.01, 0.99)), [values[:, 1].min(), values[:, 1].max()]], axis=1)
    scaled = scale("quantile", values).normalize(tensor(ends)[None])
    torch.testing.assert_close(scaled[0], tensor([[-1, -1], [1, 1]]))


@pytest.mark.parametrize("mode", MODES)
def test_smallest_and_largest_value_are_kept_beside_the_scale(mode):
    norm = normalizer(mode)
    assert torch.equal(norm.low, tensor(VALUES.min(0))[None])
    assert torch.equal(norm.high, tensor(VALUES.max(0))[None])


@pytest.mark.parametrize(("mode", "ends"), [("quantile", (0.01, 0.99)), ("min_max", (0, 1)), ("mean_std", (0, 1))])
def test_bins_of_a_token_head_span_what_becomes_minus_one_to_one_or_all_values_if_nothing_does(mode, ends):
    policy = tiny(head="token", bins=2, normalization=mode)
    chunk, expected = policy.predict_chunk(random_batch(policy)), tensor(np.quantile(ACTIONS, ends, axis=0))
    for dim in range(3):
        assert set(chunk[..., dim].unique().tolist()) == set(expected[:, dim].tolist())


@pytest.mark.parametrize("mode", MODES)
def test_each_sample_is_scaled_as_its_own_data_set_alone_would_be(mode):
    pair, x = normalizer(mode, VALUES, OTHERS), tensor(np.random.default_rng(2).normal(size=(5, 4, 3)))
    which = torch.tensor([0, 1, 1, 0, 1])
    scaled, restored = pair.of(which).normalize(x), pair.of(which).inverse(x)
    for row, place in enumerate(which.tolist()):
        values = (VALUES, OTHERS)[place]
        dims, alone = values.shape[1], scale(mode, values)
        assert torch.equal(scaled[row, :, :dims], alone.normalize(x[row : row + 1, :, :dims])[0])
        assert torch.equal(restored[row, :, :dims], alone.inverse(x[row : row + 1, :, :dims])[0])
        for name in ("low", "high"):
            assert torch.equal(getattr(pair.of(which), name)[row, :, :dims], getattr(alone, name)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [3.0, -1e30, torch.inf, torch.nan])
def test_dimension_that_a_data_set_lacks_is_zero_whatever_stands_there(mode, value):
    pair = normalizer(mode, VALUES, OTHERS)
    own = pair.of(torch.tensor([1, 0]))
    assert own.present.tolist() == [[[True, True, False]], [[True, True, True]]]
    assert [getattr(pair, name)[1, 2].item() for name in ("offset", "scale", "low", "high")] == [0, 1, 0, 0]
    x = torch.full((2, 4, 3), value)
    assert (own.normalize(x)[0, :, 2] == 0).all()
    assert (own.inverse(x)[0, :, 2] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_without_statistics_it_refuses_to_act(mode):
    norm = Normalizer({"a": 3, "b": 2}, mode)
    assert all(buffer.isnan().all() for buffer in norm.state_dict().values())
    with pytest.raises(InputError, match="no normalization statistics"):
        norm.require()
    norm.set_statistics([statistics(VALUES), statistics(OTHERS)])
    norm.require()
    norm.high[1, 1] = torch.nan  # a single value that is lost is enough
    with pytest.raises(InputError, match="no normalization statistics"):
        norm.require()


def test_statistics_travel_with_the_weights():
    norm, other = normalizer("quantile", VALUES, OTHERS), Normalizer({"a": 3, "b": 2}, "quantile")
    assert {name: tuple(value.shape) for name, value in norm.state_dict().items()} == dict.fromkeys(
        ("offset", "scale", "low", "high"), (2, 3)
    )
    other.load_state_dict(norm.state_dict())
    other.require()
    which, x = torch.tensor([0, 1]), tensor(VALUES[:8]).view(2, 4, 3)
    assert torch.equal(other.of(which).normalize(x), norm.of(which).normalize(x))


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode in MODES for name in sorted(NEEDED[mode])])
@pytest.mark.parametrize("wrong", ["missing", "too few", "NaN"])
def test_missing_or_wrong_statistics_are_refused_and_change_nothing(mode, name, wrong):
    norm, given = normalizer(mode, OTHERS, VALUES), statistics(VALUES * 2)
    if wrong == "missing":
        del given[name]
    elif wrong == "too few":
        given[name] = given[name][:2]
    else:
        given[name][1] = np.nan
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    told = f"statistics lack '{name}' of b" if wrong == "missing" else f"'{name}' of b has .* expected 3 finite values"
    with pytest.raises(InputError, match=told):
        norm.set_statistics([statistics(OTHERS * 2), given])
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_statistics_of_another_number_of_data_sets_are_refused(count):
    with pytest.raises(InputError, match=f"statistics of {count} data sets; expected those of a, b"):
        normalizer("quantile", VALUES, OTHERS).set_statistics([statistics(VALUES)] * count)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_the_mode_does_not_use_may_be_missing(mode):
    norm = Normalizer({"a": 3}, mode)
    norm.set_statistics([{name: value for name, value in statistics(VALUES).items() if name in NEEDED[mode]}])
    norm.require()
