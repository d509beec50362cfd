"""Small policies for tests that need one which knows nothing."""

import numpy as np
import torch
from torch import nn

from vla.config import ModelConfig
from vla.data.stats import statistics
from vla.model import PolicyConfig, VLAPolicy
from vla.sim.tabletop import Tabletop

VALUES = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)


def tiny(seed=0, image_size=(64, 64), **model):
    """A small policy for the table, which knows nothing but does something."""
    torch.manual_seed(seed)
    sizes = {"chunk_size": 8, "width": 32, "attention_heads": 2, "language_layers": 1, "head_layers": 1}
    config = ModelConfig(**sizes | {"mlp_ratio": 2, "flow_steps": 2} | model)
    names = (Tabletop.cameras, image_size, Tabletop.state_names, Tabletop.action_names)
    policy = VLAPolicy(PolicyConfig(config, *names, Tabletop.fps)).eval()
    policy.set_statistics(state=statistics(VALUES), action=statistics(VALUES))
    nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.3)
    return policy
