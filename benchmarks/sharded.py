"""What sharding a policy over N processes (FSDP2) costs, and what it keeps.

    python benchmarks/sharded.py exact --processes 2 --out exact.json
    python benchmarks/sharded.py large paligemma-3b --processes 2 --out large.json      # also --yaml 4gpu_fsdp_offload

exact: a small policy with --deterministic in every mode and through every change of mode. How far losses and weights
are from DDP's; whether losses, weights, averages and, between sharded checkpoints, moments have the bits of the run
that was sharded from its start to its end.
large: an architecture of real size (benchmarks/architectures.py) with random weights, sharded: not stopped; saved and
killed; resumed by as many processes, and by one that holds it whole; exported from the sharded checkpoint.

Kills are SIGKILL, to all processes of a run at once. Differences are the largest ones, absolute. Peak GB is what torch
allocated on the main process's GPU.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import architectures
import psutil
import torch

from vla.shards import Rows, files

STEPS, EVERY, KILLED = 60, 20, 25
EXACT = (
    *("--deterministic", "--steps", STEPS, "--global_batch_size", 32, "--micro_batch_size", 4, "--log.every", 1),
    *("--model.vision_blocks", 0, "--model.chunk_size", 8, "--optim.lr", 1e-4, "--optim.warmup_steps", 5),
    *("--eval.every", 0, "--eval.samples", 33, "--checkpoint.every", EVERY, "--checkpoint.keep", 9),
)
SMALLER = ("--model.width", 32, "--model.attention_heads", 2, "--model.language_layers", 2, "--model.head_layers", 2)
UNFROZEN = ("--model.freeze", "language_model", "--model.unfreeze", "language_model", 8)
RUNS = {  # by name: the run from whose last checkpoint but one it goes on, if any; YAML; more flags
    "DDP": (None, "4gpu", ()),
    "FSDP": (None, "4gpu_fsdp", ()),
    "FSDP, killed": (None, "4gpu_fsdp", ()),
    "FSDP, killed, resumed": ("FSDP, killed", "4gpu_fsdp", ()),
    "FSDP, then 1 process": ("FSDP", "1gpu", ()),
    "FSDP, then DDP": ("FSDP", "4gpu", ()),
    "DDP, then FSDP": ("DDP", "4gpu_fsdp", ()),
    "FSDP, offloaded": (None, "4gpu_fsdp_offload", ()),
    "DDP, unfrozen": (None, "4gpu", UNFROZEN),
    "FSDP, unfrozen": (None, "4gpu_fsdp", UNFROZEN),
}
LARGE = (
    *("--model.random_backbone", "--model.width", 512, "--model.head_layers", 8, "--model.chunk_size", 50),
    *("--steps", 100_000, "--eval.every", 0, "--log.every", 1, "--checkpoint.keep", 1),
    *("--optim.ema", 0, "--optim.lr", 1e-4, "--optim.warmup_steps", 10),
)
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (commands.add_parser("exact"), large_command := commands.add_parser("large")):
        command.add_argument("--processes", type=int, default=2)
        command.add_argument("--cpu", action="store_true", help="on the CPU; exact with a smaller policy")
        command.add_argument("--out", required=True, help="for all figures as JSON")
    large_command.add_argument("architecture", choices=[*architectures.REAL, "tiny"])
    large_command.add_argument("--batch", type=int, default=32, help="samples of a step, of all processes together")
    large_command.add_argument("--steps", type=int, default=24)
    large_command.add_argument("--save", type=int, default=10, help="step of the checkpoint")
    large_command.add_argument("--yaml", choices=["4gpu_fsdp", "4gpu_fsdp_offload"], default="4gpu_fsdp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        collect = [sys.executable, "-m", "vla.collect", "tabletop", "--out", f"{folder}/data", "--episodes", "40"]
        subprocess.run(collect, cwd=architectures.ROOT, check=True, capture_output=True)
        print(
            f"{'run':<22} {'steps':>7} {'seconds':>7} {'to first':>8} {'peak GB':>7} {'samples/s':>9} {'losses':>8} "
            f"{'weights':>8} same bits"
        )
        (exact if options.command == "exact" else large)(options, Path(folder))


def exact(options: argparse.Namespace, folder: Path) -> None:
    """Every mode, and every change of mode."""
    found: dict[str, dict] = {}
    new = ["--data.path", folder / "data", *EXACT, *(SMALLER if options.cpu else ())]
    for name, (begun, yaml, more) in RUNS.items():
        run, reference = folder / name, folder / ("DDP, unfrozen" if more else "DDP")
        if begun:
            shutil.copytree(folder / begun, run, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}"))
        flags = ["--resume_from", run] if begun else [*new, "--run_dir", run, *more]
        figures = found[name] = train(options, run, yaml, flags, KILLED if name == "FSDP, killed" else None, True)
        ours, others = losses(run), losses(reference)
        figures["loss_difference"] = max(abs(value - others[place]) for place, value in ours.items())
        ours, others, step = tensors(run, newest(run)), tensors(reference, newest(run)), newest(run)
        weights = [key for key in ours if key[0] == "model"]
        figures["weight_difference"] = max((ours[key] - others[key]).abs().max().item() for key in weights)
        if name not in ("DDP", "FSDP") and not more:
            others = tensors(folder / "FSDP", step)
            same = all(bits(ours[key]).equal(bits(others[key])) for key in ours.keys() & others.keys())
            figures["same_bits"] = same and losses(run).items() <= losses(folder / "FSDP").items()
        tell(options, name, runs=found, parameters=sum(ours[key].numel() for key in weights))


def large(options: argparse.Namespace, folder: Path) -> None:
    """One policy of real size: its memory, its speed, its checkpoint."""
    whole, run, backbone = folder / "whole", folder / "run", folder / options.architecture
    if options.architecture == "tiny":
        architectures.tiny.vlm("paligemma", backbone)
    else:
        architectures.write(options.architecture, backbone)
    new = ["--data.path", folder / "data", "--model.backbone", backbone, "--global_batch_size", options.batch, *LARGE]
    saved, unsaved = ("--checkpoint.every", options.save), ("--checkpoint.every", 10**6)
    again, found, until = ["--resume_from", run, *unsaved], {}, options.steps
    for name, yaml, flags in (
        ("not stopped", options.yaml, [*new, "--run_dir", whole, *unsaved]),
        ("saved, killed", options.yaml, [*new, "--run_dir", run, *saved]),
        ("resumed", options.yaml, again),
        ("resumed by 1 process", "1gpu", again),
    ):
        saving = name == "saved, killed"
        where = whole if name == "not stopped" else run
        figures = found[name] = train(options, where, yaml, flags, options.save + 3 if saving else until, saving)
