"""What fits where: train.py on architectures of real size with random weights, its peak memory and its speed.

    python benchmarks/memory.py smolvlm2-500m:full:1gpu:1:32 paligemma-3b:lora:1gpu:1:32 --out memory.json

Each row is architecture (benchmarks/architectures.py), what is trained, accelerate config, processes, samples of one
process at once; e.g. paligemma-3b:full:4gpu_fsdp:2:16. A run of 50 steps on the tabletop's pictures is killed at its
end: what is measured is training, not saving. Peak memory is the main process's, as torch allocated it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import architectures
from launched import ROOT, UNSAVED, FailedError, collect, train

STEPS = 50
COLUMNS = ("row", "parameters", "trained", "peak_gb", "samples/s")
ADAPTERS, FROZEN = "--lora.rank 16 --model.freeze vision_encoder", "--model.freeze vision_encoder language_model"
TRAINED = {
    "full": "",
    "recomputed": "--model.gradient_checkpointing",
    "frozen": FROZEN,
    "lora": ADAPTERS,
    "lora_recomputed": f"{ADAPTERS} --model.gradient_checkpointing",
    "lora_bf16": f"{ADAPTERS} --model.frozen_dtype bfloat16",
    "frozen_bf16": f"{FROZEN} --model.frozen_dtype bfloat16",
}
HEAD = "--model.width 512 --model.head_layers 8 --model.chunk_size 50"
RUN = f"--steps 100000 --eval.every 0 {UNSAVED} --log.every 10"
OPTIM = "--optim.ema 0 --optim.lr 1e-4 --optim.warmup_steps 10 --model.random_backbone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data/memory", help="demonstrations; collected if there are none"
    )
    parser.add_argument("--flags", default="", help="more flags for train.py")
    parser.add_argument("--out", help="for the figures as JSON")
    options = parser.parse_args()
    if not options.data.exists():
        collect(options.data.resolve(), 200)
    found = []
    print("{:<48} {:>13} {:>13} {:>8} {:>9}  losses".format(*COLUMNS), flush=True)
    for row in options.rows:
        result = {"row": row} | measure(row, options.data.resolve(), options.flags)
        found.append(result)
        if result["error"]:
            print(f"{row:<48} {result['error']}", flush=True)
        else:
            losses = " ".join(map("{:.3f}".format, result["losses"].values()))
            print("{:<48} {:>13} {:>13} {:>8.1f} {:>9.1f}  {}".format(*map(result.get, COLUMNS), losses), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def measure(row: str, data: Path, flags: str) -> dict:
    """The figures of one row; with what the run said last, if it failed."""
    name, trained, yaml, processes, batch = row.split(":")
    with tempfile.TemporaryDirectory() as folder:
        backbone = architectures.write(name, Path(folder, name))
        sizes = f"--data.path {data} --model.backbone {backbone} --global_batch_size {int(batch) * int(processes)}"
        more = f"{sizes} {HEAD} {RUN} {OPTIM} {TRAINED[trained]} {flags}"
        try:
            found = train(Path(folder, "run"), more, yaml=yaml, processes=int(processes), until=STEPS)
        except FailedError as failure:
            return {"error": "out of memory" if "out of memory" in str(failure) else str(failure)[-1500:]}
    return {name: found[name] for name in ("parameters", "trained", "peak_gb", "samples/s", "losses")} | {"error": ""}


if __name__ == "__main__":
    main()
