"""Train a vision-language-action policy.

    accelerate launch --config_file accelerate_configs/1gpu.yaml train.py --data.path data/demo --run_dir runs/first
    accelerate launch --config_file accelerate_configs/4gpu.yaml train.py --resume_from runs/first
    python -m vla.rollout --policy runs/first/export --env tabletop

The YAML says where it runs (machines, processes, precision), the flags say what is trained. See --help.
"""

import math
import os
import sys
import time
from functools import partial
from pathlib import Path

from vla import InputError, NotSaved, options, told
from vla.config import TrainConfig


def main(config: TrainConfig) -> None:
    # Imports that take seconds come after the flags were read, so that --help and a wrong flag answer at once.
    import torch
    from accelerate.utils import set_seed

    from vla import checkpoint, rollout, shards
    from vla.data.augment import augment, check_shift
    from vla.data.loader import loader
    from vla.data.mixture import digests, open_datasets, select
    from vla.data.stream import Samples, split, summary, training_positions
    from vla.export import deliver, init_from
    from vla.guard import Guard, Signals
    from vla.judge import Judge
    from vla.learner import Learner, accelerate, check_launch, policy_config
    from vla.log import RunLog, check_trackers
    from vla.model import VLAPolicy
    from vla.model.spec import check_losses
    from vla.optim import schedule
    from vla.restore import go_back, restore, seed_apart
    from vla.saver import FAILURES, Saver

    # ---- What can be wrong with the input is found here, before any process group exists.
    started, run_dir = time.perf_counter(), Path(config.run_dir)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    micro_batch, accumulation = options.accumulation(config, world_size)
    check_launch(config)
    check_trackers(config.log.trackers)
    resuming = options.resume_folder(config) is not None
    checkpoints = checkpoint.prepare(run_dir, resuming, rank)
    signals = Signals(run_dir)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, when CUDA starts
        torch.backends.cudnn.benchmark = False
    set_seed(config.seed, deterministic=config.deterministic)

    # ---- Policy: so far the metadata of the data sets are enough; their pictures may take hours to decode.
    parts = select(config.data)
    settings = policy_config(config, parts)
    if resuming:
        checkpoint.check_origin(checkpoints, "data", digests(parts, config.data))
    else:
        check_shift(config.data.augment, parts[0].image_size)
        check_losses(settings)
    # Pretrained weights that are trained come from the checkpoint, those that are not from where they came from.
    saved, needed = (run_dir / "backbone", config.model.freeze or config.lora.rank) if resuming else (None, True)
    policy = VLAPolicy(settings, saved, needed)
    policy.freeze_unused()
    if resuming and needed:
        checkpoint.check_origin(checkpoints, "base", policy.config.base)
    origin = f"pretrained {policy.backbone.originals}" if policy.backbone else "weights from scratch"
    if config.init_from and not resuming:
        origin = init_from(policy, Path(config.init_from))
    if config.eval.env:
        policy.drive(rollout.check_fits(policy.config, config.eval.env, config.eval.dataset))
    tokens = policy.tokenize([text for part in parts for text in part.layout.instructions])

    # ---- Data: whole episodes are held out; the statistics are those of the rest.
    data = open_datasets(parts, config.data)
    halves = [split(dataset.episodes, config.data.val_fraction, config.seed) for dataset in data.datasets]
    train_episodes, val_episodes = zip(*halves, strict=True)
    train_samples = Samples(data, train_episodes, tokens, config.model.chunk_size, config.seed, shuffle=True)
    val_samples = Samples(data, val_episodes, tokens, config.model.chunk_size, config.seed, shuffle=False)
    steps = config.steps or math.ceil(config.epochs * len(train_samples) / config.global_batch_size)
    if not resuming:  # else they are in the checkpoint
        options.check_steps(config, steps)
        policy.set_statistics(train_samples.statistics())

    # ---- What learns, on all processes.
    accelerator = accelerate(config, accumulation)
    device, main_process = accelerator.device, accelerator.is_main_process
    learner = Learner(accelerator, policy, config, example=lambda: train_samples.batch(range(micro_batch)))
    ema = learner.ema
    judge = Judge(accelerator, policy, ema, val_samples, config.eval, micro_batch)

    # ---- Resume: one integer places the data, the learning rate and the logs.
    state = judge.unjudged | {"step": 0, "seconds": 0.0, "rollbacks": 0, "left_out": []}
    state |= {"skipped_updates": 0, "bad_in_a_row": 0, "loss_average": 0.0}
    state |= {"data": [own.digest for own in data.datasets], "base": policy.config.base}
    state["precision"] = accelerator.mixed_precision
    if resuming:
        saved, found = restore(learner, config.resume_from, checkpoints, config.seed)
        state |= judge.adopt(saved)
        origin = f"resumed from {found}"
    elif rank:
        seed_apart(config.seed, rank, 0)
    first_step = step = saved_step = state["step"]
    if steps < first_step:
        raise InputError(f"--steps {steps} is behind the checkpoint, which is of step {first_step}; give at least that")
    if main_process:
        options.save(config, run_dir / "config.json")
        if policy.backbone and not resuming:
            policy.backbone.originals.save(run_dir / "backbone")
    learner.sort_buckets()

    log = RunLog(accelerator, config, first_step, steps, evaluated=state["evaluated"] == first_step)
    no_gpu = device.type == "cpu" and os.environ.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    log.say(
        f"{summary(train_samples, val_samples)}\n"
        f"policy     {config.model.head} head, {sum(p.numel() for p in learner.trained if p.requires_grad):,} of "
        f"{sum(p.numel() for p in policy.parameters()):,} parameters trained; {origin}\n"
        f"batch      {config.global_batch_size} = {micro_batch} x {accelerator.num_processes} processes x "
        f"{accumulation} micro-batches, {device.type}, precision {accelerator.mixed_precision}"
        f"{'; WARNING: the YAML asks for a GPU, and none can be used, so this trains on the CPU' * no_gpu}\n"
        f"steps      {first_step} to {steps}: {steps * config.global_batch_size / len(train_samples):.1f} epochs in all"
    )

    if later := [str(other) for other in checkpoint.all_steps(checkpoints) if other > first_step]:
        log.say(f"warning: this goes back to before steps {', '.join(later)}; the next saves delete or replace these")
    if resuming and (warning := judge.forgotten(saved)):
        log.say(warning)
    if config.optim.warmup_steps >= steps:
        log.say(f"warning: the warm-up (--optim.warmup_steps {config.optim.warmup_steps}) takes the whole run")

    guard = Guard(accelerator, config.guard, signals, log.say, train_samples.describe)
    guard.load(state)
    saver = Saver(
        *(accelerator, checkpoints, policy, learner.optimizer, ema, config.checkpoint),
        alive=lambda: guard.go_on("waiting for a checkpoint to be written"),
        committing=log.committing,
    )

    def batches_from(step: int):
        place = (micro_batch, accelerator.process_index, accelerator.num_processes, state["left_out"])
        positions = training_positions(step, steps, config.global_batch_size, *place)
        return loader(train_samples, positions, micro_batch, config.data.workers, device)

    # ---- The loop. A turn is what is due between two steps, then one optimizer step, from G positions of the stream.
    batches, seconds_before = batches_from(step), state["seconds"]
    while True:
        evaluating = step == steps or (step > 0 and config.eval.every > 0 and step % config.eval.every == 0)
        evaluating = evaluating and state["evaluated"] != step
        saving = step % config.checkpoint.every == 0 and step != saved_step
        if evaluating or saving or guard.stopping:
            guard.catch_up()
        if guard.given_up:
            raise NotSaved(f"stopped at step {step}: {FAILURES} saves in a row failed, the warnings say why")
        if guard.window:
            saver.settle()
            with guard.unwatched():
                saved, said = go_back(learner, checkpoints, config, guard.window, state["rollbacks"])
            log.say(said)
            saved |= {"rollbacks": state["rollbacks"] + 1, "left_out": [*state["left_out"], guard.window]}
            state |= judge.adopt(saved)
            step = saved_step = state["step"]
            guard.load(state)
            log.go_back(step, evaluated=state["evaluated"] == step)
            batches = batches_from(step)
            continue
        go_on = partial(guard.go_on, f"evaluating at step {step}")
        improved = evaluating and not guard.stopping and judge.evaluate(state, step, log, go_on)
        guard.stopping |= improved is None  # a signal came; the resumed run begins with this evaluation
        ending = step == steps or guard.stopping or judge.out_of_patience(state)
        judged = evaluating and state["evaluated"] == step
        # What was saved here before its evaluation, as a signal ended the run, is saved again with it.
        if improved or saving or (judged if step == saved_step else ending):
            guard.go_on(f"saving step {step}")
            state |= guard.state() | {"step": step, "seconds": seconds_before + time.perf_counter() - started}
            saver.save(state)
            saved_step = step
        if ending:
            break

        rate = schedule(config.optim, step, steps)
        model, optimizer = learner.model, learner.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

        sums: dict[str, torch.Tensor] = {}
        for _ in range(accumulation):
            with log.waiting_for_data():
                guard.go_on(f"waiting for the data of step {step + 1}")
                batch = next(batches)
            guard.go_on(f"computing step {step + 1}")
            batch["images"] = augment(batch["images"], batch["key"], config.data.augment)
            if step == 0 and not sums:
                log.images(step, "first_batch", batch["images"][:8].cpu().numpy())
            with accelerator.accumulate(model):  # gradients cross processes with the last micro-batch alone
                with accelerator.autocast():  # sharding has none of its own
                    output = model(batch)
                loss = guard.checked(output["loss"], output.pop("sample_loss"), batch["position"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(learner.trained, config.optim.clip or math.inf)
                    norm = shards.whole(norm).to(device)
                    bad = guard.judged(norm)
                    if accelerator.scaler is None:  # the fp16 scaler does the same by itself
                        # A fused step then leaves the weights alone, without a wait.
                        optimizer.optimizer.found_inf = bad.to(learner.trained[0].device)
                    if config.optim.eight_bit and bad:  # bitsandbytes leaves weights alone that have no gradient
                        optimizer.zero_grad()
                optimizer.step()
                optimizer.zero_grad()
            for name, value in output.items():
                sums[name] = sums.get(name, 0) + value.detach() / accumulation
        if ema:
            ema.update(step)
        step += 1
        if step in dict(config.model.unfreeze).values():
            learner.train_from(step)
        guard.step(step, saver.given_up)
        log.step()

        if step % config.log.every == 0 or step == steps:
            values = accelerator.reduce(torch.stack([*sums.values(), norm.float()]), "mean").tolist()
            values = dict(zip([*(f"train/{name}" for name in sums), "train/grad_norm"], values, strict=True))
            values |= {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            log.metrics(step, values | {"train/skipped_updates": guard.skipped.item()} | log.performance(step))
        log.saves(step, *saver.report())

    saver.finish()
    guard.watchdog.close()  # all is saved, and an export takes as long as it takes
    log.saves(step, *saver.report())

    # ---- The end: the best weights as one folder, and the result; or a mark that there is more to do.
    if judge.out_of_patience(state):
        log.say(f"stopped at step {step}: eval/{judge.metric} got no better in {config.eval.patience} evaluations")
    elif state["evaluated"] != steps:
        why = signals.received or "a signal to another process"
        log.say(f"stopped at step {step} of {steps} by {why}; go on with --resume_from {run_dir}")
        if main_process:
            signals.mark(f"stopped at step {step} of {steps}")
    if judge.out_of_patience(state) or state["evaluated"] == steps:
        if judge.metric and state["best_step"] is None:
            raise FloatingPointError(f"eval/{judge.metric} was never finite, so there is nothing good to export")

        def finish() -> None:
            log.say(deliver(config, state, checkpoints, [spec.name for spec in policy.config.datasets]))
            log.result(state)

        checkpoint.together(accelerator, finish)
    log.close()
    accelerator.wait_for_everyone()
    output = loss = model = None  # they hold DDP too
    learner.close()
    accelerator.end_training()


if __name__ == "__main__":
    with told(together=True):
        main(options.parse(sys.argv[1:]))
