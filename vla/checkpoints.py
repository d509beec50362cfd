"""The checkpoints of a run: which are there, which are good, what they cost.

python -m vla.checkpoints runs/demo                          by manifests and sizes; a running job is not disturbed
python -m vla.checkpoints runs/demo --verify                 by every hash; exit code 1 if one is damaged
python -m vla.checkpoints runs/demo --export best policy     (or a step) make the folder that drives a robot
python -m vla.checkpoints runs/demo --prune                  delete what is damaged, left over or superseded
"""

import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from vla import InputError, checkpoint, export, told
from vla.config import CheckpointConfig, MovedConfig
from vla.options import at_home, load, run_folder


def look(folder: Path, hashes: bool) -> tuple[dict[Path, dict], dict[Path, str], dict[Path, str], Path | None]:
    """Good checkpoints with their counters, damaged ones and unreadable ones with what is wrong; and the best.

    What a running job deletes meanwhile is left out.
    """
    good, damaged, unreadable = {}, {}, {}
    paths = checkpoint.all_steps(folder).values()
    for path in tqdm(paths, "verifying", unit="checkpoint", leave=False, disable=not hashes):
        try:
            checkpoint.verify(path, hashed=None if hashes else ())
            state = checkpoint.read_state(path)
            needed = ("bad_in_a_row", "best_step", "evaluated", "metric", "score", "step")
            good[path] = {name: state[name] for name in needed} | {"judged_on": state.get("judged_on")}
        except InputError as failure:
            if path.exists():
                bad = unreadable if isinstance(failure, checkpoint.Unreadable) else damaged
                bad[path] = str(failure).replace(f"{path}/", "").removeprefix(f"{path} ")
        except KeyError as failure:
            damaged[path] = f"trainer_state.json has no {failure}, so it is of another version of this project"
    try:
        newest_first = list(reversed(good))
        return good, damaged, unreadable, checkpoint.best(good[newest_first[0]], newest_first) if good else None
    except InputError:  # one of the good ones was deleted meanwhile
        return look(folder, hashes)


def show(
    folder: Path, good: dict[Path, dict], damaged: dict[Path, str], unreadable: dict[Path, str], best: Path | None
) -> None:
    """Print what `look` found as a table, with what else is in the folder."""
    total = 0
    print(f"{'step':>8}  {'age':>7}  {'size':>7}")
    for path in [*sorted([*good, *damaged, *unreadable]), *checkpoint.left_over(folder)]:
        step, what = str(int(path.name[-8:])), "damaged" if path in damaged else "unreadable now"
        if path in good:
            metric, score = good[path]["metric"], good[path]["score"]  # the lower the score, the better
            what = f"good, best ({metric} {-score if metric == 'success' else score:.4g})" if path == best else "good"
            what += ", newest" if path == list(good)[-1] else ""
        elif path not in damaged | unreadable:
            step, what = "", f"{path.name}: left over, or in use by a job"
        with suppress(FileNotFoundError):  # deleted meanwhile
            size = _bytes(path)
            print(f"{step:>8}  {_age(path):>7}  {_readable(size):>7}  {what}")
            total += size
    for path, problem in (damaged | unreadable).items():
        print(f"step {int(path.name[-8:])}: {problem}")
    print(f"{_readable(total)} in all, {_readable(shutil.disk_usage(folder).free)} free on the disk")


def prune(folder: Path, config: CheckpointConfig, good: dict[Path, dict], damaged: dict[Path, str]) -> None:
    """Delete what crashes left, what is damaged, and what the run's rotation would not keep, by their hashes.

    Raises InputError, deleting nothing, if no checkpoint is good.
    """
    if not good:
        raise InputError(f"{folder} holds no good checkpoint, so nothing is deleted")
    newest_first = list(reversed(good))
    superseded = good.keys() - checkpoint.to_keep(newest_first, good[newest_first[0]], config)
    doomed = [*checkpoint.left_over(folder), *damaged, *sorted(superseded)]
    names = ", ".join(path.name for path in doomed) or "nothing"
    print(f"deleting {names}; this frees {_readable(sum(map(_bytes, doomed)))}")
    for path in doomed:
        checkpoint.delete(path)


def _age(path: Path) -> str:
    seconds = time.time() - path.stat().st_mtime
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*"))


def _readable(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


@dataclass(frozen=True)
class CheckpointsConfig(MovedConfig):
    """List the checkpoints of a run; verify, export or prune them."""

    # A run folder, RUN/best, or one checkpoint.
    run: str
    # Check every hash, not sizes alone; exit code 1 if a checkpoint is damaged.
    verify: bool = False
    # Make the folder that drives a robot from the best checkpoint, or from that of a step.
    export: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="STEP|best DIR")] = None
    # Delete what is damaged, what crashes left, and what the run's own settings (checkpoint.keep, keep_every) would not
    # keep; never the best. Refused while the run is in use.
    prune: bool = False


def main(config: CheckpointsConfig) -> None:
    run_dir = run_folder(Path(config.run))
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{config.run} is no run: there is no folder {folder}; give one that train.py made")
    if not config.export and (idle := [name for name, place in config.moved().items() if place]):
        raise InputError(f"--{idle[0]} has no effect without --export; leave it out")
    if config.prune:
        settings = load(run_dir / "config.json").checkpoint
        checkpoint.lock(run_dir, patience=0)
        checkpoint.put_back(folder)
    hashes = config.verify or config.prune
    good, damaged, unreadable, best = look(folder, hashes)
    show(folder, good, damaged, unreadable, best)
    if not hashes:
        print("sizes were checked; --verify checks every hash")
    if config.export:
        wanted, out = config.export
        sources = {"best": run_dir} | {str(step): path for step, path in checkpoint.all_steps(folder).items()}
        if wanted not in sources:
            raise InputError(f"--export {wanted}: expected one of {', '.join(sources)}")
        export.main(export.ExportConfig(str(sources[wanted]), out, **config.moved()))
    if config.prune:
        prune(folder, settings, good, damaged)
    if config.verify and (bad := damaged | unreadable):
        raise InputError(f"{len(bad)} of {len(good | bad)} checkpoints damaged or unreadable in {run_dir}")


if __name__ == "__main__":
    own = {"prog": "python -m vla.checkpoints", "config": (tyro.conf.PositionalRequiredArgs,)}
    with told():
        main(tyro.cli(CheckpointsConfig, args=at_home(sys.argv[1:]), **own))
