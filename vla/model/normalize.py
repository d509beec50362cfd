"""Scale states and actions by statistics of the training data, which are buffers and so travel with the weights."""

import torch
from torch import Tensor, nn

from vla import InputError

# For each mode the two statistics that become -1 and 1 (mean_std: that become 0 and the unit).
_BOUNDS = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99")}


class Normalizer(nn.Module):
    """An affine map per dimension, (x - offset) / scale, whose buffers start as NaN and refuse to act until they are
    set.

    A dimension that does not vary in the data is only shifted, to 0.
    """

    def __init__(self, dim: int, mode: str):
        super().__init__()
        self.mode = mode
        for name in ("offset", "scale", "low", "high"):  # low and high: smallest and largest value seen
            self.register_buffer(name, torch.full((dim,), torch.nan))

    @torch.no_grad()
    def set_statistics(self, statistics: dict) -> None:
        """Take min, max, mean, std, q01 and q99, each float [dim]. Raises InputError for a missing or bad one."""
        first, second = _BOUNDS[self.mode]
        values = {}
        for name in {first, second, "min", "max"}:
            if name not in statistics:
                raise InputError(
                    f"statistics lack '{name}' (found {', '.join(sorted(statistics))}); compute them again"
                )
            values[name] = torch.as_tensor(statistics[name], dtype=torch.float64).flatten()
            if values[name].shape != self.offset.shape or not torch.isfinite(values[name]).all():
                raise InputError(
                    f"statistic '{name}' has shape {tuple(values[name].shape)} or is not finite; "
                    f"expected {self.offset.numel()} finite values"
                )
        if self.mode == "mean_std":
            offset, scale = values["mean"], values["std"]
        else:
            offset, scale = (values[first] + values[second]) / 2, (values[second] - values[first]) / 2
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(scale > 1e-6, scale, torch.ones_like(scale)))
        self.low.copy_(values["min"])
        self.high.copy_(values["max"])

    def require(self) -> None:
        """Raises InputError unless every statistic is set."""
        if not all(torch.isfinite(buffer).all() for buffer in self.buffers()):
            raise InputError(
                "the policy has no normalization statistics, so its actions would have no units; load an export that "
                "carries them, or call policy.set_statistics(state=..., action=...)"
            )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset
