"""The NTK wing's ops: tile accumulators, per-example gradients, convolutions. None is differentiable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import precision, reference

# The place of a name is what the ops take: torch's stable ABI leaks a string for each text argument of each call.
COMPUTE = ("full", "diagonal", "trace")
# A grouped convolution with fewer rows or columns in a group's product leaves the CUDA kernel's squares of 128 nearly
# empty; the reference's batched products on cuBLAS then are the better ones.
LEAST_OF_GROUP = 16


def _no_result(*_: object) -> None:
    return None


def _position_shape(a: Tensor, d: Tensor, precision: int) -> Tensor:
    return d.new_empty(d.shape[0], d.shape[1], d.shape[3] * a.shape[2])


def _conv_shape(
    input: Tensor,
    delta: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    precision: int,
) -> Tensor:
    weights = delta.shape[2] * ((input.shape[1] // groups) * math.prod(kernel_size) + int(bias))
    return delta.new_empty(delta.shape[0], delta.shape[1], weights)


def _convolve_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    local: bool,
) -> Tensor:
    sizes = zip(input.shape[2:], weight.shape[2:], padding, dilation, strict=True)
    positions = [max(0, size + 2 * pad - d * (k - 1)) for size, k, pad, d in sizes]
    return input.new_empty(input.shape[0], weight.shape[0], *positions)


def _convolve_vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *others: Any) -> tuple[Tensor, int]:
    if in_dims[0] is not None and not any(isinstance(axis, int) for axis in in_dims[1:]):  # more rows
        rows = input.movedim(in_dims[0], 0)
        return _convolve(rows.flatten(0, 1), *others).unflatten(0, rows.shape[:2]), 0
    each = [
        [
            value if axis is None else value.select(axis, index)
            for value, axis in zip((input, *others), in_dims, strict=True)
        ]
        for index in range(info.batch_size)
    ]
    return torch.stack([_convolve(*args) for args in each]), 0


_gram_accumulate = _library.register("ntk_gram_accumulate", reference.gram_accumulate, _no_result)
_gated_product = _library.register(
    "ntk_gated_product", reference.gated_product, lambda a, b, gate: a.new_empty(a.shape[0], b.shape[1])
)
_jacobian_accumulate = _library.register("ntk_jacobian_accumulate", reference.jacobian_accumulate, _no_result)
_ghost_accumulate = _library.register("ntk_ghost_accumulate", reference.ghost_accumulate, _no_result)
_position_gradients = _library.register("ntk_position_gradients", reference.position_gradients, _position_shape)
_conv_gradients = _library.register("ntk_conv_gradients", reference.conv_gradients, _conv_shape)
_convolve = _library.register("ntk_convolve", reference.convolve, _convolve_shape)
torch.library.register_vmap("finite_width::ntk_convolve", _convolve_vmap, lib=_library._LIBRARY)


def _check_tile(out: Tensor, rows: int, columns: int, outputs: int, compute: str) -> None:
    """Raise unless out has the tile's shape for this `compute`."""
    _check.one_of("compute", compute, COMPUTE)
    expected = [rows, columns] + {"full": [outputs, outputs], "diagonal": [outputs], "trace": []}[compute]
    if list(out.shape) != expected:
        raise ValueError(f"out must have shape {expected} for compute={compute!r}, got {list(out.shape)}")


def _check_operands(first_name: str, first: Tensor, others: dict[str, Tensor]) -> None:
    """Raise unless all are float tensors of one dtype on one device."""
    _check.is_tensor(first_name, first)
    _check.is_float(first_name, first)
    for name, value in others.items():
        _check.is_tensor(name, value)
        _check.like(name, value, first_name, first)


def _check_same(name: str, axis: str, size: int, other_name: str, other_size: int) -> None:
    if size != other_size:
        raise ValueError(f"{name} has {size} {axis}, but {other_name} has {other_size}")


def _check_gate_rows(name: str, value: Tensor, gate: Tensor) -> None:
    if len(value) and (len(gate) == 0 or len(value) % len(gate)):
        raise ValueError(f"{name} must have a multiple of gate's {len(gate)} rows, got {len(value)}")


