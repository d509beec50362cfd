"""What a Saver takes, in small, for tests that need no training; and disks to fill."""

import contextlib
import hashlib
import json
import subprocess

import pytest
import torch
from accelerate import Accelerator

from vla import checkpoint
from vla.config import CheckpointConfig
from vla.optim import EMA
from vla.saver import Saver


class Policy(torch.nn.Linear):
    def own_state(self):
        return self.state_dict()

    def keep(self, names):
        pass

    def own_config(self):
        return CheckpointConfig()


def small_training(dtype=torch.float32):
    """What a Saver takes, after one step: an accelerator, a policy, its optimizer, an average of the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    policy = Policy(2, 2, dtype=dtype)
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters()))
    model(torch.ones(1, 2, dtype=dtype)).sum().backward()
    optimizer.step()
    return accelerator, policy, optimizer, EMA(policy, 0.9)


def new_saver(training, folder, keep=1):
    accelerator, policy, optimizer, ema = training
    return Saver(accelerator, folder, policy, optimizer, ema, CheckpointConfig(keep=keep))


def state_of(step, **values):
    """The trainer's counters, as far as saving and rotation look at them."""
    return {
        "step": step,
        "best_step": None,
        "evaluated": None,
        "metric": "loss",
        "score": None,
        "bad_in_a_row": 0,
    } | values


def commit(training, folder, step, keep=1, **values):
    saver = new_saver(training, folder, keep)
    saver.save(state_of(step, **values))
    saver.finish()


def broken(*_, **__):
    raise OSError("first line\nsecond line")


@contextlib.contextmanager
def mounted(folder, options):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("a disk can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def seal(path):
    """Write the manifest anew, as one can who may write to the folder."""
    files = [file for file in path.iterdir() if file.name != "MANIFEST.json"]
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    (path / "MANIFEST.json").write_text(json.dumps({"files": entries}))


def checkpoints_of(folder, found):
    """Small checkpoints that verify: `found` has their counters by step."""
    for step, values in found.items():
        temporary = folder / ".saving"
        temporary.mkdir(parents=True)
        for name in (checkpoint.NEEDED | checkpoint.TENSORS) - {"trainer_state.json"}:
            (temporary / name).touch()
        (temporary / "trainer_state.json").write_text(json.dumps(state_of(step, **values) | {"versions": {}}))
        checkpoint.commit(temporary, folder / f"step_{step:08d}", {})
