"""Rows of tensors that processes share: each writes its own, and any number of them finds all again."""

import pytest
import torch
from accelerate import Accelerator
from saving import Policy, broken, new_saver, seal, state_of
from torch import nn
from training import SHARDED, in_children, rank

import vla.saver
from vla import InputError, checkpoint, fsdp, restore
from vla.config import TrainConfig
from vla.optim import EMA
from vla.saver import Saver
from vla.shards import Rows, shard, whole


class Uneven(nn.Module):
    """Parameters that two or three processes cannot share evenly, and buffers that each has."""

    def __init__(self, **more):
        super().__init__()
        for name, shape in ({"one": (1, 3), "five": (5, 2), "seven": (7,), "four": (4, 1)} | more).items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("table", torch.randn(3, 2))

    def forward(self, x):
        return self.scale * x * sum(p.square().sum() for p in self.parameters())

    def own_state(self):
        return self.state_dict()

    own_config, keep = Policy.own_config, Policy.keep


def uneven_training(seed, count=3, frozen=(), accelerator=None, **more):
    """An accelerator, which shards if the environment says so, a policy, its optimizer and average after some steps."""
    torch.manual_seed(seed)
    if accelerator is None:
        accelerator = Accelerator(cpu=True)
        fsdp.set_up(accelerator, TrainConfig())
    accelerator.free_memory()
    policy = Uneven(**more)
    for name in frozen:
        getattr(policy, name).requires_grad_(False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(trained, fused=True))
    ema = EMA(policy, 0.9)
    for step in range(count):
        model(torch.ones(())).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    return accelerator, policy, optimizer, ema


def everything(accelerator, policy, optimizer, ema):
    """The whole tensors that a checkpoint holds, by kind and name, as bytes."""
    named = {name: optimizer.state[p] for name, p in policy.named_parameters()}
    moments = {f"{name}/{kind}": value for name, has in named.items() for kind, value in has.items()}
    kinds = {"model": policy.state_dict(), "optimizer": moments, "ema": ema.average}
    return {
        (kind, n): whole(t.detach()).numpy().tobytes() for kind, tensors in kinds.items() for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, SHARDED), (3, SHARDED)), ((3, SHARDED), (1, None)), ((3, SHARDED), (2, None)), ((2, None), (3, SHARDED))],
)
def test_every_row_is_saved_and_found_again_by_any_number_of_processes(saved, loaded, tmp_path):
    def save(found):
        training = uneven_training(seed=1)
        saver = new_saver(training, tmp_path)
        buffer = saver.buffer.result() if hasattr(saver, "buffer") else None
        saver.save(state_of(1))
        found["everything"], found["draw"] = everything(*training), torch.rand(1).item()
        saver.finish()
        assert buffer is None or saver.buffer.result() is buffer

    def load(found):
        training = [None]
        for count in (0, 2):  # as a run is resumed, and as it goes back
            training = uneven_training(2, count, accelerator=training[0])
            assert restore.load(*training, tmp_path / "step_00000001") == state_of(1)
            found[count], found["draw"] = everything(*training), torch.rand(1).item()

    (tmp_path / ".saving_step_00000001").mkdir()
    (tmp_path / ".saving_step_00000001/left_over").touch()
    savers = [child.ok().found for child in in_children(save, *saved)]
    expected = savers[0]["everything"]
    checkpoint.verify(tmp_path / "step_00000001")
    assert not (tmp_path / "step_00000001/left_over").exists()
    assert len(expected) == 6 + 4 * 3 + 4
    for place, child in enumerate(in_children(load, *loaded)):
        assert child.ok().found[0] == child.found[2] == expected
        assert place >= len(savers) or child.found["draw"] == savers[place]["draw"]
    if saved[1]:
        for kind in ("model", "optimizer", "ema"):
            rows = Rows.of(tmp_path / "step_00000001", kind)
            assert {(kind, name) for name in rows.parts} == {key for key in expected if key[0] == kind}
            for name in rows.parts:
                tensor = torch.full(rows.shape(name), torch.nan)
                rows.read(name, tensor)
                assert tensor.numpy().tobytes() == expected[kind, name]


