"""One policy sharded over all processes (FSDP2), where the YAML asks accelerate for it."""

import os

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig, PartialState
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from vla import InputError
from vla.config import TrainConfig


def set_up(accelerator: Accelerator, config: TrainConfig) -> None:
    """Have accelerate shard so that the numbers are those of a policy that is not, if the YAML asks for sharding.

    Raises InputError for what does not go with it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state, precision = accelerator.state, accelerator.mixed_precision
    if accelerator.distributed_type == DistributedType.NO:
        raise InputError("the environment asks for sharding of a process that is alone; start it by accelerate launch")
    on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU
    plugin = FullyShardedDataParallelPlugin(cpu_offload=False) if on_cpu else state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError(
            f"the YAML asks for FSDP version {plugin.fsdp_version}; set fsdp_version: 2 in its fsdp_config"
        )
    offload, optim, model = isinstance(plugin.cpu_offload, CPUOffloadPolicy), config.optim, config.model
    for wrong, found, cure in (
        (precision not in ("no", "bf16"), f"mixed_precision: {precision}", "set it to bf16 or no in the YAML"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "set it to false in the YAML"),
        (
            plugin.activation_checkpointing,
            "fsdp_activation_checkpointing",
            "take it out of the YAML, and give --model.gradient_checkpointing",
        ),
        (
            plugin.auto_wrap_policy is size_based_auto_wrap_policy,
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP",
            "set it to TRANSFORMER_BASED_WRAP in the YAML",
        ),
        (accelerator.parallelism_config, "parallelism_config", "take it out of the YAML"),
        (
            offload and optim.muon_lr,
            "fsdp_offload_params",
            "set it to false in the YAML, or leave out --optim.muon_lr, which would compute on the CPU",
        ),
        (config.cuda_graphs, "--cuda_graphs", "leave it out, as shards are gathered anew in every step"),
        (optim.eight_bit, "--optim.eight_bit", "leave it out, the processes share the moments"),
        (
            model.frozen_dtype != "float32",
            f"--model.frozen_dtype {model.frozen_dtype}",
            "leave it out, the processes share the weights",
        ),
        (
            config.eval.env,
            f"--eval.env {config.eval.env}",
            "leave it out, and act with the exported policy: python -m vla.rollout",
        ),
    ):
        if wrong:
            raise InputError(f"{found} does not go with a sharded policy (FSDP); {cure}")
    if on_cpu:
        # What accelerate does on GPUs alone; and the mesh, which torch would make of GPUs if it could use any.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin, state.parallelism_config = plugin, ParallelismConfig()
        names = tuple(state.parallelism_config.fsdp_dim_names)
        state.device_mesh = init_device_mesh("cpu", (accelerator.num_processes,), mesh_dim_names=names)
    if precision == "bf16":
        # As autocast alone does it: gradients are added in float32; what goes in and comes out keeps its precision.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def reshard(policy: nn.Module) -> None:
    """Drop the whole weights of a policy that is sharded, which would else stay when its shards change.

    After a pass without gradients they are there still: the outermost part's, and with the YAML's
    fsdp_reshard_after_forward: false those of each.
    """
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def follow(policy: nn.Module) -> None:
    """Have what is sharded look anew which parameters are trained, once that has changed. Every process calls this.

    What was frozen in its first pass would else not know in which precision its gradients are added.
    """
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
