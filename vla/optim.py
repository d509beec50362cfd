"""What moves the weights: parameter groups, the learning rate as a function of the step, the average of the weights."""

import itertools
import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vla import InputError
from vla.config import OptimConfig
from vla.model import VLAPolicy
from vla.model.backbone import VisionEncoder
from vla.model.lora import submodule
from vla.shards import Rows, gathered, held, local


def parameter_groups(policy: VLAPolicy, config: OptimConfig) -> list[dict]:
    """Groups for each trained module: weights of linear maps and convolutions decay, all else does not. With muon_lr
    those among them in transformer blocks, and all of the built-in image encoder, are a group of their own, for Muon.

    Each group carries its `name`, its `peak_lr` and whether it is for `muon`. Of the names in module_lrs that fit a
    parameter the longest counts. Raises InputError for a name that fits none.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    decaying = {module.weight for module in policy.modules() if isinstance(module, kinds)}
    parts = [*policy.layers(), *(part for part in policy.modules() if isinstance(part, VisionEncoder))]
    hidden = {p for part in parts for p in part.parameters()} & decaying
    rates, groups = dict(config.module_lrs), {}
    for name in rates:
        submodule(policy, name, "optim.module_lrs")
    suffixes = ["", "/no_decay", *["/muon"] * bool(config.muon_lr)]
    for path, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        fitting = [name for name in rates if path.startswith(f"{name}.")]
        name = max(fitting, key=len, default=path.partition(".")[0])
        peak = rates.get(name, config.lr)
        for suffix in suffixes:
            muon, decay = suffix == "/muon", 0.0 if suffix == "/no_decay" else config.weight_decay
            lr = peak * config.muon_lr / config.lr if muon else peak
            group = {"name": name + suffix, "params": [], "lr": lr, "peak_lr": lr, "weight_decay": decay, "muon": muon}
            groups.setdefault(name + suffix, group)
        suffix = "/no_decay" if p not in decaying else "/muon" if config.muon_lr and p in hidden else ""
        groups[name + suffix]["params"].append(p)
    if lost := sorted(name for name in rates if not {name + suffix for suffix in suffixes} & groups.keys()):
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


def make_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """What moves these groups. Raises InputError if bitsandbytes is to keep the moments, and is not there."""
    if config.muon_lr:
        return Muon(groups, betas=config.betas, fused=True)
    if not config.eight_bit:
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("--optim.eight_bit needs bitsandbytes; pip install bitsandbytes, or leave it out") from None
    return bitsandbytes.optim.AdamW8bit(groups, betas=config.betas)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the groups that say `muon`, AdamW for the others.

    A weight [rows, columns] moves along its Nesterov momentum, orthogonalized: by all directions alike, however small
    their gradients. The step is lr * sqrt(max(1, rows / columns)) long in each. A convolution is a matrix of all that a
    pixel sees, [out, in * height * width]. torch.optim.Muon does the same for matrices that lie on one device, one by
    one; here all move together, be they sharded or not, those of one shape are orthogonalized together, and none moves
    where found_inf is set.
    """

    MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
    TOGETHER = 2**27  # numbers that are moved at once: a step needs up to 20 bytes for each, for as long as it takes

    def __setstate__(self, state):  # AdamW's looks for its moments in every group, to mend those of old versions
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        group_of = {p: group for group in groups if group["muon"] for p in group["params"] if p.grad is not None}
        together, numbers = [], 0
        for p in sorted(group_of, key=lambda p: p.shape):
            if together and numbers + p.numel() > self.TOGETHER:
                self._move(together, group_of)
                together, numbers = [], 0
            together.append(p)
            numbers += p.numel()
        if together:
            self._move(together, group_of)
        return loss

    def _move(self, parameters: list[nn.Parameter], group_of: dict[nn.Parameter, dict]) -> None:
        """One step of these parameters, of which those of one shape follow each other.

        In few launches, for which a small policy's step would wait: all that this process holds of them lies in one
        vector.
        """
        for p in parameters:
            self.state[p] = self.state[p] or before_first_step(p, muon=True)
        weights, moments = [local(p) for p in parameters], [local(self.state[p]["momentum"]) for p in parameters]
        sizes = [w.numel() for w in weights]

        def pieces(vector: Tensor) -> list[Tensor]:
            return [part.view_as(w) for part, w in zip(vector.split(sizes), weights, strict=True)]

        gradient = torch.cat([local(p.grad).flatten() for p in parameters])
        momentum = torch.cat([moment.flatten() for moment in moments])
        live = 1.0
        if (bad := getattr(self, "found_inf", None)) is not None:  # where it is 1, everything stays as it is
            gradient, live = gradient.where(bad == 0, 0), 1 - bad
        momentum.lerp_(gradient, (1 - self.MOMENTUM) * live)
        torch._foreach_copy_(moments, pieces(momentum))
        gradient.lerp_(momentum, self.MOMENTUM)
        updates, begin = [], 0
        for shape, alike in itertools.groupby(parameters, key=lambda p: p.shape):
            n, first = len(list(alike)), parameters[len(updates)]
            size = n * sizes[len(updates)]
            rows = gradient[begin : begin + size].view(n, *local(first).shape)
            directions = self._orthogonal(gathered(rows, first).flatten(2))
            updates += held(directions.unflatten(2, shape[1:]), first)
            begin += size
        update = torch.cat([u.flatten() for u in updates]).float()
        updates = pieces(update)
        torch._foreach_mul_(updates, [math.sqrt(max(1, len(p) ** 2 / p.numel())) for p in parameters])
        torch._foreach_add_(updates, torch._foreach_mul(weights, [group_of[p]["weight_decay"] for p in parameters]))
        torch._foreach_mul_(updates, [group_of[p]["lr"] for p in parameters])
        update *= live
        torch._foreach_sub_(weights, updates)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """The matrices with all their singular values brought near 1, by Newton-Schulz iterations in bfloat16.

        float32 [n, rows, columns] -> bfloat16 of that shape.
        """
        wide = matrices.shape[1] <= matrices.shape[2]
        x = (matrices if wide else matrices.mT).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x if wide else x.mT.contiguous()


def before_first_step(p: Tensor, muon: bool) -> dict[str, Tensor]:
    """What the optimizer has of a parameter before its first step."""
    if muon:
        return {"momentum": torch.zeros_like(p)}
    return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


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
        decay = min(config.decay_share * steps, steps - config.warmup_steps)  # not before the warm-up ends
        share = max(0.0, 1 - (steps - step) / max(1.0, decay))
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
