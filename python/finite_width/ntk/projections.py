"""Random projections S of parameters seen as matrices, E[SᵀS] = I, applied to matrices given as outer products.

A parameter of shape [R, ...] is a matrix [R, W]. Each of its two axes has random features of its own, and the
features of d ⊗ a are the combination of those of d and of a: so neither the gradient d ⊗ a nor S, which has R W dim
entries, is ever formed. All randomness is a function of (seed, parameter, axis, index).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from . import counters

# Values of the features that are held at once: few enough that memory is reused rather than mapped anew.
_ROOM = 1 << 20
# Side of the small Hadamard matrices that a transform is made of: more operations than butterflies, less traffic.
_HADAMARD = 32


class Projection(ABC):
    """One kind of projection to `dim` values, and the accumulators of a block of rows."""

    room = _ROOM

    def __init__(self, dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim, self.seed, self.dtype, self.device = dim, seed, dtype, device
        self._axes: dict[tuple[str, int, int], tuple[Tensor, ...]] = {}

    @abstractmethod
    def features(self, values: Tensor, name: str, axis: int) -> Tensor:
        """[..., width] vectors along an axis of the parameter to [..., F]."""

    @abstractmethod
    def one_hot(self, index: Tensor, name: str, axis: int, width: int | None) -> Tensor:
        """The features [..., F] of unit vectors, given by their index [...]; width None: a vector's only row."""

    @property
    def width(self) -> int:
        """F."""
        return self.dim

    def start(self, rows: int, outputs: int) -> Tensor:
        """An empty accumulator [n, O, F]."""
        return torch.zeros(rows, outputs, self.width, dtype=self.dtype, device=self.device)

    def finish(self, total: Tensor) -> Tensor:
        """The accumulator as the sketch [n, O, dim]."""
        return total * self.dim**-0.5

    def add_pairs(self, total: Tensor, first: Tensor, second: Tensor) -> None:
        """total += Σ_t first[n, o, t] ∘ second[n, o, t], features of both axes; sizes of 1 are repeated."""
        if first.shape[2] == second.shape[2] == 1:
            total.addcmul_(first[:, :, 0], second[:, :, 0])
        else:
            total += (first * second).sum(2)

    def _index(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def _axis(self, name: str, axis: int, width: int, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What all features of an axis share, made once: a few numbers for each index."""
        if (name, axis, width) not in self._axes:
            self._axes[name, axis, width] = make()
        return self._axes[name, axis, width]


class Countsketch(Projection):
    """Every axis is hashed to `dim` buckets with signs; the buckets of a pair add up modulo dim.

    Bucket and sign of entry (r, w) are h1(r) + h2(w) and s1(r) s2(w), so that the sketch of d ⊗ a is the circular
    convolution of two sketches, a product between Fourier transforms.

    Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (2013).
    """

    @property
    def width(self) -> int:
        return self.dim // 2 + 1

    def _hash(self, index: Tensor, name: str, axis: int) -> tuple[Tensor, Tensor]:
        where = counters.integers(counters.key(self.seed, name, str(axis), "bucket"), index, self.dim)
        return where, counters.signs(counters.key(self.seed, name, str(axis), "sign"), index, self.dtype)

    def features(self, values: Tensor, name: str, axis: int) -> Tensor:
        width = values.shape[-1]
        where, sign = self._axis(name, axis, width, lambda: self._hash(self._index(width), name, axis))
        buckets = values.new_zeros(*values.shape[:-1], self.dim)
        return torch.fft.rfft(buckets.index_add_(-1, where, values * sign))

    def one_hot(self, index: Tensor, name: str, axis: int, width: int | None) -> Tensor:
        where, sign = self._hash(index, name, axis)
        buckets = torch.zeros(*index.shape, self.dim, dtype=self.dtype, device=self.device)
        return torch.fft.rfft(buckets.scatter_(-1, where.unsqueeze(-1), sign.unsqueeze(-1)))

    def start(self, rows: int, outputs: int) -> Tensor:
        kind = torch.complex64 if self.dtype == torch.float32 else torch.complex128
        return torch.zeros(rows, outputs, self.width, dtype=kind, device=self.device)

    def finish(self, total: Tensor) -> Tensor:
        return torch.fft.irfft(total, n=self.dim)


class Gaussian(Projection):
    """Column k of the projection is u_k ⊗ v_k with standard normal u_k and v_k.

    Source: Rakhshan and Rabusseau, "Tensorized random projections" (2020).
    """

    room = 1 << 24  # rows are to share the normals that are made for them
    _KEPT = 1 << 26  # values of the axes' normals that are kept from one block of rows to the next

    def __init__(self, dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dim, seed, dtype, device)
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._room = self._KEPT

    def _normals(self, index: Tensor, name: str, axis: int) -> Tensor:
        """[..., dim] for each index along the axis."""
        numbers = index.unsqueeze(-1) * self.dim + self._index(self.dim)
        return counters.normals(counters.key(self.seed, name, str(axis), "normal"), numbers, self.dtype)

    def features(self, values: Tensor, name: str, axis: int) -> Tensor:
        width = values.shape[-1]
        if (name, axis) in self._kept:
            return values @ self._kept[name, axis]
        if width * self.dim <= self._room:
            self._room -= width * self.dim
            made = torch.empty(width, self.dim, dtype=self.dtype, device=self.device)
            for begin, end in _cuts(width, self.dim, _ROOM):
                made[begin:end] = self._normals(self._index(width)[begin:end], name, axis)
            self._kept[name, axis] = made
            return values @ made
        total = values.new_zeros(*values.shape[:-1], self.dim)
        for begin, end in _cuts(width, self.dim, _ROOM):
            total += values[..., begin:end] @ self._normals(self._index(width)[begin:end], name, axis)
        return total

    def one_hot(self, index: Tensor, name: str, axis: int, width: int | None) -> Tensor:
        if width is None:  # a vector: one axis is random enough
            return torch.ones(*index.shape, 1, dtype=self.dtype, device=self.device)
        return self._normals(index, name, axis)


class SRHT(Projection):
    """Random signs, a Hadamard transform of each axis padded to a power of two, and dim pairs of coordinates.

    Source: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2009); Tropp, "Improved analysis of the
    subsampled randomized Hadamard transform" (2011).
    """

    def _signs(self, index: Tensor, name: str, axis: int) -> Tensor:
        return counters.signs(counters.key(self.seed, name, str(axis), "sign"), index, self.dtype)

    def _coordinates(self, name: str, axis: int, width: int) -> Tensor:
        padded = 1 << max(0, width - 1).bit_length()
        return counters.integers(counters.key(self.seed, name, str(axis), "coordinate"), self._index(self.dim), padded)

    def _flips(self, name: str, axis: int) -> Tensor:
        """A sign for each of the dim coordinates and each parameter, so that two parameters' parts are uncorrelated
        coordinate by coordinate: the means of two Hadamard transforms are not zero."""
        stream = counters.key(self.seed, name, str(axis), "flip")
        return counters.signs(stream, self._index(self.dim), self.dtype)

    def features(self, values: Tensor, name: str, axis: int) -> Tensor:
        width = values.shape[-1]
        padded = 1 << max(0, width - 1).bit_length()
        signs, coordinates, flips = self._axis(name, axis, width, lambda: self._random(name, axis, width))
        turned = hadamard(torch.nn.functional.pad(values * signs, (0, padded - width)))
        return turned.gather(-1, coordinates.expand(*turned.shape[:-1], -1)).mul_(flips)

    def _random(self, name: str, axis: int, width: int) -> tuple[Tensor, ...]:
        signs = self._signs(self._index(width), name, axis)
        return signs, self._coordinates(name, axis, width), self._flips(name, axis)

    def one_hot(self, index: Tensor, name: str, axis: int, width: int | None) -> Tensor:
        both = index.unsqueeze(-1) & self._coordinates(name, axis, width or 1)
        for shift in (32, 16, 8, 4, 2, 1):  # the parity of the bits is the sign in the Hadamard matrix
            both = both ^ (both >> shift)
        signs = self._signs(index, name, axis).unsqueeze(-1) * self._flips(name, axis)
        return (1 - 2 * (both & 1)).to(self.dtype) * signs


def hadamard(values: Tensor) -> Tensor:
    """The last axis (a power of two) times the Hadamard matrix of entries ±1."""
    shape, length, done = values.shape, values.shape[-1], 1
    while done < length:  # the matrix is a Kronecker product of small ones, each a matrix product over one axis
        size = min(_HADAMARD, length // done)
        small = values.new_ones(1, 1)
        while len(small) < size:
            small = torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)])
        if done == 1:
            values = values.reshape(-1, size) @ small
        else:
            values = small @ values.reshape(-1, size, done)
        done *= size
    return values.reshape(shape)


def _cuts(count: int, each: int, room: int) -> list[tuple[int, int]]:
    """[0, count) in parts of at most `room` values, `each` per entry."""
    step = max(1, room // max(1, each))
    return [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def add_outer(projection: Projection, total: Tensor, name: str, first: Tensor, second: Tensor, flipped: bool) -> None:
    """Add Σ_t first[n, o, t] ⊗ second[n, t], a weight's gradient, to the accumulator.

    Args:
        first: [n, O, T, R]; [1, O, T, R] where it is the same for all rows.
        second: [n, T, W].
        flipped: the weight is [W, R].
    """
    axes = (1, 0) if flipped else (0, 1)
    rows, outputs = total.shape[:2]
    for begin, end in _cuts(rows, outputs * projection.width, projection.room):
        mine = first if first.shape[0] == 1 and rows > 1 else first[begin:end]
        for start, stop in _cuts(first.shape[2], (end - begin) * outputs * projection.width, projection.room):
            projection.add_pairs(
                total[begin:end],
                projection.features(mine[:, :, start:stop], name, axes[0]),
                projection.features(second[begin:end, None, start:stop], name, axes[1]),
            )


def add_tokens(projection: Projection, total: Tensor, name: str, tokens: Tensor, d: Tensor, size: int) -> None:
    """Add an embedding's gradient: Σ_t e(token) ⊗ d[n, o, t].

    Args:
        tokens: [n, T]; negative ones have no gradient.
        d: [n, O, T, D].
        size: rows of the embedding's weight.
    """
    rows, outputs = total.shape[:2]
    d = d.masked_fill((tokens < 0)[:, None, :, None], 0)
    tokens = tokens.clamp(min=0)
    for begin, end in _cuts(rows, outputs * projection.width, projection.room):
        for start, stop in _cuts(tokens.shape[1], (end - begin) * outputs * projection.width, projection.room):
            projection.add_pairs(
                total[begin:end],
                projection.one_hot(tokens[begin:end, None, start:stop], name, 0, size),
                projection.features(d[begin:end, :, start:stop], name, 1),
            )


def add_rows(projection: Projection, total: Tensor, name: str, jacobian: Tensor, first: int, size: int | None) -> None:
    """Add a Jacobian [n, O, r, W] of the parameter's rows [first, first + r) of `size`; None stands for a vector."""
    rows, outputs, count, _ = jacobian.shape
    index = torch.arange(first, first + count, device=jacobian.device)
    for begin, end in _cuts(rows, outputs * projection.width, projection.room):
        for start, stop in _cuts(count, (end - begin) * outputs * projection.width, projection.room):
            projection.add_pairs(
                total[begin:end],
                projection.one_hot(index[None, None, start:stop], name, 0, size),
                projection.features(jacobian[begin:end, :, start:stop], name, 1),
            )


KINDS: dict[str, type[Projection]] = {"countsketch": Countsketch, "gaussian": Gaussian, "srht": SRHT}
