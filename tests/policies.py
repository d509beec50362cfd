"""Small policies for tests that need one which knows nothing."""

import numpy as np
import torch
from torch import nn

from vla.config import ModelConfig
from vla.data.stats import statistics
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.sim.tabletop import Tabletop

VALUES = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
TABLETOP = DatasetSpec("tabletop", Tabletop.cameras, Tabletop.state_names, Tabletop.action_names, Tabletop.fps)
# Another robot, which has a camera less, a state dimension less and an action dimension more.
ARM = DatasetSpec("arm", ("gripper",), ("x", "y"), ("joint_0", "joint_1", "joint_2", "claw"), 50)


def tiny(seed=0, image_size=(64, 64), datasets=(TABLETOP,), cameras=Tabletop.cameras, **model):
    """A small policy for the table or for several robots, which knows nothing but does something."""
    torch.manual_seed(seed)
    sizes = {"chunk_size": 8, "width": 32, "attention_heads": 2, "language_layers": 1, "head_layers": 1}
    config = ModelConfig(**sizes | {"mlp_ratio": 2, "flow_steps": 2} | model)
    policy = VLAPolicy(PolicyConfig(config, cameras, image_size, datasets)).eval()
    policy.set_statistics([(values(len(spec.state_names)), values(len(spec.action_names))) for spec in datasets])
    nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.3)
    return policy


def values(dims):
    """Statistics of VALUES for so many dimensions."""
    return statistics(np.tile(VALUES, 2)[:, :dims])
