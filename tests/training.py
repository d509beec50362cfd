"""Runs of train.py for the end-to-end tests, and what a run has left behind.

A test's runs are children forked after the heavy imports, which are paid once: each runs train.py as a script, with
hooks that the test sets in the child alone.
"""

import contextlib
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import torch.utils.tensorboard
import tyro  # noqa: F401
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from vla import checkpoint, evaluate, export, guard, log, model, optim, rollout, shards  # noqa: F401
from vla.data import lerobot, stream  # noqa: F401
from vla.saver import Saver

ROOT = Path(__file__).parents[1]
NEW_RUN = ("--run_dir", "run", "--data.path", "data", "--steps", "10")  # flags that a new run needs
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# Two processes that share the CPU, of a YAML that is written for several GPUs.
TWO_PROCESSES = ["--config_file", str(ROOT / "accelerate_configs/4gpu.yaml"), "--num_processes", "2"]
TIMEOUT = 60  # seconds for a run that takes one or two; what then still runs is hung
ON_CPU = {"ACCELERATE_USE_CPU": "1"}  # as true as "true", which YAMLs make of it
# What the launcher makes of accelerate_configs/4gpu_fsdp.yaml.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclass
class Child:
    """How a child process ended. code: its exit code, or minus the signal that killed it. found: what it filled in."""

    code: int
    stderr: str
    found: dict

    def ok(self) -> "Child":
        assert self.code == 0, f"exit code {self.code}:\n{self.stderr}"
        return self


def train(
    *arguments,
    before: Callable[[dict], None] | None = None,
    processes: int = 1,
    env: dict | None = None,
    kill: Callable[[], bool] | None = None,
) -> list[Child]:
    """Run train.py with these flags in forked processes, to their end. `before(found)` sets hooks in each."""

    def script(found: dict) -> None:
        if before:
            before(found)
        sys.argv = ["train.py", *map(str, arguments)]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return in_children(script, processes, env, kill)


def run_module(name: str, *arguments) -> list[Child]:
    """Run `python -m name` with these arguments in a forked process, to its end."""

    def module(found: dict) -> None:
        sys.argv = [name, *map(str, arguments)]
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return in_children(module)


def in_children(
    function: Callable[[dict], None],
    processes: int = 1,
    env: dict | None = None,
    kill: Callable[[], bool] | None = None,
) -> list[Child]:
    """Call `function(found)` in forked processes that form one process group, as a launcher would start them.

    All are killed, with the workers they have, once `kill()` is true.
    """
    context, deadline, started = multiprocessing.get_context("fork"), time.monotonic() + TIMEOUT, []
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for rank in range(processes):
            variables = dict(env or {})
            if processes > 1 or "ACCELERATE_USE_FSDP" in variables:
                variables = ON_CPU | {"RANK": rank, "LOCAL_RANK": rank} | variables
                variables |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            receiver, sender = context.Pipe(duplex=False)
            errors = Path(folder, f"stderr-{rank}")
            child = context.Process(target=_child, args=(function, sender, errors, variables))
            child.start()
            sender.close()
            started.append((child, receiver, errors))
        children = []
        try:
            for child, receiver, errors in started:
                # A killed child's loader workers hold its pipe open for seconds, so its end is asked for, not awaited.
                while not receiver.poll(0.01) and child.is_alive():
                    if kill and kill():
                        _kill(started)
                    if time.monotonic() > deadline:
                        texts = [errors.read_text() for _, _, errors in started]
                        raise TimeoutError(f"no end after {TIMEOUT} s:\n" + "\n".join(texts))
                found = {}
                with contextlib.suppress(EOFError):  # it was killed
                    found = pickle.loads(receiver.recv_bytes()) if receiver.poll() else {}
                child.join(max(0, deadline - time.monotonic()))
                children.append(Child(child.exitcode, errors.read_text(), found))
        finally:
            _kill(started)  # those that hang, and workers that were left
            for child, _, _ in started:
                child.join()
    return children


def _kill(started: list[tuple]) -> None:
    for child, _, _ in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _child(function: Callable[[dict], None], sender, errors: Path, variables: dict) -> None:
    os.setpgid(0, 0)
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update({name: str(value) for name, value in variables.items()})
    logging.getLogger().handlers.clear()  # pytest's
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in the parent
    GradientState._reset_state()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has the parent ignore
    gc.freeze()  # what the parent has made is none of this process's, see `the`
    faulthandler.dump_traceback_later(TIMEOUT - 5, file=sys.stderr)
    found, code = {}, 0
    try:
        function(found)
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sender.send_bytes(pickle.dumps(found))
    os._exit(code)


