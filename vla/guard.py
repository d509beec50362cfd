"""What can bend or end a run beside its own steps: signals, processes that hang, numbers that are not finite.

Whatever one process finds, all must act on together. So each optimizer step ends with a word of a few numbers, summed
over the processes on the device and read one step later, when it has arrived: nobody waits for it.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed import distributed_c10d as distributed

from vla import FAILED
from vla.config import GuardConfig

SPIKE_WEIGHT = 0.02  # of the newest loss in the running average that a spike is measured by
NUMBERS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
PATIENCE = 5.0  # seconds, with processes that do not answer
COPIES = 1.0  # seconds within which a second signal is taken for a copy of the first: launchers send their own


class Signals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP: once, save and stop; the same or SIGINT a second time, stop now.

    Another one is no reason to hurry: a scheduler that has warned by one ends its job by the next.

    Where a signal ended a run that had more to do there is a file RUN/REQUEUE, which a scheduler's script can test. A
    run that failed leaves none, though a launcher then ends by a signal what has not failed by itself.
    """

    def __init__(self, run_dir: Path):
        self.marker = run_dir / "REQUEUE"
        self.marker.unlink(missing_ok=True)
        self.received, self.when = "", {}  # the first, and when each came
        self.saves = False  # until there is something to save a signal stops at once
        # A launcher that is killed forwards nothing, and its processes would go on for ever. Both variables are set by
        # launchers (accelerate's, torchrun) and by nobody else.
        launched = {"ACCELERATE_DYNAMO_USE_FULLGRAPH", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self.launcher = os.getppid() if launched else None
        # Python runs handlers in the main thread alone, which may wait for another process for ever; a thread hears of
        # signals through a pipe.
        self.heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # by nohup
            signal.signal(number, lambda number, frame: None)

    def __bool__(self) -> bool:
        """This process is to save and stop."""
        if not self.received and self.launcher not in (None, os.getppid()):
            self.received = "the end of its launcher"
        return bool(self.received)

    def mark(self, text: str) -> None:
        """Tell a scheduler that the run is worth starting again."""
        try:
            self.marker.write_text(text + "\n")
        except OSError as failure:  # who cannot write can still stop
            _write(f"\nwarning: {self.marker} cannot be written ({failure})\n")

    def _listen(self) -> None:
        while True:
            (number,) = os.read(self.heard, 1)
            if number in NUMBERS:  # and not SIGCHLD, for which the data loader has a handler
                self._receive(number)

    def _left(self) -> bool:
        """Another process of the launcher has ended, for which it sends a signal to this one."""
        with contextlib.suppress(psutil.Error):
            if self.launcher == os.getppid():
                return len(psutil.Process(self.launcher).children()) < int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return False

    def _receive(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        latest = self.when.get(name) if number != signal.SIGINT else max(self.when.values(), default=None)
        if latest is not None and now - latest < COPIES:
            return
        failed, left = FAILED.is_set(), self._left()
        if latest is not None or not (self.saves or failed):
            if not (failed or left):
                self.mark(f"stopped at once by {name}")
            why = f"{name}{', as another process has ended' * left}"
            _write(f"\nstopped at once by {why}; checkpoints that were committed are intact\n")
            os._exit(128 + number)
        self.when[name] = now
        if self.received:
            return
        self.received = name
        if int(os.environ.get("RANK", 0)) == 0 and not (failed or left):
            _write(f"\n{name}: will save and stop; send it again to stop at once, without saving\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, text.encode())


class Sign(NamedTuple):
    """The last sign of life of a process: how many it has given, how long ago in seconds, and what it then did."""

    count: int
    idle: float
    doing: str


class Watchdog:
    """Ends a run in which nothing has moved for a while, in any process, and says which process hangs, and where.

    Each process shows its last sign of life to the others through the store of their process group.
    """

    def __init__(self, accelerator: Accelerator, seconds: float):
        self.rank, self.processes, self.seconds = accelerator.process_index, accelerator.num_processes, seconds
        self.signs, self.doing, self.since = 0, "starting", time.monotonic()
        self.store, self.ended, self.tick = None, threading.Event(), min(seconds / 4, 10)
        if seconds:
            if self.processes > 1:
                self.store = distributed._get_default_store().clone()  # the other may be held by a hanging collective
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()

    def alive(self, doing: str) -> None:
        """A sign of life from the training thread. doing: what comes now."""
        self.signs, self.doing, self.since = self.signs + 1, doing, time.monotonic()

    def close(self) -> None:
        """Stop watching; before the process group is destroyed, and the store with it."""
        self.ended.set()
        if self.seconds:
            self.thread.join()

    def _watch(self) -> None:
        while True:
            idle = time.monotonic() - self.since
            own = Sign(self.signs, idle, f"{self.doing}, for {idle:.0f} s")
            with contextlib.suppress(RuntimeError):  # the process that holds the store is gone: watch on alone
                if self.store is not None:
                    self.store.set(f"alive/{self.rank}", f"{own.count} {time.time()} {own.idle} {own.doing}")
            if own.idle > self.seconds:
                signs = {self.rank: own} | self._others()
                if min(sign.idle for sign in signs.values()) > self.seconds:
                    self._end(signs)
            if self.ended.wait(self.tick):
                break

    def _others(self) -> dict[int, Sign]:
        """The last signs of life of the other processes, of those that can be had."""
        signs = {}

        def ask() -> None:
            for rank in {*range(self.processes)} - {self.rank}:
                with contextlib.suppress(RuntimeError):
                    count, told, idle, doing = self.store.get(f"alive/{rank}").decode().split(" ", 3)
                    silent = time.time() - float(told)
                    doing += f", then silent for {silent:.0f} s: stopped or dead" if silent > 3 * self.tick else ""
                    signs[rank] = Sign(int(count), float(idle) + silent, doing)

        # A store whose process is stopped never answers, so it is asked by a thread that may be left behind.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE)
        return signs.copy()

    def _end(self, signs: dict[int, Sign]) -> None:
        """Say what each process did last and where this one stands, and end it."""
        behind, ahead = min(sign.count for sign in signs.values()), max(sign.count for sign in signs.values())
        lines = [f"\nerror: no progress for {self.seconds:g} seconds (--guard.hang_seconds), so this run ends:"]
        for rank in range(self.processes):
            what = "no word from it"
            if rank in signs:
                what = signs[rank].doing + ("   <- behind the others" if signs[rank].count == behind < ahead else "")
            lines.append(f"  process {rank}: {what}")
        sys.stderr.write("\n".join([*lines, f"process {self.rank} stands at:", ""]))
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        time.sleep(self.tick if self.processes > 1 else 0)  # the others may ask for signs of life that are kept here
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)


class Guard:
    """Decides, alike on all processes, which updates to skip, when to go back, and when to stop.

    say: where messages for people go. describe: names samples by their positions.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: GuardConfig,
        signals: Signals,
        say: Callable[[str], None],
        describe: Callable[[list[int]], str],
    ):
        self.accelerator, self.config, self.signals = accelerator, config, signals
        self.say, self.describe = say, describe
        # The scaler of fp16 may need as many updates to halve its scale down to 1 before anything else is at fault.
        self.patience = config.bad_steps + (16 if accelerator.scaler else 0)
        self.watchdog = Watchdog(accelerator, config.hang_seconds)
        self.stopping = False  # agreed on by all: save and stop
        self.given_up = False  # agreed on by all: too many saves have failed
        self.window: tuple[int, int] | None = None  # agreed on by all: go back, and leave these steps' samples out
        signals.saves = True

    def load(self, state: dict) -> None:
        """Take the counters of a checkpoint, or of the start."""
        device = self.accelerator.device
        self.bad_in_a_row = torch.tensor(float(state["bad_in_a_row"]), device=device)
        self.skipped = torch.tensor(state["skipped_updates"], device=device)
        self.loss_average = torch.tensor(state["loss_average"], device=device)
        self.spike = torch.zeros((), device=device)
        self.losses, self.seen, self.sent, self.window = [], [], deque(), None

    def state(self) -> dict:
        """The counters as they are now; waits for the device."""
        return {
            "bad_in_a_row": int(self.bad_in_a_row.item()),
            "skipped_updates": int(self.skipped.item()),
            "loss_average": self.loss_average.item(),
        }

    @contextlib.contextmanager
    def unwatched(self):
        """Around what gives no signs of life, and takes as long as the disk does; all processes enter and leave it."""
        self.watchdog.close()
        try:
            yield
        finally:
            self.watchdog = Watchdog(self.accelerator, self.config.hang_seconds)

    def go_on(self, doing: str) -> bool:
        """A sign of life, from within what takes long. False if this process is to leave it and stop."""
        self.watchdog.alive(doing)
        return not self.signals

    def checked(self, loss: Tensor, sample_loss: Tensor, position: Tensor) -> Tensor:
        """The loss to differentiate, of one micro-batch: itself, to the bit, or no number if it is not to be learned.

        Its gradients then are no numbers either, which the sum over the processes carries to all of them.
        sample_loss, position: [B], by which the samples are named.
        """
        self.watchdog.alive(f"{self.watchdog.doing}, backward")
        self.seen.append((position, sample_loss))
        self.losses.append(loss.detach())
        poison = 0 * loss.detach()
        if self.config.spike_factor and self.accelerator.sync_gradients:
            self.mean_loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean")
            spike = (self.loss_average > 0) & (self.mean_loss > self.config.spike_factor * self.loss_average)
            self.spike = spike.float()
            poison = torch.where(spike, math.nan, poison)
        return loss * (1 + poison)

    def judged(self, norm: Tensor) -> Tensor:
        """1 if the update is to be skipped, by the norm of the gradients over all processes; else 0. Scalar."""
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad.long()
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        if self.config.spike_factor:
            average = torch.where(
                self.loss_average > 0, torch.lerp(self.loss_average, self.mean_loss, SPIKE_WEIGHT), self.mean_loss
            )
            self.loss_average = torch.where(bad > 0, self.loss_average, average)
        return bad

    def step(self, step: int, given_up: bool) -> None:
        """Send the word of a step, read that of the one before. step: steps done. given_up: this process wants to end.

        Every process calls it; `stopping`, `given_up` and `window` are then the same on all.
        """
        self.watchdog.alive(f"step {step}")
        word, arrived = torch.tensor([float(bool(self.signals)), float(given_up)]), None
        if self.accelerator.device.type == "cuda":
            word = word.pin_memory().to(self.accelerator.device, non_blocking=True)
        if self.accelerator.num_processes > 1:
            word = self.accelerator.reduce(word, "sum")
        word = torch.cat([word, torch.stack([self.bad_in_a_row, self.spike])])
        if word.is_cuda:
            word = torch.empty(len(word), pin_memory=True).copy_(word, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.sent.append((step, word, arrived, self.seen))
        self.losses, self.seen = [], []
        if len(self.sent) > 1:
            self._read()

    def catch_up(self) -> None:
        """Read every word that was sent; before what must not be done in vain. Every process calls it."""
        while self.sent:
            self._read()

    def _read(self) -> None:
        step, word, arrived, seen = self.sent.popleft()
        if arrived:
            arrived.synchronize()
        stopping, given_up, bad, spike = word.tolist()
        self.stopping, self.given_up = self.stopping or stopping > 0, self.given_up or given_up > 0
        if bad:
            self._tell(step, seen, spike > 0)
        if bad >= self.patience and self.window is None:
            self.window = step - int(bad), int(bad)

    def _tell(self, step: int, seen: list[tuple[Tensor, Tensor]], spike: bool) -> None:
        """Say which samples the skipped update of a step is owed to, as exactly as their losses tell."""
        positions, losses = (torch.cat(parts).tolist() for parts in zip(*seen, strict=True))
        loss_of = dict(gather_object(list(zip(positions, losses, strict=True))))
        bad = sorted(position for position, loss in loss_of.items() if not math.isfinite(loss))
        if bad:
            why = f"the loss is not finite for {self.describe(bad)}"
        elif spike:
            worst = max(loss_of, key=loss_of.get)
            factor = f"{self.config.spike_factor:g} times its running average (--guard.spike_factor)"
            why = f"the loss is beyond {factor}; it is highest for {self.describe([worst])}"
        else:
            why = f"a gradient is not finite; the samples are those at positions {min(loss_of)} to {max(loss_of)}"
        self.say(f"step {step}: update skipped, {why}")
