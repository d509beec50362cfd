"""Counter-based randomness: every random number is a pure function of a key, so it needs no state and no order.

A sample's key is a hash of (seed, position). Whatever is random about the sample (augmentation, flow noise, flow
time) is drawn from that key, so any process, worker or resumed run draws the same numbers for the same sample, and
no two samples share any. The hash is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014), in int64 arithmetic that wraps, so it runs on any device.
"""

import math

import numpy as np
import torch
from torch import Tensor

# One stream per use of randomness: two uses with the same key must not share numbers.
FLOW_NOISE, FLOW_TIME, AUGMENT = range(3)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


ROUNDS = 6  # of the Feistel network that permutes
_GOLDEN, _M1, _M2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the mask makes them logical


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64 bits. int64 -> int64, any shape, tensors as well as arrays."""
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    return x ^ _shift_right(x, 31)


def derive(seed: int, counter: Tensor) -> Tensor:
    """Keys of the samples at `counter`. int64 [B] -> int64 [B]."""
    return mix(mix(torch.full_like(counter, _signed(seed % (1 << 64))) + _GOLDEN) + counter * _GOLDEN)


def bits(key: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """64 random bits for each element. key: int64 [B] -> int64 [B, *shape]."""
    counter = torch.arange(1, math.prod(shape) + 1, device=key.device, dtype=torch.int64)
    stream_key = mix(key + _signed((stream + 1) * 0xD1342543DE82EF95 % (1 << 64)))
    return mix(stream_key[:, None] + counter * _GOLDEN).view(len(key), *shape)


def uniform(key: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform in [0, 1). key: int64 [B] -> float32 [B, *shape]."""
    return _shift_right(bits(key, stream, shape), 40).float() * 2.0**-24


def normal(key: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal, by Box and Muller's transform (1958). key: int64 [B] -> float32 [B, *shape]."""
    random = bits(key, stream, shape)
    radius = (_shift_right(random, 40).float() + 1) * 2.0**-24  # in (0, 1], so that its logarithm is finite
    angle = ((random >> 16) & 0xFFFFFF).float() * 2.0**-24
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)


def permute(index: Tensor, size: int, key: Tensor) -> Tensor:
    """Shuffle: the place of each index in a pseudorandom permutation of range(size), one permutation for each key.

    A Feistel network over the next power of four, walked until the result lies in range (Black and Rogaway, 2002),
    so that no permutation is ever stored. index: int64 [B] in [0, size), key: int64 [B], both on the CPU -> int64 [B].
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    index, key = index.numpy(), key.numpy()  # NumPy takes a third of torch's time

    def shuffle(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(key + turn * size + right) & mask)
        return left << half | right

    result = shuffle(index, key)
    while (outside := result >= size).any():
        result[outside] = shuffle(result[outside], key[outside])
    return torch.from_numpy(result)