def command(*words, env: dict | None = None, timeout: float = TIMEOUT) -> subprocess.CompletedProcess:
    """A command in a process of its own, in the repository, to its end."""
    variables = os.environ | (env or {})
    return subprocess.run(
        [*map(str, words)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


def start(words: list[str]) -> subprocess.Popen:
    """A command in a process of its own, which goes on while the test does."""
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | ON_CPU, stderr=subprocess.DEVNULL)


def wait_for_step(run: Path, step: int, process: subprocess.Popen, checkpoints: int = 1) -> None:
    """Until it has logged this step and committed so many checkpoints."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            logged = max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
            if logged >= step and len(steps(run)) >= checkpoints:
                return
        time.sleep(0.005)
    raise AssertionError(f"the run never logged step {step}; exit code {process.poll()}")


def after(function_owner, name: str, then: Callable) -> None:
    """Call `then(result, *arguments)` after each call of an attribute; for hooks in a child."""
    original = getattr(function_owner, name)

    def wrapped(*arguments, **named):
        result = original(*arguments, **named)
        then(result, *arguments)
        return result

    setattr(function_owner, name, wrapped)


def die_at(step: int) -> Callable[[dict], None]:
    """A hook that kills the process, as kill -9 does, once it has logged `step` and its last save is committed."""

    def hook(found: dict) -> None:
        savers = []

        def die(_, run_log, logged, values):
            if logged == step:
                savers[0].settle()
                os.kill(os.getpid(), signal.SIGKILL)

        after(Saver, "__init__", lambda _, saver, *rest, **named: savers.append(saver))
        after(log.RunLog, "metrics", die)

    return hook


def both(*hooks: Callable[[dict], None]) -> Callable[[dict], None]:
    """One hook of several."""

    def hook(found: dict) -> None:
        for each in hooks:
            each(found)

    return hook


def at_step(step: int, act: Callable[[], None], ranks: Collection[int] = range(8)) -> Callable[[dict], None]:
    """A hook that calls `act()` once this many steps are made, in the processes of these ranks."""

    def hook(found: dict) -> None:
        made = []

        def count(_, run_log):
            made[0] += 1
            if made[0] == step and int(os.environ.get("RANK", 0)) in ranks:
                act()

        after(log.RunLog, "__init__", lambda _, run_log, accelerator, config, first, last: made.append(first))
        after(log.RunLog, "step", count)

    return hook


def send(*numbers: int) -> None:
    """Signal this process and its loader workers, as a scheduler does, and go on when that was heard."""
    for number in numbers:  # from a process of its own: of its parent's signals a loader worker has another opinion
        subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
    while not the(guard.Signals).received:
        time.sleep(0.001)


def the(kind: type):
    """The one object of its class that this child has made."""
    (found,) = (thing for thing in gc.get_objects() if type(thing) is kind)
    return found


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock, the memory or a save in the background says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in map(_repeatable, lines) if line.keys() != {"step"}]


def _repeatable(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith(("perf/", "memory/", "save/"))}


def series(run: Path, name: str) -> dict[int, float]:
    """One metric by step; a step that has it twice is an error."""
    rows = [(line["step"], line[name]) for line in metrics(run) if name in line]
    assert len(rows) == len(dict(rows)), f"{name} has steps twice: {[step for step, _ in rows]}"
    return dict(rows)


def result(run: Path) -> dict:
    """result.json without what a clock, the memory or the run's name says."""
    content = json.loads((run / "result.json").read_text())
    last = _repeatable(content.pop("last"))
    return {k: v for k, v in content.items() if k not in ("seconds", "peak_memory_gb", "config")} | {"last": last}


def steps(run: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    return list(checkpoint.all_steps(run / "checkpoints"))


def last(run: Path) -> Path:
    """The newest committed checkpoint."""
    return list(checkpoint.all_steps(run / "checkpoints").values())[-1]


def of(run: Path, step: int) -> Path:
    """The checkpoint of this step."""
    return run / f"checkpoints/step_{step:08d}"


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def weights(run: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(last(run) / file)


def everything(run: Path) -> dict[str, object]:
    """All that two equal runs have in common, by name; tensors as bytes, so that equal means bit for bit."""
    found: dict[str, object] = {}

    def collect(name: str, value) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                collect(f"{name}/{key}", part)
        else:
            found[name] = repr(value)

    folder = last(run)
    collect("step", folder.name)
    for name, kind in (("weights", "model"), ("average", "ema"), ("optimizer", "optimizer")):
        for file in shards.files(folder, kind):
            collect(name if file.stem == kind else f"{name}/{file.stem}", load_file(file))
    if (folder / "optimizer.bin").exists():
        collect("optimizer", torch.load(folder / "optimizer.bin", weights_only=True))
    collect("export", load_file(run / "export/model.safetensors"))
    collect("metrics", metrics(run))
    collect("result", result(run))
    state = json.loads((folder / "trainer_state.json").read_text())
    collect("state", {k: v for k, v in state.items() if k != "seconds"})
    return found


def assert_equal(run: Path, other: Path) -> None:
    """Two runs are the same, bit for bit."""
    a, b = everything(run), everything(other)
    assert {name.split("/")[0] for name in a} >= {"weights", "average", "optimizer", "metrics", "result"}
    differing = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    assert not differing, f"{len(differing)} of {len(a)} differ: {differing[:20]}"


def once(act):
    """The function that calls `act()` the first time that it is called."""
    calls = []

    def call(*_):
        calls.append(1)
        if len(calls) == 1:
            act()

    return call


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def rank():
    return int(os.environ.get("RANK", 0))


def assert_stopped(run, children, step):
    """They saved at about this step, ended well, and left the mark."""
    assert [child.code for child in children] == [0] * len(children), children[0].stderr
    (stopped,) = re.findall(r"^stopped at step (\d+) of \d+ by .*; go on with --resume_from", children[0].stderr, re.M)
    assert step <= int(stopped) <= step + 2
    assert steps(run)[-1] == int(stopped)
    assert (run / "REQUEUE").read_text().startswith(f"stopped at step {stopped} of ")
    assert not (run / "result.json").exists()


def assert_resumes_to(run, other, processes=1, before=None, env=None):
    """The resumed run equals the other, and takes the mark away."""
    resumed = train("--resume_from", run, processes=processes, before=before, env=env)
    assert [child.code for child in resumed] == [0] * processes, resumed[0].stderr
    assert_equal(run, other)
    assert not (run / "REQUEUE").exists()


def settle():
    the(Saver).settle()
