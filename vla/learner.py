"""What learns, as the processes share it: the policy, its optimizer and its average, prepared by accelerate."""

import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vla import InputError, fsdp
from vla.config import TrainConfig
from vla.data.mixture import all_cameras
from vla.data.selection import Selection
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.model.graph import capture_learning
from vla.optim import EMA, make_optimizer, parameter_groups


def policy_config(config: TrainConfig, parts: list[Selection]) -> PolicyConfig:
    """Of a policy for the robots of these data sets."""
    cameras = all_cameras(parts, config.data.cameras)
    specs = (
        DatasetSpec(
            *(part.name, tuple(camera for camera in cameras if camera in part.cameras)),
            *(part.state_names, part.action_names, part.layout.fps),
        )
        for part in parts
    )
    return PolicyConfig(config.model, cameras, parts[0].image_size, tuple(specs), config.lora)


def check_launch(config: TrainConfig) -> None:
    """Raises InputError where processes were launched that were not asked for, or for which there are no GPUs."""
    # What accelerate launch sets for several processes, and for one alone that it starts.
    if {"MASTER_ADDR", "ACCELERATE_DYNAMO_USE_FULLGRAPH"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "several processes were asked for (--num_processes, or MASTER_ADDR is set), but accelerate has started one "
            "alone, as it does where the YAML says distributed_type NO or MULTI_CPU; take another YAML, such as "
            "accelerate_configs/4gpu.yaml with --num_processes (and ACCELERATE_USE_CPU=true on CPUs)"
        )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = 0 if on_cpu else torch.cuda.device_count()
    if here > max(gpus, 1) and not on_cpu:
        raise InputError(
            f"{here} processes were launched on a machine with {gpus} GPUs; launch fewer by --num_processes, or set "
            "ACCELERATE_USE_CPU=true"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(
            f"mixed_precision is {precision}; expected no, fp16 or bf16, in the YAML or by --mixed_precision"
        )
    if config.cuda_graphs and not gpus:
        raise InputError("--cuda_graphs needs a GPU, and this trains on the CPU; leave it out")


def accelerate(config: TrainConfig, accumulation: int) -> Accelerator:
    """The accelerator that the YAML asks for. Raises InputError for settings of it that do not go with the flags.

    It does not get the loader, whose order is arithmetic (vla/data/stream.py), nor the schedule (vla/optim.py).
    """
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # Collectives wait longer than the watchdog, which knows whether the others hang or work (vla/guard.py).
    hang = config.guard.hang_seconds
    hours = timedelta(hours=1, seconds=min(2 * hang, 14 * 24 * 3600)) if hang else timedelta(days=7)
    patience = InitProcessGroupKwargs(timeout=hours)
    folder, handlers = Path(config.run_dir), [ddp, patience]
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, project_dir=folder, kwargs_handlers=handlers)
    if accelerator.gradient_accumulation_steps != accumulation:
        raise InputError(
            f"gradient_accumulation_steps is set to {accelerator.gradient_accumulation_steps} by YAML or environment, "
            f"but it follows from the batch sizes and is {accumulation}; take it out of there"
        )
    fsdp.set_up(accelerator, config)
    return accelerator


class Learner:
    """The policy as all processes see it (`model`), the optimizer of all that will ever be trained, and the average.

    example: makes a batch of the size of a micro-batch.
    """

    def __init__(
        self, accelerator: Accelerator, policy: VLAPolicy, config: TrainConfig, example: Callable[[], dict[str, Tensor]]
    ):
        self.accelerator, self.policy, self.example = accelerator, policy, example
        if config.compile:
            policy.compile()
        policy.freeze_at(math.inf)
        optimizer = make_optimizer(parameter_groups(policy, config.optim), config.optim)
        policy.freeze_at(0)
        if not any(p.requires_grad for p in policy.parameters()):
            raise InputError("--model.freeze leaves nothing to train until --model.unfreeze; leave a part out")
        if config.cuda_graphs:
            self._capture()
        buffers = [name for name, _ in policy.named_buffers()]  # the same everywhere; not by DDP's deprecated flag
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, buffers)
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        register_fsdp_forward_method(policy, "predict_chunk")  # which needs the weights as forward does
        for block in policy.action_head.decoder.blocks:
            register_fsdp_forward_method(block, "keys_values")
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        self.trained = [p for p in policy.parameters() if p in trained]
        self.ema = EMA(policy, config.optim.ema) if config.optim.ema else None

    def _capture(self) -> None:
        """Make CUDA graphs of the policy's passes, in the precision that it trains in."""
        device, exact = self.accelerator.device, AutocastKwargs(cache_enabled=False)  # a cache would outlive the graph
        self.policy.to(device)
        with torch.random.fork_rng([device]), self.accelerator.autocast(exact):
            summed = self.accelerator.gradient_accumulation_steps > 1
            capture_learning(self.policy, self._example(), summed)

    def _example(self) -> dict[str, Tensor]:
        return {name: value.to(self.accelerator.device) for name, value in self.example().items()}

    def train_from(self, step: int) -> None:
        """Train what is to be trained from this step on. Every process calls this."""
        changed = self.policy.freeze_at(step)
        if self.ema:
            self.ema.follow(self.policy)
        if changed:
            fsdp.follow(self.policy)
        if changed and self.model is not self.policy:  # DDP only knows what was trained when it was made
            self.accelerator.free_memory()
            policy = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model, self.optimizer = self.accelerator.prepare(policy, self.optimizer.optimizer)
            self.sort_buckets()

    def sort_buckets(self) -> None:
        """Make DDP's first backward pass, and forget it. Every process calls this.

        DDP sorts its buckets by that pass, and gradients added in another order have other bits: so a resumed run adds
        like one that was not stopped.
        """
        if self.model is self.policy:
            return
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.accelerator.backward(self.model(self._example())["loss"])
            self.optimizer.zero_grad()

    def close(self) -> None:
        """Let go of DDP, which has to go before the process group: else its end could hang."""
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
