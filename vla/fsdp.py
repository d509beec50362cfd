"""Sharding of one policy over all processes (FSDP2), as accelerate's YAML asks for it."""

import os

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from vla import InputError
from vla.config import TrainConfig


def set_up(accelerator: Accelerator, config: TrainConfig) -> None:
    """Make of accelerate's sharding, if the YAML asks for it, the one that trains as without.

    Raises InputError for what cannot be had together with it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state, precision = accelerator.state, accelerator.mixed_precision
    if accelerator.device.type == "cpu":  # accelerate shards on GPUs alone: nothing else stands against it
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.fsdp_plugin.cpu_offload = OffloadPolicy()  # all of it is there already
    plugin = state.fsdp_plugin
    if precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
