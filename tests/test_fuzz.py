"""Every op on random shapes, strides, dtypes and modes: kernel against reference in float64, results and gradients.

A few cases of each in every run; `make fuzz` runs 2,000 of each, `make fuzz-nightly` 50,000 (FINITE_WIDTH_FUZZ).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import bayes_summands
import finite_width as fw
from finite_width import _library
from finite_width._gemm import gemm
from finite_width.bayes import ops as bayes
from finite_width.ntk import ops as ntk
from finite_width.pathsgd import convolution_ops
from finite_width.pathsgd import ops as pathsgd
from op_battery import copy

CASES = int(os.environ.get("FINITE_WIDTH_FUZZ", "20"))


class Draw:
    """Random sizes from hypothesis, which shrinks them; random values and layouts of tensors from one seed."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def size(self, low: int = 0, high: int = 40) -> int:
        return int(self.draw(st.integers(low, high)))

    def choice(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def tensor(self, *shape: int, writable: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values; contiguous, axes stored in another order, with gaps, or repeated by stride 0."""
        dtype = dtype or self.dtype
        layout = self.choice(["contiguous", "permuted", "gaps", *([] if writable else ["repeated"])])
        if layout == "permuted":
            order = list(range(len(shape)))[::-1]
            return self.normal([shape[axis] for axis in order], dtype).permute(order)
        if layout == "gaps":
            wide = self.normal([2 * size + 1 for size in shape], dtype)
            return wide[tuple(slice(1, 1 + 2 * size, 2) for size in shape)]
        if layout == "repeated" and shape:
            axis = self.size(0, len(shape) - 1)
            return self.normal([1 if i == axis else size for i, size in enumerate(shape)], dtype).expand(shape)
        return self.normal(shape, dtype)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), dtype=dtype, generator=self.generator)


@dataclass
class Call:
    """One call: the public wrapper and its arguments.

    linear: the result is multilinear in the arguments; its error is then held against the result of |arguments|, and
        a gradient's against that of |arguments| and |cotangent|, since a sum that cancels has no small relative error
        in any arithmetic.
    differentiable: gradients are compared as well.
    size: for other calls, the size of what is summed up in an entry: the error of an entry that cancels is held
        against this.
    summands: the sizes of what is summed up in each entry, of the results and of the gradients; every entry is held
        against its own, times `tolerance`.
    view: what to compare of (results, arguments afterwards), where that is not all tensors as they are.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    linear: bool = False
    differentiable: bool = False
    tolerance: tuple[float, float] = (1e-5, 1e-12)  # float32, float64
    size: float = 0.1
    summands: Callable[..., tuple[list[Tensor], list[Tensor]]] | None = None
    view: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors


def fuzz_gemm(d: Draw) -> Call:
    rows, columns, inner = d.size(0, 70), d.size(0, 70), d.size(0, 90)
    bias = d.tensor(columns) if d.choice([True, False]) else None
    return Call(gemm, (d.tensor(rows, inner), d.tensor(inner, columns), bias), linear=True, differentiable=True)


def tile(d: Draw, rows: int, columns: int, outputs: int) -> tuple[Tensor, str]:
    compute = d.choice(["full", "diagonal", "trace"])
    shape = [rows, columns] + {"full": [outputs, outputs], "diagonal": [outputs], "trace": []}[compute]
    return d.tensor(*shape, writable=True), compute


def fuzz_gram(d: Draw) -> Call:
    n, m, i, o, c = d.size(0, 36), d.size(0, 36), d.size(1, 50), d.size(1, 4), d.size(1, 40)
    out, compute = tile(d, n, m, o)
    args = (out, d.tensor(n, i), d.tensor(m, i), d.tensor(n, o, c), d.tensor(m, o, c), d.choice([0.0, 1.0]), compute)
    return Call(ntk.gram_accumulate, args, linear=True)


def fuzz_jacobian(d: Draw) -> Call:
    n, m, o, p = d.size(0, 36), d.size(0, 36), d.size(1, 4), d.size(1, 90)
    out, compute = tile(d, n, m, o)
    return Call(ntk.jacobian_accumulate, (out, d.tensor(n, o, p), d.tensor(m, o, p), compute), linear=True)


def fuzz_ghost(d: Draw) -> Call:
    n, m, t, s, i, o, c = (
        d.size(low, high) for low, high in ((0, 7), (0, 7), (1, 6), (1, 6), (1, 30), (1, 3), (1, 20))
    )
    out, compute = tile(d, n, m, o)
    operands = d.tensor(n, t, i), d.tensor(m, s, i), d.tensor(n, o, t, c), d.tensor(m, o, s, c)
    return Call(ntk.ghost_accumulate, (out, *operands, d.choice([0.0, 1.0]), compute), linear=True)


def fuzz_gated(d: Draw) -> Call:
    gates, times, k, n = d.size(1, 30), d.size(0, 6), d.size(1, 90), d.size(1, 90)
    return Call(ntk.gated_product, (d.tensor(gates * times, k), d.tensor(k, n), d.tensor(gates, n)), linear=True)


def fuzz_positions(d: Draw) -> Call:
    n, t, i, o, c = d.size(0, 6), d.size(0, 20), d.size(1, 40), d.size(1, 3), d.size(1, 40)
    return Call(ntk.position_gradients, (d.tensor(n, t, i), d.tensor(n, o, t, c)), linear=True)


def fuzz_convolution(d: Draw) -> Call:
    axes, groups = d.size(1, 3), d.size(1, 2)
    kernel, stride = ([d.size(1, 3) for _ in range(axes)] for _ in range(2))
    padding, dilation = [d.size(0, 2) for _ in range(axes)], [d.size(1, 2) for _ in range(axes)]
    places = [d.size(1, 5) for _ in range(axes)]
    reach = [(p - 1) * s + w * (k - 1) + 1 for p, s, w, k in zip(places, stride, dilation, kernel, strict=True)]
    sizes = [max(r - 2 * p, 1) for r, p in zip(reach, padding, strict=True)]
    places = [
        (size + 2 * p - w * (k - 1) - 1) // s + 1
        for size, p, w, k, s in zip(sizes, padding, dilation, kernel, stride, strict=True)
    ]
    n, o, c_in, c_out = d.size(0, 3), d.size(1, 2), groups * d.size(1, 4), groups * d.size(1, 9)
    if d.choice([True, False]):  # what takes Winograd's form
        kernel, stride, dilation, groups = [3, 3], [1, 1], [1, 1], 1
        padding, places = [d.size(0, 2) for _ in range(2)], [d.size(3, 20) for _ in range(2)]
        sizes = [max(place + 2 - 2 * p, 1) for place, p in zip(places, padding, strict=True)]
        places = [size + 2 * p - 2 for size, p in zip(sizes, padding, strict=True)]
        c_in, c_out = d.size(15, 40), d.size(15, 40)
    args = (d.tensor(n, c_in, *sizes), d.tensor(n, o, c_out, *places), kernel, stride, padding, dilation, groups)
    return Call(ntk.conv_gradients, (*args, d.choice([True, False])), linear=True)


def fuzz_convolve(d: Draw) -> Call:
    axes, groups = d.size(1, 3), d.size(1, 2)
    kernel, dilation = [d.size(1, 3) for _ in range(axes)], [d.size(1, 2) for _ in range(axes)]
    padding, sizes = [d.size(-1, 3) for _ in range(axes)], [d.size(3, 9) for _ in range(axes)]
    n, c_in, c_out = d.size(0, 4), groups * d.size(1, 9), groups * d.size(1, 18)
    if d.choice([True, False]):  # what takes Winograd's form
        kernel, dilation, groups = [3, 3], [1, 1], 1
        padding, sizes = [d.size(-1, 3) for _ in range(2)], [d.size(4, 21) for _ in range(2)]
        c_in, c_out = d.size(23, 50), d.size(23, 50)
    bias = d.tensor(c_out) if d.choice([True, False]) else None
    operands = (d.tensor(n, c_in, *sizes), d.tensor(c_out, c_in // groups, *kernel), bias, None)
    return Call(ntk.convolve, (*operands, padding, dilation, groups, d.choice([True, False])), linear=True)


def fuzz_tensor_train(d: Draw) -> Call:
    cores = d.size(1, 4)
    ranks = [1, *(d.size(1, 9) for _ in range(cores - 1)), 1]
    modes = [(d.size(1, 6), d.size(1, 6)) for _ in range(cores)]
    tensors = [d.tensor(ranks[k], *modes[k], ranks[k + 1]) for k in range(cores)]
    columns, rows = math.prod(n for _, n in modes), math.prod(m for m, _ in modes)
    lead = [d.size(0, 9) for _ in range(d.size(0, 2))]
    bias = d.tensor(rows) if d.choice([True, False]) else None
    return Call(fw.tt.tt_linear, (d.tensor(*lead, columns), tensors, bias), linear=True, differentiable=True)


def vector(d: Draw, units: int) -> Tensor:
    """A stored path vector: positive mantissas, then their common exponent."""
    values = 0.5 + torch.rand(units + 1, dtype=torch.float64, generator=d.generator)
    values[-1] = d.size(-12, 12)  # the step stays within float32
    return values


def fuzz_sweep(d: Draw) -> Call:
    rows, columns, forward = d.size(0, 40), d.size(0, 70), d.choice([True, False])
    into, out = (columns, rows) if forward else (rows, columns)
    update, momentum, bias = d.choice([True, False]), d.choice([True, False]), d.choice([True, False])
    momentum = momentum and update
    rates = (0.1, 0.9, 1.0, 0.99, -1.0) if momentum else (0.1, 0.0, 0.0, 1.0, 1.0)

    def pick(wanted: bool, *shape: int) -> Tensor | None:
        return d.normal(shape, d.dtype) if wanted else None

    args = (
        *(d.tensor(rows, columns, writable=True), pick(update, rows, columns), pick(momentum, rows, columns)),
        *(pick(bias, rows), pick(bias and update, rows), pick(bias and momentum, rows)),
        *(vector(d, into), vector(d, into), vector(d, out)),
        *(torch.zeros(out + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)),
        *(forward, d.choice([1.0, 2.0, 3.0, math.inf]), rates, rates),
    )

    def view(tensors: list[Tensor]) -> list[Tensor]:
        # Mantissas and their exponent go together: a rounding may move a power of two from one to the other.
        joined = [t[:-1] * torch.exp2(t[-1].clamp(-900, 900)) for t in tensors if t.shape == (out + 1,)]
        return [t for t in tensors if t.dim() == 2 or t.shape == (rows,)] + joined

    return Call(pathsgd.path_sweep, args, view=view)


def fuzz_update(d: Draw) -> Call:
    shape = [d.size(0, 9) for _ in range(d.size(1, 3))]
    momentum = d.choice([True, False])
    mass = torch.rand(shape, dtype=torch.float64, generator=d.generator) + 0.1
    rates = (0.1, 0.9, 1.0, 0.99, -1.0) if momentum else (0.1, 0.0, 0.0, 1.0, 1.0)
    args = (
        *(d.tensor(*shape, writable=True), d.tensor(*shape), d.tensor(*shape, writable=True) if momentum else None),
        *(mass, float(d.size(-4, 4)), d.choice([1.0, 2.0, 3.0]), rates),
    )
    return Call(pathsgd.path_update, args)


def fuzz_path_step(d: Draw) -> Call:
    sizes = [d.size(1, 40) for _ in range(d.size(2, 4))]
    shapes = [(out, into) for into, out in pairwise(sizes)]
    update, momentum, bias = d.choice([True, False]), d.choice([True, False]), d.choice([True, False])
    rates = [0.1, 0.9, 1.0, 0.99, -1.0] if momentum else [0.1, 0.0, 0.0, 1.0, 1.0]
    vectors = [vector(d, units) for _ in range(2) for units in sizes]
    for outer in (vectors[0], vectors[-1]):
        outer[:-1], outer[-1] = 1, 0

    def matrices(wanted: bool) -> list[Tensor | None]:
        return [d.normal(shape, d.dtype) if wanted else None for shape in shapes]

    def rows(wanted: bool) -> list[Tensor | None]:
        return [d.normal(shape[:1], d.dtype) if bias and wanted else None for shape in shapes]

    args = (
        *(matrices(True), matrices(update), matrices(momentum and update)),
        *(rows(True), rows(update), rows(momentum and update)),
        torch.cat([*vectors, torch.zeros(4 * len(shapes), dtype=torch.float64)]),
        torch.tensor([d.choice([1.0, 2.0]), 0.7, 900.0, 0.0], dtype=torch.float64),
        *(d.choice([1.0, 2.0, 3.0, math.inf]), rates * 2 * len(shapes), [], None, None, d.choice([0, 1, 2])),
    )
    units = sum(size + 1 for size in sizes)

    def view(tensors: list[Tensor]) -> list[Tensor]:
        *layers, packed, _ = tensors
        parts = packed[: 2 * units].split([size + 1 for size in sizes] * 2)
        return [*layers, *(part[:-1] * torch.exp2(part[-1].clamp(-900, 900)) for part in parts)]

    return Call(pathsgd.path_step, args, view=view)


def path_window(d: Draw) -> tuple[Tensor, list[int], list[int], tuple[Any, ...]]:
    """Path sums at a convolution's input, the shapes of its weight and output, and how it goes over the input."""
    spatial, groups = d.size(1, 3), d.size(1, 3)
    sizes = [d.size(1, 9) for _ in range(spatial)]
    stride, dilation, padding = ([d.size(low, 3) for _ in range(spatial)] for low in (1, 1, 0))
    rows = list(zip(sizes, padding, dilation, strict=True))
    kernel = [d.size(1, min(4, (size + 2 * pad - 1) // apart + 1)) for size, pad, apart in rows]
    out = [
        (size + 2 * pad - apart * (taps - 1) - 1) // step + 1
        for (size, pad, apart), taps, step in zip(rows, kernel, stride, strict=True)
    ]
    channels, filters = d.size(1, 5), d.size(1, 9) * groups
    x = d.normal((1, channels * groups, *sizes), torch.float64).abs()
    return x, [filters, channels, *kernel], [1, filters, *out], (stride, padding, dilation, groups)


def fuzz_path_convolution(d: Draw) -> Call:
    x, shape, _, how = path_window(d)
    return Call(convolution_ops.path_convolution, (x, d.tensor(*shape), d.choice([1.0, 2.0, 3.0]), *how))


def fuzz_path_convolution_backward(d: Draw) -> Call:
    x, shape, out, how = path_window(d)
    known = d.normal(out, torch.float64).abs()
    return Call(
        convolution_ops.path_convolution_backward, (known, x, d.tensor(*shape), d.choice([1.0, 2.0, 3.0]), *how)
    )


def fuzz_path_convolution_update(d: Draw) -> Call:
    x, shape, out, how = path_window(d)
    momentum = d.choice([True, False])
    known = d.normal(out, torch.float64).abs() + 0.1
    rates = (0.1, 0.9, 1.0, 0.99, -1.0) if momentum else (0.1, 0.0, 0.0, 1.0, 1.0)
    args = (
        *(d.tensor(*shape, writable=True), d.tensor(*shape), d.tensor(*shape, writable=True) if momentum else None),
        *(x + 0.1, known, float(d.size(-4, 4)), d.choice([1.0, 2.0, 3.0]), rates, *how),
    )
    return Call(convolution_ops.path_convolution_update, args)


def weights(d: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """Means, and ρ with σ between about 0.02 and 3."""
    return d.tensor(*shape), 4 * d.tensor(*shape).clamp(-1, 0.7)


def seed(d: Draw) -> Tensor:
    return torch.tensor(d.draw(st.integers(-(2**63), 2**63 - 1)))


def prior(d: Draw, *shape: int) -> tuple[Tensor | None, float | None]:
    kind = d.choice(["none", "std", "mean"])
    mean = d.tensor(*shape) if kind == "mean" else None
    return mean, None if kind == "none" else d.choice([0.3, 1.0, 2.0])


def variational(function: Callable[..., Any], args: tuple[Any, ...], terms: int, differentiable: bool = True) -> Call:
    """A call of a variational op, whose entries are sums of so many terms: within the bound of bayes_summands."""
    summands = getattr(bayes_summands, function.__name__)
    return Call(
        function, args, differentiable=differentiable, tolerance=bayes_summands.roundings(terms), summands=summands
    )


def fuzz_noise(d: Draw) -> Call:
    shape = [d.size(0, 20) for _ in range(d.size(0, 3))]
    args = (d.tensor(*shape), seed(d), d.size(0, 5), d.size(0, 3))
    return variational(bayes.noise, args, terms=1, differentiable=False)


# The KL adds 16 terms in float32 at most before it goes on in float64.
KL_TERMS = 16


def fuzz_sample(d: Draw) -> Call:
    shape = [d.size(0, 20) for _ in range(d.size(1, 3))]
    mean, std = prior(d, *shape)
    args = (*weights(d, *shape), seed(d), mean, std, d.size(0, 2), d.choice([True, False]))
    return variational(bayes.sample, args, KL_TERMS)


def fuzz_kl(d: Draw) -> Call:
    shape = [d.size(0, 20) for _ in range(d.size(1, 3))]
    mean, std = prior(d, *shape)
    return variational(bayes.kl, (*weights(d, *shape), mean, std or 1.0), KL_TERMS)


def fuzz_bayes_local(d: Draw) -> Call:
    call = fuzz_bayes_linear(d)
    x, weight_mu, *_ = call.args
    # The deviation and its gradient carry the variance's roundings into sums once more.
    return variational(bayes.local, call.args, 3 * max(*x.shape, *weight_mu.shape, KL_TERMS))


def fuzz_bayes_linear(d: Draw) -> Call:
    batch, inputs, outputs, bias = d.size(0, 40), d.size(1, 70), d.size(1, 70), d.choice([True, False])
    mean, std = prior(d, outputs, inputs)
    bias_mean = d.tensor(outputs) if bias and mean is not None else None
    pairs = (*weights(d, outputs, inputs), *(weights(d, outputs) if bias else (None, None)))
    args = (d.tensor(batch, inputs), *pairs, seed(d), mean, bias_mean, std)
    return variational(bayes.linear, args, max(batch, inputs, outputs, KL_TERMS))


def fuzz_bayes_samples(d: Draw) -> Call:
    batch, inputs, outputs, samples = d.size(0, 20), d.size(1, 50), d.size(1, 50), d.size(1, 4)
    pairs = (*weights(d, outputs, inputs), *(weights(d, outputs) if d.choice([True, False]) else (None, None)))
    args = (d.tensor(d.choice([1, samples]), batch, inputs), *pairs, seed(d), d.size(0, 3), samples)
    return variational(bayes.linear_samples, args, inputs, differentiable=False)


FUZZ: dict[str, Callable[[Draw], Call]] = {
    "gemm": fuzz_gemm,
    "ntk_gram_accumulate": fuzz_gram,
    "ntk_jacobian_accumulate": fuzz_jacobian,
    "ntk_ghost_accumulate": fuzz_ghost,
    "ntk_position_gradients": fuzz_positions,
    "ntk_conv_gradients": fuzz_convolution,
    "ntk_convolve": fuzz_convolve,
    "ntk_gated_product": fuzz_gated,
    "tt_linear": fuzz_tensor_train,
    "path_sweep": fuzz_sweep,
    "path_step": fuzz_path_step,
    "path_update": fuzz_update,
    "path_convolution": fuzz_path_convolution,
    "path_convolution_backward": fuzz_path_convolution_backward,
    "path_convolution_update": fuzz_path_convolution_update,
    "bayes_noise": fuzz_noise,
    "bayes_sample": fuzz_sample,
    "bayes_kl": fuzz_kl,
    "bayes_linear": fuzz_bayes_linear,
    "bayes_local": fuzz_bayes_local,
    "bayes_linear_samples": fuzz_bayes_samples,
}
# The backward of an op is reached through its gradients.
THROUGH_GRADIENTS = {
    *("tt_linear_backward", "bayes_sample_backward", "bayes_kl_backward"),
    *("bayes_linear_backward", "bayes_local_backward"),
}


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def outcome(call: Call, args: tuple[Any, ...], absolute: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """What a call returns and leaves in its arguments; and its gradients for a cotangent without symmetry.

    Args:
        absolute: for the arguments' and the cotangent's absolute values.
    """
    if absolute:
        args = tree_map(lambda x: x.abs() if isinstance(x, Tensor) else x, args)
    args = copy(args)
    leaves = [leaf for leaf in tensors(args) if leaf.is_floating_point()] if call.differentiable else []
    for leaf in leaves:
        leaf.requires_grad_()
    result = tensors(call.function(*args))
    gradients: list[Tensor] = []
    if leaves:
        # Rounded from float64: where the ramp crosses 0, the float32 one would be another number altogether.
        ramps = [torch.linspace(-1, 0.7, out.numel(), dtype=torch.float64).reshape(out.shape) for out in result]
        ramps = [(ramp.abs() if absolute else ramp).to(out.dtype) for ramp, out in zip(ramps, result, strict=True)]
        loss = torch.stack([(out * ramp).sum() for out, ramp in zip(result, ramps, strict=True)]).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    everything = [leaf.detach() for leaf in (*result, *([] if leaves else tensors(args)))]
    return call.view([t for t in everything if t.is_floating_point()]), gradients


def check(call: Call) -> None:
    dtype = next(t.dtype for t in tensors(call.args) if t.is_floating_point())
    double = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, copy(call.args))
    with fw.reference_only():
        exact = outcome(call, double)
        scale = exact
        if call.linear:
            scale = outcome(call, double, absolute=True)
    found = outcome(call, call.args)
    bound = call.tolerance[dtype == torch.float64]
    if call.summands:
        for results, rights, sizes in zip(found, exact, call.summands(*double), strict=True):
            for result, right, size in zip(results, rights, sizes, strict=True):
                assert result.shape == right.shape == size.shape
                over = (result.double() - right).abs() - bound * size
                assert not (over > 0).any(), (
                    f"{result[over > 0][0]} for {right[over > 0][0]}, {float(over.max()):.1e} too far"
                )
        return
    for results, rights, sizes in zip(found, exact, scale, strict=True):
        for result, right, size in zip(results, rights, sizes, strict=True):
            assert result.shape == right.shape
            entries = call.size * math.sqrt(right.numel())
            allowed = bound * float(size.norm() if call.linear else right.norm() + entries)
            difference = float((result.double() - right).norm())
            assert difference <= allowed or difference == 0, f"{difference:.2e} over {allowed:.2e}, {list(right.shape)}"


def test_every_op_is_here() -> None:
    assert set(FUZZ) | THROUGH_GRADIENTS == set(_library.SCHEMAS)


@pytest.mark.parametrize("name", FUZZ)
def test_fuzz(name: str) -> None:
    @settings(max_examples=CASES, deadline=None, derandomize=CASES < 1000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def every(data: Any) -> None:
        check(FUZZ[name](Draw(data.draw)))

    every()
