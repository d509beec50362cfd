"""What is around a CUDA graph; tests/model/test_gpu.py has the graphs themselves."""

from types import SimpleNamespace

import pytest
import torch
from robots import tiny
from torch import nn

from vla import InputError
from vla.model import policy as policy_module
from vla.model.graph import capture_learning


def replayed(policy, arguments):
    """Like a graph: takes the names of its example in their order, and writes its outputs to the same memory."""
    (example,), forward = arguments, policy.forward
    static = {name: value.detach().clone() for name, value in forward(example).items()}

    def replay(batch):
        assert list(batch) == list(example)
        new = forward(batch)
        for name, value in static.items():
            value.copy_(new[name].detach())
        return static | {"loss": static["loss"] + 0 * new["loss"]}

    policy.forward = replay
    return policy


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        each = self.weight * batch["x"]
        return {"loss": each.mean(), "sample_loss": each}


def test_what_a_replay_gave_outlives_the_next(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed)
    policy, x = Doubling(), torch.arange(3.0)
    capture_learning(policy, {"x": x, "position": x}, summed=False)
    first = policy({"position": x, "x": x + 1, "key": x})  # in another order, with another name
    policy({"x": x + 5, "position": x})
    torch.testing.assert_close(first["sample_loss"], 2 * (x + 1))
    assert first["loss"] == 4
    assert first["loss"].requires_grad
    assert not first["sample_loss"].requires_grad


def test_policy_that_cannot_be_captured_is_refused(monkeypatch):
    def fails(policy, arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    with pytest.raises(
        InputError, match=r"--cuda_graphs: .*\(RuntimeError: operation not permitted.* capturing\); leave it out"
    ):
        capture_learning(Doubling(), {"x": torch.zeros(1)}, summed=False)


class Pretended(str):
    """A place for tensors, on the CPU, that says it is a GPU."""

    type = "cuda"


def test_policy_whose_capture_fails_says_so_and_is_not_saved(monkeypatch, tmp_path):
    def fails(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(policy_module, "Graph", fails)
    policy = tiny()
    policy.state_norm._buffers["offset"] = SimpleNamespace(device=Pretended("cpu"))
    with pytest.raises(InputError, match=r"cannot be captured \(RuntimeError: operation .* capturing\); load it again"):
        policy.capture()
    assert policy.action_head.decoder.state.weight.dtype == torch.bfloat16
    with pytest.raises(InputError, match="a captured policy is not saved, as its weights may be rounded"):
        policy.save_pretrained(tmp_path / "export")
