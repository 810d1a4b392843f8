"""The NTK ops against torch's own per-example gradients, and through the op battery."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finite_width.ntk import ops
from op_battery import OpCase, Sample, battery

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def normal(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=generator)


def tile(compute: str, rows: int, columns: int, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = [rows, columns] + {"full": [outputs, outputs], "diagonal": [outputs], "trace": []}[compute]
    return normal(*shape, dtype=dtype, generator=generator)


def strided(tensor: Tensor) -> Tensor:
    """The same values with the axes stored in reverse order."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


def gram_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for rows, columns, features, outputs, channels in [
        (5, 7, 9, 3, 4),
        (1, 1, 1, 1, 1),
        (0, 3, 2, 2, 2),
        (33, 20, 40, 1, 17),
    ]:
        for compute in ops.COMPUTE:
            operands = [
                normal(*shape, dtype=dtype, generator=generator)
                for shape in [
                    (rows, features),
                    (columns, features),
                    (rows, outputs, channels),
                    (columns, outputs, channels),
                ]
            ]
            out = tile(compute, rows, columns, outputs, dtype, generator)
            samples.append(Sample((out, *operands, 1.0, compute)))
            samples.append(Sample((out.clone(), *map(strided, operands), 0.0, compute)))
    return samples


def jacobian_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for rows, columns, outputs, parameters in [(5, 7, 3, 11), (1, 1, 1, 1), (4, 0, 2, 3), (20, 33, 2, 70)]:
        for compute in ops.COMPUTE:
            j1 = normal(rows, outputs, parameters, dtype=dtype, generator=generator)
            j2 = normal(columns, outputs, parameters, dtype=dtype, generator=generator)
            out = tile(compute, rows, columns, outputs, dtype, generator)
            samples.append(Sample((out, j1, j2, compute)))
            samples.append(Sample((out.clone(), strided(j1), strided(j2), compute)))
    return samples


def ghost_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for rows, columns, left, right, features, outputs, channels in [
        (3, 4, 5, 2, 7, 3, 6),
        (1, 1, 1, 1, 1, 1, 1),
        (0, 2, 2, 2, 2, 2, 2),
    ]:
        for compute in ops.COMPUTE:
            operands = [
                normal(*shape, dtype=dtype, generator=generator)
                for shape in [
                    (rows, left, features),
                    (columns, right, features),
                    (rows, outputs, left, channels),
                    (columns, outputs, right, channels),
                ]
            ]
            out = tile(compute, rows, columns, outputs, dtype, generator)
            samples.append(Sample((out, *operands, 1.0, compute)))
            samples.append(Sample((out.clone(), *map(strided, operands), 0.0, compute)))
    return samples


def position_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for rows, positions, features, outputs, channels in [
        (3, 5, 4, 2, 6),
        (1, 1, 1, 1, 1),
        (2, 0, 3, 2, 2),
        (4, 40, 17, 3, 33),
    ]:
        a = normal(rows, positions, features, dtype=dtype, generator=generator)
        d = normal(rows, outputs, positions, channels, dtype=dtype, generator=generator)
        samples += [Sample((a, d)), Sample((strided(a), strided(d)))]
    return samples


