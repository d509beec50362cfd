"""What only a GPU can show: `make test-gpu` on a machine that has one.

All of it happens in child processes, as a process that has used a GPU cannot be forked.
"""

import signal

import pytest
import torch
from backbones import batch_of, policy_on
from robots import HEADS
from training import assert_equal, at_step, die_at, in_children, series, train

from vla import InputError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; see make test-gpu")

LONGER = ("--log.every", 20, "--eval.every", 0, "--checkpoint.every", 20, "--steps", 20)


@pytest.mark.parametrize("kind", ["", "smolvlm", "paligemma", "siglip"])
@pytest.mark.parametrize("head", HEADS)
def test_captured_policy_equals_eager_one_for_every_batch(kind, head, originals):
    flags = originals(kind) if kind else {}

    def compare(found: dict) -> None:
        eager, captured = (policy_on(flags, max_tokens=36, **HEADS[head]).cuda().eval() for _ in range(2))
        captured.capture(2, torch.float32)
        for turn in range(3):
            seen = {name: value.cpu().roll(turn, dims=0) for name, value in batch_of(eager).items()}
            seen["key"] += turn
            batch = {name: value.cuda() for name, value in seen.items()}
            expected = eager.predict_chunk(batch)
            for given in (batch, seen):  # from the GPU and from the CPU
                torch.testing.assert_close(captured.predict_chunk(given), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(captured.predict_chunk(batch), captured.predict_chunk(batch), rtol=0, atol=0)
        for given in (batch, seen):  # another size: as it was before
            one, own = ({name: value[:1] for name, value in whole.items()} for whole in (given, batch))
            torch.testing.assert_close(captured.predict_chunk(one), eager.predict_chunk(own), rtol=1e-4, atol=1e-4)

    in_children(compare)[0].ok()


@pytest.mark.parametrize("kind", ["", "smolvlm"])
def test_captured_policy_in_bf16_is_autocast_and_is_not_saved(kind, originals, tmp_path):
    flags = originals(kind) if kind else {}

    def compare(found: dict) -> None:
        eager, captured = (policy_on(flags, max_tokens=36, **HEADS["flow"]).cuda().eval() for _ in range(2))
        captured.capture(2)
        batch = {name: value.cuda() for name, value in batch_of(eager).items()}
        for size in (2, 1):
            own = {name: value[:size] for name, value in batch.items()}
            with torch.autocast("cuda", torch.bfloat16):
                expected = eager.predict_chunk(own)
            torch.testing.assert_close(captured.predict_chunk(own), expected, rtol=0.05, atol=0.05)
        with pytest.raises(InputError, match="a captured policy is not saved"):
            captured.save_pretrained(tmp_path / "export")

    in_children(compare)[0].ok()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("own", [(), ("--optim.muon_lr", 0.01, "--compile", "--cuda_graphs")], ids=["plain", "graphs"])
def test_steps_do_not_wait_for_the_gpu(head, own, flags, tmp_path):
    """But for log lines, evaluations and saves, of which there are none here."""

    def hook(found: dict) -> None:
        at_step(5, lambda: torch.cuda.set_sync_debug_mode("error"))(found)
        at_step(15, lambda: torch.cuda.set_sync_debug_mode("default"))(found)

    own = (*own, "--data.augment.brightness", 0.1, "--data.augment.shift", 0.05, "--data.workers", 1)
    (child,) = train(*flags, "--model.head", head, *own, *LONGER, "--run_dir", tmp_path / "run", before=hook)
    assert "AccumulateGrad" not in child.ok().stderr


@pytest.mark.parametrize("micro", [12, 4])
def test_training_by_graphs_is_the_training_without(micro, flags, uninterrupted):
    own = ("--micro_batch_size", micro, "--data.augment.brightness", 0.1)
    graphs, eager = (uninterrupted(*own, *more) for more in (("--cuda_graphs",), ()))
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert series(graphs, name) == pytest.approx(series(eager, name), rel=2e-3), name


@pytest.mark.parametrize("own", [(), ("--compile", "--micro_batch_size", 4)], ids=["plain", "compiled"])
def test_run_by_graphs_is_resumed_bit_for_bit(own, flags, uninterrupted, tmp_path):
    own = (*own, "--cuda_graphs", "--deterministic")
    (killed,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=die_at(7))
    assert killed.code == -signal.SIGKILL
    train("--resume_from", tmp_path / "run")[0].ok()
    assert_equal(tmp_path / "run", uninterrupted(*own))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_by_graphs_are_the_training_of_one(flags, uninterrupted):
    on_gpus = {"ACCELERATE_USE_CPU": "false"}
    two, one = uninterrupted("--cuda_graphs", processes=2, env=on_gpus), uninterrupted("--cuda_graphs")
    assert series(two, "train/loss") == pytest.approx(series(one, "train/loss"), rel=2e-3)
