"""Heads small enough for loops by hand, and what they take."""

import numpy as np
import torch
from torch import nn

from vla import keyed
from vla.config import ModelConfig
from vla.data.stats import statistics
from vla.model.heads import HEADS
from vla.model.normalize import Normalizer

B, H, A, P, D, S = 5, 4, 3, 2, 16, 6
GRIPPER = 2
ACTIONS = np.random.default_rng(1).normal([0.0, 5.0, 0.0], [0.02, 2.0, 1.0], (400, A)).astype(np.float32)
ACTIONS[:, GRIPPER] = np.where(ACTIONS[:, GRIPPER] > 0.3, 0.8, 0.2)  # two values, neither 0 nor 1
SHORT = torch.arange(H)[None] < torch.tensor([1, 2, 3, 4, 4])[:, None]  # valid steps of each sample
# The data set of each sample: the second one's robot lacks the last action dimension.
ROBOTS = {"one robot": torch.zeros(B, dtype=torch.int64), "two robots": torch.tensor([0, 1, 1, 0, 1])}


class Fixed(nn.Module):
    """A decoder that always gives the same."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def keys_values(self, hidden):
        return hidden

    def forward(self, *_):
        return self.out


def scale(mode="quantile", dataset=ROBOTS["one robot"][:1]):
    """By default of any number of samples of the first data set."""
    norm = Normalizer({"whole": A, "smaller": A - 1}, mode)
    norm.set_statistics([statistics(ACTIONS), statistics(ACTIONS[:, :-1])])
    return norm.of(dataset)


def head(kind, action_dim=A, **model):
    torch.manual_seed(0)
    sizes = {"chunk_size": H, "width": D, "attention_heads": 2, "head_layers": 1, "mlp_ratio": 2, "bins": 8}
    made = HEADS[kind](ModelConfig(head=kind, **sizes | model), D, P, action_dim)
    nn.init.normal_(made.decoder.out[-1].weight)  # it starts at 0, where the loss depends on nothing else
    return made


def inputs(normalized, robots="one robot"):
    """What every loss takes, for these normalized actions."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[:, -2:] = False
    return {
        "hidden": torch.randn(B, S, D, generator=generator),
        "mask": mask,
        "state": torch.randn(B, P, generator=generator),
        "actions": normalized,
        "valid": valid(robots),
        "key": keyed.derive(0, torch.arange(B)),
        "scale": scale(dataset=ROBOTS[robots]),
    }


def valid(robots="one robot"):
    return SHORT[:, :, None] & scale(dataset=ROBOTS[robots]).present  # [B, H, A]


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunks():
    """Chunks of the data's own actions, [B, H, A], in the robot's units."""
    return torch.from_numpy(ACTIONS[: B * H]).view(B, H, A)


def mean_of_valid(error, robots="one robot"):
    """The mean of the valid entries of each sample, one after the other. error(b, h, a) -> [B]."""
    means = []
    for b in range(B):
        dims = A - ROBOTS[robots][b].item()
        entries = [error(b, h, a) for h in range(H) if SHORT[b, h] for a in range(dims)]
        entries = [entry for entry in entries if entry is not None]
        means.append(sum(entries) / len(entries))
    return torch.tensor(means)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.double(), expected.double(), **{"rtol": 1e-5, "atol": 1e-6} | tolerance)
