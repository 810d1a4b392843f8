"""y = x Wᵀ + bias with W a Tensor Train: the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from . import decomposition, ops, planner, precision, reference

LAYOUTS = ("matrix", "in_out")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tt_linear(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None, *, layout: str = "matrix") -> Tensor:
    """Product with a Tensor-Train weight, y = x Wᵀ + bias, without building W unless that is cheapest.

    layout="matrix":  W[(m_1 ... m_d), (n_1 ... n_d)] = G_1[m_1, n_1] G_2[m_2, n_2] ··· G_d[m_d, n_d]
    layout="in_out":  W[(m_1 ... m_e), (n_1 ... n_d)] = G_1[n_1] ··· G_d[n_d] H_1[m_1] ··· H_e[m_e]

    The order of contraction is planned once for each set of core shapes and each power of two of the batch
    (`planner.plan`). Only x and the cores are kept for the backward pass.

    Args:
        x: [..., N], N = Π n_k; float32, float64, bfloat16 or float16 (half precision is summed in float32).
        cores: [r_{k-1}, m_k, n_k, r_k] each for "matrix"; [r_{k-1}, n_k, r_k], then [r_{k-1}, m_k, r_k], for "in_out".
            One dtype and device with x; r_0 = r_last = 1.
        bias: [M], M = Π m_k.
        layout: "matrix" or "in_out".

    Returns:
        [..., M], of x's dtype; under torch.autocast, of the autocast dtype unless x is float64.

    Raises:
        ValueError: cores that do not fit together or to x, another layout.
        TypeError: other dtypes, or two of them; cores that are no list or tuple of tensors.

    Source: Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015 (layout "matrix").

    Example:
        >>> import torch, finite_width as fw
        >>> cores = [torch.randn(1, 4, 2, 3), torch.randn(3, 5, 6, 1)]
        >>> fw.tt.tt_linear(torch.randn(7, 12), cores).shape
        torch.Size([7, 20])
    """
    _check.is_tensor("x", x)
    decomposition.is_list_of_cores(cores)
    x, cores, bias = _autocast(x, cores, bias)
    _check.is_dtype("x", x, DTYPES)
    return _apply(x, cores, bias, _check_call(x, cores, bias, layout))


class Signature(NamedTuple):
    """What a call needs to know of its cores.

    Attributes:
        shapes: of the cores, with four axes each.
        in_cores: how many of them hold input modes, or 0 for the layout "matrix" (`reference.Plan`).
        rows, columns: M, N.
    """

    shapes: tuple[planner.CoreShape, ...]
    in_cores: int
    rows: int
    columns: int


def apply_checked(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, signature: Signature) -> Tensor:
    """`tt_linear` of a layer, whose cores fit together and to x."""
    x, cores, bias = _autocast(x, cores, bias)
    first = cores[0]
    if x.dtype != first.dtype or x.device != first.device:
        _check.is_dtype("x", x, DTYPES)
        _check.like("x", x, "the layer's cores", first)
    return _apply(x, cores, bias, signature)


def _autocast(
    x: Tensor, cores: Sequence[Tensor], bias: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """The arguments in the autocast dtype, where autocast is on; float64 stays, as in torch's own products."""
    if not (torch.is_autocast_enabled(x.device.type) and x.is_floating_point()):
        return x, cores, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.to(dtype)

    return cast(x), [cast(core) for core in cores], None if bias is None else cast(bias)


def _apply(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, signature: Signature) -> Tensor:
    shapes, in_cores, rows, columns = signature
    inputs = x.reshape(-1, columns) if x.dim() != 2 else x
    on_gpu = x.is_cuda and ops.has_cuda_kernels()
    if x.dtype == torch.float16 and not on_gpu:  # summed in float32
        wide = [core.float() for core in cores]
        y = _apply(inputs.float(), wide, None if bias is None else bias.float(), signature).half()
    elif len(cores) == 1:
        y = F.linear(inputs, cores[0].reshape(rows, columns), bias)
    else:
        code = planner.plan_code(shapes, inputs.shape[0], x.dtype, in_cores, precision.chosen() if on_gpu else None)
        if code[0]:
            y = ops.tt_linear(inputs, cores, bias, code)
        elif len(code) == 3:
            y = _dense(inputs, cores, bias, in_cores)
        else:
            y = _chain(inputs, cores, bias, code, in_cores)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], rows)


def _dense(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, in_cores: int) -> Tensor:
    """A plan of one group: W, made in float32 at least, in torch's own products with x's dtype."""
    wide = reference.accumulation_dtype(x.dtype)
    four_axes = [core.to(wide) for core in reference.as_matrix(cores, in_cores)]
    return F.linear(x, reference.merge(four_axes)[0, :, :, 0].to(x.dtype), bias)


def _chain(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, code: Any, in_cores: int) -> Tensor:
    """A plan of three groups or more: plain torch, differentiated by torch."""
    wide = reference.accumulation_dtype(x.dtype)
    four_axes = [core.to(wide) for core in reference.as_matrix(cores, in_cores)]
    y = reference.tt_chain(x.to(wide), four_axes, None if bias is None else bias.to(wide), code[2:], code[1])
    return y.to(x.dtype)


def _check_call(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, layout: str) -> Signature:
    """Checks all arguments."""
    _check.one_of("layout", layout, LAYOUTS)
    decomposition.check_cores(cores, (4,) if layout == "matrix" else (3,))
    _check.like("cores[0]", cores[0], "x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., N], got {list(x.shape)}")
    in_cores = 0
    if layout == "in_out":
        in_cores = _count_in_cores(x.shape[-1], cores)
    shapes = four_axis_shapes(cores, in_cores)
    rows, columns = 1, 1
    for _, m, n, _ in shapes:
        rows, columns = rows * m, columns * n
    if x.shape[-1] != columns:
        raise ValueError(
            f"x must have a last dimension of {columns}, the product of the input modes, got {list(x.shape)}"
        )
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.like("bias", bias, "x", x)
        if bias.shape != (rows,):
            raise ValueError(f"bias must have shape [{rows}], the product of the output modes, got {list(bias.shape)}")
    return Signature(shapes, in_cores, rows, columns)


def four_axis_shapes(cores: Sequence[Tensor], in_cores: int) -> tuple[planner.CoreShape, ...]:
    """The shapes [r_{k-1}, m_k, n_k, r_k] of the cores; a missing mode is 1."""
    if not in_cores:
        return tuple([(a, b, c, d) for a, b, c, d in [core.shape for core in cores]])
    return tuple(
        (c.shape[0], 1, c.shape[1], c.shape[2]) if k < in_cores else (c.shape[0], c.shape[1], 1, c.shape[2])
        for k, c in enumerate(cores)
    )


def _count_in_cores(columns: int, cores: Sequence[Tensor]) -> int:
    """How many leading cores make up the N columns of x; modes of 1 may count on either side."""
    size = 1
    for k, core in enumerate(cores[:-1], start=1):
        size *= core.shape[1]
        if size == columns:
            return k
    modes = [core.shape[1] for core in cores]
    raise ValueError(
        f"x must have a last dimension that is the product of the first few modes of the cores, {modes}, with one "
        f"core left at least for the output; got {columns}"
    )