@pytest.mark.parametrize("env", [SHARDED, None])
def test_checkpoint_of_another_policy_is_refused_with_the_difference_and_changes_nothing(env, tmp_path):
    def save_and_load(_):
        training = uneven_training(seed=1, gone=(2,))
        saver = new_saver(training, tmp_path)
        saver.save(state_of(1))
        saver.finish()
        others = uneven_training(seed=2, accelerator=training[0], five=(6, 2), more=(2,))
        before = everything(*others)
        told = r"the weights are not .* missing more, left over gone, of another shape five; use the checkpoint with"
        with pytest.raises(InputError, match=told):
            restore.load(*others, tmp_path / "step_00000001")
        assert everything(*others) == before
        others = uneven_training(seed=2, accelerator=training[0], frozen=["one"], gone=(2,))
        accelerator, policy, optimizer, _ = others
        before = everything(*others)
        told = "the moments are not .* missing nothing, left over one/exp_avg, one/exp_avg_sq, one/step,"
        error, told = (InputError, told) if env else (ValueError, "doesn't match the size of optimizer's group")
        with pytest.raises(error, match=told):
            restore.load(accelerator, policy, optimizer, None, tmp_path / "step_00000001")
        assert everything(*others) == before

    in_children(save_and_load, 1, env)[0].ok()


@pytest.mark.parametrize("failing", [0, 1])
def test_save_that_fails_in_one_process_fails_in_all_with_its_reason_and_the_next_succeeds(failing, tmp_path):
    def save(found):
        training, save_file = uneven_training(seed=1), vla.saver.save_file
        saver = new_saver(training, tmp_path)
        if rank() == failing:
            vla.saver.save_file = broken
        saver.save(state_of(1))
        saver.settle()
        found["problems"], found["left"] = saver.report()[1], [path.name for path in tmp_path.iterdir()]
        training[0].wait_for_everyone()
        vla.saver.save_file = save_file
        saver.save(state_of(2))
        saver.finish()

    children = in_children(save, 2, SHARDED)
    (problem,) = children[0].ok().found["problems"]
    why = "OSError: process 1: OSError: first line" if failing else "OSError: first line"
    assert problem.startswith(f"a checkpoint could not be saved ({why}): there is none yet; 1 of 3")
    assert children[0].found["left"] == children[1].ok().found["problems"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_state_that_is_not_finite_in_one_process_is_never_committed(tmp_path):
    def save(found):
        training = uneven_training(seed=1)
        saver = new_saver(training, tmp_path)
        if rank() == 1:
            training[1].five.to_local().data[-1] = torch.inf
        saver.save(state_of(1))
        saver.settle()
        found["problems"] = saver.report()[1]

    first, second = in_children(save, 2, SHARDED)
    assert "process 1: FloatingPointError: weights or moments are not finite" in first.ok().found["problems"][0]
    second.ok()
    assert not list(tmp_path.iterdir())


def test_process_that_says_nothing_fails_the_save_in_bounded_time(tmp_path):
    def save(found):
        saver = new_saver(uneven_training(seed=1), tmp_path)
        vla.saver.PATIENCE = 0
        if rank() == 1:
            Saver._write_rows = lambda *_: []
        signs = []
        saver.alive = lambda: signs.append(1)
        saver.save(state_of(1))
        saver.settle()
        found["problems"], found["signs"] = saver.report()[1], len(signs)

    first, second = in_children(save, 2, SHARDED)
    assert "(OSError: process 1: no word of it)" in first.ok().found["problems"][0]
    second.ok()
    assert not list(tmp_path.iterdir())


def test_checkpoint_in_rows_needs_the_moments_of_every_process(tmp_path):
    for name in checkpoint.NEEDED | {shard("model", part, 2) for part in range(2)}:
        (tmp_path / name).touch()
    seal(tmp_path)
    missing = [shard("optimizer", part, 2) for part in range(2)]
    with pytest.raises(InputError, match=f"MANIFEST.json does not list {', '.join(missing)}$"):
        checkpoint.verify(tmp_path)
