"""Computations on a GPU as one launch each (Nguyen et al., "Accelerating PyTorch with CUDA graphs", 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vla import InputError, in_one_line


class Graph:
    """A CUDA graph of a function of one batch.

    batch: an example; of batches with other shapes the function is called itself. It must neither wait for the device
    nor depend on values; memory that it reads besides, such as weights, must stay where it is.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]):
        self.function = function
        self.batch = {name: value.clone() for name, value in batch.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # what is chosen, compiled or allocated in the first calls is no part of it
                function(self.batch)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(self.batch)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if any(batch[name].shape != value.shape for name, value in self.batch.items()):
            return self.function({name: batch[name].to(value.device) for name, value in self.batch.items()})
        for name, value in self.batch.items():
            value.copy_(batch[name], non_blocking=True)
        self.graph.replay()
        return self.output.clone()


def capture_learning(policy: nn.Module, batch: dict[str, Tensor], summed: bool) -> None:
    """From now on compute the policy's forward and backward pass as one launch each, in training mode.

    batch: an example; later batches need its shapes, dtypes and device, and what is trained must stay the same.
    summed: the gradients of several backward passes are to be added up. Raises InputError for a policy whose passes
    are not the same launches every time.
    """
    names = list(batch)
    # Gradients are accumulated on the stream of the capture; autograd waits for that.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        replay = torch.cuda.make_graphed_callables(policy, (batch,)).forward  # the policy's own while it evaluates
    except RuntimeError as failure:
        why = in_one_line(failure)
        raise InputError(f"--cuda_graphs: this policy's passes cannot be captured ({why}); leave it out") from failure

    def forward(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = replay({name: batch[name] for name in names})
        values = {name: value.detach().clone() for name, value in output.items()}  # the next replay overwrites them
        return values | {"loss": output["loss"].clone()}

    policy.forward = forward
    for p in policy.parameters():
        if summed and p.requires_grad:  # the sum would else begin where the next pass writes its gradients
            p.register_hook(torch.clone)
