"""A model's dense layers and convolutions, forward and backward on this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._gemm import gemm, gemm_below_autograd
from .._library import nothing_to_differentiate
from . import ops
from .precision import splits_dense_layers


class Dense(torch.autograd.Function):
    """rows [R, I] times matrix [I, C] plus bias, forward and backward on the better matrix product.

    Beside the rows nothing that requires a gradient comes in; the anchor gives the result its place in the graph.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None, anchor: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(rows, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad, matrix = grads[0], ctx.matrix.t()
        if not nothing_to_differentiate():
            return gemm(grad, matrix), None, None, None
        if grad.stride(0) == 0 and len(grad) > 1:  # one row again and again, such as a unit cotangent
            return _product(grad[:1], matrix).expand(len(grad), -1), None, None, None
        return _product(grad, matrix), None, None, None


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    if splits_dense_layers(rows):
        return ops.dense(rows, matrix, bias)
    return gemm_below_autograd(rows, matrix, bias)


class Convolved(torch.autograd.Function):
    """A convolution with stride 1, forward and backward on this library's kernel.

    Only `source` requires a gradient. It is the layer's input or, with `gated`, what a ReLU made the input from: then
    the ReLU's backward is done on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gated: bool,
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.weight, ctx.padding, ctx.dilation, ctx.groups = weight, padding, dilation, groups
        ctx.gated = gated
        if gated:
            ctx.save_for_backward(input)  # raises in the backward if the input was written in place meanwhile
        return ops.convolve(input, weight, bias, None, padding, dilation, groups, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, groups, gate = ctx.weight, ctx.groups, ctx.saved_tensors[0] if ctx.gated else None
        kernel = weight.shape[2:]
        flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(*range(2, weight.dim()))
        padding = [d * (k - 1) - p for d, k, p in zip(ctx.dilation, kernel, ctx.padding, strict=True)]
        return ops.convolve(grads[0], flipped, None, gate, padding, ctx.dilation, groups, False), *[None] * 7
