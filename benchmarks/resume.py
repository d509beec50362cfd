"""How long a run takes to go on: from the command to its first step, at step 10 and at step 1,000,000, in turns.

    python benchmarks/resume.py --data data/demo

The checkpoint of step 1,000,000 is that of step 10 with another number, beside a log as long as such a run's. Samples
come 100 at a time, so the stream is at position 10^8. Then the same without a process around it: the first batch of a
stream over 10^8 frames in 10^6 episodes, at its start and at its end.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from launched import ROOT

from vla.config import ModelConfig
from vla.data.loader import loader
from vla.data.mixture import Mixture
from vla.data.stream import Samples, training_positions
from vla.model.backbone import LanguageModel

STEPS, BATCH = (10, 1_000_000), 100
SMALL = (
    "--model.width 32 --model.attention_heads 2 --model.vision_blocks 0 --model.language_layers 1 --model.head_layers 1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    settings = f"{SMALL} --global_batch_size {BATCH} --log.every 1 --eval.every 0 --data.workers 1".split()
    train("--data.path", options.data, "--run_dir", folder / "10", "--steps", STEPS[0], *settings).wait()
    advance(shutil.copytree(folder / "10", folder / "1000000"))

    seconds: dict[int, list[float]] = {step: [] for step in STEPS}
    for _ in range(options.repeats):
        for step in STEPS:
            run = Path(shutil.copytree(folder / str(step), folder / "run"))
            seconds[step].append(to_first_step(run, step))
            shutil.rmtree(run)
    for step in STEPS:
        rounded = ", ".join(f"{value:.2f}" for value in seconds[step])
        print(
            f"command to first step after step {step:>9,}: median {statistics.median(seconds[step]):.2f} s ({rounded})"
        )
    print(f"ratio {statistics.median(seconds[STEPS[1]]) / statistics.median(seconds[STEPS[0]]):.3f}")

    samples, places = long_stream(), {"start": 0, "end": 10**8 // BATCH - 2}
    for name, step in places.items():
        first = statistics.median(first_batch(samples, step) for _ in range(20))
        print(f"first batch at the {name} of a stream over 10^8 frames: {first * 1e3:.2f} ms")
    shutil.rmtree(folder)


def train(*flags) -> subprocess.Popen:
    """train.py in a process of its own, with this repository's code."""
    command = [sys.executable, "train.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def advance(run: str) -> None:
    """Make a run's checkpoint of step 10 one of step 1,000,000, and its log as long."""
    old, new = Path(run, "checkpoints/step_00000010"), Path(run, "checkpoints/step_01000000")
    old.rename(new)
    state, manifest = (
        json.loads((new / "trainer_state.json").read_text()),
        json.loads((new / "MANIFEST.json").read_text()),
    )
    content = json.dumps(state | {"step": STEPS[1]}).encode()
    (new / "trainer_state.json").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["trainer_state.json"] = entry
    (new / "MANIFEST.json").write_text(json.dumps(manifest))
    line = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[0])
    with Path(run, "metrics.jsonl").open("w") as log:
        log.writelines(json.dumps(line | {"step": step}) + "\n" for step in range(50, STEPS[1] + 1, 50))


def to_first_step(run: Path, step: int) -> float:
    """Seconds from the command until the step after `step` is logged."""
    log = run / "metrics.jsonl"
    began = time.perf_counter()
    process = train("--resume_from", run, "--steps", step + 1000)
    while process.poll() is None:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            lines = file.read().splitlines(keepends=True)
        if lines and lines[-1].endswith(b"\n") and json.loads(lines[-1])["step"] == step + 1:
            break
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    assert process.poll() is None, "the run ended before its first step"
    process.kill()
    process.wait()
    return seconds


def long_stream(episodes: int = 10**6, cameras: int = 1, size: int = 8, chunk: int = 8) -> Samples:
    """Samples of episodes of 100 frames, whose contents take no memory. size: height and width of the pictures."""
    ends = np.arange(1, episodes + 1) * 100
    data = SimpleNamespace(
        cameras=tuple(f"camera{i}" for i in range(cameras)),
        image_size=(size, size),
        state_dim=1,
        action_dim=1,
        episode_from=ends - 100,
        episode_to=ends,
        instructions=["go"],
        state=np.broadcast_to(np.zeros(1, np.float32), (100 * episodes, 1)),
        task_index=np.broadcast_to(np.zeros(1, np.int32)[0], 100 * episodes),
        read_images=lambda frames, out, rows, slots: out.fill(0),
        windows=lambda frames, size: (
            np.zeros((len(frames), size, 1), np.float32),
            np.zeros((len(frames), size), bool),
        ),
    )
    tokens = LanguageModel(ModelConfig(max_tokens=8)).tokenize(data.instructions)
    return Samples(Mixture([data]), [np.arange(episodes)], tokens, chunk, seed=0, shuffle=True)


def first_batch(samples: Samples, step: int) -> float:
    """Seconds until the first batch of a stream that begins at a step is there."""
    positions = training_positions(step, step + 10**6, BATCH, BATCH, 0, 1)
    began = time.perf_counter()
    next(loader(samples, positions, BATCH, workers=0, device=torch.device("cpu")))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
