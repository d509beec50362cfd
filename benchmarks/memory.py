"""What fits where: train.py on architectures of real size with random weights, its peak memory and its speed.

    python benchmarks/memory.py smolvlm2-500m:full:1gpu:1:32 paligemma-3b:lora:1gpu:1:32 --out memory.json

Each row is architecture (benchmarks/architectures.py), what is trained, accelerate config, processes, samples of one
process at once; e.g. paligemma-3b:full:4gpu_fsdp:2:16. A run of 50 steps on the tabletop's pictures is killed at its
end: what is measured is training, not saving. Peak memory is the main process's, as torch allocated it.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import architectures
import psutil

STEPS, EVERY = 50, 10
ADAPTERS = ("--lora.rank", "16", "--model.freeze", "vision_encoder")
TRAINED = {
    "full": (),
    "recomputed": ("--model.gradient_checkpointing",),
    "frozen": ("--model.freeze", "vision_encoder", "language_model"),
    "lora": ADAPTERS,
    "lora_recomputed": (*ADAPTERS, "--model.gradient_checkpointing"),
    "lora_bf16": (*ADAPTERS, "--model.frozen_dtype", "bfloat16"),
    "frozen_bf16": ("--model.freeze", "vision_encoder", "language_model", "--model.frozen_dtype", "bfloat16"),
}
HEAD = ("--model.width", "512", "--model.head_layers", "8", "--model.chunk_size", "50")
RUN = ("--steps", "100000", "--eval.every", "0", "--checkpoint.every", "1000000", "--log.every", EVERY)
OPTIM = ("--optim.ema", "0", "--optim.lr", "1e-4", "--optim.warmup_steps", "10", "--model.random_backbone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--data", default="data/memory", help="demonstrations; collected if there are none")
    parser.add_argument("--flags", default="", help="more flags for train.py")
    parser.add_argument("--out", help="for the figures as JSON")
    options = parser.parse_args()
    if not Path(options.data).exists():
        collect = [sys.executable, "-m", "vla.collect", "tabletop", "--out", options.data, "--episodes", "200"]
        subprocess.run(collect, check=True, capture_output=True)
    found = []
    print(f"{'row':<48} {'parameters':>13} {'trained':>13} {'peak GB':>8} {'samples/s':>9}  loss", flush=True)
    for row in options.rows:
        result = {"row": row} | measure(row, options.data, options.flags.split())
        found.append(result)
        shown = (result["parameters"], result["trained"], result["peak_gb"], result["samples_per_second"])
        losses = " ".join(f"{loss:.3f}" for loss in result["losses"])
        print(
            f"{row:<48} {shown[0]:>13} {shown[1]:>13} {shown[2]:>8} {shown[3]:>9}  {losses}{result['error']}",
            flush=True,
        )
        if options.out:
            Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def measure(row: str, data: str, flags: list[str]) -> dict:
    """The figures of one row; with what the run said last, if it failed."""
    name, trained, where, processes, batch = row.split(":")
    folder = Path(tempfile.mkdtemp())
    architectures.write(name, folder / name)
    yaml = architectures.ROOT / f"accelerate_configs/{where}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", yaml, "--num_processes", processes]
    command += [
        architectures.ROOT / "train.py",
        "--data.path",
        data,
        "--run_dir",
        folder / "run",
        "--model.backbone",
        folder / name,
    ]
    command += ["--global_batch_size", int(batch) * int(processes), *HEAD, *RUN, *OPTIM, *TRAINED[trained], *flags]
    said = (folder / "said").open("w+")
    job = psutil.Popen(list(map(str, command)), stdout=said, stderr=said)
    logged = []
    while job.poll() is None and len(logged) < STEPS // EVERY:
        time.sleep(0.5)
        metrics = folder / "run/metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        logged = [row for row in map(json.loads, lines) if "train/loss" in row]
    everyone = [*job.children(recursive=True), job] if job.poll() is None else []
    for process in everyone:  # torch starts them in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everyone, timeout=30)  # then the GPUs are free
    said.seek(0)
    words = said.read()
    counts = next((line.split() for line in words.splitlines() if line.startswith("policy ")), ["?"] * 9)
    complete = len(logged) >= STEPS // EVERY
    last = logged[-1] if logged else {}
    shutil.rmtree(folder)
    return {
        "parameters": counts[5],
        "trained": counts[3],
        "peak_gb": round(last.get("memory/peak_gb", 0), 1),
        "samples_per_second": round(last.get("perf/samples_per_second", 0), 1),
        "losses": [row["train/loss"] for row in logged],
        "error": "" if complete else "out of memory" if "out of memory" in words else words[-1500:],
    }


if __name__ == "__main__":
    main()
