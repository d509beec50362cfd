"""A computation on a GPU as one launch."""

from collections.abc import Callable

import torch
from torch import Tensor


class Graph:
    """A CUDA graph (Nguyen et al., "Accelerating PyTorch with CUDA graphs", 2021) of a function of one batch.

    batch: an example; later batches need its shapes, dtypes and device. The function must neither wait for the device
    nor depend on values; memory that it reads besides, such as weights, must stay where it is.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]):
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

    def fits(self, batch: dict[str, Tensor]) -> bool:
        """Whether all shapes are those of the example."""
        return all(batch[name].shape == value.shape for name, value in self.batch.items())

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for name, value in self.batch.items():
            value.copy_(batch[name], non_blocking=True)
        self.graph.replay()
        return self.output.clone()
