"""What must not slow a step: traces that are not asked for, waits for the device."""

import gzip
import json

from torch.utils._python_dispatch import TorchDispatchMode
from training import after, series, train

from vla import log


def test_traced_run_writes_its_steps_and_is_the_same_training(flags, uninterrupted, tmp_path):
    own = ["--log.profile", 3, "--checkpoint.every", 99, "--eval.every", 0]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    child.ok()
    (trace,) = (tmp_path / "run/profile").glob("*.pt.trace.json.gz")
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert [name for name in names if name and name.startswith("ProfilerStep#")] == [
        f"ProfilerStep#{n}" for n in (10, 11, 12)
    ]
    assert "aten::convolution" in names
    assert series(tmp_path / "run", "train/loss") == series(uninterrupted(), "train/loss")


def test_trace_of_more_steps_than_there_are_is_refused_but_keeps_no_run_from_going_on_without_it(flags, tmp_path):
    children = train(*flags, "--log.profile", 7, "--run_dir", tmp_path / "run", processes=2)
    for child in children:
        assert child.code == 1
    told = "error: --log.profile 7 needs 17 steps, as the first 10 are left out; --steps is 16: give more of these"
    assert told in children[0].stderr
    train(*flags, "--steps", 12, "--eval.every", 0, "--log.profile", 2, "--run_dir", tmp_path / "other")[0].ok()
    (child,) = train("--resume_from", tmp_path / "other", "--steps", 16, "--log.profile", 2)
    assert "--log.profile 2 needs 12 steps, as the first 10 are left out, and 4 are left" in child.ok().stderr
    (child,) = train("--resume_from", tmp_path / "other", "--steps", 40)  # it was asked of the other starts alone
    assert "--log.profile" not in child.ok().stderr
    assert len(list((tmp_path / "other/profile").iterdir())) == 1


def test_steps_that_log_nothing_never_wait_for_the_device(flags, tmp_path):
    # On a GPU each of these operations stops the queue of kernels until all before it are done.
    waiting = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.is_nonzero"}

    def count(found):
        found["waits"], now = {}, [1]

        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), named=None):
                if str(function.overloadpacket) in waiting:
                    found["waits"].setdefault(now[0], []).append(str(function))
                return function(*arguments, **(named or {}))

        counter = Counter()
        after(log.RunLog, "__init__", lambda *_: counter.__enter__())
        after(log.RunLog, "close", lambda *_: counter.__exit__(None, None, None))
        # A step's count begins after its optimizer step, so that its own log line, evaluation and save belong to it.
        after(log.RunLog, "step", lambda *_: now.__setitem__(0, now[0] + 1))

    own = ["--data.workers", 1, "--log.every", 6, "--eval.every", 0, "--checkpoint.every", 100, "--steps", 20]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=count)
    waits = child.ok().found["waits"]
    assert set(waits) - {1} <= {step + 1 for step in (6, 12, 18, 20)}, waits
    assert {7, 13, 19, 21} <= set(waits)
