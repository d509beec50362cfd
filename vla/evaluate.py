"""How good a policy is on held-out episodes: the loss, and the error of its actions in the robot's units."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from vla import sim
from vla.data.stream import Samples
from vla.model.policy import VLAPolicy
from vla.rollout import Episode, rollout


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

    Every process calls this. Each sample is counted once, whatever the number of processes, and its noise is keyed by
    it, so evaluations are comparable. None, on all processes, if `go_on()` was false on any before it was done.
    """
    count = min(limit, len(samples))
    chosen = [i * len(samples) // count for i in range(count)]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    # A process with nothing to do still takes part in the sum below, with a sample that weighs nothing.
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)] or [chosen[:1]]
    sums: dict[str, torch.Tensor] = {}
    policy.eval()
    done = True
    for positions in batches:
        done = done and go_on()
        if not done and sums:
            break
        batch = {name: value.to(accelerator.device) for name, value in samples.__getitems__(positions).items()}
        with accelerator.autocast():
            values = policy(batch)
            del values["sample_loss"]
            error = (policy.predict_chunk(batch).float() - batch["actions"]).abs()  # [B, H, A]
        valid = (~batch["action_is_pad"]).float()[:, :, None]
        error = (error * valid).sum(1) / valid.sum(1)  # [B, A]
        size = len(error) if mine else 0
        values |= {f"action_error/{name}": error[:, i].mean() for i, name in enumerate(policy.config.action_names)}
        values |= {"action_error": error.mean(), "count": torch.ones((), device=error.device)}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double() * size
    policy.train()
    sums["left_early"] = torch.tensor(float(not done), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(torch.stack([sums[name] for name in sorted(sums)]), "sum").tolist()
    means = dict(zip(sorted(sums), total, strict=True))
    samples_seen, left_early = means.pop("count"), means.pop("left_early")
    if left_early:
        return None
    return {f"eval/{name}": value / samples_seen for name, value in means.items()}


def closed_loop(
    accelerator: Accelerator,
    policy: VLAPolicy,
    env: str,
    episodes: int,
    record: int = 4,
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[dict[str, float] | None, list[Episode]]:
    """Success rate in an environment, the episodes shared out over the processes; every process calls this.

    Also returns this process's first `record` episodes with their frames. The rate is None, on all processes, if
    `go_on()` was false on any before all were done.
    """
    seeds = [sim.VALIDATION_SEEDS + i for i in range(episodes)][accelerator.process_index :: accelerator.num_processes]
    policy.eval()
    done = rollout(policy, env, seeds, record=record, go_on=go_on)
    policy.train()
    totals = [sum(e.success for e in done), len(done)]
    totals = torch.tensor(totals, dtype=torch.float64, device=accelerator.device)
    successes, count = accelerator.reduce(totals, "sum").tolist()
    return {"eval/success": successes / count} if count == episodes else None, done[:record]
