"""What a step takes as the work grows: frames of the data set, cameras, length of the chunk; each alone, in turns.

    python benchmarks/growth.py --out growth.json

data: until a batch is there, of an index whose frames hold nothing; step: forward and backward pass and update of the
policy of the demo, in milliseconds, medians. More processes: benchmarks/scaling.py. A real index: benchmarks/data.py.
"""

import json
import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from resume import long_stream
from step import MODELS

from vla import options
from vla.checkpoint import versions
from vla.data.loader import loader
from vla.data.stats import statistics as statistics_of
from vla.data.stream import training_positions
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.optim import make_optimizer, parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
USUAL = {"frames": 10**6, "cameras": 1, "chunk": 8}
VALUES = {"frames": [10**4, 10**5, 10**6, 10**7, 10**8], "cameras": [1, 2, 4], "chunk": [8, 16, 32, 64]}
WARM = 5


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="for all figures as JSON")
    asked = parser.parse_args()
    rows = [USUAL | {name: value} | {"grows": name} for name, values in VALUES.items() for value in values]
    times: list[dict[str, list[float]]] = [{"data": [], "step": []} for _ in rows]
    for _ in range(asked.rounds):
        for row, own in zip(rows, times, strict=True):
            for part, milliseconds in measure(row, asked.steps).items():
                own[part] += milliseconds
    found = [row | {part: statistics.median(own[part]) for part in own} for row, own in zip(rows, times, strict=True)]
    for row in found:
        print(f"{row['grows']:<8}{row[row['grows']]:>12,}  data {row['data']:7.2f} ms  step {row['step']:7.2f} ms")
    setting = vars(asked) | {"out": asked.out.name, "device": DEVICE.type, "versions": versions()}
    asked.out.write_text(json.dumps(setting | {"figures": found}, indent=1) + "\n")


def measure(row: dict, steps: int) -> dict[str, list[float]]:
    """Milliseconds of the parts of each step."""
    flags, size = MODELS["demo"]
    flags += f" --data.path none --run_dir none --steps 1 --model.max_tokens 8 --model.chunk_size {row['chunk']}"
    config = options.parse(flags.split())
    samples = long_stream(row["frames"] // 100, row["cameras"], size, row["chunk"])
    robot = DatasetSpec("robot", tuple(f"camera{i}" for i in range(row["cameras"])), ("s",), ("a",), 30)
    policy = VLAPolicy(PolicyConfig(config.model, robot.cameras, (size, size), (robot,))).to(DEVICE)
    policy.set_statistics([(statistics_of(np.array([[-1.0], [1.0]])),) * 2])
    optimizer = make_optimizer(parameter_groups(policy, config.optim), config.optim)
    batch_size = config.global_batch_size
    positions = training_positions(10**6, 10**6 + WARM + steps, batch_size, batch_size, 0, 1)
    batches = loader(samples, positions, batch_size, workers=0, device=DEVICE)
    times = {"data": [], "step": []}
    for _ in range(WARM + steps):
        began = time.perf_counter()
        batch = next(batches)
        seen = time.perf_counter()
        policy(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times["data"].append(1e3 * (seen - began))
        times["step"].append(1e3 * (time.perf_counter() - seen))
    return {part: values[WARM:] for part, values in times.items()}


if __name__ == "__main__":
    main()
