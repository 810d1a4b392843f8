"""What one block of rows keeps for one entry of the plan, and how two blocks' factors add to a tile of the kernel.

Every class has `rows(begin, end)` (a slice, views where they can be), `nbytes`, and `accumulate(out, other, compute)`:
out += the product of this factor's Jacobians with the other's. `Tiled` factors give their Jacobian in tiles over the
parameters, which the caller walks (walk.py), so that a tile is computed once per block and not once per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops


def _size(*tensors: Tensor) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


@dataclass
class Gram:
    """A dense layer at one position: the Jacobian is d ⊗ a."""

    a: Tensor  # [n, I]
    d: Tensor  # [n, O, C]
    bias: float

    def rows(self, begin: int, end: int) -> Gram:
        return Gram(self.a[begin:end], self.d[begin:end], self.bias)

    @property
    def nbytes(self) -> int:
        return _size(self.a, self.d)

    def accumulate(self, out: Tensor, other: Gram, compute: str) -> None:
        ops.gram_accumulate(out, self.a, other.a, self.d, other.d, self.bias, compute)


@dataclass
class Last:
    """The dense layer whose output is the model's: its cotangents are the identity, which is never formed."""

    a: Tensor  # [n, I]
    outputs: int
    bias: float

    def rows(self, begin: int, end: int) -> Last:
        return Last(self.a[begin:end], self.outputs, self.bias)

    @property
    def nbytes(self) -> int:
        return _size(self.a)

    def accumulate(self, out: Tensor, other: Last, compute: str) -> None:
        left = self.a.unsqueeze(1)
        right = left if other.a is self.a else other.a.unsqueeze(1)
        if self.outputs == 1:  # the kernel is the product itself
            while out.dim() > 2:
                out = out.select(-1, 0)
            ops.jacobian_accumulate(out, left, right, "trace")
            out += self.bias
            return
        inner = out.new_full(out.shape[:2], self.bias)
        ops.jacobian_accumulate(inner, left, right, "trace")
        if compute == "full":
            out.diagonal(dim1=2, dim2=3).add_(inner[:, :, None])
        elif compute == "diagonal":
            out.add_(inner[:, :, None])
        else:
            out.add_(inner, alpha=self.outputs)


@dataclass
class Ghost:
    """A dense layer at several positions: Σ_{t, s} (a_t · a_s)(d_t · d_s), without its gradients."""

    a: Tensor  # [n, T, I]
    d: Tensor  # [n, O, T, C]
    bias: float

    def rows(self, begin: int, end: int) -> Ghost:
        return Ghost(self.a[begin:end], self.d[begin:end], self.bias)

    @property
    def nbytes(self) -> int:
        return _size(self.a, self.d)

    def accumulate(self, out: Tensor, other: Ghost, compute: str) -> None:
        ops.ghost_accumulate(out, self.a, other.a, self.d, other.d, self.bias, compute)


@dataclass
class Tokens:
    """An embedding: rows of the weight meet where the tokens are equal."""

    tokens: Tensor  # [n, T]; -1 for padding, which has no gradient
    d: Tensor  # [n, O, T, D]

    def rows(self, begin: int, end: int) -> Tokens:
        return Tokens(self.tokens[begin:end], self.d[begin:end])

    @property
    def nbytes(self) -> int:
        return _size(self.tokens, self.d)

    def accumulate(self, out: Tensor, other: Tokens, compute: str) -> None:
        distinct, index = torch.cat([self.tokens.flatten(), other.tokens.flatten()]).unique(return_inverse=True)
        one_hot = torch.nn.functional.one_hot(index, len(distinct)).to(out.dtype)
        one_hot[:, distinct < 0] = 0
        a1 = one_hot[: self.tokens.numel()].reshape(*self.tokens.shape, len(distinct))
        a2 = one_hot[self.tokens.numel() :].reshape(*other.tokens.shape, len(distinct))
        ops.ghost_accumulate(out, a1, a2, self.d, other.d, 0.0, compute)


@dataclass
class Jacobian:
    """A Jacobian held whole."""

    j: Tensor  # [n, O, P]
    array: Tensor | None = None  # of the blocks that stand beside each other (adjacent.py): their rows, O, P
    begin: int = 0  # this block's first row in it

    def rows(self, begin: int, end: int) -> Jacobian:
        return Jacobian(self.j[begin:end])

    @property
    def nbytes(self) -> int:
        return _size(self.j)

    def accumulate(self, out: Tensor, other: Jacobian, compute: str) -> None:
        ops.jacobian_accumulate(out, self.j, other.j, compute)


