"""How good a policy is on held-out episodes: the loss, and the error of its actions in the robot's units."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from vla import fsdp, sim
from vla.data.stream import Samples
from vla.model.policy import VLAPolicy
from vla.rollout import Episode, processes, rollout


@torch.no_grad()
def held_out(
    accelerator: Accelerator,
    policy: VLAPolicy,
    samples: Samples,
    limit: int,
    batch_size: int,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """Loss, its terms and the mean absolute action error, over at most `limit` evenly spaced samples.

    With several data sets also loss and error of each; the error of each dimension only if all have the same ones.

    Every process calls this. Each sample is counted once, whatever the number of processes, and its noise is keyed by
    it, so evaluations are comparable. None, on all processes, if `go_on()` was false on any before it was done.
    """
    count = min(limit, len(samples))
    chosen = [i * len(samples) // count for i in range(count)]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    # All processes take part equally often, those with fewer samples with one that weighs nothing: the sum below needs
    # each, and where the policy is sharded every batch does.
    rounds = -(-count // (accelerator.num_processes * batch_size))
    batches = [mine[i * batch_size : (i + 1) * batch_size] for i in range(rounds)]
    datasets = policy.config.datasets
    sums: dict[str, torch.Tensor] = {}  # for each value float64 [2]: its sum over the samples, and how many they are

    def add(name: str, mean: torch.Tensor, size: int) -> None:
        size = torch.full_like(mean, size if positions else 0, dtype=torch.float64)
        total = torch.where(size > 0, mean.double() * size, 0)  # the mean of no sample is NaN
        sums[name] = sums.get(name, 0) + torch.stack([total, size])

    policy.eval()
    done = True
    for positions in batches:
        done = done and go_on()
        if accelerator.is_fsdp2:  # none may leave alone
            done = not accelerator.reduce(torch.tensor(float(not done), device=accelerator.device), "sum").item()
        if not done and sums:
            break
        batch = {n: value.to(accelerator.device) for n, value in samples.batch(positions or chosen[:1]).items()}
        with accelerator.autocast():
            values = policy(batch)
            sample_loss = values.pop("sample_loss")
            error = (policy.predict_chunk(batch).float() - batch["actions"]).abs()  # [B, H, A]
        valid = (~batch["action_is_pad"]).float()[:, :, None]
        error = (error * valid).sum(1) / valid.sum(1)  # [B, A]
        for name, value in values.items():
            add(name, value, len(error))
        for place, spec in enumerate(datasets):
            rows = batch["dataset"] == place
            own = error[rows, : len(spec.action_names)]
            add("action_error", own.mean(), len(own))
            if len(datasets) > 1:
                add(f"action_error/{spec.name}", own.mean(), len(own))
                add(f"loss/{spec.name}", sample_loss[rows].mean(), len(own))
        if len({spec.action_names for spec in datasets}) == 1:
            for i, name in enumerate(datasets[0].action_names):
                add(f"action_error/{name}", error[:, i].mean(), len(error))
    policy.train()
    fsdp.reshard(policy)
    left_early = torch.tensor([float(not done), 0], dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(torch.stack([left_early, *(sums[name] for name in sorted(sums))]), "sum").tolist()
    if total[0][0]:
        return None
    means = zip(sorted(sums), total[1:], strict=True)
    return {f"eval/{name}": value / size for name, (value, size) in means if size}


def closed_loop(
    accelerator: Accelerator,
    policy: VLAPolicy,
    env: str,
    episodes: int,
    image_size: int = 0,
    record: int = 4,
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[dict[str, float] | None, list[Episode]]:
    """Success rate in an environment and in each tier of its tasks, the episodes shared out over the processes.

    image_size: see sim.make (0: the policy's). Every process calls this. Also returns its first `record` episodes, on
    the main process with their frames. The rates are None, on all processes, if `go_on()` was false on any before all
    were done.
    """
    seeds = [sim.VALIDATION_SEEDS + i for i in range(episodes)][accelerator.process_index :: accelerator.num_processes]
    world = sim.make(env)
    options = {"image_size": image_size or max(policy.config.image_size), "workers": processes(world)}
    filmed = range(record if accelerator.is_main_process else 0)
    policy.eval()
    done = rollout(policy, env, seeds, record=filmed, go_on=go_on, **options)
    policy.train()
    groups = {"": done}
    groups |= {f"/{tier}": [e for e in done if e.task in tasks] for tier, tasks in world.tiers.items()}
    sums = [[sum(e.success for e in own), len(own)] for own in groups.values()]
    sums = torch.tensor(sums, dtype=torch.float64, device=accelerator.device)
    sums = dict(zip(groups, accelerator.reduce(sums, "sum").tolist(), strict=True))
    rates = {f"eval/success{group}": successes / count for group, (successes, count) in sums.items() if count}
    return rates if sums[""][1] == episodes else None, done[:record]
