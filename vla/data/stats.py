"""Statistics of a data set, one definition for the writer and for training."""

import numpy as np

from vla import InputError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of each dimension over all N rows, computed in float64.

    values: [N, D], any real dtype, N >= 1.
    Returns min, max, mean, std (of the population), q01, q10, q50, q90, q99, each float32 [D], and count, int64 [1].
    Quantiles interpolate linearly between the two nearest rows, as numpy does.
    Raises InputError if there is no row.
    """
    if len(values) == 0:
        raise InputError("statistics of 0 frames, expected at least 1: choose at least one episode")
    values = np.asarray(values, dtype=np.float64)
    rows = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    rows |= zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True)
    return {name: row.astype(np.float32) for name, row in rows.items()} | {"count": np.array([len(values)])}


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
