"""Scale states and actions by statistics of the training data, which are buffers and so travel with the weights.

Dimension key: K data sets, B batch, D dimensions of the data set that has most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla import InputError

# For each mode the two statistics that become -1 and 1 (mean_std: that become 0 and the unit).
_BOUNDS = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99")}
_STILL = 1e-6  # half the span of a dimension that does not vary, but for rounding


class Scale(NamedTuple):
    """An affine map per sample and dimension, (x - offset) / scale; tensors [B, 1, D].

    Both ways it makes 0 of the dimensions that the sample's data set lacks; `inverse` gives those that do not vary the
    one value that they have.
    """

    offset: Tensor
    scale: Tensor
    low: Tensor  # smallest and largest value seen, or (Normalizer's `clipped`) what becomes -1 and 1
    high: Tensor
    present: Tensor  # bool, false in the dimensions that the data set lacks

    def normalize(self, x: Tensor) -> Tensor:
        return ((x - self.offset) / self.scale).where(self.present, 0)

    def inverse(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.offset).where(self.high - self.low > 2 * _STILL, self.low)


class Normalizer(nn.Module):
    """The scales of all data sets, float32 [K, D], whose buffers start as NaN and refuse to act until they are set.

    dims: how many dimensions each data set has, by its name. A dimension that does not vary in a data set is only
    shifted there, to 0. One that moves so rarely that its quantiles miss it is scaled by min and max in their place.
    clipped: low and high are what becomes -1 and 1, if the mode has such.
    """

    def __init__(self, dims: dict[str, int], mode: str, clipped: bool = False):
        super().__init__()
        self.dims, self.mode, self.width = dims, mode, max(dims.values())
        self.clipped = clipped and mode != "mean_std"
        for name in ("offset", "scale", "low", "high"):
            self.register_buffer(name, torch.full((len(dims), self.width), torch.nan))
        present = torch.arange(self.width) < torch.tensor(list(dims.values()))[:, None]  # [K, D]
        self.register_buffer("present", present, persistent=False)

    def of(self, dataset: Tensor) -> Scale:
        """The scales of the samples of a batch. dataset: int64 [B], the place of each sample's data set."""
        return Scale(*(getattr(self, name)[dataset][:, None] for name in Scale._fields))

    @torch.no_grad()
    def set_statistics(self, statistics: Sequence[dict]) -> None:
        """Take min, max, mean, std, q01 and q99, each float [its dimensions], of each data set in order.

        Raises InputError for a missing or bad one that the mode needs.
        """
        if len(statistics) != len(self.dims):
            raise InputError(f"statistics of {len(statistics)} data sets; expected those of {', '.join(self.dims)}")
        first, second = _BOUNDS[self.mode]
        values = {}
        for name in {first, second, "min", "max"} | ({"std"} if self.mode == "quantile" else set()):
            rows = []
            for (dataset, dim), given in zip(self.dims.items(), statistics, strict=True):
                if name not in given:
                    raise InputError(
                        f"statistics lack '{name}' of {dataset} (found {', '.join(sorted(given))}); compute them again"
                    )
                row = torch.as_tensor(given[name], dtype=torch.float64).flatten()
                if row.shape != (dim,) or not torch.isfinite(row).all():
                    raise InputError(
                        f"statistic '{name}' of {dataset} has shape {tuple(row.shape)} or is not finite; "
                        f"expected {dim} finite values"
                    )
                rows.append(F.pad(row, (0, self.width - dim)))  # 0, and so a scale of 1, where it has no dimension
            values[name] = torch.stack(rows)  # [K, D]
        if self.mode == "mean_std":
            offset, scale = values["mean"], values["std"]
        else:
            low, high = values[first], values[second]
            if self.mode == "quantile":
                rare = values["std"] > 3 * (high - low) / 2  # normalized, its mean square would be over 9
                low, high = values["min"].where(rare, low), values["max"].where(rare, high)
            offset, scale = (low + high) / 2, (high - low) / 2
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(scale > _STILL, scale, torch.ones_like(scale)))
        self.low.copy_(low if self.clipped else values["min"])
        self.high.copy_(high if self.clipped else values["max"])

    def require(self) -> None:
        """Raises InputError unless every statistic is set."""
        if not all(torch.isfinite(buffer).all() for buffer in self.buffers()):
            raise InputError(
                "the policy has no normalization statistics, so its actions would have no units; load an export that "
                "carries them, or call policy.set_statistics"
            )
