"""Speed of a training step: train.py beside the limit, which is a bare loop, and beside what one would use instead.

    python benchmarks/step.py demo --eager --out demo.json
    python benchmarks/step.py metaworld --flags=--cuda_graphs --out metaworld.json
    PYTHONPATH=$LEROBOT python benchmarks/step.py smolvlm smolvlm-frozen --sides limit train lerobot --out smolvlm.json

The same policy, data, batch size, precision and optimizer in each, in turns (benchmarks/loops.py):
limit: batches that lie on the device, autocast, torch.compile, fused AdamW or Muon, CUDA graphs if asked for; no
loader, clipping, average or log.
train: train.py --compile with all that it does.
trainer: transformers.Trainer with the same compiled layers, optimizer, loader workers and pinned memory, and a Dataset
that gives samples one at a time, as they usually do. batched: the same, but it gives whole batches.
lerobot: LeRobot's SmolVLA and the step of its training, which has a backbone of the same sizes and a head of as many
parameters, over batches that lie on the device, in bf16.

utilization: floating-point operations of the limit (counted by torch on the policy that is not compiled) over those of
a large matrix product in the same run. Of train.py also what the device was busy with, from a trace of 5 steps, by what
launched it, and how often torch.compile made another program of a function in the whole run with its evaluation.
"""

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import architectures
import torch
from launched import ROOT, UNSAVED, collect, train

from vla.checkpoint import versions

SMOLVLM = (
    "--model.backbone {backbone} --model.random_backbone --model.language_layers 16 --model.width 768 "
    "--model.attention_heads 12 --model.head_layers 8 --model.mlp_ratio 7 --model.chunk_size 50 "
    "--global_batch_size 64 --data.workers 8"
)
MODELS = {  # by name: flags; height and width of the pictures
    "demo": (
        "--model.width 64 --model.attention_heads 4 --model.mlp_ratio 2 --model.vision_stride 8 --model.vision_blocks "
        "0 --model.language_layers 2 --model.head_layers 2 --model.max_tokens 56 --model.chunk_size 8 "
        "--model.n_action_steps 2 --global_batch_size 32 --data.workers 1",
        64,
    ),
    "metaworld": (
        "--data.cameras table --model.head regression --model.loss.l1 0.1 --model.loss.mse 0.9 --model.width 384 "
        "--model.attention_heads 6 --model.language_layers 4 --optim.muon_lr 0.01 --global_batch_size 512 "
        "--data.workers 10",
        224,
    ),
    "smolvlm": (SMOLVLM, 512),
    "smolvlm-frozen": (
        f"{SMOLVLM} --model.freeze vision_encoder language_model --model.frozen_dtype bfloat16",
        512,
    ),
}
OTHERS = ("limit", "trainer", "batched", "lerobot")
YAML = "1gpu" if torch.cuda.is_available() else "cpu"
SIDES, WARM, TRACED = ("limit", "train", "trainer", "batched", "lerobot"), 20, 5


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags for all of them")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--out", type=Path, required=True, help="for all figures as JSON")
    asked = parser.parse_args()
    found: dict[str, dict] = {}
    print(
        f"{'samples/s':<16}", *(f"{side:>9}" for side in SIDES), *(f"train / {side:<8}" for side in OTHERS), flush=True
    )

    def keep() -> None:
        setting = vars(asked) | {"out": asked.out.name, "versions": versions()}
        asked.out.write_text(json.dumps(setting | {"figures": found}, indent=1) + "\n")

    for name in asked.models:
        found[name] = {side: [] for side in asked.sides}
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), asked, found[name], keep)
        tell(name, found[name])


