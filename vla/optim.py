"""What moves the weights: parameter groups, the learning rate as a function of the step, the average of the weights."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vla import InputError
from vla.config import OptimConfig
from vla.model.lora import submodule
from vla.shards import Rows, local


def parameter_groups(policy: nn.Module, config: OptimConfig) -> list[dict]:
    """Two AdamW groups for each trained module: weights of linear maps and convolutions decay, all else does not.

    Each group carries its `name` and its `peak_lr`. Of the names in module_lrs that fit a parameter the longest counts.
    Raises InputError for a name that fits none.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    decaying = {module.weight for module in policy.modules() if isinstance(module, kinds)}
    rates, groups = dict(config.module_lrs), {}
    for name in rates:
        submodule(policy, name, "optim.module_lrs")
    for path, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        fitting = [name for name in rates if path.startswith(f"{name}.")]
        name = max(fitting, key=len, default=path.partition(".")[0])
        peak = rates.get(name, config.lr)
        for suffix, decay in ("", config.weight_decay), ("/no_decay", 0.0):
            group = {"name": name + suffix, "params": [], "lr": peak, "peak_lr": peak, "weight_decay": decay}
            groups.setdefault(name + suffix, group)
        groups[name if p in decaying else f"{name}/no_decay"]["params"].append(p)
    if lost := sorted(name for name in rates if not {name, f"{name}/no_decay"} & groups.keys()):
        raise InputError(
            f"--optim.module_lrs gives a rate to {', '.join(lost)}, where nothing is trained; leave it out"
        )
    if not groups:
        raise InputError("--model.freeze leaves nothing to train; name less of the policy")
    return [group for group in groups.values() if group["params"]]


def trained_parameters(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """An optimizer's parameters by name, in the order of its groups."""
    names = {p: name for name, p in policy.named_parameters()}
    return {names[p]: p for group in optimizer.param_groups for p in group["params"]}


def adamw(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW for these groups. Raises InputError if it is to keep 8 bits and bitsandbytes is not there."""
    if not config.eight_bit:
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("--optim.eight_bit needs bitsandbytes; pip install bitsandbytes, or leave it out") from None
    return bitsandbytes.optim.AdamW8bit(groups, betas=config.betas)


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step (0-based) of a run of `steps`: a function, so no state can be lost."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)  # of what follows the warm-up
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return 0.1 ** sum(step / steps >= milestone for milestone in config.milestones)
    if config.schedule == "wsd":
        share = max(0.0, 1 - (steps - step) / max(1.0, config.decay_share * steps))
    falling = (1 + math.cos(math.pi * share)) / 2 if config.schedule == "cosine" else 1 - share
    return config.final_ratio + (1 - config.final_ratio) * falling


class EMA:
    """Exponential moving average of the trained parameters, in float32, once for each optimizer step.

    The decay rises with the step, min(decay, (1 + step) / (10 + step)), so that early weights are soon forgotten. Each
    process averages the rows that it holds.
    """

    def __init__(self, policy: nn.Module, decay: float):
        self.decay, self.average = decay, {}
        self.follow(policy)

    def follow(self, policy: nn.Module) -> None:
        """Average what is trained now; what was not until now, from its present weights on."""
        self.live = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        new = {name: p.detach().clone() for name, p in self.live.items() if name not in self.average}
        self.average = {name: new[name] if name in new else self.average[name] for name in self.live}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(map(local, self.average.values())), self._weights(), weight)

    def load(self, saved: Rows) -> None:
        """Take a saved average. Raises KeyError for a parameter that it lacks."""
        for name, value in self.average.items():
            saved.read(name, value)

    @contextmanager
    def applied(self):
        """Inside, the policy has the averaged weights; afterwards its own again, bit for bit."""
        with torch.no_grad():
            own = [weight.clone() for weight in self._weights()]
            torch._foreach_copy_(self._weights(), list(map(local, self.average.values())))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights(), own)

    def _weights(self) -> list[Tensor]:
        return list(map(local, self.live.values()))
