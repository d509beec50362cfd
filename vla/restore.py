"""Go on from a checkpoint: what it holds (vla/checkpoint.py), back into what learns."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils import gather_object, set_seed
from accelerate.utils import load as load_tensors

from vla import InputError, in_one_line
from vla.checkpoint import all_steps, find, read_state, together, wanted
from vla.config import TrainConfig
from vla.learner import Learner
from vla.model.policy import VLAPolicy
from vla.optim import EMA, before_first_step, trained_parameters
from vla.shards import Rows, files

logger = logging.getLogger(__name__)


def load(
    accelerator: Accelerator, policy: VLAPolicy, optimizer: torch.optim.Optimizer, ema: EMA | None, path: Path
) -> dict:
    """Restore policy, optimizer, average and generators from a verified checkpoint. Returns the `state` given to save.

    Nothing of it is executed: JSON, safetensors, and torch.load with weights_only. Raises, having changed nothing,
    InputError if names or shapes are not those of the policy, ValueError if the moments are not of as many parameters.
    """
    own = path / f"random_states_{accelerator.process_index}.pkl"
    if own.exists():  # a process that is new to this run has none
        load_tensors(own)  # accelerate would ignore one that is broken or unsafe
    weights, average = Rows.of(path, "model"), Rows.of(path, "ema") if ema else None
    policy.keep(weights.parts)
    weights.check(policy.own_state(), "the weights")
    if ema:
        average.check(ema.average, "the average")
    if accelerator.is_fsdp2 or files(path, "optimizer"):
        _load_rows(policy, optimizer, path, weights)
    else:
        optimizer.load_state_dict(load_tensors(path / "optimizer.bin", map_location="cpu"))
        weights.fill(policy.own_state(), "the weights")
    # Without the file it was not trained in fp16, and the scaler begins anew.
    scaler = accelerator.scaler if (path / "scaler.pt").exists() else None
    # Of what accelerate loads, the scaler and the generators.
    load_accelerator_state(str(path), [], [], [], [], accelerator.process_index, scaler, map_location="cpu")
    accelerator.step = 0  # saves fall between steps; a process new to this run has no file to read its count from
    if ema:
        ema.load(average)
    return read_state(path)


def _load_rows(policy: VLAPolicy, optimizer: torch.optim.Optimizer, path: Path, weights: Rows) -> None:
    """Fill policy and optimizer, or the rows of them that this process holds, tensor by tensor from the files."""
    trained = trained_parameters(policy, optimizer)
    if files(path, "optimizer"):
        moments = Rows.of(path, "optimizer")
    else:  # by number, in the order of the groups
        saved = torch.load(path / "optimizer.bin", map_location="cpu", mmap=True, weights_only=True)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        if len(numbers) != len(trained):
            raise InputError(
                f"the moments are those of {len(numbers)} parameters, expected {len(trained)}; use the checkpoint with "
                "the settings that it was made with"
            )
        of = dict(zip(numbers, trained, strict=True))
        moments = Rows({f"{of[n]}/{kind}": [value] for n, has in saved["state"].items() for kind, value in has.items()})
    moved = {name.rpartition("/")[0] for name in moments.parts}
    by_muon = {p for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    state = {
        p: optimizer.state.get(p) or before_first_step(p, p in by_muon) for name, p in trained.items() if name in moved
    }
    expected = {f"{n}/{kind}": value for n, p in trained.items() if p in state for kind, value in state[p].items()}
    moments.check(expected, "the moments")
    for rows, tensors in ((weights, policy.own_state()), (moments, expected)):
        for name, tensor in tensors.items():
            rows.read(name, tensor)
    optimizer.state.clear()
    optimizer.state.update(state)


def seed_apart(seed: int, rank: int, step: int) -> None:
    """Seed what is dropped in training, of which only saved generators know more, in each process on its own."""
    set_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def go_back(
    learner: Learner, folder: Path, config: TrainConfig, window: tuple[int, int], rollbacks: int
) -> tuple[dict, str]:
    """Restore the last checkpoint from before steps that were skipped. Returns its `state`, and what to say of it.

    window: the step before them, and how many they are. rollbacks: how often the run went back before. Raises
    FloatingPointError if that was often enough, and if there is none.
    """
    what = f"{window[1]} updates in a row, up to step {sum(window)}, were skipped"
    cure = "look at the samples named above, or start a new run with a lower --optim.lr"
    if rollbacks >= config.guard.rollbacks:
        raise FloatingPointError(
            f"{what}, and the run has gone back {rollbacks} times before (--guard.rollbacks); the last checkpoint is "
            f"intact: {cure}"
        )
    saves = all_steps(folder)
    later = [path for saved, path in saves.items() if saved > window[0]]
    try:
        state, path = restore(learner, str(folder), folder, config.seed, later)
    except InputError as failure:
        why = failure if len(later) < len(saves) else "nothing was saved before them"
        raise FloatingPointError(f"{what}, and there is nothing to go back to ({why}): {cure}") from None
    return state, f"{what}: going back to {path}, and on without the samples of these steps"


def restore(
    learner: Learner, resume_from: str, folder: Path, seed: int, passed_over: Iterable[Path] = ()
) -> tuple[dict, Path]:
    """Find, verify, load, on all processes together. Returns the `state` given to `save`, and the checkpoint.

    seed: of the run, for a process that has no generators in it. If loading fails on any process, all load the next
    older checkpoint, whole. Raises InputError if none is left, and at once for a checkpoint that was named.
    """
    accelerator = learner.accelerator
    passed_over = set(passed_over)
    while True:
        path, state, problem = together(accelerator, lambda: find(resume_from, folder, passed_over)), None, ""
        learner.train_from(int(path.name[-8:]))  # as it was trained then
        try:
            state = load(accelerator, learner.policy, learner.optimizer, learner.ema, path)
        except Exception as failure:  # by every kind of damage another one; all processes must hear of it
            problem = f"{path} cannot be loaded: {in_one_line(failure)}"
        problem = next(filter(None, gather_object([problem])), "")
        if not problem:
            now = accelerator.mixed_precision
            if accelerator.is_main_process and (before := state.get("precision", now)) != now:
                logger.warning("%s was trained in precision %s, and the run goes on in %s", path, before, now)
            if not (path / f"random_states_{accelerator.process_index}.pkl").exists():
                seed_apart(seed, accelerator.process_index, state["step"])
            return state | {"precision": now}, path
        if wanted(resume_from) not in ("", "best"):
            raise InputError(problem)
        if accelerator.is_main_process:
            logger.warning("%s; trying the one before it", problem)
        passed_over.add(path)
