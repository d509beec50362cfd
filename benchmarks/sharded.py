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
import platform
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
        run, reference, killed = folder / name, folder / ("DDP, unfrozen" if more else "DDP"), name == "FSDP, killed"
        if begun:
            shutil.copytree(folder / begun, run, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}"))
        flags = ["--resume_from", run] if begun else [*new, "--run_dir", run, *more]
        figures = found[name] = train(options, run, yaml, flags, KILLED if killed else None, saved=killed)
        step, logged = newest(run), losses(run)
        ours, others = tensors(run, step), tensors(reference, step)
        weights = [key for key in ours if key[0] == "model"]
        figures["weight_difference"] = max((ours[key] - others[key]).abs().max().item() for key in weights)
        figures["loss_difference"] = max(abs(value - losses(reference)[place]) for place, value in logged.items())
        if name not in ("DDP", "FSDP") and not more:
            others = tensors(folder / "FSDP", step)
            same = all(
                ours[key].numpy().tobytes() == others[key].numpy().tobytes() for key in ours.keys() & others.keys()
            )
            figures["same_bits"] = same and logged.items() <= losses(folder / "FSDP").items()
        show(name, figures)
        write(options, parameters=sum(ours[key].numel() for key in weights), runs=found)


def large(options: argparse.Namespace, folder: Path) -> None:
    """One policy of real size: its memory, its speed, its checkpoint."""
    whole, run, backbone = folder / "whole", folder / "run", folder / options.architecture
    if options.architecture == "tiny":
        architectures.tiny.vlm("paligemma", backbone)
    else:
        architectures.write(options.architecture, backbone)
    new = ["--data.path", folder / "data", "--model.backbone", backbone, "--global_batch_size", options.batch, *LARGE]
    unsaved = ("--checkpoint.every", 10**6)
    again, found = ["--resume_from", run, *unsaved], {}

    def measure(name: str, run: Path, yaml: str, flags: list, until: int, saved: bool = False) -> None:
        figures = found[name] = train(options, run, yaml, flags, until, saved)
        expected = found["not stopped"]["losses"]
        both = figures["losses"].keys() & expected.keys()
        figures["loss_difference"] = max(abs(figures["losses"][step] - expected[step]) for step in both)
        show(name, figures)
        write(options, runs=found)

    measure("not stopped", whole, options.yaml, [*new, "--run_dir", whole, *unsaved], options.steps)
    saving = [*new, "--run_dir", run, "--checkpoint.every", options.save]
    measure("saved, killed", run, options.yaml, saving, options.save + 3, saved=True)
    measure("resumed", run, options.yaml, again, options.steps)
    measure("resumed by 1 process", run, "1gpu", again, options.steps)

    step, save = newest(run), found["saved, killed"]["saves"][0]
    sizes = {path.name: path.stat().st_size for path in sorted(at(run, step).iterdir())}
    exported = export(at(run, step), folder / "export")
    write(options, parameters=exported["parameters"], runs=found, checkpoint=save | {"files": sizes}, export=exported)
    shown = [*range(step + 1, options.steps, max(1, (options.steps - step) // 4)), options.steps]
    print(f"{'losses of steps':<22}", *(f"{number:>9}" for number in shown))
    for name in ("not stopped", "resumed", "resumed by 1 process"):
        print(f"{name:<22}", *(f"{found[name]['losses'][number]:9.6f}" for number in shown))
    print(
        f"saved {sum(sizes.values()) / 1e9:.2f} GB in files of at most {max(sizes.values()) / 1e9:.2f} GB: training "
        f"waited {save['save/blocked_seconds']:.2f} s, all was on the disk after {save['save/commit_seconds']:.1f} s\n"
        f"exported {exported['parameters']:,} parameters in {exported['seconds']:.1f} s by one process, "
        f"of at most {exported['peak_gb']:.2f} GB of anonymous memory"
    )


def train(
    options: argparse.Namespace, run: Path, yaml: str, flags: list, until: int | None = None, saved: bool = False
) -> dict:
    """Run train.py to its end, or kill it when step `until` and, with `saved`, a save are logged. Its figures.

    Exits with what the run said last if it failed, or ended before.
    """
    begun, rows, first = newest(run), [], None
    metrics, processes = run / "metrics.jsonl", 1 if yaml == "1gpu" else options.processes
    if metrics.exists():  # later lines are of the run before
        metrics.write_text("".join(f"{json.dumps(row)}\n" for row in logged(run) if row["step"] <= begun))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{yaml}.yaml"]
    command += ["--num_processes", processes, "--main_process_port", 0, "train.py", *flags]  # port 0: any that is free
    with tempfile.TemporaryFile("w+") as said:
        env, began = os.environ | (ON_CPU if options.cpu else {}), time.perf_counter()
        job = psutil.Popen([*map(str, command)], cwd=architectures.ROOT, env=env, stdout=said, stderr=said)
        try:
            while (code := job.poll()) is None:
                rows = [row for row in logged(run) if row["step"] > begun]
                first = first or (rows and time.perf_counter() - began)
                if until and rows and rows[-1]["step"] >= until and (not saved or any("save/bytes" in r for r in rows)):
                    break
                time.sleep(0.05)
        finally:
            kill(job)
        seconds = time.perf_counter() - began
        if code or (until and code == 0):
            said.seek(0)
            sys.exit(f"the run ended with exit code {code}:\n{said.read()[-5000:]}")
    rows = [row for row in logged(run) if row["step"] > begun]
    steps = [row for row in rows if "train/loss" in row]
    return {
        "yaml": yaml,
        "processes": processes,
        "from_step": begun,
        "to_step": steps[-1]["step"],
        "seconds": seconds,
        "seconds_to_first_step": first,
        "peak_gb": max((row["memory/peak_gb"] for row in steps if "memory/peak_gb" in row), default=None),
        "samples_per_second": statistics.median(row["perf/samples_per_second"] for row in steps),
        "losses": {row["step"]: row["train/loss"] for row in steps},
        "saves": [row for row in rows if "save/bytes" in row],
    }


def kill(job: psutil.Popen) -> None:
    """SIGKILL to a launcher, its processes, which torch gives sessions of their own, and their workers."""
    if job.poll() is None:
        everyone = [job, *job.children(recursive=True)]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=30)  # what they held of the GPU is free then


def export(checkpoint: Path, out: Path) -> dict:
    """Export a checkpoint in a process of its own. Its seconds, and its peak of memory but for pages of mapped files."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "vla.export", checkpoint, "--out", out]
    with subprocess.Popen(command, cwd=architectures.ROOT, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            if anonymous := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{job.pid}/status").read_text()):
                peak = max(peak, int(anonymous[1]) * 1024)
            time.sleep(0.02)
    if job.returncode:
        sys.exit(f"the export ended with exit code {job.returncode}")
    shapes = Rows.of(out, "model")
    parameters = sum(math.prod(shapes.shape(name)) for name in shapes.parts)
    return {"seconds": time.perf_counter() - began, "peak_gb": peak / 1e9, "parameters": parameters}


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def newest(run: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name[-8:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def logged(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole."""
    lines = (run / "metrics.jsonl").read_text().splitlines(True) if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> dict[tuple[str, int], float]:
    names = ("train/loss", "eval/loss")
    return {(name, row["step"]): row[name] for row in logged(run) for name in names if name in row}


def tensors(run: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors of a checkpoint by kind and name: weights, averages and, if it is sharded, moments."""
    found = {}
    for kind in ("model", "ema", "optimizer"):
        rows = Rows.of(at(run, step), kind) if files(at(run, step), kind) else Rows({})
        for name in rows.parts:
            found[kind, name] = torch.empty(rows.shape(name), dtype=torch.float64)
            rows.read(name, found[kind, name])
    return found


def show(name: str, figures: dict) -> None:
    steps, same = f"{figures['from_step']}-{figures['to_step']}", figures.get("same_bits")
    numbers = ("seconds", "7.1f"), ("seconds_to_first_step", "8.1f"), ("peak_gb", "7.2f")
    numbers += ("samples_per_second", "9.1f"), ("loss_difference", "8.1e"), ("weight_difference", "8.1e")
    cells = [
        f"{'-':>{form.split('.')[0]}}" if figures.get(key) is None else f"{figures[key]:{form}}"
        for key, form in numbers
    ]
    print(f"{name:<22} {steps:>7}", *cells, {None: "-", True: "yes", False: "no"}[same], flush=True)


def write(options: argparse.Namespace, **figures) -> None:
    on_gpu = torch.cuda.is_available() and not options.cpu
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    setting |= {"device": torch.cuda.get_device_name() if on_gpu else platform.machine()}
    setting |= {"torch": torch.__version__, "accelerate": accelerate.__version__}
    Path(options.out).write_text(json.dumps(setting | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
