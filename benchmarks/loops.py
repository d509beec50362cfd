"""What train.py is measured against (benchmarks/step.py), each in a process of its own; prints its figures as JSON.

python benchmarks/loops.py limit 100 --data.path data/demo --run_dir /tmp/run --global_batch_size 32
python benchmarks/loops.py trainer 100 …
PYTHONPATH=$LEROBOT python benchmarks/loops.py lerobot 100 …
"""

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import launched  # noqa: F401 - which finds vla
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vla import options
from vla.config import TrainConfig
from vla.data.mixture import open_datasets, select
from vla.data.stream import Samples, split
from vla.learner import policy_config
from vla.model import VLAPolicy
from vla.model.graph import capture_learning
from vla.optim import make_optimizer, parameter_groups

WARM = 20  # steps that are not counted
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def build(config: TrainConfig) -> tuple[VLAPolicy, Samples]:
    """The policy and the samples that train.py makes of these flags."""
    torch.manual_seed(config.seed)
    parts = select(config.data)
    policy = VLAPolicy(policy_config(config, parts))
    policy.freeze_unused()
    data = open_datasets(parts, config.data)
    episodes = [split(d.episodes, config.data.val_fraction, config.seed)[0] for d in data.datasets]
    tokens = policy.tokenize([text for part in parts for text in part.layout.instructions])
    samples = Samples(data, episodes, tokens, config.model.chunk_size, config.seed, shuffle=True)
    policy.set_statistics(samples.statistics())
    return policy, samples


def per_second(step: Callable[[], object], steps: int) -> float:
    """Calls of `step` in a second, after WARM."""
    for i in range(WARM + steps):
        if i == WARM:
            wait()
            began = time.perf_counter()
        step()
    wait()
    return steps / (time.perf_counter() - began)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def limit(config: TrainConfig, steps: int) -> dict:
    """A bare loop over batches that lie on the device."""
    policy, samples = build(config)
    policy.to(DEVICE)
    size = config.global_batch_size
    batches = [samples.batch(range(i * size, (i + 1) * size)) for i in range(4)]
    batches = [{name: value.to(DEVICE) for name, value in batch.items()} for batch in batches]
    optimizer, turn = make_optimizer(parameter_groups(policy, config.optim), config.optim), iter(range(10**9))

    def backward() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = policy(batches[next(turn) % len(batches)])["loss"]
        loss.backward()

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        backward()
    optimizer.zero_grad()
    if config.compile:
        policy.compile()
    if config.cuda_graphs:
        with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
            capture_learning(policy, batches[0], summed=False)
    speed, side = per_second(step, steps), 8192 if CUDA else 1024
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    figures = {"samples/s": speed * size, "flops_per_sample": counter.get_total_flops() / size}
    figures["matmul_flops"] = 2 * side**3 * per_second(lambda: a @ a, 50)
    figures["utilization"] = figures["flops_per_sample"] * figures["samples/s"] / figures["matmul_flops"]
    return figures | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else None}


class Rows(torch.utils.data.Dataset):
    """Samples one at a time, as a Dataset usually gives them, so many that no epoch ends."""

    def __init__(self, samples: Samples, length: int):
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.samples.batch([index]).items()}


