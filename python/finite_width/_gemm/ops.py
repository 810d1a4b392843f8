"""The matrix product as a differentiable op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference, table


def _fake(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_op = _library.register("gemm", reference.gemm, _fake)


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return gemm_below_autograd(a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        a, b, _ = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b, needs_bias = ctx.needs_input_grad
        return (
            _call(grad, b.mT, None) if needs_a else None,
            _call(a.mT, grad, None) if needs_b else None,
            grad.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, dbias: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        tangent = a.new_zeros(a.shape[0], b.shape[1])
        if da is not None:
            tangent = tangent + _call(da, b, None)
        if db is not None:
            tangent = tangent + _call(a, db, None)
        return tangent if dbias is None else tangent + dbias

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, int | None], a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        a_dim, b_dim, bias_dim = in_dims
        size = info.batch_size
        if b_dim is None and a_dim is not None:  # the batch joins the rows
            rows = a.movedim(a_dim, 0)
            if rows.stride(1) == 0 and rows.shape[1] > 1:  # one row again and again, such as a unit cotangent
                out = _call(rows[:, 0], b, None).unsqueeze(1).expand(-1, rows.shape[1], -1)
            else:
                out = _call(rows.reshape(-1, rows.shape[-1]), b, None).reshape(size, rows.shape[1], b.shape[1])
        elif a_dim is None and b_dim is not None:  # the batch joins the columns
            columns = b.movedim(b_dim, 1)
            out = _call(a, columns.reshape(columns.shape[0], -1), None).reshape(a.shape[0], size, -1).movedim(1, 0)
        elif a_dim is None:
            out = _call(a, b, None).expand(size, -1, -1)
        else:
            assert b_dim is not None
            pairs = zip(a.unbind(a_dim), b.unbind(b_dim), strict=True)
            out = torch.stack([_call(each_a, each_b, None) for each_a, each_b in pairs])
        if bias is None:
            return out, 0
        return out + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1)), 0


_call = _library.differentiable(_op, _Gemm)


def gemm_below_autograd(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op without checks, gradients or transforms, for callers that have made sure of all three."""
    result: Tensor = _library.below_autograd(_op, a, b, bias)
    return result


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product on the better GEMM of this machine: a b + bias.

    Args:
        a: [M, K], float32 or float64, any strides.
        b: [K, N], the same dtype and device.
        bias: [N], added to every row.

    Returns:
        [M, N]; the same bits for any number of threads. Who computes it is in `fw.build_info()["gemm_table"]`.

    Raises:
        ValueError: shapes that do not fit, tensors on two devices.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width._gemm import gemm
        >>> gemm(torch.ones(2, 3), torch.ones(3, 4)).shape
        torch.Size([2, 4])
    """
    _check.is_tensor("a", a)
    _check.is_tensor("b", b)
    _check.is_float("a", a)
    _check.has_dim("a", a, 2, "[M, K]")
    _check.has_dim("b", b, 2, "[K, N]")
    _check.like("b", b, "a", a)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b must have {a.shape[1]} rows, as many as a has columns, got {list(b.shape)}")
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.like("bias", bias, "a", a)
        if bias.shape != (b.shape[1],):
            raise ValueError(f"bias must have shape [{b.shape[1]}], got {list(bias.shape)}")
    if table.route(a.shape[0], b.shape[1]) == table.TORCH:
        return reference.gemm(a, b, bias)
    result: Tensor = _call(a, b, bias)
    return result