def measure(name: str, folder: Path, asked: Namespace, found: dict[str, list | dict], keep: Callable[[], None]) -> None:
    """Every side so many times, and where the time of train.py goes; kept as soon as found."""
    flags, size = MODELS[name]
    collect(folder / "data", 40, size)
    if "{backbone}" in flags:
        flags = flags.format(backbone=architectures.write("smolvlm2-500m", folder / "backbone"))
    flags += f" --data.path {folder / 'data'} {'' if asked.eager else '--compile'} {asked.flags}"
    for turn in range(asked.rounds):
        for side in asked.sides:
            run = folder / f"{side}{turn}"
            if side == "train":
                steps = f"--steps {WARM + asked.steps} --log.every {asked.steps // 5} --eval.every 0 {UNSAVED}"
                row = train(run, f"{flags} {steps}", yaml=YAML, until=WARM + asked.steps)
            else:
                own = f"{flags} --run_dir {run} --steps 1"
                command = [sys.executable, "benchmarks/loops.py", side, str(asked.steps), *own.split()]
                env = os.environ | {"GOMP_SPINCOUNT": "1000"}  # as vla sets it
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{side}: {done.stderr[-3000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
            found[side].append(row)
            keep()
            print(f"{name}, round {turn + 1}: {side} {row['samples/s']:.1f} samples/s", file=sys.stderr, flush=True)
    if "train" in asked.sides:
        traced = f"{flags} --log.profile {TRACED} --steps {WARM + TRACED} --eval.every 0 {UNSAVED}"
        found["traced"] = train(folder / "traced", traced, yaml=YAML, compiling=True)
        found["parts"] = parts(next((folder / "traced/profile").iterdir()))
        keep()


def parts(trace: Path) -> dict[str, float]:
    """Shares of the traced steps' time: on a GPU what it worked on, and idle; on a CPU what it was in."""
    events = [event for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if event.get("dur")]
    steps = [
        event for event in events if event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation"
    ]
    updates = [
        event for event in events if event["name"].startswith("Optimizer.step#") and event["cat"] == "user_annotation"
    ]
    seconds = dict.fromkeys(("copy to the device", "forward", "backward", "optimizer"), 0.0)
    work = [event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = {
        e["args"]["correlation"]: e
        for e in events
        if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e["args"]
    }
    for event in work:
        by = launched.get(event["args"]["correlation"])
        if "HtoD" in event["name"]:
            part = "copy to the device"
        elif by is None or by["tid"] == steps[0]["tid"]:
            part = "optimizer" if by and any(u["ts"] <= by["ts"] <= u["ts"] + u["dur"] for u in updates) else "forward"
        else:
            part = "backward"  # autograd has a thread of its own
        seconds[part] += event["dur"]
    if not work:
        seconds = {"optimizer": sum(event["dur"] for event in updates)}
        seconds["backward"] = sum(
            e["dur"] for e in events if e["name"].startswith("autograd::engine::evaluate_function")
        )
    total = sum(event["dur"] for event in steps)
    return {part: value / total for part, value in seconds.items()} | {"rest": 1 - sum(seconds.values()) / total}


def tell(name: str, found: dict) -> None:
    speeds = {side: statistics.median(row["samples/s"] for row in found[side]) for side in SIDES if found.get(side)}
    cells = [f"{speeds[side]:9.1f}" if side in speeds else " " * 9 for side in SIDES]
    ratios = [f"{speeds['train'] / speeds[side]:>16.3f}" if {side, "train"} <= speeds.keys() else "" for side in OTHERS]
    print(f"{name:<16}", *cells, *ratios, flush=True)
    if "parts" in found:
        waits = statistics.median(row["data_wait"] for row in found["train"])
        print(f"  waiting for data {waits:.1%},", ", ".join(f"{p} {share:.1%}" for p, share in found["parts"].items()))
        print("  {recompiled} recompiled, {graph_breaks} graph breaks".format(**found["traced"]))
    if "limit" in found:
        used = statistics.median(row["utilization"] for row in found["limit"])
        rate = statistics.median(row["matmul_flops"] for row in found["limit"])
        print(f"  {used:.1%} of the {rate / 1e12:.3g} TFLOP/s of a matrix product", flush=True)


if __name__ == "__main__":
    main()