@dataclass
class DenseInputs:
    """All uses of a dense layer's weight, side by side: what its gradients are computed from."""

    a: Tensor  # [n, T, I]
    d: Tensor  # [n, O, T, C]

    def rows(self, begin: int, end: int) -> DenseInputs:
        return DenseInputs(self.a[begin:end], self.d[begin:end])

    def gradients(self, begin: int, end: int) -> Tensor:
        """[n, O, p]: the gradients of what makes the channels [begin, end)."""
        return ops.position_gradients(self.a, self.d[..., begin:end])


@dataclass
class ConvInputs:
    """One use of a convolution's weight: what its gradients are computed from."""

    a: Tensor  # [n, T, Cin, *S]: T calls on the rows of one example
    d: Tensor  # [n, O, T, Cout, *S']
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]
    transposed: bool

    def rows(self, begin: int, end: int) -> ConvInputs:
        return ConvInputs(self.a[begin:end], self.d[begin:end], self.geometry, self.transposed)

    def gradients(self, begin: int, end: int, bias: bool = False) -> Tensor:
        """[n, O, p]: the gradients of the weight's rows [begin, end), of each with its bias behind it if asked for."""
        rows, calls = self.d.shape[0], self.d.shape[2]
        kernel, stride, padding, dilation, groups = self.geometry
        if self.transposed:
            return self._transposed_gradients(begin, end)
        a, d = self.a, self.d[:, :, :, begin:end]
        if groups > 1:  # the plan cuts at whole groups
            each_out, each_in = self.d.shape[3] // groups, a.shape[2] // groups
            first, last = begin // each_out, end // each_out
            a, groups = a[:, :, first * each_in : last * each_in], last - first
        if calls == 1:
            return ops.conv_gradients(a[:, 0], d[:, :, 0], kernel, stride, padding, dilation, groups, bias)
        merged = d.transpose(1, 2).flatten(0, 1)
        result = ops.conv_gradients(a.flatten(0, 1), merged, kernel, stride, padding, dilation, groups, bias)
        return result.unflatten(0, (rows, calls)).sum(1)

    def _transposed_gradients(self, begin: int, end: int) -> Tensor:
        """A transposed convolution is the adjoint: its weight gradient is a convolution's with the roles swapped."""
        rows, outputs, calls = self.d.shape[:3]
        kernel, stride, padding, dilation, groups = self.geometry
        each = self.a.shape[2] // groups
        first, last = begin // each, (end + each - 1) // each
        if groups > 1:  # the plan cuts at whole groups
            width = self.d.shape[3] // groups
            d, groups = self.d[:, :, :, first * width : last * width], last - first
        else:
            d = self.d
        # Every (row, output, call) is an example whose "input" is the cotangent and whose "cotangent" is the input.
        examples = d.flatten(0, 2)
        inputs = self.a[:, None, :, begin:end].expand(rows, outputs, calls, end - begin, *self.a.shape[3:])
        inputs = inputs.reshape(rows * outputs * calls, 1, end - begin, *self.a.shape[3:])
        result = ops.conv_gradients(examples, inputs, kernel, stride, padding, dilation, groups, False)
        return result.reshape(rows, outputs, calls, -1).sum(2)


@dataclass
class Tiled:
    """A weight used at several positions, maybe by several calls; its Jacobian is computed in tiles over its rows."""

    uses: Sequence[ConvInputs | DenseInputs]
    cuts: list[int]  # the tiles are the weight's rows (of a dense layer the channels out) [cuts[i], cuts[i + 1])

    def rows(self, begin: int, end: int) -> Tiled:
        return Tiled([use.rows(begin, end) for use in self.uses], self.cuts)

    @property
    def nbytes(self) -> int:
        return sum(_size(use.a, use.d) for use in self.uses)

    def tile(self, index: int) -> Jacobian:
        begin, end = self.cuts[index], self.cuts[index + 1]
        total = self.uses[0].gradients(begin, end)
        for use in self.uses[1:]:
            total += use.gradients(begin, end)
        return Jacobian(total)


Factor = Gram | Last | Ghost | Tokens | Jacobian | Tiled
