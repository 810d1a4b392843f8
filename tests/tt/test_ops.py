"""The op battery over the Tensor-Train product and its gradients."""

from __future__ import annotations

import os
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import finite_width as fw
from finite_width.tt import ops, reference
from finite_width.tt.precision import PRECISIONS
from op_battery import DEVICES, OpCase, Sample, battery, need, relative_error


def random_cores(shapes: Any, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, generator=generator) / max(shape[0], shape[-1]) ** 0.5 for shape in shapes]


def matrix_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    small = [(1, 2, 3, 2), (2, 3, 2, 3), (3, 2, 2, 1)]
    tails = [(1, 5, 7, 6), (6, 5, 4, 5), (5, 3, 7, 4), (4, 7, 5, 1)]  # modes that fill no vector
    square = [(1, 4, 4, 8), (8, 8, 8, 8), (8, 8, 8, 8), (8, 4, 4, 1)]
    wide = [(1, 8, 8, 24), (24, 8, 8, 1)]
    samples = [
        Sample((randn(3, 12), random_cores(small, dtype, generator), randn(12))),
        Sample((randn(12, 2).mT, random_cores(small, dtype, generator))),  # not contiguous
        Sample((randn(2, 3, 3), random_cores([(1, 3, 3, 1), (1, 2, 1, 1)], dtype, generator))),
        Sample((randn(0, 12), random_cores(small, dtype, generator), randn(12))),
        Sample((randn(70, 980), random_cores(tails, dtype, generator), randn(525))),
        Sample((randn(33, 1024), random_cores(square, dtype, generator), randn(1024))),
        Sample((randn(300, 64), random_cores(wide, dtype, generator), None)),  # rank 24 > r*: through the dense W
    ]
    strided = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in random_cores(small, dtype, generator)]
    return [*samples, Sample((randn(4, 12), strided, randn(24)[::2]))]


def in_out_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    two, four = [(1, 12, 4), (4, 5, 1)], [(1, 28, 9), (9, 28, 10), (10, 2, 3), (3, 5, 1)]
    return [
        Sample((randn(3, 12), random_cores(two, dtype, generator), randn(5)), {"layout": "in_out"}),
        Sample((randn(65, 784), random_cores(four, dtype, generator), randn(10)), {"layout": "in_out"}),
        Sample((randn(64, 784), random_cores([(1, 784, 50), (50, 10, 1)], dtype, generator)), {"layout": "in_out"}),
    ]


def linear_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    return [*matrix_samples(dtype, generator), *in_out_samples(dtype, generator)]


def backward_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    shapes = [(1, 2, 2, 2), (2, 3, 2, 3), (3, 2, 2, 1)]
    for plan in ((1, 0, 0, 0, 0, 0), (2, 1, 0, 0, 0, 0), (2, 0, 0, 1, 1, 0), (1, 1, 1, 1, 0, 0), (2, 1, 1, 0, 1, 0)):
        for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1)) if plan == (2, 1, 0, 0, 0, 0) else ((1, 1, 1),):
            rows = 2 if plan[2] + plan[3] + plan[4] + sum(needs) < 4 else 40  # few enough rows for gradient checks
            grad = torch.randn(rows, 12, dtype=dtype, generator=generator)
            x = torch.randn(rows, 8, dtype=dtype, generator=generator)
            samples.append(Sample((grad, x, random_cores(shapes, dtype, generator), plan, needs)))
    large = [(1, 5, 7, 6), (6, 5, 4, 5), (5, 3, 7, 4), (4, 7, 5, 1)]
    for left_first in (0, 1):
        for dense in ((0, 0), (1, 0), (0, 1), (1, 1)):
            grad = torch.randn(90, 525, dtype=dtype, generator=generator)
            x = torch.randn(90, 980, dtype=dtype, generator=generator)
            plan = (2, left_first, 0, *dense, 0)
            samples.append(Sample((grad, x, random_cores(large, dtype, generator), plan, (1, 1, 1))))
    return samples


def shapes_bad() -> list[Any]:
    x, cores = torch.randn(2, 12), [torch.randn(1, 2, 3, 2), torch.randn(2, 3, 4, 1)]
    return [
        ((x[:, :11], cores), ValueError, "x must have a last dimension of 12"),
        ((x, []), ValueError, "cores must hold at least one core"),
        ((x, [cores[0], cores[1][:1]]), ValueError, r"cores\[1\] must begin with rank 2"),
        ((x, [cores[0], cores[1].repeat(1, 1, 1, 2)]), ValueError, r"cores\[1\] must end with rank 1"),
        ((x, [cores[0][0], cores[1]]), ValueError, r"cores\[0\] must have 4 axes"),
        ((x.double(), cores), TypeError, r"cores\[0\] has dtype torch.float32, but x has torch.float64"),
        ((x.long(), cores), TypeError, "x must be float32 or float64"),
        ((x, cores, torch.randn(5)), ValueError, r"bias must have shape \[6\]"),
        ((x, cores, torch.randn(6).to("meta")), ValueError, "bias is on meta"),
        (("x", cores), TypeError, "x must be a torch.Tensor"),
    ]


