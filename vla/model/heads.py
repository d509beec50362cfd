"""Three ways to predict a chunk of actions from the hidden states of a backbone; all share one decoder.

Dimension key: B batch, S prefix tokens, H action horizon, A action dimension, P state dimension, K bins, D width.

`loss` and `sample` of each head take hidden [B, S, the backbone's width], mask bool [B, S] (true where to look), state
[B, P] (normalized), key int64 [B] (what is random about a sample is drawn from it) and scale (of its actions; tensors
[B, 1, A]); `loss` also actions [B, H, A] (normalized) and valid bool [B, H, A], and it gives each term per sample [B].

`valid` is false past the end of an episode, and in the dimensions that the sample's data set lacks: no loss is taken
there. Actions are 0 in the latter, as are samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla import keyed
from vla.config import ModelConfig
from vla.model.backbone import Block
from vla.model.normalize import Scale


def sample_mean(error: Tensor, valid: Tensor) -> Tensor:
    """Mean of each sample's own valid entries. error: [B, H, A], valid: bool [B, H, A] -> [B]."""
    weight = valid.float()
    return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


class Decoder(nn.Module):
    """A transformer over [state | H action slots] whose every layer attends to the backbone's hidden states."""

    def __init__(self, config: ModelConfig, context_width: int, state_dim: int, out_dim: int):
        super().__init__()
        width = config.width
        self.state = nn.Linear(state_dim, width)
        self.slot = nn.Parameter(torch.randn(config.chunk_size, width) * 0.5)
        self.context_norm = nn.LayerNorm(context_width)
        self.blocks = nn.ModuleList(Block(config, context_width) for _ in range(config.head_layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim))
        nn.init.zeros_(self.out[-1].weight)  # start from the mean action

    def _context(self, hidden: Tensor) -> Tensor:
        return self.context_norm(hidden.to(self.context_norm.weight.dtype))

    def keys_values(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `forward` takes in place of these hidden states, worked out once for several passes."""
        context = self._context(hidden)
        return [block.keys_values(context) for block in self.blocks]

    def forward(
        self,
        hidden: Tensor | list[tuple[Tensor, Tensor]],
        mask: Tensor,
        state: Tensor,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """hidden [B, S, its width] or its keys_values, mask bool [B, S], state [B, P] -> [B, H, out].

        slots: what the action slots carry [B, H, D]; visible: bool [B, H], the slots that others may look at.
        """
        x = self.slot.expand(len(state), -1, -1) if slots is None else self.slot + slots
        x = torch.cat([self.state(state)[:, None], x], dim=1)  # [B, 1 + H, D]
        contexts = hidden if isinstance(hidden, list) else [self._context(hidden)] * len(self.blocks)
        attend = None
        if visible is not None:
            attend = F.pad(visible, (1, 0), value=True)[:, None, None, :]  # [B, 1, 1, 1 + H], the state always
        for block, context in zip(self.blocks, contexts, strict=True):
            x = block(x, attend, context, mask[:, None, None, :])
        return self.out(x[:, 1:]).float()


class RegressionHead(nn.Module):
    """Actions directly, by L1 or squared error; two-valued dimensions by binary cross-entropy."""

    def __init__(self, config: ModelConfig, context_width: int, state_dim: int, action_dim: int):
        super().__init__()
        self.weights, self.has_continuous = config.loss, len(set(config.gripper_dims)) < action_dim
        gripper = torch.tensor([dim in config.gripper_dims for dim in range(action_dim)])  # [A]
        self.register_buffer("gripper", gripper, persistent=False)
        self.has_grippers = len(config.gripper_dims) > 0
        self.decoder = Decoder(config, context_width, state_dim, action_dim)

    def loss(self, hidden, mask, state, actions: Tensor, valid: Tensor, key: Tensor, scale: Scale) -> dict[str, Tensor]:
        out, terms = self.decoder(hidden, mask, state), {}
        if self.has_continuous:
            error, counted = out - actions, valid & ~self.gripper
            if self.weights.l1:
                terms["l1"] = sample_mean(error.abs(), counted)
            if self.weights.mse:
                terms["mse"] = sample_mean(error.square(), counted)
        if self.has_grippers:
            high = (scale.inverse(actions) > (scale.low + scale.high) / 2).float()
            error = F.binary_cross_entropy_with_logits(out, high, reduction="none")
            terms["bce"] = sample_mean(error, valid & self.gripper)
        return terms

    def sample(self, hidden, mask, state, key: Tensor, scale: Scale) -> Tensor:
        """-> actions in the robot's units [B, H, A]."""
        out = self.decoder(hidden, mask, state)
        return torch.where(self.gripper, torch.where(out > 0, scale.high, scale.low), scale.inverse(out))


class FlowHead(nn.Module):
    """Flow matching (Lipman et al., 2023) on straight paths from noise at t = 1 to actions at t = 0 (π0, 2024)."""

    def __init__(self, config: ModelConfig, context_width: int, state_dim: int, action_dim: int):
        super().__init__()
        self.steps, self.chunk = config.flow_steps, (config.chunk_size, action_dim)
        self.action = nn.Linear(action_dim, config.width)
        self.time = nn.Sequential(nn.Linear(64, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.decoder = Decoder(config, context_width, state_dim, action_dim)
        periods = 4e-3 * 1000 ** torch.linspace(0, 1, 32)  # of sines, from 0.004 to 4
        self.register_buffer("frequencies", 2 * torch.pi / periods, persistent=False)

    def embed_time(self, t: Tensor) -> Tensor:
        """Flow times [B] in (0, 1], embedded [B, D]."""
        angle = t[:, None] * self.frequencies
        return self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))

    def velocity(self, hidden, mask, state, noisy: Tensor, time: Tensor, visible: Tensor | None = None) -> Tensor:
        """noisy: [B, H, A], time: embedded [B, D] or [1, D] -> d noisy / dt, [B, H, A]."""
        return self.decoder(hidden, mask, state, self.action(noisy) + time[:, None], visible)

    def loss(self, hidden, mask, state, actions: Tensor, valid: Tensor, key: Tensor, scale: Scale) -> dict[str, Tensor]:
        """t ~ Beta(1.5, 1), drawn by its inverse distribution u^(1 / 1.5); noise and t come from the sample's key."""
        t = 0.001 + 0.999 * keyed.uniform(key, keyed.FLOW_TIME) ** (1 / 1.5)  # [B]
        noise = keyed.normal(key, keyed.FLOW_NOISE, self.chunk).where(scale.present, 0)
        noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        # Slots past the end of an episode hold no action: the others must not see what stands there.
        error = self.velocity(hidden, mask, state, noisy, self.embed_time(t), visible=valid.any(-1)) - (noise - actions)
        return {"flow": sample_mean(error.square(), valid)}

    def sample(self, hidden, mask, state, key: Tensor, scale: Scale) -> Tensor:
        """Euler steps from the noise of each sample's key. -> actions in the robot's units [B, H, A]."""
        actions = keyed.normal(key, keyed.FLOW_NOISE, self.chunk).where(scale.present, 0)
        hidden = self.decoder.keys_values(hidden)
        t = torch.arange(self.steps, 0, -1, device=actions.device) / self.steps  # from 1 down
        for time in self.embed_time(t).split(1):
            velocity = self.velocity(hidden, mask, state, actions, time).where(scale.present, 0)
            actions = actions - velocity / self.steps
        return scale.inverse(actions)


class TokenHead(nn.Module):
    """Each dimension of each action classified into bins of the same size, all at once.

    They span what is normalized to [-1, 1], as in OpenVLA (Kim et al., 2024); with mean_std all values seen.
    """

    def __init__(self, config: ModelConfig, context_width: int, state_dim: int, action_dim: int):
        super().__init__()
        self.bins, self.smoothing, self.action_dim = config.bins, config.label_smoothing, action_dim
        self.decoder = Decoder(config, context_width, state_dim, action_dim * config.bins)

    def loss(self, hidden, mask, state, actions: Tensor, valid: Tensor, key: Tensor, scale: Scale) -> dict[str, Tensor]:
        logits = self.decoder(hidden, mask, state).unflatten(-1, (self.action_dim, self.bins))  # [B, H, A, K]
        span = (scale.high - scale.low).clamp(min=1e-6)
        share = (scale.inverse(actions) - scale.low) / span  # 0 … 1 over the bins
        target = (share * self.bins).long().clamp(0, self.bins - 1)
        error = F.cross_entropy(
            logits.flatten(0, 2), target.flatten(), reduction="none", label_smoothing=self.smoothing
        )
        return {"ce": sample_mean(error.view_as(share), valid)}

    def sample(self, hidden, mask, state, key: Tensor, scale: Scale) -> Tensor:
        """The middle of the likeliest bin; the outermost mean the ends of their span. -> [B, H, A] in robot units."""
        best = self.decoder(hidden, mask, state).unflatten(-1, (self.action_dim, self.bins)).argmax(-1).float()
        share = torch.where(best == 0, 0.0, torch.where(best == self.bins - 1, 1.0, (best + 0.5) / self.bins))
        return torch.lerp(scale.low.expand_as(share), scale.high.expand_as(share), share)


HEADS = {"flow": FlowHead, "regression": RegressionHead, "token": TokenHead}
