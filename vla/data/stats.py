"""Statistics of a data set, one definition for the writer and for training."""

from collections.abc import Sequence

import numpy as np

from vla import InputError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BLOCK = 1 << 20  # rows whose squares are in memory at a time


def statistics(values: np.ndarray, spans: Sequence[tuple[int, int]] = ((0, None),)) -> dict[str, np.ndarray]:
    """Statistics of each dimension over all rows, or those of some spans (first, and one past the last), in float64.

    values: [N, D], any real dtype; a memory map may be larger than memory, which holds one dimension at a time.
    Returns min, max, mean, std (of the population), q01, q10, q50, q90, q99, each float32 [D], and count, int64 [1].
    Quantiles interpolate linearly between the two nearest rows, as numpy does.
    Raises InputError if there is no row.
    """
    count = sum(len(values[first:end]) for first, end in spans)
    if not count:
        raise InputError("statistics of 0 frames, expected at least 1: choose at least one episode")
    names = ("min", "max", "mean", "std", *QUANTILES)
    columns = [
        _column_statistics(np.concatenate([values[first:end, d] for first, end in spans]))
        for d in range(values.shape[1])
    ]
    table = np.array(columns, dtype=np.float32).reshape(-1, len(names))  # [D, 9]
    return dict(zip(names, table.T.copy(), strict=True)) | {"count": np.array([count])}


def _column_statistics(column: np.ndarray) -> list[float]:
    """The statistics of one dimension, of which a copy is given: it is put into another order."""
    mean = column.mean(dtype=np.float64)
    squares = [np.square(column[n : n + BLOCK] - mean).sum() for n in range(0, len(column), BLOCK)]
    position = (len(column) - 1) * np.array(list(QUANTILES.values()))
    below = position.astype(np.int64)
    above = np.minimum(below + 1, len(column) - 1)
    column.partition(np.union1d(below, above))  # these rows then stand where a sort would put them
    low, high = column[below].astype(np.float64), column[above].astype(np.float64)
    share = position - below
    # From the nearer end, as np.quantile does, to the same bit.
    quantiles = np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))
    return [column.min(), column.max(), mean, np.sqrt(np.sum(squares) / len(column)), *quantiles]


def image_statistics(histogram: np.ndarray, pixels_per_image: int) -> dict[str, np.ndarray]:
    """The same statistics of images scaled to [0, 1], from the number of pixels at each level, int64 [3, 256].

    Returns float32 [3, 1, 1] each, and count, int64 [1], in images. Quantiles take the darker of two levels.
    """
    level, pixels = np.arange(256) / 255, histogram[0].sum()
    mean = histogram @ level / pixels  # [3]
    rows = {"mean": mean, "std": np.sqrt((histogram * (level - mean[:, None]) ** 2).sum(1) / pixels)}
    for name, quantile in {"min": 0, "max": 1, **QUANTILES}.items():
        rows[name] = level[(histogram.cumsum(1) <= int(quantile * (pixels - 1))).sum(1)]
    rows = {name: row.astype(np.float32).reshape(3, 1, 1) for name, row in rows.items()}
    return rows | {"count": np.array([pixels // pixels_per_image])}
