"""Random numbers that are functions of (key, index) alone: the same on every device, rank, block and call."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values made at once: the integers between take eight times a float's room


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key(seed: int, *words: str) -> int:
    """An int64 key for a stream of numbers, from the seed and words that name the stream."""
    digest = hashlib.blake2b("\0".join((str(seed), *words)).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _shift(value: Tensor, count: int) -> Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def bits(stream: int, index: Tensor) -> Tensor:
    """64 random bits for each index, as int64: the finaliser of SplitMix64 at key + index · golden ratio.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    value = index.to(torch.int64) * _GOLDEN + stream
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def signs(stream: int, index: Tensor, dtype: torch.dtype) -> Tensor:
    """±1 for each index."""
    return 1 - 2 * (bits(stream, index) & 1).to(dtype)


def integers(stream: int, index: Tensor, bound: int) -> Tensor:
    """An integer in [0, bound) for each index; of 63 bits, so that the unevenness is below bound / 2⁶³."""
    return _shift(bits(stream, index), 1) % bound


def normals(stream: int, index: Tensor, dtype: torch.dtype) -> Tensor:
    """A standard normal number for each index, by Box and Muller from 32 bits each for radius and angle."""
    result = torch.empty(index.shape, dtype=dtype, device=index.device)
    flat, source = result.view(-1), index.reshape(-1)
    for begin in range(0, source.numel(), _CHUNK):
        random = bits(stream, source[begin : begin + _CHUNK])
        radius = (_shift(random, 32).double() + 1) * 2.0**-32  # in (0, 1]
        angle = (random & 0xFFFFFFFF).double() * (2.0**-32 * 2 * math.pi)
        flat[begin : begin + _CHUNK] = (-2 * radius.log()).sqrt() * angle.cos()
    return result
