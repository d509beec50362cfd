"""Where numbers and pictures of a run go: metrics.jsonl, the trackers, the progress bar, result.json."""

import io
import json
import math
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from PIL import Image
from tqdm import tqdm

from vla import InputError
from vla.checkpoint import versions
from vla.config import TrainConfig
from vla.options import flatten


def tracker(name: str, run_dir: Path, first_step: int):
    """What accelerate's `log_with` takes; TensorBoard's drops what an earlier start logged after `first_step`.

    Raises InputError for a tracker that is unknown or not installed.
    """
    available = [str(available) for available in get_available_trackers()]
    if name not in available:
        raise InputError(f"--log.trackers {name} is unknown or not installed; here are {', '.join(available)}")
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", run_dir, purge_step=first_step + 1)
    return name


WARM = 10  # steps before a trace begins


class RunLog:
    """Writes on the main process, does nothing on the others. A resumed run continues the files at its step.

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
        accelerator.log_with = [tracker(name, self.run_dir, first_step) for name in config.log.trackers]
        accelerator.init_trackers("vla")
        if not accelerator.is_main_process:
            return
        if first_step == 0 and (writer := self._tensorboard()):
            writer.add_text("config", _markdown(config), 0)
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
        if writer := self._tensorboard():
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What SummaryWriter(purge_step=…) writes when it starts: readers then drop the later events before it.
            writer._get_file_writer().add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.bar.n = step
        self.bar.refresh()

    def _keep_until(self, step: int, evaluated: bool) -> None:
        """Open metrics.jsonl with the lines up to a step, and up to its evaluation."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept, last = [], {}
        for line in (line for line in lines if line.endswith("\n")):
            _, _, number, kind, _ = line.split('"', 4)  # of {"step": 12, "train/loss": …: a long log is read in no time
            logged = int(number.strip(": ,"))
            if logged < step or (logged == step and (evaluated or not kind.startswith("eval/"))):
                kept.append(line)
                last[kind] = line
        self.last = {}
        for line in last.values():
            self.last |= json.loads(line)
        self.last.pop("step", None)
        shortened = path.with_suffix(".tmp")
        shortened.write_text("".join(kept))
        shortened.replace(path)  # whole or not at all: a run may be killed here again
        self.file = path.open("a")

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
        self.file.write(json.dumps({"step": step} | {name: self.last[name] for name in values}) + "\n")
        self.file.flush()
        self.accelerator.log(values, step=step)
        names = {
            "train/loss": "loss",
            "eval/loss": "eval",
            "eval/success": "success",
            "perf/samples_per_second": "samples/s",
        }
        known = {short: self.last.get(name) for name, short in names.items()}
        self.bar.set_postfix({short: f"{value:.4g}" for short, value in known.items() if value is not None})

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """One picture: a column for each sample, a row for each camera. images: uint8 [B, N, 3, h, w]."""
        if writer := self._tensorboard():
            rows = [np.concatenate(list(camera), axis=2) for camera in images.swapaxes(0, 1)]  # N times [3, h, B · w]
            writer.add_image(name, np.concatenate(rows, axis=1), step)
            writer.flush()

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """A moving picture for TensorBoard. frames: uint8 [L, h, w, 3]."""
        if writer := self._tensorboard():
            from tensorboard.compat.proto.summary_pb2 import Summary

            # SummaryWriter.add_video wants moviepy to make a GIF; a GIF is all that TensorBoard needs.
            image = Summary.Image(
                height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif(frames, fps)
            )
            writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
            writer.flush()

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
            self.bar.close()
            self.file.close()

    def result(self, state: dict) -> None:
        """Write result.json. state: the trainer's counters at the end."""
        if not self.accelerator.is_main_process:
            return
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
        (self.run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    def _tensorboard(self):
        if self.accelerator.is_main_process:
            for open_tracker in self.accelerator.trackers:
                if open_tracker.name == "tensorboard":
                    return open_tracker.writer
        return None


def gif(frames: np.ndarray, fps: int) -> bytes:
    """An endless GIF in 256 colours, the same for all frames, so that what does not move takes no bytes.

    frames: uint8 [L, h, w, 3].
    """
    some = Image.fromarray(np.concatenate(frames[np.linspace(0, len(frames) - 1, num=5, dtype=int)]))
    colours = some.quantize(256, method=Image.Quantize.FASTOCTREE)  # small things keep theirs
    pictures = [Image.fromarray(frame).quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _markdown(config: TrainConfig) -> str:
    return "| flag | value |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {value} |" for name, value in flatten(config).items()
    )
