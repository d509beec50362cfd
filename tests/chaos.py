"""Kill a whole training job with SIGKILL at random instants, start it again with the same command, until it is done;
then compare it, bit for bit, with a run that nobody stopped.

    make chaos KILLS=100

The job is `accelerate launch` with two processes, two loader workers each, accumulation, averaged weights, evaluations
and a checkpoint every other step. Its launcher, processes and workers are killed at once. What each process did is
appended to a file as it happens (see `record`): the history of the run that no kill takes back.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import random
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from training import LAUNCH, ON_CPU, TWO_PROCESSES, after, everything  # noqa: E402

from vla import InputError, checkpoint, guard  # noqa: E402
from vla.saver import Saver  # noqa: E402

BATCH = 12
FLAGS = [
    *("--data.workers", "2", "--global_batch_size", str(BATCH), "--micro_batch_size", "3"),
    *("--model.width", "128", "--model.attention_heads", "4", "--model.vision_blocks", "0"),
    *("--model.language_layers", "2", "--model.head_layers", "2"),
    *("--model.chunk_size", "4", "--model.n_action_steps", "2", "--model.flow_steps", "2"),
    *("--optim.lr", "1e-3", "--optim.warmup_steps", "20", "--optim.ema", "0.99"),
    *("--eval.every", "25", "--eval.samples", "16", "--checkpoint.every", "2", "--log.every", "1"),
]
AIMED, FLIPPED = 0.3, 0.15  # shares of the kills that wait for a save, and after which a bit is flipped
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, of linux/prctl.h


# ---- In the job: what it does, as it does it.


def record(path: Path) -> None:
    """Append what this training process does to a file, one line each:

    from STEP              it starts, at this step
    step STEP RANK P P …   it made this step, having learned from the samples at these positions of the stream
    save STEP              a save begins
    commit STEP            its checkpoint is in place
    """
    rank, positions = int(os.environ.get("RANK", 0)), []
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(*words) -> None:
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())

    def learned(_, guard, loss, sample_loss, position) -> None:
        positions.extend(position.tolist())

    def made(_, guard, step, *rest) -> None:
        write("step", step, rank, *positions)
        positions.clear()

    def save(saver, state) -> None:
        if rank == 0:
            write("save", state["step"])
        begin(saver, state)

    begin, Saver.save = Saver.save, save
    after(guard.Guard, "checked", learned)
    after(guard.Guard, "step", made)
    after(checkpoint, "commit", lambda _, temporary, final, *others: write("commit", int(final.name[-8:])))
    if rank == 0:
        after(guard.Guard, "load", lambda _, guard, state: write("from", state["step"]))


def recorded(path: Path, offset: int = 0) -> Iterator[tuple[str, list[int]]]:
    """The lines of a record, from a byte on."""
    for line in path.read_bytes()[offset:].decode().splitlines() if path.exists() else ():
        what, *numbers = line.split()
        yield what, [int(number) for number in numbers]


def repeated_and_lost(path: Path, steps: int, batch: int = BATCH) -> tuple[int, int]:
    """Samples of the surviving history that were learned too often, and those never learned.

    What survives of a step is what its processes did the last time that they made it; the positions of all steps are
    due once each.
    """
    last = {tuple(numbers[:2]): numbers[2:] for what, numbers in recorded(path) if what == "step"}
    learned = Counter(position for positions in last.values() for position in positions)
    due = Counter(range(steps * batch))
    return (learned - due).total(), (due - learned).total()


# ---- Outside of it: the killer.


@dataclass
class Start:
    """One start of the job, by what it recorded."""

    first: int | None = None  # the step that it went on from
    step: int | None = None  # the last that its main process made
    saving: int | None = None  # begun and not committed

    @classmethod
    def read(cls, lines: Iterable[tuple[str, list[int]]]) -> "Start":
        start = cls()
        for what, numbers in lines:
            if what == "from":
                start.first = numbers[0]
            elif what == "step" and numbers[1] == 0:
                start.step = numbers[0]
            elif what == "save":
                start.saving = numbers[0]
            elif what == "commit" and numbers[0] == start.saving:  # the one before may still be on its way
                start.saving = None
        return start


class Job:
    """The job in a run folder, which can be started, killed, and started again."""

    def __init__(self, folder: Path, data: Path, steps: int):
        self.run, self.record, self.output = folder / "run", folder / "record.txt", folder / "output.txt"
        folder.mkdir(parents=True)
        flags = ["--data.path", data, "--run_dir", self.run, "--steps", steps, *FLAGS, "--resume_from", "auto"]
        # Port 0: any that is free, as other jobs may run here.
        self.launch = [*LAUNCH, *TWO_PROCESSES, "--main_process_port", "0", __file__, "--job", self.record, *flags]

    def start(self) -> None:
        self.offset, self.began = self.record.stat().st_size if self.record.exists() else 0, time.monotonic()
        with self.output.open("a") as output:
            self.process = psutil.Popen(
                [str(word) for word in self.launch], cwd=ROOT, env=os.environ | ON_CPU, stdout=output, stderr=output
            )

    @property
    def now(self) -> Start:
        return Start.read(recorded(self.record, self.offset))

    @property
    def half_saves(self) -> list[Path]:
        return list((self.run / "checkpoints").glob(".saving_*"))

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether it still runs when this becomes true."""
        while self.process.poll() is None:
            if until():
                return True
            time.sleep(0.005)
        if self.process.returncode:
            sys.exit(f"the job failed by itself:\n{self.output.read_text()[-5000:]}")
        return False

    def kill(self) -> int:
        """SIGKILL to the launcher, its processes and their workers, at once. Returns how many they were."""
        killed = set()
        while everyone := {self.process, *psutil.Process().children(recursive=True)} - killed:
            for process in sorted(everyone, key=lambda process: process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            killed |= everyone
            psutil.wait_procs(everyone)
        return len(killed)


def flip_a_bit(run: Path, chance: random.Random) -> tuple[int, str] | None:
    """Damage the newest checkpoint if an older good one is there. Returns its step and the file."""
    newest_two = list(checkpoint.all_steps(run / "checkpoints").values())[-2:]
    try:
        for path in newest_two:
            checkpoint.verify(path)
    except InputError:
        return None
    if len(newest_two) < 2:
        return None
    newest = newest_two[-1]
    file = chance.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return int(newest.name[-8:]), file.name


def main(kills: int, steps: int, seed: int, folder: Path) -> None:
    began, chance = time.monotonic(), random.Random(seed)
    # What a killed launcher leaves behind becomes a child of this process, which so finds all of a job.
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "data"
    collect = [sys.executable, "-m", "vla.collect", "tabletop", "--out", data, "--episodes", "24"]
    subprocess.run([str(word) for word in collect], cwd=ROOT, check=True, capture_output=True)

    whole = Job(folder / "uninterrupted", data, steps)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(f"python tests/chaos.py --kills {kills} --steps {steps} --seed {seed}")
    print(
        f"commit {commit.stdout.strip()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} CPU cores"
    )
    words = ["accelerate", "launch", *map(str, whole.launch[3:])]
    print("job:", shlex.join(words).replace(f"{ROOT}/", ""), flush=True)
    whole.start()
    whole.wait(lambda: whole.now.step is not None)
    startup = time.monotonic() - whole.began
    whole.wait(lambda: False)
    training = time.monotonic() - whole.began - startup
    print(f"uninterrupted: {startup:.1f} s to the first step, {training:.1f} s for {steps} steps", flush=True)

    count, flips, passed_over, problems = Counter(), [], 0, []
    made = repeated = lost = 0
    while count["kills"] < kills:
        count["runs"] += 1
        job = Job(folder / f"run_{count['runs']}", data, steps)
        running, flipped = True, None
        while running:
            job.start()
            count["starts"] += 1
            aimed = chance.random() < AIMED
            # Half of any instants fall into the start-up. A save is waited for after a while of training.
            delay = startup * chance.uniform(0, 1 if aimed else 2)
            within = training / steps * chance.uniform(0, 0.5)
            if count["kills"] == kills:
                running = job.wait(lambda: False)
            elif aimed:
                running = job.wait(lambda job=job: job.now.step is not None)
                startup, due = time.monotonic() - job.began, time.monotonic() + delay
                running = running and job.wait(lambda job=job, due=due: time.monotonic() > due and job.half_saves)
                time.sleep(within)
            else:
                running = job.wait(lambda due=job.began + delay: time.monotonic() > due)
            processes = job.kill()
            now = job.now
            if now.first is not None:
                count["resumed" if now.first else "anew"] += 1
                if flipped:
                    passed_over += now.first < flipped[0]
                    flipped = None
            if not running:
                break
            count.update(["kills", "aimed" if aimed else "random"])
            where = f"step {now.step}"
            if now.step is None:
                count["start-up"] += 1
                where = "start-up"
            if now.saving is not None:
                count["in a save"] += 1
                where += f", save of step {now.saving} not committed"
                for half_save in job.half_saves:
                    count["half saves"] += 1
                    where += f", {half_save.name} left"
            if chance.random() < FLIPPED and not flipped and (flipped := flip_a_bit(job.run, chance)):
                flips.append(flipped)
                where += f"; then a bit flipped in {flipped[1]} of step {flipped[0]}"
            print(
                f"kill {count['kills']}: {time.monotonic() - job.began:.1f} s after the start, {processes} processes, "
                f"from step {now.first}, {'a save' if aimed else 'any instant'}: {where}",
                flush=True,
            )
        a, b = everything(job.run), everything(whole.run)
        differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        problems += differing
        print(f"run {count['runs']} is done: {len(differing)} of {len(b)} values differ {differing[:5]}", flush=True)
        made += sum(what == "step" and numbers[1] == 0 for what, numbers in recorded(job.record))
        repeated, lost = (a + b for a, b in zip((repeated, lost), repeated_and_lost(job.record, steps), strict=True))

    unheeded = len(flips) - passed_over
    equal = "equal, bit for bit" if not problems else f"{len(problems)} DIFFER"
    print(f"""
| | |
| --- | --- |
| kills of the whole job, all SIGKILL | {count["kills"]} |
| of these at any instant, and aimed at a save | {count["random"]}, {count["aimed"]} |
| inside the start-up, before the first step | {count["start-up"]} |
| inside a save, begun and not committed | {count["in a save"]} |
| of these with a half-written folder left | {count["half saves"]} |
| bits flipped in the newest checkpoint, passed over on resume | {len(flips)}, {passed_over} |
| starts that resumed, began at step 0, died before | \
{count["resumed"]}, {count["anew"]}, {count["starts"] - count["resumed"] - count["anew"]} |
| runs to the end, steps of each, steps made in all | {count["runs"]}, {steps}, {made} |
| samples repeated, lost in the surviving history | {repeated}, {lost} |
| weights, averages, optimizer, logged losses, export, result | {equal} |
| minutes | {(time.monotonic() - began) / 60:.0f} |""")
    if problems or repeated or lost or unheeded:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        record(Path(sys.argv[2]))
        sys.argv = ["train.py", *sys.argv[3:]]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--kills", type=int, default=100)
        parser.add_argument("--steps", type=int, default=600)
        parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
        parser.add_argument("--folder", type=Path, default=ROOT / "runs/chaos")
        main(**vars(parser.parse_args()))
