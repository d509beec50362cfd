"""What sharding a policy over N processes (FSDP2) costs, and what it keeps.

    python benchmarks/sharded.py exact --processes 2 --out exact.json
    python benchmarks/sharded.py large paligemma-3b --processes 2 --out large.json      # also --yaml 4gpu_fsdp_offload

exact: a small policy with --deterministic, beside DDP, in every mode and through every change of mode. same_bits: its
losses, weights, averages and, where sharded, moments are those of the run that was sharded from start to end.
large: an architecture of real size (benchmarks/architectures.py) with random weights, sharded: not stopped; saved and
killed; resumed, also by one process that holds it whole; exported from the sharded checkpoint.

d_losses, d_weights: largest absolute differences, those of weights in the newest checkpoint.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import architectures
import psutil
import torch
from launched import ROOT, UNSAVED, collect, train

from vla.checkpoint import versions
from vla.shards import Rows, files

COLUMNS = ("from", "to", "seconds", "to_first", "peak_gb", "samples/s", "d_losses", "d_weights", "same_bits")
EXACT = (
    "--deterministic --steps 45 --global_batch_size 32 --micro_batch_size 4 --log.every 1 --model.vision_blocks 0 "
    "--model.chunk_size 8 --optim.lr 1e-4 --optim.warmup_steps 5 --eval.every 0 --eval.samples 33 "
    "--checkpoint.every 15 --checkpoint.keep 9"
)
KILLED = 20
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
        collect(Path(folder, "data"), 40)
        print(f"{'run':<21}", *(f"{column:>9}" for column in COLUMNS), flush=True)
        (exact if options.command == "exact" else large)(options, Path(folder))


def exact(options: Namespace, folder: Path) -> None:
    """Every mode, and every change of mode."""
    found: dict[str, dict] = {}
    for name, (begun, yaml, more) in RUNS.items():
        flags = "" if begun else f"{EXACT} {SMALLER if options.cpu else ''} {more} --data.path {folder / 'data'}"
        killed = {"until": KILLED, "saved": True} if name == "FSDP, killed" else {}
        processes = 1 if yaml == "1gpu" else options.processes
        where = {"yaml": yaml, "processes": processes, "cpu": options.cpu, "begun": begun and folder / begun}
        row = found[name] = train(folder / name, flags, **where, **killed)
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
    new = f"{LARGE} --data.path {folder / 'data'} --model.backbone {backbone} --global_batch_size {options.batch}"
    for name, begun, yaml, flags, until in (
        ("not stopped", "", options.yaml, f"{new} {UNSAVED}", options.steps),
        ("killed", "", options.yaml, f"{new} --checkpoint.every {options.save}", options.save + 3),
        ("resumed", "killed", options.yaml, UNSAVED, options.steps),
        ("resumed by 1 process", "killed", "1gpu", UNSAVED, options.steps),
    ):
        processes = 1 if yaml == "1gpu" else options.processes
        where = {"yaml": yaml, "processes": processes, "cpu": options.cpu, "begun": begun and folder / begun}
        found[name] = train(folder / name, flags, **where, until=until, saved=name == "killed")
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


def export(checkpoint: Path, out: Path) -> dict[str, float]:
    """Export in one process: seconds, and the peak of its anonymous memory (files that it maps do not count)."""
    began, peak, command = time.perf_counter(), 0, [sys.executable, "-m", "vla.export", checkpoint, "--out", out]
    job = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
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
