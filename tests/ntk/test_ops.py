"""The NTK ops against torch's own per-example gradients, and through the op battery."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import finite_width as fw
from finite_width.ntk import ops
from op_battery import DEVICES, OpCase, Sample, battery, need, relative_error


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
    # Few rows of long Jacobians, which CUDA kernels sum in parts.
    long = [normal(rows, 1, 2100, dtype=dtype, generator=generator) for rows in (3, 4)]
    samples.append(Sample((tile("trace", 3, 4, 1, dtype, generator), *long, "trace")))
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
        # Some of a layer's channels, of a sweep that has the outputs first.
        wide = normal(outputs, rows, positions, channels + 3, dtype=dtype, generator=generator)
        some = wide.transpose(0, 1)[..., 2 : channels + 2]
        samples += [Sample((a, d)), Sample((strided(a), strided(d))), Sample((a, some))]
    return samples


CONVOLUTIONS = [  # rows, outputs, channels in, channels out, spatial sizes, kernel, stride, padding, dilation, groups
    (2, 3, 4, 6, (9, 8), (3, 2), (1, 1), (0, 0), (1, 1), 1),
    (2, 2, 4, 6, (9, 8), (3, 3), (2, 1), (1, 2), (1, 2), 2),
    (1, 1, 3, 3, (7,), (3,), (2,), (1,), (2,), 3),
    (2, 2, 2, 3, (5, 4, 6), (2, 3, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    (0, 2, 2, 3, (5,), (2,), (1,), (0,), (1,), 1),
    (2, 7, 5, 5, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (2, 7, 4, 4, (30,), (1,), (1,), (0,), (1,), 4),
    (3, 2, 5, 17, (20, 19), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    # As dot products: one and several stretches of positions, columns and rows left over, groups, a stride.
    (2, 1, 2, 5, (40, 31), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 3, 1, 3, (2081,), (5,), (2,), (2,), (1,), 1),
    (1, 2, 6, 9, (17, 18), (3, 2), (1, 1), (1, 1), (1, 1), 3),
    # In Winograd's form: odd and even edges, channels and rows in several blocks, tiles in several chains.
    (2, 3, 17, 19, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 70, 16, (5, 40), (3, 3), (1, 1), (0, 2), (1, 1), 1),
    (1, 10, 16, 80, (6, 7), (3, 3), (1, 1), (1, 0), (1, 1), 1),
    (2, 1, 33, 16, (24, 25), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 16, 16, (3, 460), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 2, 16, 16, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    # The same on larger tiles: every remainder at the edges, tiles in several chains.
    (2, 2, 16, 17, (16, 18), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 3, 18, 16, (19, 21), (3, 3), (1, 1), (2, 0), (1, 1), 1),
    (1, 1, 16, 16, (50, 61), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 17, 16, (18, 270), (3, 3), (1, 1), (1, 1), (1, 1), 1),
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
        samples += [Sample((input, delta, *geometry, False)), Sample((strided(input), strided(delta), *geometry, True))]
    return samples


CONVOLVED = [  # rows, channels in, channels out, spatial sizes, kernel, padding, dilation, groups, rows of the gate
    (5, 4, 6, (9, 8), (3, 2), (0, 0), (1, 1), 1, 0),
    (6, 4, 10, (9, 7), (3, 3), (1, 2), (1, 1), 2, 3),
    (3, 3, 3, (7,), (3,), (1,), (2,), 3, 1),
    (2, 2, 3, (5, 4, 6), (2, 3, 3), (1, 0, 1), (1, 1, 2), 1, 2),
    (2, 3, 30, (5, 4, 6), (3, 3, 2), (-1, 1, 1), (1, 1, 2), 1, 2),
    (3, 5, 33, (20, 19), (3, 3), (-1, 2), (1, 2), 1, 0),
    (19, 50, 14, (2, 2), (3, 3), (1, 1), (1, 1), 2, 0),
    (1, 3, 5, (700,), (5,), (2,), (1,), 1, 0),
    (1, 2, 3, (1581,), (2,), (3,), (1,), 1, 0),
    (0, 2, 3, (5,), (2,), (1,), (1,), 1, 0),
    (2, 2, 3, (2, 2), (5, 5), (0, 0), (1, 1), 1, 0),
    (3, 4, 5, (4, 6), (1, 2), (2, 3), (1, 1), 1, 0),
    (2, 2, 3, (3, 4, 2), (1, 1, 2), (1, 2, 2), (1, 1, 1), 1, 1),
    # In Winograd's form: odd and even edges, channels in several chains, many images.
    (6, 24, 29, (9, 8), (3, 3), (1, 1), (1, 1), 1, 3),
    (1, 400, 24, (6, 5), (3, 3), (2, 0), (1, 1), 1, 0),
    (37, 25, 24, (5, 6), (3, 3), (1, 1), (1, 1), 1, 1),
    (2, 24, 50, (40, 39), (3, 3), (-1, 2), (1, 1), 1, 2),
    (1, 24, 24, (4, 300), (3, 3), (1, -2), (1, 1), 1, 0),
    # The same, on larger tiles where a position may see its neighbours' rounding.
    (3, 24, 29, (16, 31), (3, 3), (1, 0), (1, 1), 1, 3),
    (1, 400, 24, (18, 17), (3, 3), (1, 1), (1, 1), 1, 0),
    (9, 25, 24, (20, 19), (3, 3), (0, 2), (1, 1), 1, 1),
    (2, 24, 25, (17, 31), (3, 3), (1, 1), (1, 1), 1, 1),
    (1, 24, 24, (18, 270), (3, 3), (1, 1), (1, 1), 1, 1),
]


def gated_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    # Rows, inner, columns, rows of the gate: whole tiles and edges, the transposed form, one column, nothing at all.
    shapes = [(12, 5, 40, 4), (26, 400, 70, 13), (500, 9, 3, 250), (3, 2, 1, 1), (0, 3, 4, 2)]
    for rows, inner, columns, gates in shapes:
        a = normal(rows, inner, dtype=dtype, generator=generator)
        b = normal(inner, columns, dtype=dtype, generator=generator)
        gate = normal(gates, columns, dtype=dtype, generator=generator).relu()
        samples += [Sample((a, b, gate)), Sample((strided(a), strided(b), strided(gate)))]
    # Zeros that the rows of a group share: strips, chunks, edges of both widths, a group without terms, few zeros.
    for outputs, gates, inner, columns, kept in [(10, 5, 800, 100, 0.5), (14, 18, 200, 70, 0.3), (6, 3, 400, 96, 0.95)]:
        a = normal(outputs, gates, inner, dtype=dtype, generator=generator)
        a *= torch.rand(gates, inner, generator=generator) < kept
        a[:, 1] = 0
        b = normal(inner, columns, dtype=dtype, generator=generator)
        gate = normal(gates, columns, dtype=dtype, generator=generator)
        samples += [Sample((a.flatten(0, 1), b, gate)), Sample((a.flatten(0, 1), strided(b), strided(gate)))]
    return samples


def test_what_a_gate_lets_through_has_the_bits_of_the_product_alone() -> None:
    for sample in gated_samples(torch.float32, torch.Generator().manual_seed(8)):
        a, b, gate = sample.args
        whole = torch.ops.finite_width.gemm(a, b, None)
        expected = torch.where(gate.repeat(len(a) // len(gate), 1) > 0, whole, 0)
        assert torch.equal(ops.gated_product(a, b, gate), expected)


def convolve_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for rows, channels_in, channels_out, sizes, kernel, padding, dilation, groups, gates in CONVOLVED:
        input = normal(rows, channels_in, *sizes, dtype=dtype, generator=generator)
        weight = normal(channels_out, channels_in // groups, *kernel, dtype=dtype, generator=generator)
        bias = normal(channels_out, dtype=dtype, generator=generator)
        geometry = (padding, dilation, groups)
        shape = ops.convolve(input, weight, None, None, *geometry, True).shape[1:]
        gate = normal(gates, *shape, dtype=dtype, generator=generator) if gates else None
        samples.append(Sample((input, weight, bias, None, *geometry, True)))
        samples.append(Sample((strided(input), strided(weight), None, gate, *geometry, False)))
    return samples


def test_convolutions_and_their_backward_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(4)
    for sample in convolve_samples(torch.float64, generator):
        input, weight, bias, gate, padding, dilation, groups, local = sample.args
        if min(padding) < 0 or len(input) == 0:
            continue
        source = input.clone().requires_grad_()
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(padding)]
        if min(ops.convolve(input, weight, None, None, padding, dilation, groups, local).shape) == 0:
            with pytest.raises(RuntimeError, match="Kernel size"):
                convolve(source, weight, bias, 1, padding, dilation, groups)
            continue
        expected = convolve(source, weight, bias, 1, padding, dilation, groups)
        if gate is not None:
            expected = torch.where(gate.repeat(len(input) // len(gate), *[1] * (gate.dim() - 1)) > 0, expected, 0)
        found = ops.convolve(input, weight, bias, gate, padding, dilation, groups, local)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [4, 5, 6, 7])
def test_a_window_of_zeros_gives_zero_and_sees_nothing_else(first: int) -> None:
    """Winograd's form computes several positions together; where a ReLU's corner decides, each has to be alone."""
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.float64):
        weight = normal(32, 32, 3, 3, dtype=dtype, generator=generator)
        for last in (11, 12):
            image = normal(2, 32, 20, 20, dtype=dtype, generator=generator)
            image[1] = torch.inf
            image[:, :, first:last, first:last] = 0
            result = ops.convolve(image, weight, None, None, [1, 1], [1, 1], 1, True)
            inside = result[:, :, first + 1 : last - 1, first + 1 : last - 1]
            assert torch.equal(inside, torch.zeros_like(inside))


def test_a_row_of_a_convolution_has_the_same_bits_alone() -> None:
    if not fw.has_kernels():
        pytest.skip("the promise is the kernel's: torch's convolution rounds by the size of the batch")
    generator = torch.Generator().manual_seed(5)
    for sample in convolve_samples(torch.float32, generator):
        input, weight, bias, gate, *geometry = sample.args
        whole = ops.convolve(input, weight, bias, gate, *geometry)
        for row in range(len(input)):
            own = None if gate is None else gate[row % len(gate)][None]
            assert torch.equal(ops.convolve(input[row : row + 1], weight, bias, own, *geometry)[0], whole[row])


def test_a_row_of_gradients_has_the_same_bits_alone() -> None:
    if not fw.has_kernels():
        pytest.skip("the promise is the kernel's")
    generator = torch.Generator().manual_seed(6)
    for sample in conv_samples(torch.float32, generator):
        input, delta, *geometry = sample.args
        whole = ops.conv_gradients(input, delta, *geometry)
        for row in range(len(input)):
            alone = ops.conv_gradients(input[row : row + 1], delta[row : row + 1], *geometry)
            assert torch.equal(alone[0], whole[row])


def test_conv_gradients_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    for sample in conv_samples(torch.float64, generator):
        input, delta, kernel, stride, padding, dilation, groups, bias = sample.args
        if input.shape[0] == 0:
            continue
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        weight = torch.zeros(delta.shape[2], input.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(delta.shape[2], dtype=torch.float64, requires_grad=True)
        result = ops.conv_gradients(input, delta, kernel, stride, padding, dilation, groups, bias)
        for row in range(input.shape[0]):
            for output in range(delta.shape[1]):
                value = convolve(input[row : row + 1], weight, shift, stride, padding, dilation, groups)
                expected = torch.autograd.grad(value, (weight, shift), delta[row, output][None])
                both = torch.cat([expected[0].flatten(1), expected[1][:, None]], 1) if bias else expected[0]
                torch.testing.assert_close(result[row, output], both.flatten(), rtol=1e-12, atol=1e-12)


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


def taken_by_cuda_kernels(device: str) -> bool:
    """Whether such tensors go to CUDA kernels: on a GPU, or on the CPU in the emulation (tests/cuda_on_host)."""
    if device == "cpu":
        return "FINITE_WIDTH_CUDA_ON_HOST" in os.environ
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("finite_width::ntk_gram_accumulate", "CUDA"))


# The least and the most relative error of a kernel tile in float32 products of such precision. For "split-bf16", twice
# (there are two factors) what csrc/ntk/gram_multiply.cuh derives for a single product: sums of a few values reach half.
ERRORS = {"ieee": (0.0, 1e-6), "split": (0.0, 1e-6), "bf16": (2e-4, 1e-2), "split-bf16": (2e-7, 2.3e-5)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.parametrize("precision", ERRORS)
def test_precisions_keep_their_error(precision: str, compute: str, alone: bool, device: str) -> None:
    """Against float64, at sizes on both sides of a square (128) and of a stage (16, 32): two batches, and one alone."""
    need(device)
    generator = torch.Generator().manual_seed(6)
    for rows, columns, features, outputs, channels in [(131, 7, 37, 1, 66), (23, 70, 8, 3, 64), (9, 5, 17, 2, 3)]:
        a1, a2 = (normal(n, features, dtype=torch.float64, generator=generator).float() for n in (rows, columns))
        d1, d2 = (  # outputs outermost, as a batched backward leaves them
            normal(outputs, n, channels, dtype=torch.float64, generator=generator).float().transpose(0, 1)
            for n in (rows, columns)
        )
        right = (a1, d1) if alone else (a2, d2)
        out = tile(compute, rows, len(right[0]), outputs, torch.float32, generator)
        exact = out.double()
        with fw.reference_only():
            ops.gram_accumulate(exact, *(x.double() for x in (a1, right[0], d1, right[1])), 1.0, compute)
        a1, d1 = a1.to(device), d1.to(device)
        right = (a1, d1) if alone else (a2.to(device), d2.to(device))
        found = out.to(device)
        with fw.ntk.cuda_precision(precision):
            ops.gram_accumulate(found, a1, right[0], d1, right[1], 1.0, compute)
        least, most = ERRORS[precision] if taken_by_cuda_kernels(device) else ERRORS["ieee"]
        assert least <= relative_error(found.cpu(), exact) <= most
        if alone:
            added = found.cpu() - out
            mirrored = added.transpose(0, 1).mT if compute == "full" else added.transpose(0, 1)
            torch.testing.assert_close(added, mirrored, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.parametrize("precision", ERRORS)
def test_precisions_of_positions_keep_their_error(precision: str, compute: str, device: str) -> None:
    """Against float64, two batches and one alone; with more positions than a square has rows, they are cut."""
    need(device)
    generator = torch.Generator().manual_seed(8)
    for rows, columns, left, right, features, outputs, channels in [
        (45, 5, 3, 50, 18, 2, 9),
        (2, 2, 131, 131, 5, 1, 6),
    ]:
        a1, d1 = (
            normal(*shape, dtype=torch.float32, generator=generator)
            for shape in ((rows, left, features), (rows, outputs, left, channels))
        )
        a2, d2 = (
            normal(*shape, dtype=torch.float32, generator=generator)
            for shape in ((columns, right, features), (columns, outputs, right, channels))
        )
        for a, d in ((a2, d2), (a1, d1)):
            out = tile(compute, rows, len(a), outputs, torch.float32, generator)
            exact = out.double()
            with fw.reference_only():
                ops.ghost_accumulate(exact, a1.double(), a.double(), d1.double(), d.double(), 1.0, compute)
            found, there, d_there = out.to(device), a1.to(device), d1.to(device)
            others = (there, d_there) if a is a1 else (a.to(device), d.to(device))
            with fw.ntk.cuda_precision(precision):
                ops.ghost_accumulate(found, there, others[0], d_there, others[1], 1.0, compute)
            least, most = ERRORS[precision] if taken_by_cuda_kernels(device) else ERRORS["ieee"]
            assert least <= relative_error(found.cpu(), exact) <= most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "precision, compute",
    [*(("ieee", compute) for compute in ops.COMPUTE), ("split", "full"), ("bf16", "trace"), ("split-bf16", "full")],
)
def test_long_jacobians_of_few_rows_keep_their_error(precision: str, compute: str, device: str) -> None:
    """Against float64, two batches and one alone; CUDA kernels sum these in parts of k."""
    need(device)
    generator = torch.Generator().manual_seed(9)
    rows = 67 if (precision, compute) == ("ieee", "full") else 20  # more squares than one, and one
    length = 1100 if compute == "trace" else 2100
    j1, j2 = (normal(count, 2, length, dtype=torch.float32, generator=generator) for count in (rows, 5))
    for j in (j2, j1):
        out = tile(compute, rows, len(j), 2, torch.float32, generator)
        exact = out.double()
        with fw.reference_only():
            ops.jacobian_accumulate(exact, j1.double(), j.double(), compute)
        found, there = out.to(device), j1.to(device)
        with fw.ntk.cuda_precision(precision):
            ops.jacobian_accumulate(found, there, there if j is j1 else j.to(device), compute)
        least, most = ERRORS[precision] if taken_by_cuda_kernels(device) else ERRORS["ieee"]
        # A row's product with itself is a sum of one sign, whose errors cancel.
        assert (0 if j is j1 else least) <= relative_error(found.cpu(), exact) <= most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ERRORS)
def test_a_nan_stays_in_its_row_and_column(precision: str, device: str) -> None:
    """With every bit that it can have on a GPU, where arithmetic makes it 0x7fffffff."""
    need(device)
    j1, j2 = torch.ones(3, 1, 20), torch.ones(4, 1, 20)
    for bits in (0x7FC00000, 0x7FFFFFFF, -0x400000, -1):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        for side, place in ((j1, 1), (j2, 2)):
            kept, out = side.clone(), torch.zeros(3, 4, device=device)
            side[place, 0, 7] = nan
            with fw.ntk.cuda_precision(precision):
                ops.jacobian_accumulate(out, j1.to(device), j2.to(device), "trace")
            side.copy_(kept)
            expected = torch.full((3, 4), 20.0)
            expected.select(0 if side is j1 else 1, place).fill_(torch.nan)
            torch.testing.assert_close(out.cpu(), expected, equal_nan=True)


LAYERS = [  # as CONVOLUTIONS, of more rows and columns than a square of 128 has; the last is nothing but a product
    (2, 3, 16, 50, (8, 9), (3, 3), (1, 2), (1, 0), (1, 1), 1),
    (1, 5, 60, 56, (4, 3, 5), (2, 1, 3), (1, 1, 2), (0, 1, 1), (2, 1, 1), 2),
    (2, 2, 130, 70, (6, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ERRORS)
def test_gradients_have_float32_s_error_in_every_precision(precision: str, bias: bool, device: str) -> None:
    need(device)
    generator = torch.Generator().manual_seed(10)
    for convolution in LAYERS:
        rows, outputs, channels_in, channels_out, sizes, *geometry = convolution
        input = normal(rows, channels_in, *sizes, dtype=torch.float32, generator=generator)
        delta = normal(
            outputs, rows, channels_out, *positions(convolution), dtype=torch.float32, generator=generator
        ).transpose(0, 1)
        with fw.reference_only():
            exact = ops.conv_gradients(input.double(), delta.double(), *geometry, bias)
        with fw.ntk.cuda_precision(precision):
            found = ops.conv_gradients(input.to(device), delta.to(device), *geometry, bias)
        assert relative_error(found.cpu(), exact) <= 1e-6
    a = normal(3, 70, 40, dtype=torch.float32, generator=generator)
    d = normal(3, 2, 70, 65, dtype=torch.float32, generator=generator)
    with fw.reference_only():
        exact = ops.position_gradients(a.double(), d.double())
    with fw.ntk.cuda_precision(precision):
        assert relative_error(ops.position_gradients(a.to(device), d.to(device)).cpu(), exact) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_split_sums_of_one_sign_do_not_drift(device: str) -> None:
    """Tensor cores round sums toward zero: a long sum kept in them would be too small by its length."""
    need(device)
    generator = torch.Generator().manual_seed(7)
    j1, j2 = (torch.rand(n, 1, 3000, dtype=torch.float32, generator=generator) for n in (3, 2))
    for precision in ("split", "split-bf16"):
        out = torch.zeros(3, 2, device=device)
        with fw.ntk.cuda_precision(precision):
            ops.jacobian_accumulate(out, j1.to(device), j2.to(device), "trace")
        assert relative_error(out.cpu(), j1[:, 0].double() @ j2[:, 0].double().T) <= 1e-6


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


CASES = [
    OpCase(
        name="ntk_gram_accumulate",
        kind="mutating",
        call=ops.gram_accumulate,
        samples=gram_samples,
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
        bad=[((zeros(2, 3, 4), zeros(2, 1, 4, 4)), ValueError, "d has 4 positions")],
    ),
    OpCase(
        name="ntk_conv_gradients",
        kind="functional",
        call=ops.conv_gradients,
        samples=conv_samples,
        bad=[
            (
                (zeros(1, 2, 5), zeros(1, 1, 3, 5), [3], [1], [0], [1], 1, False),
                ValueError,
                "delta must have 3 positions",
            ),
            (
                (zeros(1, 2, 5), zeros(1, 1, 3, 3), [3], [1, 1], [0], [1], 1, False),
                ValueError,
                "stride must have 1 entries",
            ),
            ((zeros(1, 2, 5), zeros(1, 1, 3, 3), [3], [1], [0], [1], 2, False), ValueError, "groups=2 must divide"),
        ],
    ),
    OpCase(
        name="ntk_gated_product",
        kind="functional",
        call=ops.gated_product,
        samples=gated_samples,
        bad=[
            ((zeros(4, 3), zeros(2, 5), zeros(2, 5)), ValueError, "b has 2 rows"),
            ((zeros(4, 3), zeros(3, 5), zeros(2, 4)), ValueError, "gate has 4 columns"),
            ((zeros(4, 3), zeros(3, 5), zeros(3, 5)), ValueError, "gate's 3 rows"),
            ((zeros(4, 3), zeros(3, 5), zeros(2, 5).double()), TypeError, "gate has dtype"),
        ],
    ),
    OpCase(
        name="ntk_convolve",
        kind="functional",
        call=ops.convolve,
        samples=convolve_samples,
        bad=[
            ((zeros(1, 2, 5), zeros(3, 3, 2), None, None, [0], [1], 1, True), ValueError, "must have 2 / groups"),
            ((zeros(1, 2, 5), zeros(3, 2, 2), zeros(2), None, [0], [1], 1, True), ValueError, "bias must have shape"),
            ((zeros(1, 2, 5), zeros(3, 2, 2), None, zeros(1, 3, 5), [0], [1], 1, True), ValueError, "gate must have"),
            ((zeros(3, 2, 5), zeros(3, 2, 2), None, zeros(2, 3, 4), [0], [1], 1, True), ValueError, "gate's 2 rows"),
            ((zeros(1, 2, 5), zeros(3, 2, 2), None, None, [0, 0], [1], 1, True), ValueError, "padding must have 1"),
            ((zeros(1, 2, 5), zeros(3, 2, 2).double(), None, None, [0], [1], 1, True), TypeError, "weight has dtype"),
        ],
    ),
]

test_battery = battery(CASES)