def gram_accumulate(out: Tensor, a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, bias: float, compute: str) -> None:
    """Add a dense layer's part of a kernel tile: out += (a1 a2ᵀ + bias) ∘ (d1 d2ᵀ).

    For a dense layer with input a and cotangents d = ∂f/∂(layer output), the layer's Jacobian for row n and output o
    is d[n, o] ⊗ a[n], so the inner product of two of them is the product of two inner products.

    Args:
        out: [N, M, O, O] for compute "full", [N, M, O] for "diagonal", [N, M] for "trace" (the sum); written; may be
            a view of a larger result.
        a1: [N, I], the inputs; float32 or float64, any strides.
        a2: [M, I]. Where a1 is a2 and d1 is d2, a kernel may compute half and mirror it.
        d1: [N, O, C], the cotangents of all outputs.
        d2: [M, O, C].
        bias: added to every inner product of inputs: 1 where the layer's bias counts, else 0.
        compute: "full", "diagonal" or "trace".

    Raises:
        ValueError: shapes that do not fit, tensors on two devices, an unknown `compute`.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> out = torch.zeros(1, 1)
        >>> ops.gram_accumulate(out, torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 2, 1), torch.ones(1, 2, 1), 1.0,
        ...                     "trace")
        >>> out
        tensor([[8.]])
    """
    _check_operands("out", out, {"a1": a1, "a2": a2, "d1": d1, "d2": d2})
    for name, value in (("a1", a1), ("a2", a2)):
        _check.has_dim(name, value, 2, "[rows, I]")
    for name, value in (("d1", d1), ("d2", d2)):
        _check.has_dim(name, value, 3, "[rows, O, C]")
    _check_same("d1", "rows", d1.shape[0], "a1", a1.shape[0])
    _check_same("d2", "rows", d2.shape[0], "a2", a2.shape[0])
    _check_same("a2", "features", a2.shape[1], "a1", a1.shape[1])
    _check_same("d2", "outputs", d2.shape[1], "d1", d1.shape[1])
    _check_same("d2", "channels", d2.shape[2], "d1", d1.shape[2])
    _check_tile(out, a1.shape[0], a2.shape[0], d1.shape[1], compute)
    _gram_accumulate(out, a1, a2, d1, d2, bias, COMPUTE.index(compute), precision.chosen())


def jacobian_accumulate(out: Tensor, j1: Tensor, j2: Tensor, compute: str) -> None:
    """Add the product of two Jacobian blocks to a kernel tile: out += j1 j2ᵀ.

    Args:
        out: as for `gram_accumulate`; written.
        j1: [N, O, P], float32 or float64, any strides.
        j2: [M, O, P].
        compute: "full", "diagonal" or "trace".

    Raises:
        ValueError: shapes that do not fit, tensors on two devices, an unknown `compute`.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> out = torch.zeros(2, 2, 3)
        >>> ops.jacobian_accumulate(out, torch.ones(2, 3, 5), torch.ones(2, 3, 5), "diagonal")
        >>> out[0, 1]
        tensor([5., 5., 5.])
    """
    _check_operands("out", out, {"j1": j1, "j2": j2})
    for name, value in (("j1", j1), ("j2", j2)):
        _check.has_dim(name, value, 3, "[rows, O, P]")
    _check_same("j2", "outputs", j2.shape[1], "j1", j1.shape[1])
    _check_same("j2", "parameters", j2.shape[2], "j1", j1.shape[2])
    _check_tile(out, j1.shape[0], j2.shape[0], j1.shape[1], compute)
    _jacobian_accumulate(out, j1, j2, COMPUTE.index(compute), precision.chosen())


def ghost_accumulate(out: Tensor, a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, bias: float, compute: str) -> None:
    """Add the part of a dense layer used at T positions, without its gradients: Σ_{t, s} (a_t · a_s + bias)(d_t · d_s).

    Cheaper than per-example gradients where T² is small against the layer's width.

    Args:
        out: as for `gram_accumulate`; written.
        a1: [N, T, I], the inputs at each position; float32 or float64, any strides.
        a2: [M, S, I].
        d1: [N, O, T, C], the cotangents of all outputs at each position.
        d2: [M, O, S, C].
        bias: added to every inner product of inputs: 1 where the layer's bias counts, else 0.
        compute: "full", "diagonal" or "trace".

    Raises:
        ValueError: shapes that do not fit, tensors on two devices, an unknown `compute`.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> out = torch.zeros(1, 1)
        >>> ops.ghost_accumulate(out, torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 1, 2, 1),
        ...                      torch.ones(1, 1, 2, 1), 0.0, "trace")
        >>> out
        tensor([[12.]])
    """
    _check_operands("out", out, {"a1": a1, "a2": a2, "d1": d1, "d2": d2})
    for name, value in (("a1", a1), ("a2", a2)):
        _check.has_dim(name, value, 3, "[rows, T, I]")
    for name, value in (("d1", d1), ("d2", d2)):
        _check.has_dim(name, value, 4, "[rows, O, T, C]")
    for side, a, d in (("1", a1, d1), ("2", a2, d2)):
        _check_same(f"d{side}", "rows", d.shape[0], f"a{side}", a.shape[0])
        _check_same(f"d{side}", "positions", d.shape[2], f"a{side}", a.shape[1])
    _check_same("a2", "features", a2.shape[2], "a1", a1.shape[2])
    _check_same("d2", "outputs", d2.shape[1], "d1", d1.shape[1])
    _check_same("d2", "channels", d2.shape[3], "d1", d1.shape[3])
    _check_tile(out, a1.shape[0], a2.shape[0], d1.shape[1], compute)
    _ghost_accumulate(out, a1, a2, d1, d2, bias, COMPUTE.index(compute), precision.chosen())


