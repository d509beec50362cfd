"""Runs of train.py under `accelerate launch`, for the benchmarks: started, watched, killed, gone on with."""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # where `vla` is, for the scripts beside this one
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
UNSAVED = "--checkpoint.every 1000000"


class FailedError(RuntimeError):
    """A run that ended where it should not. Its text is what it said last."""


def collect(out: Path, episodes: int, image_size: int = 64) -> None:
    """Demonstrations of the tabletop. image_size: height and width of the pictures."""
    command = [sys.executable, "-m", "vla.collect", "tabletop", "--out", out, "--episodes", episodes]
    subprocess.run([*map(str, command), "--image_size", str(image_size)], cwd=ROOT, check=True, capture_output=True)


def train(
    run: Path,
    flags: str,
    *,
    yaml: str = "1gpu",
    processes: int = 1,
    begun: Path | None = None,
    until: int | None = None,
    saved: bool = False,
    cpu: bool = False,
    compiling: bool = False,
) -> dict:
    """Figures of a run, new or gone on with from a copy of another's folder, to its end or killed after step `until`.

    saved: not killed before a checkpoint was written either. Kills are SIGKILL, to all processes at once. to_first:
    seconds from the command to the first step logged; peak_gb: as torch allocated on the main process's GPU;
    samples/s: median over the lines of the log. compiling: also how often torch.compile made another program of a
    function (recompiled), and how often it gave up within one (graph_breaks). Raises FailedError.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{yaml}.yaml"]
    command += ["--num_processes", processes, "--main_process_port", 0, "train.py", *flags.split()]  # 0: any free one
    command += ["--resume_from" if begun else "--run_dir", run]
    if begun:  # in a folder of its own, with links, as checkpoints are large
        ended = (begun / "result.json").exists()  # then its last checkpoint leaves nothing to do
        last = max(begun.glob("checkpoints/step_*")).name if ended else ""
        left_out = shutil.ignore_patterns("metrics.jsonl", "result.json", last)
        shutil.copytree(begun, run, copy_function=os.link, ignore=left_out)
    first = None
    with tempfile.TemporaryFile("w+") as said:
        env = os.environ | (ON_CPU if cpu else {})
        env |= {"TORCH_LOGS": "recompiles,graph_breaks"} if compiling else {}
        began = time.perf_counter()
        job = psutil.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=said, stderr=said)
        ended = enough = False
        while not ended and not enough:
            time.sleep(0.05)
            ended = job.poll() is not None  # asked first, so that then all rows are there
            text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
            save = next(({key: row[key] for key in row if key != "step"} for row in rows if "save/bytes" in row), None)
            first = first or (time.perf_counter() - began if rows else None)
            enough = bool(until and rows and rows[-1]["step"] >= until and (save or not saved))
        everyone = [] if ended else [job, *job.children(recursive=True)]  # torch starts them in sessions of their own
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        seconds = time.perf_counter() - began
        psutil.wait_procs(everyone, timeout=30)  # then the GPUs are free
        said.seek(0)
        words = said.read()
    if job.returncode if until is None else not enough:
        raise FailedError(f"{run.name}: train.py ended with exit code {job.returncode}:\n{words[-5000:]}")
    steps = [row for row in rows if "train/loss" in row]
    trained, parameters = re.search(r"([\d,]+) of ([\d,]+) parameters trained", words).groups()
    figures = {"yaml": yaml, "processes": processes, "from": steps[0]["step"] - 1, "to": steps[-1]["step"]}
    figures |= {"seconds": seconds, "to_first": first, "save": save, "parameters": parameters, "trained": trained}
    figures["peak_gb"] = max(row.get("memory/peak_gb", 0) for row in steps) or None
    figures["data_wait"] = statistics.median(row["perf/data_wait_share"] for row in steps)
    figures["samples/s"] = statistics.median(row["perf/samples_per_second"] for row in steps)
    if compiling:
        figures["recompiled"] = words.count("Recompiling function")
        figures["graph_breaks"] = words.count("Graph break in user code")
    return figures | {"losses": {row["step"]: row["train/loss"] for row in steps}}
