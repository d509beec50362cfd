import tracemalloc

import numpy as np
import pytest

from vla import InputError
from vla.data.stats import QUANTILES, statistics

RANDOM = np.random.default_rng(0)
VALUES = {
    "one row": RANDOM.normal(3, 1, (1, 2)).astype(np.float32),
    "two rows": RANDOM.normal(0, 1, (2, 3)).astype(np.float32),
    "an even number": RANDOM.normal(-5, 20, (1000, 3)).astype(np.float32),
    "an odd number": RANDOM.standard_cauchy((10_007, 2)).astype(np.float32),
    "ties": RANDOM.integers(-1, 2, (501, 2)).astype(np.float32),
    "one value": np.full((77, 1), 0.1, np.float32),
    "far from zero": (np.arange(1001, dtype=np.float32) % 2 + 4_000_000)[:, None],
    "a quantile near zero": np.array([[-5], [-4], [1]], np.float32),
    "double precision": RANDOM.normal(1e9, 1, (301, 2)),
    "integers": RANDOM.integers(-9, 9, (44, 2)),
    "no dimension": np.empty((5, 0), np.float32),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_statistics_are_those_of_numpy_in_double_precision(values):
    found, doubles = statistics(values), values.astype(np.float64)
    expected = {"min": doubles.min(0), "max": doubles.max(0), "mean": doubles.mean(0), "std": doubles.std(0)}
    expected |= {name: np.quantile(doubles, quantile, axis=0) for name, quantile in QUANTILES.items()}
    assert found.keys() == {*expected, "count"}
    assert found["count"].tolist() == [len(values)]
    for name, row in expected.items():
        np.testing.assert_array_equal(found[name], row.astype(np.float32), err_msg=name)
        assert found[name].dtype == np.float32


def test_statistics_add_up_more_rows_than_fit_in_a_block(monkeypatch):
    monkeypatch.setattr("vla.data.stats.BLOCK", 7)
    values = VALUES["an even number"]
    np.testing.assert_allclose(statistics(values)["std"], values.std(0, dtype=np.float64), rtol=1e-7)


def test_statistics_of_a_memory_map_need_little_more_than_one_column(tmp_path):
    written = RANDOM.normal(0, 1, (2_000_000, 3)).astype(np.float32)
    written.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", np.float32, "r", shape=written.shape)
    tracemalloc.start()
    found = statistics(mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(written) + 20e6  # a column, and a block of it in double precision
    for name, row in statistics(written).items():
        np.testing.assert_array_equal(found[name], row)


def test_statistics_leave_the_values_in_their_order():
    values = VALUES["an even number"].copy()
    statistics(values)
    statistics(values[:, :1])
    np.testing.assert_array_equal(values, VALUES["an even number"])


def test_statistics_of_no_frame_are_refused():
    with pytest.raises(InputError, match="0 frames, expected at least 1"):
        statistics(np.empty((0, 3), np.float32))