class Batches(Rows):
    """The same, but a DataLoader gets a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.samples.batch(indices)


class AsTrainerTakesIt(nn.Module):
    def __init__(self, policy: VLAPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, **batch) -> dict[str, Tensor]:
        return {"loss": self.policy(batch)["loss"]}


class Clock(transformers.TrainerCallback):
    """Notes when the first WARM steps were done, and when all were."""

    def __init__(self, steps: int):
        self.due, self.times = (WARM, WARM + steps), []

    def on_step_end(self, arguments, state, control, **_) -> None:
        if state.global_step in self.due:
            wait()
            self.times.append(time.perf_counter())


def trainer(config: TrainConfig, steps: int, dataset: type[Rows] = Rows) -> dict:
    """transformers.Trainer, with what makes it fast."""
    policy, samples = build(config)
    if config.compile:
        policy.compile()
    arguments = transformers.TrainingArguments(
        output_dir=config.run_dir,
        max_steps=WARM + steps,
        per_device_train_batch_size=config.global_batch_size,
        max_grad_norm=config.optim.clip,
        bf16=CUDA,
        use_cpu=not CUDA,
        dataloader_num_workers=config.data.workers,
        dataloader_prefetch_factor=4,
        dataloader_persistent_workers=True,
        dataloader_pin_memory=CUDA,
        remove_unused_columns=False,
        logging_steps=50,
        logging_nan_inf_filter=False,  # which waits for the device in each step
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock(steps)
    model = AsTrainerTakesIt(policy.to(DEVICE))
    transformers.Trainer(
        model,
        arguments,
        data_collator=torch.utils.data.default_collate if dataset is Rows else lambda batch: batch,
        train_dataset=dataset(samples, (WARM + steps) * config.global_batch_size),
        callbacks=[clock],
        optimizers=(make_optimizer(parameter_groups(policy, config.optim), config.optim), None),
    ).train()
    began, ended = clock.times
    return {"samples/s": steps * config.global_batch_size / (ended - began)}


def batched(config: TrainConfig, steps: int) -> dict:
    """The same with a Dataset that knows how to give whole batches."""
    return trainer(config, steps, Batches)


def lerobot(config: TrainConfig, steps: int) -> dict:
    """LeRobot's SmolVLA and the step of its lerobot-train, over batches that lie on the device.

    In bf16, which is not its default; frozen, the weights of the backbone are too, as when it loads them. The package
    is found on the path: github.com/huggingface/lerobot, or its wheel.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    ours, samples = build(config)
    size, frozen, cameras = config.global_batch_size, bool(config.model.freeze), ours.config.cameras
    # Asked for two special tokens alone, which are not used.
    tokens = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=0, global_image_token_id=0))
    smolvlm_with_expert.AutoProcessor = SimpleNamespace(from_pretrained=lambda _: tokens)
    seen = {f"observation.images.{name}": (3, *ours.config.image_size) for name in cameras}
    policy = SmolVLAPolicy(
        SmolVLAConfig(
            input_features={name: PolicyFeature(FeatureType.VISUAL, shape) for name, shape in seen.items()}
            | {"observation.state": PolicyFeature(FeatureType.STATE, (ours.config.state_dim,))},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ours.config.action_dim,))},
            chunk_size=config.model.chunk_size,
            n_action_steps=config.model.chunk_size,
            vlm_model_name=config.model.backbone,
            load_vlm_weights=False,
            num_vlm_layers=config.model.language_layers,
            freeze_vision_encoder=frozen,
            train_expert_only=frozen,
            resize_imgs_with_padding=ours.config.image_size,
            device=DEVICE.type,
        )
    ).to(DEVICE)
    if frozen:
        policy.model.vlm_with_expert.vlm.bfloat16()
    batches = []
    for i in range(4):
        batch = {name: value.to(DEVICE) for name, value in samples.batch(range(i * size, (i + 1) * size)).items()}
        images = zip(seen, batch["images"].float().div(255).unbind(1), strict=True)
        batches.append(
            dict(images)
            | {"observation.state": batch["state"], "action": batch["actions"], "action_is_pad": batch["action_is_pad"]}
            | {"observation.language.tokens": batch["tokens"]}
            | {"observation.language.attention_mask": batch["token_mask"]}
        )
    accelerator = Accelerator(mixed_precision="bf16" if CUDA else "no", cpu=not CUDA)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy, optimizer = accelerator.prepare(policy, optimizer)
    turn = iter(range(10**9))

    def step() -> None:
        policy.train()
        with accelerator.autocast():
            loss, _ = policy.forward(dict(batches[next(turn) % len(batches)]))
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(policy.parameters(), policy.config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item(), norm.item()

    trained, every = (sum(p.numel() for p in policy.parameters() if p.requires_grad >= only) for only in (True, False))
    return {"samples/s": per_second(step, steps) * size, "trained": trained, "parameters": every}


if __name__ == "__main__":
    side, steps, *flags = sys.argv[1:]
    sides = {"limit": limit, "trainer": trainer, "batched": batched, "lerobot": lerobot}
    print(json.dumps(sides[side](options.parse(flags), int(steps))))
