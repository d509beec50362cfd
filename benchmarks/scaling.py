"""How training goes with the number of GPUs: its speed, its losses, killed and gone on with on fewer, sharded.

    python benchmarks/scaling.py --gpus 1 2 4 --out small.json
    python benchmarks/scaling.py --gpus 1 2 4 --architecture paligemma-3b --batch 16 --out large.json

Runs of train.py on the tabletop's pictures, one after another on one host, under 4gpu.yaml (1gpu.yaml for one GPU):
speed: a fixed batch for each GPU. efficiency: samples/s over those of the fewest GPUs, as their numbers are.
same: a fixed batch in all, accumulated by fewer GPUs. difference: the largest, at any step, of a loss from that of the
most GPUs.
kill: the most GPUs killed by SIGKILL, gone on with by half of them, killed, and gone on with by the most.
fsdp: the same training sharded over the most.
"""

import json
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import architectures
from launched import UNSAVED, collect, train

from vla.checkpoint import versions

PARTS = ("speed", "same", "kill", "fsdp")
RUN = "--steps 50 --eval.every 0 --eval.samples 1 --log.every 1 --optim.lr 3e-4 --optim.warmup_steps 10"
SAVED, KILLED = 15, (20, 35)  # a checkpoint every so many steps; the steps after which it is killed
SMALL = "--data.image_size 224 224"  # the built-in policy as it is, 9.6 million parameters
LARGE = "--model.random_backbone --model.width 512 --model.head_layers 8 --model.chunk_size 50 --optim.ema 0"
TINY = "--model.width 32 --model.attention_heads 2 --model.language_layers 1 --model.head_layers 1"
COLUMNS = ("processes", "samples/s", "efficiency", "peak_gb", "from", "to", "difference")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4], help="in rising order")
    parser.add_argument("--architecture", choices=architectures.REAL, help="if not the built-in policy")
    parser.add_argument("--batch", type=int, default=256, help="samples of one GPU at once")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--flags", default="", help="more flags for train.py")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, with a tiny policy")
    parser.add_argument("--out", type=Path, required=True, help="for all figures as JSON")
    options = parser.parse_args()
    print(f"{'run':<21}", *(f"{column:>10}" for column in COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scale(options, Path(folder))


def scale(options: Namespace, folder: Path) -> None:
    collect(folder / "data", 200)
    policy = TINY if options.cpu else SMALL
    if options.architecture:
        policy = f"{LARGE} --model.backbone {architectures.write(options.architecture, folder / options.architecture)}"
    new = f"--data.path {folder / 'data'} {RUN} {policy} --micro_batch_size {options.batch} {options.flags}"
    found: dict[str, dict] = {}

    def run(name: str, gpus: int, flags: str, yaml: str = "4gpu", compare: str = "", **how) -> None:
        yaml = "1gpu" if gpus == 1 else yaml
        row = found[name] = train(folder / name, flags, yaml=yaml, processes=gpus, cpu=options.cpu, **how)
        if compare:
            expected = found[compare]["losses"]
            row["difference"] = max(abs(loss - expected[step]) for step, loss in row["losses"].items())
        else:
            fewest = found[next(iter(found))]
            row["efficiency"] = row["samples/s"] / gpus / (fewest["samples/s"] / fewest["processes"])
        cells = ["" if value is None else value for value in map(row.get, COLUMNS)]
        cells = [f"{value:.4g}" if isinstance(value, float) else value for value in cells]
        print(f"{name:<21}", *(f"{cell:>10}" for cell in cells), flush=True)
        setting = vars(options) | {"out": options.out.name, "versions": versions()}
        options.out.write_text(json.dumps(setting | {"runs": found}, indent=1) + "\n")

    most = options.gpus[-1]
    if "speed" in options.parts:
        for gpus in options.gpus:
            run(f"speed, {gpus}", gpus, f"{new} --global_batch_size {gpus * options.batch} {UNSAVED}")
    same, reference = f"{new} --global_batch_size {most * options.batch}", f"speed, {most}"
    if reference not in found:
        run(reference, most, f"{same} {UNSAVED}")
    if "same" in options.parts:
        for gpus in options.gpus[:-1]:
            run(f"same, {gpus}", gpus, f"{same} {UNSAVED}", compare=reference)
    if "kill" in options.parts:
        half = most // 2 or 1
        killed = {"compare": reference, "saved": True}
        run(f"{most}, killed", most, f"{same} --checkpoint.every {SAVED}", until=KILLED[0], **killed)
        run(f"on with {half}, killed", half, "", begun=folder / f"{most}, killed", until=KILLED[1], **killed)
        run(f"on with {most}", most, "", begun=folder / f"on with {half}, killed", compare=reference)
    if "fsdp" in options.parts and most > 1:
        run(f"sharded over {most}", most, f"{same} {UNSAVED}", "4gpu_fsdp", compare=reference)
    print("step", *(f"{name:>21}" for name in found), sep="  ")
    for step in (1, 2, 3, 5, 10, 20, 30, 40, 50):
        losses = (row["losses"].get(step) for row in found.values())
        print(f"{step:>4}", *(f"{'' if loss is None else f'{loss:.6f}':>21}" for loss in losses), sep="  ")


if __name__ == "__main__":
    main()
