"""What a checkpoint costs the training: ours in the background beside accelerate's plain save_state, in one run.

    python benchmarks/save.py --width 768 --layers 12          # 1 GB of state and more, on the CPU
    python benchmarks/save.py --width 1536 --layers 8          # 450 M parameters, on a GPU

Both save the same weights and AdamW moments to the same disk. Steps during a write are compared with those between
writes, which take turns with them.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import launched  # noqa: F401 - which finds vla
import numpy as np
import torch
from accelerate import Accelerator

from vla.config import CheckpointConfig, ModelConfig, OptimConfig
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.optim import parameter_groups
from vla.saver import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12, help="of the language model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--saves", type=int, default=4, help="of each kind")
    parser.add_argument("--between", type=int, default=4, help="steps between two saves")
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", help="for the figures as JSON")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no")
    torch.manual_seed(0)
    model_config = ModelConfig(
        head="regression", width=options.width, language_layers=options.layers, attention_heads=8, max_tokens=32
    )
    spec = DatasetSpec("arm", ("front",), tuple("abcdefgh"), tuple("abcdefg"), 10)
    config = PolicyConfig(model_config, spec.cameras, (64, 64), (spec,))
    policy = VLAPolicy(config)
    for normalizer, size in ((policy.state_norm, 8), (policy.action_norm, 7)):
        spread = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
        normalizer.set_statistics([{name: np.full(size, value, np.float32) for name, value in spread.items()}])
    optimizer = torch.optim.AdamW(parameter_groups(policy, OptimConfig()), fused=True)
    model, optimizer = accelerator.prepare(policy, optimizer)
    tokens, token_mask = policy.tokenize(["push the red block"] * options.batch)
    batch = {
        "dataset": torch.zeros(options.batch, dtype=torch.int64),
        "image_mask": torch.ones(options.batch, 1, dtype=torch.bool),
        "images": torch.randint(0, 256, (options.batch, 1, 3, 64, 64), dtype=torch.uint8),
        "state": torch.randn(options.batch, 8),
        "tokens": tokens,
        "token_mask": token_mask,
        "actions": torch.randn(options.batch, model_config.chunk_size, 7),
        "action_is_pad": torch.zeros(options.batch, model_config.chunk_size, dtype=torch.bool),
        "key": torch.arange(options.batch),
    }
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        """One training step. Returns its seconds."""
        began = wait()
        accelerator.backward(model(batch)["loss"])
        accelerator.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return wait() - began

    folder = Path(options.folder or tempfile.mkdtemp())
    (folder / "ours").mkdir(parents=True)
    saver = Saver(accelerator, folder / "ours", policy, optimizer, None, CheckpointConfig(keep=1))
    for _ in range(3):
        step()
    saver.buffer.result()

    plain, ours, quiet, busy, whole = [], [], [], [], []
    state = {"best_step": None, "evaluated": None, "metric": "loss", "score": None, "bad_in_a_row": 0}
    for number in range(1, options.saves + 1):
        began = wait()
        accelerator.save_state(str(folder / "plain"))
        plain.append(time.perf_counter() - began)
        shutil.rmtree(folder / "plain")

        before = [step() for _ in range(options.between)]
        began = wait()
        saver.save(state | {"step": number})
        during = []
        while not saver.pending.done():
            during.append(step())
        if len(during) > 1:
            during.pop()  # it may have been over before this step was
        (metrics,), problems = saver.report()
        assert not problems, problems
        quiet, busy, ours = quiet + before, busy + during, [*ours, metrics]
        # A save's whole cost to the training: the seconds of as many steps as a write takes, with it and without.
        elapsed = wait() - began
        whole.append(elapsed - (len(during) + 1) * statistics.mean(before))
        print(
            f"save {number}: plain {plain[-1]:.2f} s, ours {ours[-1]}, {len(during)} steps during the write", flush=True
        )
    blocked = [metrics["save/blocked_seconds"] for metrics in ours]
    figures = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "gigabytes": ours[-1]["save/bytes"] / 1e9,
        "plain_blocked_seconds": plain,
        "ours_blocked_seconds": blocked,
        "ours_commit_seconds": [metrics["save/commit_seconds"] for metrics in ours],
        "blocked_ratio": statistics.median(plain) / statistics.median(blocked),
        "step_seconds": statistics.mean(quiet),
        "step_seconds_during_write": statistics.mean(busy),
        "steps_during_write": len(busy),
        "slower_during_write": statistics.mean(busy) / statistics.mean(quiet) - 1,
        "whole_cost_seconds": whole,
    }
    print(json.dumps(figures, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