def dense(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """A dense layer on a GPU's tensor cores: rows [R, I] times matrix [I, C] plus bias [C], as "split" multiplies.

    Below autograd and without checks: layers.py asks `precision.splits_dense_layers` first. The kernel of products of
    Jacobians reads both operands along k, so a matrix that does not lie so is copied: 8 bytes a weight against
    2 R operations.
    """
    out = rows.new_zeros(rows.shape[0], matrix.shape[1])
    if bias is not None:
        out += bias
    left, right = rows.unsqueeze(1), matrix.t().contiguous().unsqueeze(1)
    _library.below_autograd(_jacobian_accumulate, out, left, right, reference.TRACE, precision.SPLIT)
    return out


def position_gradients(a: Tensor, d: Tensor) -> Tensor:
    """Per-example weight gradients of a dense layer used at T positions: Σ_t d[n, o, t] ⊗ a[n, t].

    Args:
        a: [N, T, I], the inputs; float32 or float64, any strides.
        d: [N, O, T, C], the cotangents of all outputs.

    Returns:
        [N, O, C I], in the layout of a weight [C, I].

    Raises:
        ValueError: shapes that do not fit, tensors on two devices.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> ops.position_gradients(torch.ones(1, 4, 2), torch.ones(1, 1, 4, 3))
        tensor([[[4., 4., 4., 4., 4., 4.]]])
    """
    _check_operands("a", a, {"d": d})
    _check.has_dim("a", a, 3, "[N, T, I]")
    _check.has_dim("d", d, 4, "[N, O, T, C]")
    _check_same("d", "rows", d.shape[0], "a", a.shape[0])
    _check_same("d", "positions", d.shape[2], "a", a.shape[1])
    gradients: Tensor = _position_gradients(a, d, precision.chosen())
    return gradients


def conv_gradients(
    input: Tensor,
    delta: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> Tensor:
    """Per-example weight gradients of a convolution with 1, 2 or 3 spatial axes, without storing the unfold.

    Args:
        input: [N, Cin, *S], the layer's input; float32 or float64, any strides.
        delta: [N, O, Cout, *S'], the cotangents of all outputs. A range of output channels of a convolution with
            groups=1 gives the gradients of those channels alone.
        kernel_size: one size per spatial axis, as the following three.
        stride: as in torch's convolution.
        padding: zeros added on both sides of each axis.
        dilation: as in torch's convolution.
        groups: as in torch's convolution.
        bias: whether each output channel's bias gradient, the sum of delta over positions, follows its weights.

    Returns:
        [N, O, P] in the layout of the weight [Cout, Cin / groups, *kernel_size]; with `bias` in the layout
        [Cout, Cin / groups · |kernel_size| + 1], each channel's bias last.

    Raises:
        ValueError: shapes that do not fit, tensors on two devices.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> ops.conv_gradients(torch.ones(1, 1, 4), torch.ones(1, 1, 1, 3), [2], [1], [0], [1], 1, True)
        tensor([[[3., 3., 3.]]])
    """
    _check_operands("input", input, {"delta": delta})
    spatial = len(kernel_size)
    if spatial not in (1, 2, 3):
        raise ValueError(f"kernel_size must have 1, 2 or 3 entries, got {list(kernel_size)}")
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(value) != spatial:
            raise ValueError(f"{name} must have {spatial} entries like kernel_size, got {list(value)}")
    for name, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", [groups], 1),
    ):
        if min(value) < least:
            raise ValueError(f"{name} must be at least {least}, got {list(value)}")
    _check.has_dim("input", input, spatial + 2, "[N, Cin, *S]")
    _check.has_dim("delta", delta, spatial + 3, "[N, O, Cout, *S']")
    _check_same("delta", "rows", delta.shape[0], "input", input.shape[0])
    if input.shape[1] % groups or delta.shape[2] % groups:
        raise ValueError(
            f"groups={groups} must divide the channels of input ({input.shape[1]}) and delta ({delta.shape[2]})"
        )
    if bias and input.shape[1] == 0:
        raise ValueError("input must have channels where bias is asked for, got none")
    for axis in range(spatial):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        positions = (input.shape[axis + 2] + 2 * padding[axis] - reach) // stride[axis] + 1
        if positions != delta.shape[axis + 3]:
            raise ValueError(
                f"delta must have {positions} positions on spatial axis {axis}, since input has "
                f"{input.shape[axis + 2]}, got {delta.shape[axis + 3]}"
            )
    rows, columns = delta.shape[1] * delta.shape[2] // groups, input.shape[1] // groups * math.prod(kernel_size)
    narrow = delta.is_cuda and groups > 1 and min(rows, columns) < LEAST_OF_GROUP
    call = reference.conv_gradients if narrow else _conv_gradients
    gradients: Tensor = call(
        input,
        delta,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        bias,
        precision.chosen(),
    )
    return gradients


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    local: bool,
) -> Tensor:
    """A convolution with stride 1 in 1, 2 or 3 spatial axes, and maybe the backward of a ReLU behind it.

    With the flipped weight, its channels in and out swapped, and the padding dilation * (kernel - 1) - padding, it is
    the backward of such a convolution.

    Args:
        input: [N, Cin, *S], float32 or float64, any strides.
        weight: [Cout, Cin / groups, *kernel].
        bias: [Cout], added to every position.
        gate: [G, Cout, *S'] where N is a multiple of G: the result is 0 where gate[n mod G] <= 0.
        padding: zeros added on both sides of each spatial axis; where negative, that much of the input is left out.
        dilation: as in torch's convolution.
        groups: as in torch's convolution.
        local: a position depends on its own window alone, bit for bit: then a window of zeros gives its bias exactly,
            as a ReLU behind needs it. Without it, neighbours may reach a position by their rounding, which allows
            3 × 3 kernels a form with fewer products.

    Returns:
        [N, Cout, *S'], contiguous. The bits of a row depend on this row alone, for any number of threads.

    Raises:
        ValueError: shapes that do not fit, tensors on two devices.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> gate = torch.tensor([[[1.0, -1.0]]])
        >>> ops.convolve(torch.ones(1, 1, 3), torch.ones(1, 1, 2), None, gate, [0], [1], 1, True)
        tensor([[[2., 0.]]])
    """
    _check_operands("input", input, {"weight": weight})
    spatial = weight.dim() - 2
    if spatial not in (1, 2, 3):
        raise ValueError(f"weight must have 1, 2 or 3 spatial axes, got shape {list(weight.shape)}")
    _check.has_dim("input", input, spatial + 2, "[N, Cin, *S]")
    for name, value in (("padding", padding), ("dilation", dilation)):
        if len(value) != spatial:
            raise ValueError(f"{name} must have {spatial} entries like the kernel, got {list(value)}")
    if min(weight.shape[2:]) < 1 or min(dilation) < 1:
        raise ValueError(f"kernel and dilation must be at least 1, got {list(weight.shape[2:])} and {list(dilation)}")
    if groups < 1 or input.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight must have {input.shape[1]} / groups channels in and a multiple of groups={groups} channels out, "
            f"got shape {list(weight.shape)}"
        )
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.like("bias", bias, "input", input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {[weight.shape[0]]}, got {list(bias.shape)}")
    if gate is not None:
        _check.is_tensor("gate", gate)
        _check.like("gate", gate, "input", input)
        sizes = _convolve_shape(input, weight, bias, gate, padding, dilation, groups, local).shape[1:]
        if gate.shape[1:] != sizes:
            raise ValueError(f"gate must have shape {['G', *sizes]}, got {list(gate.shape)}")
        _check_gate_rows("input", input, gate)
    result: Tensor = _convolve(input, weight, bias, gate, list(padding), list(dilation), groups, local)
    return result


def gated_product(a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """A matrix product and the backward of a ReLU behind it.

    Args:
        a: [M, K], float32 or float64, any strides.
        b: [K, N].
        gate: [G, N] where M is a multiple of G: the result is 0 where gate[m mod G] <= 0.

    Returns:
        [M, N], contiguous; what is not 0 has the bits of `_gemm.gemm`, for any number of threads.

    Raises:
        ValueError: shapes that do not fit, tensors on two devices.
        TypeError: other dtypes.

    Example:
        >>> import torch
        >>> from finite_width.ntk import ops
        >>> ops.gated_product(torch.ones(2, 3), torch.ones(3, 2), torch.tensor([[1.0, -1.0]]))
        tensor([[3., 0.],
                [3., 0.]])
    """
    _check_operands("a", a, {"b": b, "gate": gate})
    for name, value, axes in (("a", a, "[M, K]"), ("b", b, "[K, N]"), ("gate", gate, "[G, N]")):
        _check.has_dim(name, value, 2, axes)
    _check_same("b", "rows", b.shape[0], "a", a.shape[1])
    _check_same("gate", "columns", gate.shape[1], "b", b.shape[1])
    _check_gate_rows("a", a, gate)
    result: Tensor = _gated_product(a, b, gate)
    return result
