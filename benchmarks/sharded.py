"""What sharding a policy over N processes (FSDP2) costs, and what it keeps.

    python benchmarks/sharded.py exact --processes 2 --out exact.json
    python benchmarks/sharded.py large paligemma-3b --processes 2 --out large.json      # also --yaml 4gpu_fsdp_offload

exact: a small policy with --deterministic, beside DDP, in every mode and through every change of mode. same_bits: its
losses, weights, averages and, where sharded, moments are those of the run that was sharded from start to end.
large: an architecture of real size (benchmarks/architectures.py) with random weights, sharded: not stopped; saved and
killed; resumed, also by one process that holds it whole; exported from the sharded checkpoint.

Kills are SIGKILL, to all processes at once. to_first: seconds to the first step; peak_gb: as torch allocated on the
main process's GPU; d_losses, d_weights: largest absolute differences, those of weights in the newest checkpoint.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import architectures
import psutil
import torch

from vla.checkpoint import versions
from vla.shards import Rows, files

COLUMNS = ("from", "to", "seconds", "to_first", "peak_gb", "samples/s", "d_losses", "d_weights", "same_bits")
EXACT = (
    "--deterministic --steps 45 --global_batch_size 32 --micro_batch_size 4 --log.every 1 --model.vision_blocks 0 "
    "--model.chunk_size 8 --optim.lr 1e-4 --optim.warmup_steps 5 --eval.every 0 --eval.samples 33 "
    "--checkpoint.every 15 --checkpoint.keep 9"
)
KILLED, LAST = 20, "step_00000045"
SMALLER = " --model.width 32 --model.attention_heads 2 --model.language_layers 2 --model.head_layers 2"
UNFROZEN = "--model.freeze language_model --model.unfreeze language_model 8"
RUNS = {  # by name: the run from whose last checkpoint but one it goes on, if any; YAML; more flags
    "DDP": ("", "4gpu", ""),
    "FSDP": ("", "4gpu_fsdp", ""),
    "FSDP, killed": ("", "4gpu_fsdp", ""),
    "FSDP, killed, resumed": ("FSDP, killed", "4gpu_fsdp", ""),
    "FSDP, then 1 process": ("FSDP", "1gpu", ""),
    "FSDP, then DDP": ("FSDP", "4gpu", ""),
    "DDP, then FSDP": ("DDP", "4gpu_fsdp", ""),
    "FSDP, offloaded": ("", "4gpu_fsdp_offload", ""),
    "DDP, unfrozen": ("", "4gpu", UNFROZEN),
    "FSDP, unfrozen": ("", "4gpu_fsdp", UNFROZEN),
}
LARGE = (
    "--model.random_backbone --model.width 512 --model.head_layers 8 --model.chunk_size 50 --steps 100000 "
    "--eval.every 0 --log.every 1 --checkpoint.keep 1 --optim.ema 0 --optim.lr 1e-4 --optim.warmup_steps 10"
)
UNSAVED = "--checkpoint.every 1000000"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (commands.add_parser("exact"), of_large := commands.add_parser("large")):
        command.add_argument("--processes", type=int, default=2)
        command.add_argument("--cpu", action="store_true", help="without GPUs; exact: with a smaller policy")
        command.add_argument("--out", required=True, help="for all figures as JSON")
    of_large.add_argument("architecture", choices=[*architectures.REAL, "tiny"])
    of_large.add_argument("--batch", type=int, default=32, help="samples of a step, over all processes")
    of_large.add_argument("--steps", type=int, default=24)
    of_large.add_argument("--save", type=int, default=10, help="step of the checkpoint")
    of_large.add_argument("--yaml", choices=["4gpu_fsdp", "4gpu_fsdp_offload"], default="4gpu_fsdp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        collect = [sys.executable, "-m", "vla.collect", "tabletop", "--out", f"{folder}/data", "--episodes", "40"]
        subprocess.run(collect, cwd=architectures.ROOT, check=True, capture_output=True)
        print(f"{'run':<21}", *(f"{column:>9}" for column in COLUMNS), flush=True)
        (exact if options.command == "exact" else large)(options, Path(folder))


def exact(options: Namespace, folder: Path) -> None:
    """Every mode, and every change of mode."""
    found: dict[str, dict] = {}
    for name, (begun, yaml, more) in RUNS.items():
        flags = "" if begun else f"{EXACT} {SMALLER if options.cpu else ''} {more}"
        row = found[name] = train(options, folder, name, begun, yaml, flags, KILLED if name == "FSDP, killed" else None)
        reference, last = "DDP, unfrozen" if more else "DDP", max((folder / name).glob("checkpoints/step_*")).name
        ours, ddp, fsdp = (tensors(folder / run / "checkpoints" / last) for run in (name, reference, "FSDP"))
        weights = [key for key in ours if key[0] == "model"]
        row["d_weights"] = max((ours[key] - ddp[key]).abs().max().item() for key in weights)
        if name not in ("DDP", "FSDP") and not more:
            same = all(ours[key].numpy().tobytes() == fsdp[key].numpy().tobytes() for key in ours)
            row["same_bits"] = same and row["losses"].items() <= found["FSDP"]["losses"].items()
        tell(options, found, name, reference, parameters=sum(ours[key].numel() for key in weights))


def large(options: Namespace, folder: Path) -> None:
    """One policy of real size: its memory, its speed, its checkpoint."""
    found, backbone = {}, folder / options.architecture
    if options.architecture == "tiny":
        architectures.tiny.vlm("paligemma", backbone)
    else:
        architectures.write(options.architecture, backbone)
    new = f"{LARGE} --model.backbone {backbone} --global_batch_size {options.batch}"
    for name, begun, yaml, flags, until in (
        ("not stopped", "", options.yaml, f"{new} {UNSAVED}", options.steps),
        ("killed", "", options.yaml, f"{new} --checkpoint.every {options.save}", options.save + 3),
        ("resumed", "killed", options.yaml, UNSAVED, options.steps),
        ("resumed by 1 process", "killed", "1gpu", UNSAVED, options.steps),
    ):
        found[name] = train(options, folder, name, begun, yaml, flags, until)
        tell(options, found, name, "not stopped")
    checkpoint = max((folder / "killed").glob("checkpoints/step_*"))
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())}
    figures = found["killed"]["save"] | {"save/largest_file": max(sizes.values())}
    figures |= export(checkpoint, folder / "export")
    tell(options, found, **figures, files=sizes)
    steps = [step for step in found["resumed by 1 process"]["losses"] if step <= options.steps]
    for name in ("not stopped", "resumed", "resumed by 1 process"):
        print(f"{name:<21} losses", *(f"{found[name]['losses'][step]:.6f}" for step in steps[::3]))
    print(", ".join(f"{what} {value:.4g}" for what, value in figures.items()))


def train(options: Namespace, folder: Path, name: str, begun: str, yaml: str, flags: str, until: int | None) -> dict:
    """Figures of a run, new or gone on with elsewhere; killed after step `until` and, if its name says so, a save."""
    run, processes, first = folder / name, 1 if yaml == "1gpu" else options.processes, None
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{yaml}.yaml"]
    command += ["--num_processes", processes, "--main_process_port", 0, "train.py", *flags.split()]  # 0: any free one
    command += ["--resume_from", run] if begun else ["--data.path", folder / "data", "--run_dir", run]
    if begun:  # in a folder of its own, with links, as checkpoints are large
        left_out = ["metrics.jsonl", "result.json", *([LAST] if (folder / begun / "result.json").exists() else [])]
        shutil.copytree(folder / begun, run, copy_function=os.link, ignore=shutil.ignore_patterns(*left_out))
    with tempfile.TemporaryFile("w+") as said:
        env, began = os.environ | (ON_CPU if options.cpu else {}), time.perf_counter()
        job = psutil.Popen([*map(str, command)], cwd=architectures.ROOT, env=env, stdout=said, stderr=said)
        ended = enough = False
        while not ended and not enough:
            time.sleep(0.05)
            ended = job.poll() is not None  # asked first, so that then all rows are there
            text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
            save = next(({key: row[key] for key in row if key != "step"} for row in rows if "save/bytes" in row), None)
            first = first or (time.perf_counter() - began if rows else None)
            enough = bool(until and rows and rows[-1]["step"] >= until and (save or not name.endswith("killed")))
        everyone = [] if ended else [job, *job.children(recursive=True)]  # torch starts them in sessions of their own
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        seconds = time.perf_counter() - began
        psutil.wait_procs(everyone, timeout=30)  # then the GPUs are free
        if job.returncode if until is None else not enough:
            said.seek(0)
            sys.exit(f"{name}: train.py ended with exit code {job.returncode}:\n{said.read()[-5000:]}")
    steps = [row for row in rows if "train/loss" in row]
    peak = max(row.get("memory/peak_gb", 0) for row in steps) or None
    figures = {"yaml": yaml, "processes": processes, "from": steps[0]["step"] - 1, "to": steps[-1]["step"]}
    figures |= {"seconds": seconds, "to_first": first, "peak_gb": peak, "save": save}
    figures["samples/s"] = statistics.median(row["perf/samples_per_second"] for row in steps)
    return figures | {"losses": {row["step"]: row["train/loss"] for row in steps}}


def export(checkpoint: Path, out: Path) -> dict[str, float]:
    """Export in one process: seconds, and the peak of its anonymous memory (files that it maps do not count)."""
    began, peak, command = time.perf_counter(), 0, [sys.executable, "-m", "vla.export", checkpoint, "--out", out]
    job = psutil.Popen(command, cwd=architectures.ROOT, stdout=subprocess.DEVNULL)
    while job.poll() is None:
        peak = max(peak, (memory := job.memory_info()).rss - memory.shared)
        time.sleep(0.02)
    if job.returncode:
        sys.exit(f"the export ended with exit code {job.returncode}")
    return {"export/seconds": time.perf_counter() - began, "export/peak_gb": peak / 1e9}


def tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Its whole tensors by kind and name; moments only where they are sharded."""
    found = {}
    for kind in (kind for kind in ("model", "ema", "optimizer") if files(checkpoint, kind)):
        rows = Rows.of(checkpoint, kind)
        for name in rows.parts:
            found[kind, name] = torch.empty(rows.shape(name), dtype=torch.float64)
            rows.read(name, found[kind, name])
    return found


def tell(options: Namespace, found: dict, name: str = "", reference: str = "", **figures) -> None:
    """Write all figures; of a run also how far its losses are from those of another, and print its row."""
    if name:
        row, expected = found[name], found[reference]["losses"]
        row["d_losses"] = max(abs(loss - expected[step]) for step, loss in row["losses"].items() if step in expected)
        cells = ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, COLUMNS)]
        print(f"{name:<21}", *(f"{cell!s:>9}" for cell in cells), flush=True)
    setting = vars(options) | {"out": Path(options.out).name, "versions": versions()}
    Path(options.out).write_text(json.dumps(setting | figures | {"runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
