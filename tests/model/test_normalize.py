import numpy as np
import pytest
import torch

from vla import InputError
from vla.data.stats import statistics
from vla.model.normalize import Normalizer

MODES = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99")}
VALUES = np.random.default_rng(0).gamma(2.0, [0.01, 1.0, 300.0], (500, 3)) - [0.0, 5.0, 100.0]  # skewed, far apart


def normalizer(mode, values=VALUES):
    norm = Normalizer(values.shape[1], mode)
    norm.set_statistics(statistics(values))
    return norm


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_inverse_undoes_the_map_for_any_leading_dimensions(mode):
    norm, x = normalizer(mode), tensor(VALUES).view(5, 100, 3)
    scaled = norm(x)
    assert scaled.shape == x.shape
    span = tensor(np.ptp(VALUES, axis=0))
    assert ((norm.inverse(scaled) - x).abs() / span).max() < 1e-6
    assert torch.equal(norm(x[2, 3]), scaled[2, 3])


def test_mean_and_deviation_become_zero_and_the_unit():
    scaled = normalizer("mean_std")(tensor(VALUES))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mode", "quantiles"), [("min_max", (0, 1)), ("quantile", (0.01, 0.99))])
def test_bounds_become_minus_one_and_one(mode, quantiles):
    low, high = np.quantile(VALUES, quantiles, axis=0)
    norm = normalizer(mode)
    torch.testing.assert_close(norm(tensor(low)), -torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(norm(tensor(high)), torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(norm(tensor((low + high) / 2)), torch.zeros(3), rtol=0, atol=1e-5)
    inside = (normalizer(mode)(tensor(VALUES)).abs() <= 1 + 1e-6).float().mean()
    assert inside == 1 if mode == "min_max" else 0.97 < inside < 1  # outliers are not cut off


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [0.0, 1.0, -1234.5])
def test_dimension_that_does_not_vary_is_only_shifted(mode, constant):
    values = np.stack([VALUES[:, 1], np.full(500, constant)], axis=1)
    norm = normalizer(mode, values)
    assert (norm(tensor(values))[:, 1] == 0).all()
    assert norm(tensor([0.0, constant + 0.5]))[1] == 0.5  # a robot that moves it after all is told so, not a million
    assert norm.inverse(torch.zeros(2))[1] == constant
    torch.testing.assert_close(norm(tensor(values))[:, 0], normalizer(mode)(tensor(VALUES))[:, 1])


@pytest.mark.parametrize("mode", MODES)
def test_smallest_and_largest_value_are_kept_beside_the_scale(mode):
    norm = normalizer(mode)
    assert torch.equal(norm.low, tensor(VALUES.min(0)))
    assert torch.equal(norm.high, tensor(VALUES.max(0)))


@pytest.mark.parametrize("mode", MODES)
def test_without_statistics_it_refuses_to_act(mode):
    norm = Normalizer(3, mode)
    assert all(buffer.isnan().all() for buffer in norm.buffers())
    with pytest.raises(InputError, match="no normalization statistics"):
        norm.require()
    norm.set_statistics(statistics(VALUES))
    norm.require()
    norm.high[1] = torch.nan  # a single value that is lost is enough
    with pytest.raises(InputError, match="no normalization statistics"):
        norm.require()


def test_statistics_travel_with_the_weights():
    other = Normalizer(3, "quantile")
    other.load_state_dict(normalizer("quantile").state_dict())
    other.require()
    assert torch.equal(other(tensor(VALUES)), normalizer("quantile")(tensor(VALUES)))


@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in MODES for name in sorted({*MODES[mode], "min", "max"})]
)
@pytest.mark.parametrize("wrong", ["missing", "too few", "NaN"])
def test_missing_or_wrong_statistics_are_refused_and_change_nothing(mode, name, wrong):
    norm, given = normalizer(mode), statistics(VALUES * 2)
    if wrong == "missing":
        del given[name]
    elif wrong == "too few":
        given[name] = given[name][:2]
    else:
        given[name][1] = np.nan
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    told = f"statistics lack '{name}'" if wrong == "missing" else f"statistic '{name}' .* expected 3 finite values"
    with pytest.raises(InputError, match=told):
        norm.set_statistics(given)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_the_mode_does_not_use_may_be_missing(mode):
    wanted = {*MODES[mode], "min", "max"}
    norm = Normalizer(3, mode)
    norm.set_statistics({name: value for name, value in statistics(VALUES).items() if name in wanted})
    norm.require()
