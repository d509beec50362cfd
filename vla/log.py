"""Where numbers and pictures of a run go: metrics.jsonl, the trackers, the progress bar, result.json."""

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from tqdm import tqdm

from vla import InputError, NotSaved, in_one_line
from vla.checkpoint import versions
from vla.config import TrainConfig
from vla.images import gif
from vla.options import flatten


def check_trackers(names: Iterable[str]) -> None:
    """Raises InputError for a tracker that is unknown or not installed."""
    available = [str(available) for available in get_available_trackers()]
    if unknown := [name for name in names if name not in available]:
        raise InputError(f"--log.trackers {unknown[0]} is unknown or not installed; here are {', '.join(available)}")


def tracker(name: str, run_dir: Path, first_step: int):
    """What accelerate's `log_with` takes; TensorBoard's drops what an earlier start logged after `first_step`."""
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", run_dir, purge_step=first_step + 1)
    return name


WARM = 10  # steps before a trace begins


class RunLog:
    """Writes on the main process, does nothing on the others. A resumed run continues the files at its step.

    A disk that is full ends nothing: metrics.jsonl is filled up when there is room again, a tracker that failed is
    dropped.

    evaluated: the run has the evaluation of its first step behind it, and will not log it again.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, first_step: int, steps: int, evaluated: bool = False
    ):
        traced = config.log.profile
        short = traced and steps - first_step < WARM + traced
        needs = f"--log.profile {traced} needs {WARM + traced} steps, as the first {WARM} are left out"
        if short and first_step == 0:
            raise InputError(f"{needs}; --steps is {steps}: give more of these, or trace less")
        self.accelerator, self.run_dir, self.batch = accelerator, Path(config.run_dir), config.global_batch_size
        self.config, self.steps = config, steps
        self.last: dict[str, float] = {}
        self.since, self.waited, self.steps_since = time.perf_counter(), 0.0, 0
        self.pending = b""  # lines of metrics.jsonl for which there was no room
        self.before = self.run_dir / "metrics.before.jsonl"  # of before the run went back, until it saves
        accelerator.log_with = [tracker(name, self.run_dir, first_step) for name in config.log.trackers]
        accelerator.init_trackers("vla")
        if not accelerator.is_main_process:
            return
        if first_step == 0:
            self._tensorboard(lambda writer: writer.add_text("config", _markdown(config), 0))
        self._keep_until(first_step, evaluated)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5 if terminal else 10
        )

        self.profiler = None
        if short:
            self.say(f"warning: {needs}, and {steps - first_step} are left: nothing is traced")
        elif traced:
            when = torch.profiler.schedule(wait=WARM - 1, warmup=1, active=traced, repeat=1)
            write = torch.profiler.tensorboard_trace_handler(str(self.run_dir / "profile"), use_gzip=True)
            self.profiler = torch.profiler.profile(schedule=when, on_trace_ready=write)
            self.profiler.start()

    def go_back(self, step: int, evaluated: bool) -> None:
        """What was logged after `step` is forgotten: the run went back to it."""
        if not self.accelerator.is_main_process:
            return
        self.file.close()
        self._keep_until(step, evaluated)

        def purge(writer) -> None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What SummaryWriter(purge_step=…) writes when it starts: readers then drop the later events before it.
            writer._get_file_writer().add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

        self._tensorboard(purge)
        self.bar.n = step
        with suppress(OSError):
            self.bar.refresh()

    def _keep_until(self, step: int, evaluated: bool) -> None:
        """Open metrics.jsonl with the lines up to a step and its evaluation, among them those that waited for room."""
        path = self.run_dir / "metrics.jsonl"
        if self.before.exists():  # nothing was saved since it was set aside, and checkpoints that it tells of are there
            self.before.replace(path)
            self.pending = b""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept, last = [], {}
        for line in (line for line in [*lines, *self.pending.splitlines(keepends=True)] if line.endswith(b"\n")):
            try:  # of {"step": 12, "train/loss": …: a long log is read in no time
                _, _, number, kind, rest = line.split(b'"', 4)
                logged = int(number.strip(b": ,"))
                rest.index(b"}\n")
            except ValueError:
                self.say(f"warning: a damaged line of {path} is left out")
                continue
            if logged < step or (logged == step and (evaluated or not kind.startswith(b"eval/"))):
                kept.append(line)
                last[kind] = line
        self.last = {}
        for line in last.values():
            with suppress(ValueError):  # damaged further on
                self.last |= json.loads(line)
        self.last.pop("step", None)
        content, shortened, self.pending = b"".join(kept), path.with_suffix(".tmp"), b""
        try:
            shortened.write_bytes(content)
            if len(kept) < len(lines):
                path.replace(self.before)
            shortened.replace(path)  # whole or not at all: a run may be killed here again
        except OSError:  # a full disk: what is to stay up to the first line that is not needs no room
            shortened.unlink(missing_ok=True)
            same = next((i for i, (old, new) in enumerate(zip(lines, kept, strict=False)) if old != new), len(lines))
            self.pending = b"".join(kept[same:])
        self.file = path.open("ab", buffering=0)
        self.file.truncate(len(content) - len(self.pending))

    @contextmanager
    def waiting_for_data(self):
        """Around the call that may wait for the loader."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def step(self) -> None:
        """One optimizer step was made."""
        self.steps_since += 1
        if self.accelerator.is_main_process:
            with suppress(OSError):  # nobody hears it any more, which is no reason to stop
                self.bar.update()
            if self.profiler:
                self.profiler.step()

    def performance(self, step: int) -> dict[str, float]:
        """Speed since the last call (evaluations and saves between count as time), data wait, memory."""
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        speed = self.steps_since / elapsed
        values = {
            "perf/samples_per_second": speed * self.batch,
            "perf/data_wait_share": self.waited / elapsed,
            "perf/eta_seconds": (self.steps - step) / speed,
        }
        if torch.cuda.is_available() and self.accelerator.device.type == "cuda":
            values |= {
                "memory/allocated_gb": torch.cuda.memory_allocated() / 1e9,
                "memory/reserved_gb": torch.cuda.memory_reserved() / 1e9,
                "memory/peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        self.waited, self.steps_since = 0.0, 0
        return values

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Numbers of this step, for every tracker, metrics.jsonl and the bar."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN: what is not finite becomes null.
        self.last |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps({"step": step} | {name: self.last[name] for name in values}) + "\n")
        self._tracked(lambda tracker: tracker.log(values, step=step))
        names = {
            "train/loss": "loss",
            "eval/loss": "eval",
            "eval/success": "success",
            "perf/samples_per_second": "samples/s",
        }
        known = {short: self.last.get(name) for name, short in names.items()}
        with suppress(OSError):
            self.bar.set_postfix({short: f"{value:.4g}" for short, value in known.items() if value is not None})

    def _append(self, line: str) -> None:
        """Write a line to metrics.jsonl, after those that found no room; whole or not at all."""
        size, lines = os.fstat(self.file.fileno()).st_size, self.pending + line.encode()
        try:
            if self.file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.pending = b""
        except OSError as failure:
            self.file.truncate(size)
            if not self.pending:
                self.say(f"warning: metrics wait until {self.file.name} can be written again ({in_one_line(failure)})")
            self.pending = lines

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self.accelerator.is_main_process:
            with suppress(OSError):
                tqdm.write(text, file=sys.stderr)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """One picture: a column for each sample, a row for each camera. images: uint8 [B, N, 3, h, w]."""

        def add(writer) -> None:
            rows = [np.concatenate(list(camera), axis=2) for camera in images.swapaxes(0, 1)]  # N times [3, h, B · w]
            writer.add_image(name, np.concatenate(rows, axis=1), step)
            writer.flush()

        self._tensorboard(add)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """A moving picture for TensorBoard. frames: uint8 [L, h, w, 3]."""

        def add(writer) -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # SummaryWriter.add_video wants moviepy to make a GIF; a GIF is all that TensorBoard needs.
            image = Summary.Image(
                height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif(frames, fps)
            )
            writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
            writer.flush()

        self._tensorboard(add)

    def committing(self) -> None:
        """A checkpoint is about to be committed: from then on the run goes on from there. Any thread may call it."""
        if self.accelerator.is_main_process:
            with suppress(OSError):
                self.before.unlink(missing_ok=True)

    def saves(self, step: int, metrics: list[dict[str, float]], problems: list[str]) -> None:
        """What became of checkpoints (see Saver.report)."""
        for values in metrics:
            self.metrics(step, values)
        for problem in problems:
            self.say(f"warning: {problem}")

    def close(self) -> None:
        """Close what is open."""
        if self.accelerator.is_main_process:
            if self.profiler:
                self.profiler.stop()
            with suppress(OSError):
                self.bar.close()
            self.file.close()
            self._tracked(lambda tracker: tracker.finish())
            self.accelerator.trackers = []

    def result(self, state: dict) -> None:
        """Write result.json. state: the trainer's counters at the end. Raises NotSaved if it cannot be written."""
        if not self.accelerator.is_main_process:
            return
        self.committing()
        cuda = self.accelerator.device.type == "cuda"
        result = {
            **state,
            "samples": state["step"] * self.batch,
            "last": self.last,
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "versions": versions(),
            "config": asdict(self.config),
        }
        path = self.run_dir / "result.json"
        try:
            path.with_suffix(".tmp").write_text(json.dumps(result, indent=2) + "\n")
            path.with_suffix(".tmp").replace(path)
        except OSError as failure:
            path.with_suffix(".tmp").unlink(missing_ok=True)
            raise NotSaved(f"{path} cannot be written ({in_one_line(failure)})") from None

    def _tracked(self, use: Callable, name: str = "") -> None:
        """Have each tracker, or that of this name, log something; one that fails is dropped."""
        if not self.accelerator.is_main_process:
            return
        for tracker in [*self.accelerator.trackers]:
            if name in ("", tracker.name):
                try:
                    use(tracker)
                except OSError as failure:  # TensorBoard's writer raises it for ever
                    self.accelerator.trackers.remove(tracker)
                    self.say(f"warning: {tracker.name} logs no more in this start ({in_one_line(failure)})")

    def _tensorboard(self, use: Callable) -> None:
        self._tracked(lambda tracker: use(tracker.writer), "tensorboard")


def _markdown(config: TrainConfig) -> str:
    return "| flag | value |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {value} |" for name, value in flatten(config).items()
    )
