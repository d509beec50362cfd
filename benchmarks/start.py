"""Where the seconds go from the command to the first step, and from the last step to the end.

    python benchmarks/start.py demo --out demo.json
    python benchmarks/start.py metaworld --flags "--compile --cuda_graphs" --out metaworld.json

new: a new run; with --compile its programs are compiled. resumed: the same from its checkpoint of the second step, in
another process, which finds them compiled. Medians; each part lasts until the function named in PARTS was first called
(before) or first returned (after).
"""

import builtins
import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from launched import ROOT, collect

BEGAN = "VLA_BEGAN"  # in the environment: the time of the command
PARTS = {  # module that train.py imports, function, whether it ends a part when it is called: the part
    ("vla.checkpoint", "prepare", True): "imports",
    ("vla.model", "VLAPolicy.__init__", True): "metadata",
    ("vla.model", "VLAPolicy.__init__", False): "policy",
    ("vla.learner", "accelerate", True): "data, statistics",
    ("vla.learner", "accelerate", False): "device",
    ("vla.learner", "Learner.__init__", False): "optimizer, graphs",
    ("vla.guard", "Guard.__init__", True): "checkpoint, log",
    ("vla.log", "RunLog.step", False): "step",
    ("vla.judge", "evaluate.held_out", False): "evaluation",
    ("vla.saver", "Saver.finish", False): "save",
    ("vla.export", "export", False): "export",
}


def main() -> None:
    import architectures
    from step import MODELS

    from vla.checkpoint import versions

    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--flags", default="", help="more flags for train.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="for all figures as JSON")
    asked, found = parser.parse_args(), {}
    for name in asked.models:
        flags, size = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            collect(Path(folder, "data"), 40, size)
            if "{backbone}" in flags:
                flags = flags.format(backbone=architectures.write("smolvlm2-500m", Path(folder, "backbone")))
            flags += f" --data.path {folder}/data --log.every 1 --eval.every 0 --checkpoint.every 2 {asked.flags}"
            turns = [turn(Path(folder, str(i)), flags) for i in range(asked.repeats)]
        found[name] = turns
        for kind in ("new", "resumed"):
            parts = {part: statistics.median(t[kind][part] for t in turns) for part in turns[0][kind]}
            first = sum(list(parts.values())[: list(parts).index("step 1") + 1])
            print(f"{name}, {kind}: {first:.1f} s to the first step")
            print("  " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()), flush=True)
        setting = vars(asked) | {"out": asked.out.name, "versions": versions()}
        asked.out.write_text(json.dumps(setting | {"figures": found}, indent=1) + "\n")


def turn(folder: Path, flags: str) -> dict[str, dict[str, float]]:
    """The parts of a new run of 4 steps and of the same gone on with from step 2, with compile caches of their own."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    new = parts([*flags.split(), "--run_dir", str(folder / "run"), "--steps", "4"], env)
    for path in folder.glob("run/checkpoints/step_*4"):
        path.rename(folder / path.name)
    for name in ("result.json", "export"):
        (folder / "run" / name).rename(folder / name)
    return {"new": new, "resumed": parts(["--resume_from", str(folder / "run"), "--steps", "4"], env)}


def parts(flags: list[str], env: dict[str, str]) -> dict[str, float]:
    """Seconds of each part of a run, by name, in order."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [f"accelerate_configs/{'1gpu' if on_gpu() else 'cpu'}.yaml", "--num_processes", "1", __file__, *flags]
    began = time.time()
    done = subprocess.run(command, env=env | {BEGAN: str(began)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    marks = [*json.loads(done.stdout.splitlines()[-1]), ("exit", time.time() - began)]
    if unseen := set(PARTS.values()) - dict(marks).keys():
        sys.exit(f"train.py never reached what PARTS names for {', '.join(sorted(unseen))}: was it renamed or moved?")
    seconds, before, steps = {}, 0.0, 0
    for part, at in marks:
        if part == "step":
            steps += 1
            part = f"step {steps}"
        if part not in seconds:  # the policy is made once more for the export
            seconds[part] = at - before
            before = at
    return seconds


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def watched() -> None:
    """Run train.py in this process and print when each part of PARTS ended."""
    marks, began, original, done = [], float(os.environ[BEGAN]), builtins.__import__, set()

    def mark(part: str) -> None:
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        marks.append((part, time.time() - began))

    def watch(function, before: str | None, after: str | None):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if before:
                mark(before)
            result = function(*args, **kwargs)
            if after:
                mark(after)
            return result

        return wrapped

    def importing(name, *args, **kwargs):
        module = original(name, *args, **kwargs)
        for where, path in {key[:2] for key in PARTS} - done:
            if where in sys.modules and name in (where, "vla") and args and "train.py" in str(args[0].get("__file__")):
                done.add((where, path))
                *owners, last = path.split(".")
                owner = functools.reduce(getattr, owners, sys.modules[where])
                ends = [PARTS.get((where, path, before)) for before in (True, False)]
                setattr(owner, last, watch(getattr(owner, last), *ends))
        return module

    builtins.__import__ = importing
    sys.argv = ["train.py", *sys.argv[1:]]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        print(json.dumps(marks), flush=True)


if __name__ == "__main__":
    if BEGAN in os.environ:
        watched()
    else:
        main()
