"""A model's dense layers and convolutions, forward and backward on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .._gemm import gemm, gemm_below_autograd
from .._library import nothing_to_differentiate
from . import ops
from .precision import splits_dense_layers

# The dispatch keys by which torch.func.vmap sees every operation.
_BATCHING = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
)

# Up to so many terms a product that is gated as it is written takes no longer than a copy that is gated.
GATED_DEPTH = 32


def _in_a_plain_sweep(cotangent: Tensor) -> bool:
    """Whether the cotangent is that of one backward sweep, or of several in one torch.func.vmap, and nothing else.

    Else the sweep itself is differentiated, or the model runs transforms of its own.
    """
    if nothing_to_differentiate():
        return True
    in_one_vmap = _functorch.is_batchedtensor(cotangent) and len(_functorch.get_interpreter_stack() or []) == 1
    return in_one_vmap and not torch.is_grad_enabled() and forward_ad._current_level < 0


def _for_all(call: Callable[[Tensor], Tensor], cotangent: Tensor) -> Tensor:
    """call([k, n, ...]), which gives [k, n, ...], for the k cotangents [n, ...] of a plain sweep at once.

    The way that torch offers, a rule for vmap, costs a tenth to a quarter of a millisecond of Python a call.
    """
    if not _functorch.is_batchedtensor(cotangent):
        return call(cotangent.unsqueeze(0)).squeeze(0)
    with torch._C._ExcludeDispatchKeyGuard(_BATCHING):
        every = _functorch.get_unwrapped(cotangent).movedim(_functorch.maybe_get_bdim(cotangent), 0)
        result = call(every)
    return _functorch._add_batch_dim(result, 0, _functorch.maybe_get_level(cotangent))


class Dense(torch.autograd.Function):
    """rows [R, I] times matrix [I, C] plus bias, forward and backward on the better matrix product.

    Only `source` requires a gradient. It is the rows or, with `gated`, what a ReLU made the rows from: then the ReLU's
    backward is done on the way. The anchor gives the result its place in the graph.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None, gated: bool, anchor: Tensor
    ) -> Tensor:
        ctx.matrix, ctx.gated = matrix, gated
        if gated:
            ctx.save_for_backward(rows)  # raises in the backward if the rows were written in place meanwhile
        return _product(rows, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if not ctx.needs_input_grad[0]:
            return None, *[None] * 5
        matrix, gate = ctx.matrix.t(), ctx.saved_tensors[0] if ctx.gated else None
        if not _in_a_plain_sweep(grads[0]):
            found = gemm(grads[0], matrix)
            return found if gate is None else found.masked_fill(gate <= 0, 0), *[None] * 5

        def call(every: Tensor) -> Tensor:
            rows, kept = every.shape[1], None if splits_dense_layers(every) else gate
            again = rows > 1 and every.stride(1) == 0  # one row again and again, such as a unit cotangent
            if again and (kept is None or every.shape[-1] > GATED_DEPTH):
                product = _product(every[:, 0], matrix).unsqueeze(1).expand(-1, rows, -1)
            elif kept is not None:
                return ops.gated_product(every.flatten(0, 1), matrix, kept).unflatten(0, every.shape[:2])
            else:
                product = _product(every.flatten(0, 1), matrix).unflatten(0, every.shape[:2])
            if gate is None:
                return product
            return torch.ops.aten.threshold_backward(product, gate.expand_as(product), 0)

        return _for_all(call, grads[0]), *[None] * 5


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

        def of_rows(rows: Tensor) -> Tensor:
            return ops.convolve(rows, flipped, None, gate, padding, ctx.dilation, groups, False)

        if not _in_a_plain_sweep(grads[0]):
            return of_rows(grads[0]), *[None] * 7
        found = _for_all(lambda every: of_rows(every.flatten(0, 1)).unflatten(0, every.shape[:2]), grads[0])
        return found, *[None] * 7
