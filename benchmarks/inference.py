"""Time from an observation to a chunk of actions: as the policy is, with compiled layers, and captured.

    python benchmarks/inference.py demo metaworld smolvlm --out inference.json

The policies of benchmarks/step.py with random weights (flow heads take 10 steps); NumPy arrays in, an array out, median
of all calls in milliseconds. eager: float32; autocast: bfloat16, on a GPU; compiled: the same with compiled layers;
captured: policy.capture(), also in float32. error: largest difference of an action from that of eager, as a share of
the actions' range.
"""

import json
import statistics
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import architectures
import numpy as np
import torch
from step import MODELS

from vla import options
from vla.checkpoint import versions
from vla.data.stats import statistics as statistics_of
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STATES, ACTIONS = 7, 7
WAYS = ("eager", "autocast", "compiled", "captured", "captured float32") if CUDA else ("eager", "compiled")
WARM = 5


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="for all figures as JSON")
    asked = parser.parse_args()
    found = []
    print(f"{'policy':<16} {'batch':>5}  {'way':<16} {'ms':>8} {'error':>8} {'peak GB':>8}", flush=True)
    for name in asked.models:
        for batch in asked.batches:
            expected = None
            for way in asked.ways:
                row, chunk = measure(name, batch, way, asked.calls, asked.cameras)
                expected = chunk if expected is None else expected
                row["error"] = float(np.abs(chunk - expected).max() / 2)
                found.append(row)
                shown = f"{row['ms']:>8.2f} {row['error']:>8.5f} {row['peak_gb'] or float('nan'):>8.2f}"
                print(f"{name:<16} {batch:>5}  {way:<16} {shown}", flush=True)
                setting = vars(asked) | {"out": asked.out.name, "versions": versions()}
                asked.out.write_text(json.dumps(setting | {"figures": found}, indent=1) + "\n")


def measure(name: str, batch: int, way: str, calls: int, cameras: int) -> tuple[dict, np.ndarray]:
    """Figures of one way, and the actions that it came to."""
    torch.compiler.reset()
    policy, size = build(name, cameras), MODELS[name][1]
    policy.to(DEVICE).eval()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    if way == "compiled":
        policy.compile()
    if way.startswith("captured"):
        policy.capture(batch, torch.float32 if way.endswith("float32") else torch.bfloat16)
    random = np.random.default_rng(0)
    seen = {
        "images": random.integers(0, 256, (cameras, 3, size, size), np.uint8),
        "state": random.uniform(-1, 1, STATES).astype(np.float32),
        "instruction": "put the red cube in the blue zone",
    }
    key, lower, times = torch.arange(batch), CUDA and way in ("autocast", "compiled"), []
    for _ in range(WARM + calls):
        began = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=lower):
            chunk = policy.predict_chunk(policy.collate([seen] * batch, key)).cpu().numpy()
        times.append(1000 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
    row = {"policy": name, "batch": batch, "way": way, "ms": statistics.median(times[WARM:]), "peak_gb": peak}
    return row | {"slowest_ms": max(times[WARM:]), "parameters": sum(p.numel() for p in policy.parameters())}, chunk


def build(name: str, cameras: int) -> VLAPolicy:
    flags, size = MODELS[name]
    names = (tuple(f"camera{i}" for i in range(cameras)), tuple(f"s{i}" for i in range(STATES)))
    robot = DatasetSpec("robot", *names, tuple(f"a{i}" for i in range(ACTIONS)), 30)
    with tempfile.TemporaryDirectory() as folder:
        if "{backbone}" in flags:
            flags = flags.format(backbone=architectures.write("smolvlm2-500m", Path(folder, "backbone")))
        model = options.parse(["--run_dir", folder, "--data.path", folder, "--steps", "1", *flags.split()]).model
        torch.manual_seed(0)
        policy = VLAPolicy(PolicyConfig(model, robot.cameras, (size, size), (robot,)))
    ends = np.random.default_rng(0).uniform(-1, 1, (1000, max(STATES, ACTIONS)))
    policy.set_statistics([(statistics_of(ends[:, :STATES]), statistics_of(ends[:, :ACTIONS]))])
    torch.nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.02)  # which starts at 0 and would hide all
    return policy


if __name__ == "__main__":
    main()
