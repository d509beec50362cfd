"""What can bend or end a run beside its own steps: signals, processes that hang, numbers that are not finite.

Whatever one process finds, all must act on together. So each optimizer step ends with a word of a few numbers, summed
over the processes on the device and read one step later, when it has arrived: nobody waits for it.
"""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed import distributed_c10d as distributed

from vla.config import GuardConfig

SPIKE_WEIGHT = 0.02  # of the newest loss in the running average that a spike is measured by
COPIES = 1.0  # seconds within which a second signal is taken for a copy of the first: launchers send their own


class Signals:
    """SIGTERM, SIGINT and SIGUSR1: once, save and stop; a second time, stop now.

    Where a signal ended a run that had more to do there is a file RUN/REQUEUE, which a scheduler's script can test.
    """

    def __init__(self, run_dir: Path):
        self.marker = run_dir / "REQUEUE"
        self.marker.unlink(missing_ok=True)
        self.received, self.when = "", 0.0
        self.saves = False  # until there is something to save a signal stops at once
        # A launcher that is killed forwards nothing, and its processes would go on for ever.
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self.launcher = os.getppid() if launched else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def __bool__(self) -> bool:
        """This process is to save and stop."""
        if not self.received and self.launcher not in (None, os.getppid()):
            self.received = "the end of its launcher"
        return bool(self.received)

    def mark(self, text: str) -> None:
        """Tell a scheduler that the run is worth starting again."""
        self.marker.write_text(text + "\n")

    def _receive(self, number: int, _frame) -> None:
        name, again = signal.Signals(number).name, bool(self.received)
        if again and time.monotonic() - self.when < COPIES:
            return
        if again or not self.saves:
            self.mark(f"stopped at once by {name}")
            os.write(2, f"stopped at once by {name}; the last checkpoint is intact\n".encode())
            os._exit(128 + number)
        self.received, self.when = name, time.monotonic()


class Watchdog:
    """Ends a process of a run in which nothing has moved for a while, and says which process hangs, and where.

    Each process shows its last sign of life to the others through the store of their process group.
    """

    def __init__(self, accelerator: Accelerator, seconds: float):
        self.rank, self.processes, self.seconds = accelerator.process_index, accelerator.num_processes, seconds
        self.signs, self.doing, self.since = 0, "starting", time.monotonic()
        self.store = distributed._get_default_store() if self.processes > 1 else None
        self.ended = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, doing: str) -> None:
        """A sign of life from the training thread. doing: what comes now."""
        self.signs, self.doing, self.since = self.signs + 1, doing, time.monotonic()

    def _watch(self) -> None:
        while not self.ended.wait(min(self.seconds / 4, 10)):
            idle = time.monotonic() - self.since
            if self.store is not None:
                self.store.set(f"alive/{self.rank}", f"{self.signs} {idle:.0f} {self.doing}")
            if idle > self.seconds:
                self._end()

    def _end(self) -> None:
        others = range(self.processes) if self.store is not None else []
        signs = {self.rank: (self.signs, f"{time.monotonic() - self.since:.0f}", self.doing)}
        for rank in others:
            count, idle, doing = self.store.get(f"alive/{rank}").decode().split(" ", 2)
            signs[rank] = (int(count), idle, doing)
        behind = min(count for count, _, _ in signs.values())
        lines = [f"error: no progress for {self.seconds:.0f} seconds (--guard.hang_seconds), so this run ends:"]
        for rank, (count, idle, doing) in sorted(signs.items()):
            hangs = "   <- behind the others" if count == behind and self.processes > 1 else ""
            lines.append(f"  process {rank}: {doing}, for {idle} s{hangs}")
        sys.stderr.write("\n".join([*lines, f"process {self.rank} stands at:", ""]))
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
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
        self.accelerator, self.config, self.signals, self.say, self.describe = (
            accelerator,
            config,
            signals,
            say,
            describe,
        )
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
        self.losses, self.seen, self.sent, self.window = [], [], deque(), None

    def state(self) -> dict:
        """The counters as they are now; waits for the device."""
        return {
            "bad_in_a_row": int(self.bad_in_a_row.item()),
            "skipped_updates": int(self.skipped.item()),
            "loss_average": self.loss_average.item(),
        }

    def go_on(self, doing: str) -> bool:
        """A sign of life, from within what takes long. False if this process is to leave it and stop."""
        self.watchdog.alive(doing)
        return not self.signals

    def checked(self, loss: Tensor, sample_loss: Tensor, position: Tensor) -> Tensor:
        """The loss to differentiate, of one micro-batch: itself, to the bit, or no number if it is not to be learned.

        Its gradients then are no numbers either, which the sum over the processes carries to all of them.
        sample_loss, position: [B], by which the samples are named.
        """
        self.seen.append((position, sample_loss))
        self.losses.append(loss.detach())
        poison = 0 * loss.detach()
        if self.config.spike_factor and self.accelerator.sync_gradients:
            self.mean_loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean")
            spike = (self.loss_average > 0) & (self.mean_loss > self.config.spike_factor * self.loss_average)
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
        word = torch.cat([word, self.bad_in_a_row[None]])
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
        stopping, given_up, bad = word.tolist()
        self.stopping, self.given_up = self.stopping or stopping > 0, self.given_up or given_up > 0
        if bad:
            self._tell(step, seen)
        if bad >= self.config.bad_steps and self.window is None:
            self.window = step - int(bad), int(bad)

    def _tell(self, step: int, seen: list[tuple[Tensor, Tensor]]) -> None:
        position, loss = (torch.cat(parts) for parts in zip(*seen, strict=True))
        bad = gather_object(position[~torch.isfinite(loss)].tolist())
        everything = gather_object(position.tolist())
        if bad:
            self.say(f"step {step}: update skipped, the loss is not finite for {self.describe(sorted(bad))}")
        else:
            self.say(
                f"step {step}: update skipped, a gradient is not finite or the loss has a spike; its samples are at "
                f"positions {min(everything)} to {max(everything)}"
            )
