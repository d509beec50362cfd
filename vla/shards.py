"""Tensors of which each process holds some rows, in memory (FSDP2) and in files.

FSDP2 cuts the first dimension: of n rows, process k of p holds those from k * ceil(n / p), at most ceil(n / p), maybe
none. Such processes save NAME-00001-of-0000p.safetensors and so on, each its own rows. A tensor is what the files have
of it, one below the other; what is not cut is in the first. A process that holds all saves NAME.safetensors. Whoever
reads takes the rows that it wants from whichever files have them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vla import InputError

NAME = re.compile(r"(\w+)-\d{5}-of-(\d{5})\.safetensors")


def shard(kind: str, rank: int, processes: int) -> str:
    """Name of the file with the rows of one process."""
    return f"{kind}-{rank + 1:05d}-of-{processes:05d}.safetensors"


def files(folder: Path, kind: str) -> list[Path]:
    """The files of one kind of tensors ("model", "optimizer", "ema"), in order of their rows; empty if there are none.

    Those of all processes, be they there or not.
    """
    if (folder / f"{kind}.safetensors").exists():
        return [folder / f"{kind}.safetensors"]
    found = [int(match[2]) for path in folder.glob(f"{kind}-*") if (match := NAME.fullmatch(path.name))]
    return [folder / shard(kind, rank, max(found)) for rank in range(max(found, default=0))]


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in their own memory; the tensor itself if it is not cut."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all processes; each calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(rows: Tensor, like: Tensor) -> Tensor:
    """Tensors of all processes, from the rows of each that this one holds of tensors like that; each calls this.

    rows: [n, rows, ...] -> [n, *like.shape]
    """
    if not isinstance(like, DTensor):
        return rows
    shape = torch.empty(len(rows), *like.shape, device="meta")
    cut = DTensor.from_local(
        rows, like.device_mesh, [Shard(1)], run_check=False, shape=shape.shape, stride=shape.stride()
    )
    return cut.full_tensor()


def held(tensors: Tensor, like: Tensor) -> Tensor:
    """The rows of each that this process holds of tensors like that. [n, *like.shape] -> [n, rows, ...]"""
    if not isinstance(like, DTensor):
        return tensors
    begin = first_row(like)
    return tensors[:, begin : begin + len(local(like))]


def first_row(tensor: DTensor) -> int:
    """Where the rows begin that this process holds."""
    mesh = tensor.device_mesh
    return mesh.get_local_rank() * -(-len(tensor) // mesh.size())


def own(tensors: Mapping[str, Tensor], main_process: bool) -> dict[str, Tensor]:
    """What this process is to save of these: its rows, and on the main process what is not cut."""
    held = {name: local(tensor) for name, tensor in tensors.items()}
    return {n: t for n, t in held.items() if (len(t) > 0 if isinstance(tensors[n], DTensor) else main_process)}


class Rows:
    """Tensors by name, each the rows of its parts one below the other, which are read when they are asked for."""

    def __init__(self, parts: Mapping[str, Sequence]):  # of slices of safetensors, or of tensors
        self.parts = parts

    @classmethod
    def of(cls, folder: Path, kind: str) -> "Rows":
        """Those of one kind in a folder. Raises FileNotFoundError, naming the file, if one is missing."""
        parts: dict[str, list] = {}
        for path in files(folder, kind) or [folder / f"{kind}.safetensors"]:
            path.open("rb").close()  # safetensors calls every file missing that it cannot open
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append(file.get_slice(name))
        return cls(parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shapes = [_shape(part) for part in self.parts[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        parts = [part[...] for part in self.parts[name]]
        return torch.cat(parts) if parts[0].ndim else parts[0]

    def check(self, expected: Mapping[str, Tensor], what: str) -> None:
        """Raises InputError, naming the difference, unless names and shapes are those of these tensors."""
        missing, left_over = sorted(expected.keys() - self.parts.keys()), sorted(self.parts.keys() - expected.keys())
        other = [
            name for name in sorted(expected.keys() & self.parts.keys()) if self.shape(name) != expected[name].shape
        ]
        if missing or left_over or other:
            raise InputError(
                f"{what} are not those of this policy: missing {_some(missing)}, left over {_some(left_over)}, "
                f"of another shape {_some(other)}; use the checkpoint with the settings that it was made with"
            )

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> None:
        """Fill a tensor of the shape of the whole, or of one that is cut the rows that this process holds."""
        mine, begin, row = local(tensor), 0, 0
        if not tensor.ndim:
            mine.copy_(self.parts[name][0][...])
            return
        if isinstance(tensor, DTensor):
            begin = first_row(tensor)
        for part in self.parts[name]:
            rows = _shape(part)[0]
            first, last = max(begin, row), min(begin + len(mine), row + rows)
            if first < last:
                mine[first - begin : last - begin].copy_(part[first - row : last - row])
            row += rows

    def fill(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Check them, then read them all."""
        self.check(tensors, what)
        for name, tensor in tensors.items():
            self.read(name, tensor)


def _shape(part) -> tuple[int, ...]:
    return tuple(part.shape if isinstance(part, Tensor) else part.get_shape())


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