CONVOLUTIONS = [  # rows, outputs, channels in, channels out, spatial sizes, kernel, stride, padding, dilation, groups
    (2, 3, 4, 6, (9, 8), (3, 2), (1, 1), (0, 0), (1, 1), 1),
    (2, 2, 4, 6, (9, 8), (3, 3), (2, 1), (1, 2), (1, 2), 2),
    (1, 1, 3, 3, (7,), (3,), (2,), (1,), (2,), 3),
    (2, 2, 2, 3, (5, 4, 6), (2, 3, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    (0, 2, 2, 3, (5,), (2,), (1,), (0,), (1,), 1),
    (3, 2, 5, 17, (20, 19), (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


def positions(convolution: tuple) -> list[int]:
    _, _, _, _, sizes, kernel, stride, padding, dilation, _ = convolution
    return [
        (size + 2 * pad - d * (k - 1) - 1) // s + 1
        for size, k, s, pad, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]


def conv_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for convolution in CONVOLUTIONS:
        rows, outputs, channels_in, channels_out, sizes, *geometry = convolution
        input = normal(rows, channels_in, *sizes, dtype=dtype, generator=generator)
        delta = normal(rows, outputs, channels_out, *positions(convolution), dtype=dtype, generator=generator)
        samples += [Sample((input, delta, *geometry)), Sample((strided(input), strided(delta), *geometry))]
    return samples


def test_conv_gradients_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    for sample in conv_samples(torch.float64, generator):
        input, delta, kernel, stride, padding, dilation, groups = sample.args
        if input.shape[0] == 0:
            continue
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        weight = torch.zeros(delta.shape[2], input.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
        result = ops.conv_gradients(input, delta, kernel, stride, padding, dilation, groups)
        for row in range(input.shape[0]):
            for output in range(delta.shape[1]):
                value = convolve(input[row : row + 1], weight, None, stride, padding, dilation, groups)
                (expected,) = torch.autograd.grad(value, weight, delta[row, output][None])
                torch.testing.assert_close(result[row, output], expected.flatten(), rtol=1e-12, atol=1e-12)


def test_gram_and_ghost_are_products_of_jacobians() -> None:
    generator = torch.Generator().manual_seed(1)
    a1, a2 = (normal(rows, 4, 5, dtype=torch.float64, generator=generator) for rows in (3, 2))
    d1, d2 = (normal(rows, 2, 4, 6, dtype=torch.float64, generator=generator) for rows in (3, 2))
    for compute in ops.COMPUTE:
        expected = torch.zeros_like(tile(compute, 3, 2, 2, torch.float64, generator))
        ops.jacobian_accumulate(expected, ops.position_gradients(a1, d1), ops.position_gradients(a2, d2), compute)
        ops.jacobian_accumulate(expected, d1.sum(2), d2.sum(2), compute)
        ghost = torch.zeros_like(expected)
        ops.ghost_accumulate(ghost, a1, a2, d1, d2, 1.0, compute)
        torch.testing.assert_close(ghost, expected, rtol=1e-12, atol=1e-12)
        one_position = torch.zeros_like(expected)
        ops.gram_accumulate(one_position, a1[:, 0], a2[:, 0], d1[:, :, 0], d2[:, :, 0], 1.0, compute)
        single = torch.zeros_like(expected)
        ops.ghost_accumulate(single, a1[:, :1], a2[:, :1], d1[:, :, :1], d2[:, :, :1], 1.0, compute)
        torch.testing.assert_close(one_position, single, rtol=1e-12, atol=1e-12)


def test_tiles_may_be_views() -> None:
    generator = torch.Generator().manual_seed(2)
    j1, j2 = (normal(rows, 2, 5, dtype=torch.float64, generator=generator) for rows in (3, 4))
    whole = torch.zeros(6, 8, 2, 2, dtype=torch.float64)
    ops.jacobian_accumulate(whole[1:4, 2:6], j1, j2, "full")
    expected = torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    ops.jacobian_accumulate(expected, j1, j2, "full")
    torch.testing.assert_close(whole[1:4, 2:6], expected)
    assert whole[0].abs().sum() == 0
    assert whole[:, 6:].abs().sum() == 0


@pytest.mark.parametrize("compute", ops.COMPUTE)
def test_one_batch_gives_a_symmetric_tile(compute: str) -> None:
    generator = torch.Generator().manual_seed(3)
    a = normal(19, 30, dtype=torch.float32, generator=generator)
    d = normal(19, 3, 20, dtype=torch.float32, generator=generator)
    out = torch.zeros_like(tile(compute, 19, 19, 3, torch.float32, generator))
    ops.gram_accumulate(out, a, a, d, d, 1.0, compute)
    mirrored = out.transpose(0, 1).mT if compute == "full" else out.transpose(0, 1)
    torch.testing.assert_close(out, mirrored, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [5, 63, 64, 130])
@pytest.mark.parametrize("compute", ops.COMPUTE)
def test_outputs_may_lie_anywhere(compute: str, channels: int) -> None:
    """The layout that a batched backward leaves, outputs outermost, gives the bits of a contiguous one."""
    generator = torch.Generator().manual_seed(4)
    a1, a2 = (normal(rows, 6, dtype=torch.float32, generator=generator) for rows in (14, 35))
    d1, d2 = (normal(7, rows, channels, dtype=torch.float32, generator=generator).transpose(0, 1) for rows in (14, 35))
    for a, d in ((a2, d2), (a1, d1)):  # two batches, and one alone
        expected = torch.zeros_like(tile(compute, 14, len(a), 7, torch.float32, generator))
        found = torch.zeros_like(expected)
        left = d1.contiguous()
        ops.gram_accumulate(expected, a1, a, left, left if d is d1 else d.contiguous(), 1.0, compute)
        ops.gram_accumulate(found, a1, a, d1, d, 1.0, compute)
        assert torch.equal(found, expected)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


CASES = [
    OpCase(
        name="ntk_gram_accumulate",
        kind="mutating",
        call=ops.gram_accumulate,
        samples=gram_samples,
        tolerance=TOLERANCE,
        bad=[
            (
                (zeros(2, 2), zeros(2, 3), zeros(2, 4), zeros(2, 1, 5), zeros(2, 1, 5), 0.0, "trace"),
                ValueError,
                "a2 has 4 features",
            ),
            (
                (zeros(2, 2), zeros(2, 3), zeros(2, 3), zeros(2, 1, 5), zeros(2, 1, 5), 0.0, "sum"),
                ValueError,
                "compute must be",
            ),
            (
                (zeros(2, 2), zeros(2, 3), zeros(2, 3), zeros(2, 1, 5), zeros(2, 1, 5), 0.0, "full"),
                ValueError,
                "out must have",
            ),
            (
                (zeros(2, 2), zeros(2, 3).double(), zeros(2, 3), zeros(2, 1, 5), zeros(2, 1, 5), 0.0, "trace"),
                TypeError,
                "a1 has dtype",
            ),
        ],
    ),
    OpCase(
        name="ntk_jacobian_accumulate",
        kind="mutating",
        call=ops.jacobian_accumulate,
        samples=jacobian_samples,
        tolerance=TOLERANCE,
        bad=[
            ((zeros(2, 2), zeros(2, 1, 3), zeros(2, 1, 4), "trace"), ValueError, "j2 has 4 parameters"),
            ((zeros(2, 2).int(), zeros(2, 1, 3), zeros(2, 1, 3), "trace"), TypeError, "out must be float32"),
        ],
    ),
    OpCase(
        name="ntk_ghost_accumulate",
        kind="mutating",
        call=ops.ghost_accumulate,
        samples=ghost_samples,
        tolerance=TOLERANCE,
        bad=[
            (
                (zeros(2, 2), zeros(2, 3, 4), zeros(2, 3, 4), zeros(2, 1, 5, 4), zeros(2, 1, 3, 4), 0.0, "trace"),
                ValueError,
                "d1 has 5 positions",
            ),
        ],
    ),
    OpCase(
        name="ntk_position_gradients",
        kind="functional",
        call=ops.position_gradients,
        samples=position_samples,
        tolerance=TOLERANCE,
        bad=[((zeros(2, 3, 4), zeros(2, 1, 4, 4)), ValueError, "d has 4 positions")],
    ),
    OpCase(
        name="ntk_conv_gradients",
        kind="functional",
        call=ops.conv_gradients,
        samples=conv_samples,
        tolerance=TOLERANCE,
        bad=[
            ((zeros(1, 2, 5), zeros(1, 1, 3, 5), [3], [1], [0], [1], 1), ValueError, "delta must have 3 positions"),
            ((zeros(1, 2, 5), zeros(1, 1, 3, 3), [3], [1, 1], [0], [1], 1), ValueError, "stride must have 1 entries"),
            ((zeros(1, 2, 5), zeros(1, 1, 3, 3), [3], [1], [0], [1], 2), ValueError, "groups=2 must divide"),
        ],
    ),
]

test_battery = battery(CASES)
