"""Train a vision-language-action policy.

    accelerate launch --config_file accelerate_configs/1gpu.yaml train.py --data.path data/tabletop --run_dir runs/first
    accelerate launch --config_file accelerate_configs/4gpu.yaml train.py --resume_from runs/first
    python -m vla.rollout --policy runs/first/export --env tabletop

The YAML says where it runs (machines, processes, precision), the flags say what is trained. See --help.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from vla import InputError
from vla import config as configuration


def main(config: configuration.TrainConfig) -> None:
    # On a busy CPU, threads that spin while they wait take the cores from those they wait for: 4 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # Imports that take seconds come after the flags were read, so that --help and a wrong flag answer at once.
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    from vla import checkpoint, evaluate, rollout
    from vla.data.lerobot import LeRobotDataset
    from vla.data.stream import Samples, loader, split, training_positions
    from vla.export import export, init_from
    from vla.log import RunLog
    from vla.model import PolicyConfig, VLAPolicy
    from vla.optim import EMA, parameter_groups, schedule

    # ---- What can be wrong with the input is found here, before any process group exists.
    started, run_dir, world_size = time.perf_counter(), Path(config.run_dir), int(os.environ.get("WORLD_SIZE", 1))
    micro_batch, accumulation = configuration.accumulation(config, world_size)
    resuming = configuration.resume_folder(config) is not None
    checkpoints = checkpoint.prepare(run_dir, resuming)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, when CUDA starts
        torch.backends.cudnn.benchmark = False
    set_seed(config.seed, deterministic=config.deterministic)

    # ---- Data: whole episodes are held out; the statistics are those of the rest.
    data = LeRobotDataset(config.data.path, cameras=config.data.cameras, image_cache=config.data.image_cache or None)
    policy = VLAPolicy(
        PolicyConfig(config.model, data.cameras, data.image_size, data.state_names, data.action_names, data.fps)
    )
    train_episodes, val_episodes = split(data.num_episodes, config.data.val_fraction, config.seed)
    train_samples = Samples(data, train_episodes, policy.tokenize, config.model.chunk_size, config.seed, shuffle=True)
    val_samples = Samples(data, val_episodes, policy.tokenize, config.model.chunk_size, config.seed, shuffle=False)
    steps = config.steps or math.ceil(config.epochs * len(train_samples) / config.global_batch_size)

    # ---- Policy: statistics first, then weights from elsewhere, if any.
    policy.set_statistics(*train_samples.statistics())
    origin = init_from(policy, Path(config.init_from)) if config.init_from and not resuming else "weights from scratch"
    if config.eval.env:
        rollout.check_fits(policy.config, config.eval.env)

    # ---- Accelerator. It does not get the loader, whose order is arithmetic (vla/data/stream.py), nor the schedule.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, project_dir=run_dir, kwargs_handlers=[ddp])
    if accelerator.gradient_accumulation_steps != accumulation:
        raise InputError(
            f"gradient_accumulation_steps is set to {accelerator.gradient_accumulation_steps} by YAML or environment, "
            f"but it follows from the batch sizes and is {accumulation}; take it out of there"
        )
    if accelerator.num_processes != world_size:
        raise InputError(
            f"{world_size} processes were launched, but each would train alone on {accelerator.device.type}: "
            "the YAML is for GPUs that are not here; take another, or set ACCELERATE_USE_CPU=true"
        )
    device, main_process = accelerator.device, accelerator.is_main_process
    if config.compile:
        policy.compile()  # in place, so that the names of saved weights stay as they are
    groups = parameter_groups(policy, config.optim)
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(groups, betas=config.optim.betas, fused=True))
    trained = [p for p in policy.parameters() if p.requires_grad]
    ema = EMA(policy, config.optim.ema) if config.optim.ema else None

    # ---- Resume: one integer places the data, the learning rate and the logs.
    state = {"step": 0, "best": None, "best_step": None, "evaluations_since_best": 0}
    state |= {"skipped_updates": 0, "seconds": 0.0}
    if resuming:
        found = checkpoint.find_together(accelerator, config.resume_from, checkpoints)
        state |= checkpoint.load(accelerator, found, ema)
        origin = f"resumed from {found}"
    first_step = step = state["step"]
    if steps < first_step:
        raise InputError(f"--steps {steps} is behind the checkpoint, which is of step {first_step}; give at least that")
    seconds_before = state["seconds"]
    skipped = torch.tensor(state["skipped_updates"], device=device)
    bad_in_a_row = torch.zeros((), device=device)
    if main_process:
        configuration.save(config, run_dir / "config.json")

    log = RunLog(accelerator, config, first_step, steps)
    log.say(
        f"data       {config.data.path}: {len(train_samples)} frames of {len(train_episodes)} episodes to train on, "
        f"{len(val_samples)} frames of {len(val_episodes)} held out\n"
        f"policy     {config.model.head} head, {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in policy.parameters()):,} parameters trained; {origin}\n"
        f"batch      {config.global_batch_size} = {micro_batch} x {accelerator.num_processes} processes x "
        f"{accumulation} micro-batches, {device.type}, precision {accelerator.mixed_precision}\n"
        f"steps      {first_step} to {steps}: {steps * config.global_batch_size / len(train_samples):.1f} epochs in all"
    )

    def evaluated() -> bool:
        """Evaluate, log, keep the score; true if it is the best so far. All processes agree: values are reduced."""
        values = {}
        with ema.applied() if ema else contextlib.nullcontext():
            if len(val_samples):
                values |= evaluate.held_out(accelerator, policy, val_samples, config.eval.samples, micro_batch)
            if config.eval.env:
                success, recorded = evaluate.closed_loop(accelerator, policy, config.eval.env, config.eval.episodes)
                values |= success
                if main_process:
                    log.video(step, "rollout", rollout.grid(recorded), data.fps)
        log.metrics(step, values)
        value, sign = values[f"eval/{config.eval.metric}"], -1 if config.eval.metric == "success" else 1
        better = state["best"] is None or sign * value < sign * state["best"] - config.eval.min_delta
        if better and math.isfinite(value):
            state.update(best=value, best_step=step, evaluations_since_best=0)
            return True
        state["evaluations_since_best"] += 1
        return False

    def out_of_patience() -> bool:
        return 0 < config.eval.patience <= state["evaluations_since_best"]

    # ---- The loop. One turn is one optimizer step, from positions [step · G, (step + 1) · G) of the stream.
    positions = training_positions(
        first_step, steps, config.global_batch_size, micro_batch, accelerator.process_index, accelerator.num_processes
    )
    batches = iter(loader(train_samples, positions, config.data.workers, pin_memory=device.type == "cuda"))
    while step < steps and not out_of_patience():
        rate = schedule(config.optim, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

        sums: dict[str, torch.Tensor] = {}
        for _ in range(accumulation):
            with log.waiting_for_data():
                batch = next(batches)
            if step == 0 and not sums:
                log.images(step, "first_batch", batch["images"][:8].numpy())
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            with accelerator.accumulate(model):  # gradients cross processes with the last micro-batch alone
                output = model(batch)
                accelerator.backward(output["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained, config.optim.clip or math.inf)
                    bad = (~torch.isfinite(norm)).float()
                    skipped += bad.long()
                    bad_in_a_row = (bad_in_a_row + 1) * bad
                    if accelerator.scaler is None:  # the fp16 scaler does the same by itself
                        optimizer.optimizer.found_inf = bad  # a fused step leaves the weights alone, without a wait
                optimizer.step()
                optimizer.zero_grad()
            for name, value in output.items():
                sums[name] = sums.get(name, 0) + value.detach() / accumulation
        if ema:
            ema.update(step)
        step += 1
        log.step()

        if step % config.log.every == 0 or step == steps:
            values = accelerator.reduce(torch.stack([*sums.values(), norm.float()]), "mean").tolist()
            values = dict(zip([*(f"train/{name}" for name in sums), "train/grad_norm"], values, strict=True))
            values |= {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            log.metrics(step, values | {"train/skipped_updates": skipped.item()} | log.performance(step))
            if (count := int(bad_in_a_row.item())) >= max(2, config.log.every):
                raise FloatingPointError(
                    f"loss or gradients were not finite in each of the {count} steps up to step {step}; the last "
                    "checkpoint is intact: lower --optim.lr, or look at the data at these steps"
                )

        improved = (step == steps or (config.eval.every and step % config.eval.every == 0)) and evaluated()
        if improved or out_of_patience() or step == steps or step % config.checkpoint.every == 0:
            state |= {"step": step, "skipped_updates": skipped.item()}
            state["seconds"] = seconds_before + time.perf_counter() - started
            checkpoint.save(accelerator, checkpoints, state, asdict(policy.config), ema)
            if main_process:
                keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
                checkpoint.rotate(checkpoints, step, keep, keep_every, state["best_step"])

    # ---- The end: the best weights as one folder, and the result.
    if out_of_patience():
        log.say(
            f"stopped at step {step}: eval/{config.eval.metric} got no better in {config.eval.patience} evaluations"
        )
    if state["best_step"] is None:
        raise FloatingPointError(f"eval/{config.eval.metric} was never finite, so there is nothing good to export")
    if main_process:
        best = checkpoints / f"step_{state['best_step']:08d}"
        checkpoint.verify(best)
        card = f"Trained on {config.data.path}; the best of {step} steps of {config.global_batch_size} samples"
        export(best, run_dir / "export", f"{card} was step {state['best_step']}.")
    log.close(state)
    accelerator.wait_for_everyone()
    output = None  # it and the model hold DDP's reducer, which has to go before the process group: its end could hang
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(configuration.parse(sys.argv[1:]))
    except (InputError, FloatingPointError) as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every process finds the same fault: say it once
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