CASES = [
    OpCase(
        name="tt_linear",
        kind="differentiable",
        call=fw.tt.tt_linear,
        samples=linear_samples,
        bad=shapes_bad(),
    ),
    OpCase(
        name="tt_linear_backward",
        kind="differentiable",
        call=ops.tt_linear_backward,
        samples=backward_samples,
        bad=[
            (
                (
                    torch.randn(2, 6),
                    torch.randn(3, 12),
                    [torch.randn(1, 2, 3, 2), torch.randn(2, 3, 4, 1)],
                    (1, 0, 0, 0, 0, 0),
                    (1, 1, 1),
                ),
                ValueError,
                "x must have shape",
            )
        ],
    ),
]
test_battery = battery(CASES)


def taken_by_cuda_kernels(device: str) -> bool:
    """Whether such tensors go to CUDA kernels: on a GPU, or on the CPU in the emulation (tests/cuda_on_host)."""
    return "FINITE_WIDTH_CUDA_ON_HOST" in os.environ if device == "cpu" else ops.has_cuda_kernels()


# The most relative error of a result or a gradient, and the least of the largest one where a CUDA kernel computes it:
# 16-bit kernels round the halves, the intermediate and the result.
KINDS = {
    "bf16": (torch.bfloat16, "ieee", 1e-3, 5e-3),
    "fp16": (torch.float16, "ieee", 1e-4, 6e-4),
    "ieee": (torch.float32, "ieee", 0.0, 2e-6),
    "split": (torch.float32, "split", 0.0, 2e-6),
    "tf32": (torch.float32, "tf32", 1e-4, 2e-3),
}
# Around a square (16) and a tile (32 or 64) of the CUDA kernels, and more rows than a slot of gradients has.
TRAINS = {
    "odd modes": ([(1, 5, 7, 6), (6, 5, 4, 5), (5, 3, 7, 4), (4, 7, 5, 1)], 5),
    "a mode of 1": ([(1, 1, 70, 5), (5, 10, 1, 1)], 9),
    "large modes": ([(1, 33, 9, 3), (3, 3, 8, 3), (3, 7, 8, 3), (3, 8, 5, 1)], 3),
    "whole tiles": ([(1, 8, 4, 2), (2, 4, 8, 3), (3, 32, 32, 1)], 3),
    "three cores in a half": ([(1, 3, 2, 3), (3, 2, 5, 4), (4, 3, 3, 5), (5, 2, 2, 1)], 7),
    "many rows": ([(1, 2, 3, 3), (3, 4, 2, 1)], 300),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left_first", [0, 1])
@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_precisions_keep_their_error(kind: str, train: str, left_first: int, device: str) -> None:
    """Against float64: the product, and each gradient alone and with the others."""
    need(device)
    dtype, precision, least, most = KINDS[kind]
    if dtype == torch.float16 and device == "cpu" and fw.has_kernels():
        pytest.skip("float16 is widened before it comes to the CPU's kernel")
    (shapes, batch), generator = TRAINS[train], torch.Generator().manual_seed(9)
    cores = [core.to(dtype) for core in random_cores(shapes, torch.float64, generator)]
    rows, columns = (prod(shape[axis] for shape in shapes) for axis in (1, 2))
    x, grad, bias = (
        torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)
        for size in ((batch, columns), (batch, rows), (rows,))
    )
    plan = (len(shapes) - 1 if "three" in train else len(shapes) // 2, left_first, 0, 0, 0, 0)
    wide = [core.double() for core in cores]
    exact = [reference.tt_linear(x.double(), wide, bias.double(), plan)]
    exact += reference.tt_linear_backward(grad.double(), x.double(), wide, plan, (1, 1, 1))
    x, grad, bias, *cores = (value.to(device) for value in (x, grad, bias, *cores))
    plan = (*plan, PRECISIONS.index(precision))
    results = [ops.tt_linear(x, cores, bias, plan), *ops.tt_linear_backward(grad, x, cores, plan, (1, 1, 1))]
    for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        alone = ops.tt_linear_backward(grad, x, cores, plan, needs)
        start = {0: 1, 1: 2, 2: 2 + len(cores)}[needs.index(1)]
        for one, other in zip(alone, results[start:], strict=False):
            assert torch.equal(one, other)
    errors = [relative_error(result.cpu(), right) for result, right in zip(results, exact, strict=True)]
    assert all(result.dtype == dtype for result in results)
    assert max(errors) <= most
    if taken_by_cuda_kernels(device):
        assert max(errors) >= least


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_row_and_in_every_gradient(kind: str, device: str) -> None:
    need(device)
    dtype, precision, *_ = KINDS[kind]
    if dtype == torch.float16 and device == "cpu" and fw.has_kernels():
        pytest.skip("float16 is widened before it comes to the CPU's kernel")
    cores = random_cores([(1, 3, 2, 3), (3, 2, 5, 1)], torch.float32, torch.Generator().manual_seed(2))
    cores = [core.to(device, dtype) for core in cores]
    x, grad = torch.ones(9, 10, device=device, dtype=dtype), torch.ones(9, 6, device=device, dtype=dtype)
    x[4, 3] = float("nan")
    plan = (1, 0, 0, 0, 0, 0, PRECISIONS.index(precision))
    y = ops.tt_linear(x, cores, None, plan)
    assert torch.equal(y.isnan().all(1).cpu(), torch.arange(9) == 4)
    assert torch.equal(y.isnan().any(1).cpu(), torch.arange(9) == 4)
    for gradient in ops.tt_linear_backward(grad, x, cores, plan, (0, 1, 0)):
        assert gradient.isnan().any()
