"""Path-SGD's ops through the battery, and what they promise beyond it: exact scaling, range, zero γ."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import finite_width as fw
from finite_width.pathsgd.convolution_ops import path_convolution, path_convolution_backward, path_convolution_update
from finite_width.pathsgd.ops import path_step, path_sweep, path_update
from op_battery import OpCase, Sample, battery, moved

PLAIN = (0.1, 0.0, 0.0, 1.0, 1.0)
FULL = (0.1, 0.9, 1.0, 0.99, -1.0)


def _vector(units, generator, exponent=0.0):
    values = 0.5 + torch.rand(units + 1, generator=generator, dtype=torch.float64)
    values[-1] = exponent
    return values


def _sweep(rows, cols, forward, p, dtype, generator, *, update=True, momentum=False, bias=True, exponent=0.0):
    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    into, out = (cols, rows) if forward else (rows, cols)
    return [
        randn(rows, cols), randn(rows, cols) if update else None, randn(rows, cols) if momentum else None,
        randn(rows) if bias else None, randn(rows) if bias and update else None,
        randn(rows) if bias and momentum else None,
        _vector(into, generator, exponent), _vector(into, generator, exponent), _vector(out, generator),
        torch.zeros(out + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), forward, p,
        FULL if momentum else PLAIN, PLAIN,
    ]  # fmt: skip


def _sweep_samples(dtype, generator):
    samples = []
    for forward in (True, False):
        for p in (1.0, 2.0, 3.0, math.inf):
            samples.append(_sweep(13, 21, forward, p, dtype, generator))
            samples.append(_sweep(5, 8, forward, p, dtype, generator, momentum=True, exponent=-40.0))
        samples.append(_sweep(6, 9, forward, 2.0, dtype, generator, update=False, bias=False, exponent=900.0))
        for scale, found in ((1024.0, 0.0), (3.0, 1.0)):  # GradScaler's loss scale, and whether it found an infinity
            scaled = _sweep(9, 11, forward, 2.0, dtype, generator, momentum=True)
            samples.append([*scaled, torch.tensor(scale), torch.tensor([found])])
        lrs = torch.tensor([[0.2, 0.9], [0.05, 1.0]], dtype=torch.float64).unbind()
        samples.append([*_sweep(9, 11, forward, 2.0, dtype, generator, momentum=True), None, None, *lrs])
        samples.append(_sweep(0, 4, forward, 2.0, dtype, generator))
        samples.append(_sweep(4, 0, forward, 2.0, dtype, generator))
        strided = _sweep(7, 10, forward, 2.0, dtype, generator)
        strided[0] = torch.randn(10, 7, generator=generator, dtype=torch.float64).to(dtype).T
        samples.append(strided)
    return [Sample(tuple(sample)) for sample in samples]


def _step(sizes, state, p, dtype, generator, *, momentum=False, bias=True, update=True, rest=()):
    """A chain's step; state: what is known, Φ and its exponent."""

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = [(out, into) for into, out in pairwise(sizes)]
    vectors = [_vector(units, generator, exponent) for exponent in (3.0, -2.0) for units in sizes]
    for outer in (vectors[0], vectors[-1]):
        outer[:-1], outer[-1] = 1, 0
    matrices = [[randn(*shape) if wanted else None for shape in shapes] for wanted in (True, update, momentum)]
    rows = [[randn(shape[0]) if bias and wanted else None for shape in shapes] for wanted in (True, update, momentum)]
    return [
        *matrices, *rows, torch.cat([*vectors, torch.zeros(4 * len(shapes), dtype=torch.float64)]),
        torch.tensor([*state, 0.0], dtype=torch.float64), p, [*(FULL if momentum else PLAIN), *PLAIN] * len(shapes),
        *rest,
    ]  # fmt: skip


def _step_samples(dtype, generator):
    samples = []
    for knows in (1.0, 2.0):
        for p in (1.0, 2.0, 3.0, math.inf):
            samples.append(_step((21, 13, 8, 3), (knows, 0.7, 1.0), p, dtype, generator, momentum=p > 2))
        samples.append(_step((9, 6), (knows, math.nan, 0.0), 2.0, dtype, generator, bias=False))
        samples.append(_step((4, 0, 3), (knows, 0.7, 1.0), 2.0, dtype, generator))
        samples.append(_step((4, 7, 3), (knows, 0.7, 1.0), 2.0, dtype, generator, update=False))
        lr = torch.tensor([0.2, 0.9], dtype=torch.float64)
        for found in (0.0, 1.0):
            rest = ([lr, None, None, lr.flip(0)], torch.tensor(4.0), torch.tensor([found]))
            samples.append(_step((9, 7, 5), (knows, 0.7, 1.0), 2.0, dtype, generator, momentum=True, rest=rest))
    for rebuild in (1, 2):
        rest = ([], None, None, rebuild)
        samples.append(_step((21, 13, 8, 3), (0.0, 0.0, 0.0), 2.0, dtype, generator, momentum=True, rest=rest))
    return [Sample(tuple(sample)) for sample in samples]


def _changed_step(index, value):
    sample = _step((4, 3, 2), (1.0, 0.7, 1.0), 2.0, torch.float32, torch.Generator().manual_seed(0))
    sample[index] = value(sample[index])
    return tuple(sample)


def _changed(index, value):
    sample = _sweep(3, 4, True, 2.0, torch.float32, torch.Generator().manual_seed(0))
    sample[index] = value
    return tuple(sample)


def _update_samples(dtype, generator):
    samples = []
    for shape in ((13,), (2, 3, 3, 3), (0,)):
        for p in (1.0, 2.0, 3.0):
            w, g, m = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
            mass = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
            if mass.numel():
                mass.view(-1)[0] = 0
            samples += [Sample((w, g, None, mass, 3.0, p, PLAIN)), Sample((w, g, m, mass, -2.0, p, FULL))]
    for scale, found in ((1024.0, 0.0), (3.0, 1.0)):
        w, g, m = (torch.randn(13, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
        mass, how = torch.rand(13, generator=generator, dtype=torch.float64) + 0.1, (0.0, 2.0, FULL)
        samples.append(Sample((w, g, m, mass, *how, torch.tensor(scale), torch.tensor(found))))
        lr, exponent = torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
        samples.append(Sample((w, g, m, mass, exponent, 2.0, FULL, None, None, lr)))
    strided = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype).T
    samples.append(Sample((strided, strided.clone(), None, torch.rand(5, 4, dtype=torch.float64), 0.0, 2.0, PLAIN)))
    return samples


# x, weight, output, (stride, padding, dilation, groups): 1 to 3 axes, groups, depthwise, windows on padding alone.
WINDOWS = [
    ((1, 5, 9, 8), (7, 5, 3, 3), (1, 7, 9, 8), ([1, 1], [1, 1], [1, 1], 1)),
    ((1, 6, 9, 8), (8, 3, 3, 2), (1, 8, 4, 8), ([2, 1], [0, 1], [1, 2], 2)),
    ((1, 4, 5, 5), (8, 1, 3, 3), (1, 8, 3, 3), ([2, 2], [1, 1], [1, 1], 4)),
    ((1, 13, 2, 2), (26, 13, 3, 3), (1, 26, 2, 2), ([1, 1], [1, 1], [1, 1], 1)),
    ((1, 40, 17), (3, 40, 4), (1, 3, 5), ([3], [2], [2], 1)),
    ((1, 3, 4, 3, 5), (5, 3, 2, 1, 3), (1, 5, 3, 3, 2), ([1, 1, 2], [0, 0, 0], [1, 2, 1], 1)),
    ((1, 2, 3, 3), (4, 2, 1, 1), (1, 4, 7, 7), ([1, 1], [2, 2], [1, 1], 1)),
    # Up to four positions, which have a form of their own: several blocks of channels, remainders of filters, weights.
    ((1, 70, 2, 2), (9, 70, 3, 3), (1, 9, 2, 2), ([1, 1], [1, 1], [1, 1], 1)),
    ((1, 6, 3, 3), (10, 3, 2, 2), (1, 10, 2, 2), ([1, 1], [0, 0], [1, 1], 2)),
    ((1, 8, 1, 1), (6, 8, 1, 1), (1, 6, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    ((1, 3, 5), (5, 3, 3), (1, 5, 3), ([1], [0], [1], 1)),
]
LARGE = [
    ((1, 70, 8, 9), (130, 70, 3, 3), (1, 130, 8, 9), ([1, 1], [1, 1], [1, 1], 1)),
    ((1, 6, 31, 33), (24, 3, 3, 3), (1, 24, 31, 33), ([1, 1], [1, 1], [1, 1], 2)),
    ((1, 200, 2, 2), (90, 200, 3, 3), (1, 90, 2, 2), ([1, 1], [1, 1], [1, 1], 1)),
]


def _positive(shape, generator):
    return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)


def _convolutions(call, windows=WINDOWS):
    """Samples of a convolution's op: each window with some p, one of them on strided tensors."""

    def samples(dtype, generator):
        found = []
        for index, (x, weight, out, how) in enumerate(windows):
            p = (2.0, 1.0, 3.0)[index % 3]
            w, g, m = (torch.randn(weight, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
            into, known = _positive(x, generator), _positive(out, generator)
            if index == 1:
                w, g, into = (each.mT.contiguous().mT for each in (w, g, into))
            found.append(Sample(call(w, g, m if index % 2 else None, into, known, p, how)))
        return found

    return samples


def _for_forward(w, g, m, x, known, p, how):
    return (x, w, p, *how)


def _for_backward(w, g, m, x, known, p, how):
    return (known, x, w, p, *how)


def _for_update(w, g, m, x, known, p, how):
    return (w, g, m, x, known, 3.0, p, FULL if m is not None else PLAIN, *how)


IMAGE, FILTERS = torch.ones(1, 2, 5, 5, dtype=torch.float64), torch.ones(4, 2, 3, 3)
OUTPUT = torch.ones(1, 4, 3, 3, dtype=torch.float64)
ROW = torch.ones(3)
CASES = [
    OpCase(
        name="path_convolution",
        kind="functional",
        call=path_convolution,
        samples=_convolutions(_for_forward),
        bad=[
            ((IMAGE.float(), FILTERS), TypeError, "x must be float64"),
            ((IMAGE, FILTERS.half()), TypeError, "weight must be float32"),
            ((IMAGE[0], FILTERS), ValueError, "x must have shape"),
            ((IMAGE, FILTERS[0, 0]), ValueError, "weight must have shape"),
            ((IMAGE, FILTERS, 0.5), ValueError, "p must be at least 1"),
            ((IMAGE, FILTERS, math.inf), ValueError, "p must be at least 1 and finite"),
            ((IMAGE, FILTERS, 2.0, (1,)), ValueError, "stride must be 2 ints"),
            ((IMAGE, FILTERS, 2.0, (1, 1), (0, -1)), ValueError, "padding must be 2 ints of at least 0"),
            ((IMAGE, FILTERS, 2.0, (1, 1), (0, 0), (1, 1), 2), ValueError, "groups = 2 does not fit"),
            ((IMAGE, FILTERS, 2.0, (1, 1), (0, 0), (3, 3)), ValueError, "weight .* is larger than the padded x"),
        ],
        thread_samples=_convolutions(_for_forward, LARGE),
    ),
    OpCase(
        name="path_convolution_backward",
        kind="functional",
        call=path_convolution_backward,
        samples=_convolutions(_for_backward),
        bad=[
            ((OUTPUT[:, :3], IMAGE, FILTERS), ValueError, "known must have shape"),
            ((OUTPUT.float(), IMAGE, FILTERS), TypeError, "known has dtype"),
            ((OUTPUT, IMAGE, FILTERS, 2.0, (2, 2)), ValueError, "known must have shape"),
        ],
        thread_samples=_convolutions(_for_backward, LARGE),
    ),
    OpCase(
        name="path_convolution_update",
        kind="mutating",
        call=path_convolution_update,
        samples=_convolutions(_for_update),
        bad=[
            ((FILTERS, FILTERS[0], None, IMAGE, OUTPUT), ValueError, "grad must have shape"),
            ((FILTERS, FILTERS, FILTERS.double(), IMAGE, OUTPUT), TypeError, "momentum has dtype"),
            ((FILTERS, FILTERS, None, IMAGE, OUTPUT[:, :, 1:]), ValueError, "known must have shape"),
            ((FILTERS, FILTERS, None, IMAGE, OUTPUT, 0.0, 2.0, (0.1,)), ValueError, "rates must hold"),
            ((FILTERS, FILTERS, None, IMAGE, OUTPUT, torch.ones(2).double()), ValueError, "exponent must have one"),
        ],
        thread_samples=_convolutions(_for_update, LARGE),
    ),
    OpCase(
        name="path_sweep",
        kind="mutating",
        call=path_sweep,
        samples=_sweep_samples,
        bad=[
            (_changed(0, ROW), ValueError, "weight must have shape"),
            (_changed(0, torch.ones(3, 4).half()), TypeError, "weight must be float32"),
            (_changed(1, torch.ones(4, 3)), ValueError, "grad must have shape"),
            (_changed(3, torch.ones(4)), ValueError, "bias must have shape"),
            (_changed(8, torch.ones(3, dtype=torch.float64)), ValueError, "across must have shape"),
            (_changed(6, torch.ones(5)), TypeError, "from_old must be float64"),
            (_changed(12, 0.5), ValueError, "p must be at least 1"),
            ((*_changed(12, 2.0), ROW), ValueError, "grad_scale must have one element"),
            ((*_changed(12, 2.0), None, torch.ones((), dtype=torch.int64)), TypeError, "found_inf must be float32"),
        ],
        thread_samples=lambda dtype, generator: [
            Sample(tuple(_sweep(600, 1500, forward, 2.0, dtype, generator, momentum=True))) for forward in (True, False)
        ],
    ),
    OpCase(
        name="path_step",
        kind="mutating",
        call=path_step,
        samples=_step_samples,
        bad=[
            (([], [], [], [], [], [], ROW, ROW), ValueError, "weights must hold at least one"),
            (_changed_step(1, lambda grads: grads[:1]), ValueError, "grads must be as long as weights"),
            (
                _changed_step(0, lambda weights: [weights[0], weights[0]]),
                ValueError,
                r"weights\[1\] must have 3 columns",
            ),
            (_changed_step(0, lambda weights: [ROW, weights[1]]), ValueError, r"weights\[0\] must have shape"),
            (_changed_step(2, lambda _: [ROW, None]), ValueError, r"momenta\[0\] must have shape"),
            (_changed_step(3, lambda biases: [biases[1], biases[1]]), ValueError, r"biases\[0\] must have shape \[3\]"),
            (_changed_step(6, lambda vectors: vectors[1:]), ValueError, "vectors must have shape"),
            (_changed_step(7, lambda state: state[1:]), ValueError, r"state must have shape \[4\]"),
            (_changed_step(8, lambda _: 0.5), ValueError, "p must be at least 1"),
            (_changed_step(9, lambda rates: rates[1:]), ValueError, "rates must hold ten numbers a layer, 20, got 19"),
            ((*_changed_step(8, lambda p: p), [None]), ValueError, "lrs must hold two tensors a layer"),
            ((*_changed_step(8, lambda p: p), [], None, None, 3), ValueError, "rebuild must be 0, 1 or 2"),
        ],
        thread_samples=lambda dtype, generator: [
            Sample(tuple(_step((700, 300, 40), (knows, 0.7, 1.0), 2.0, dtype, generator))) for knows in (1.0, 2.0)
        ],
    ),
    OpCase(
        name="path_update",
        kind="mutating",
        call=path_update,
        samples=_update_samples,
        bad=[
            ((ROW, torch.ones(4), None, ROW.double()), ValueError, "grad must have shape"),
            ((ROW, ROW, None, torch.ones(4, dtype=torch.float64)), ValueError, "mass must have shape"),
            ((ROW, ROW, None, ROW), TypeError, "mass must be float64"),
            ((ROW, ROW, None, ROW.double(), 0.0, 0.5), ValueError, "p must be at least 1"),
        ],
        thread_samples=lambda dtype, generator: [
            Sample(
                (
                    torch.ones(100_003, dtype=dtype),
                    torch.ones(100_003, dtype=dtype),
                    None,
                    torch.rand(100_003, generator=generator, dtype=torch.float64),
                    0.0,
                    2.0,
                    PLAIN,
                )
            )
        ],
    ),
]
test_battery = battery(CASES)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_units_scaled_by_powers_of_two_scale_exactly(forward: bool, p: float, device: str) -> None:
    """A unit's scale of 2^±60 changes no bit of what the sweep computes, up to that power of two."""
    generator = torch.Generator().manual_seed(5)
    plain = _sweep(19, 45, forward, p, torch.float32, generator, momentum=True)
    exponents_out = torch.randint(-60, 61, (19,), generator=generator)
    exponents_in = torch.randint(-60, 61, (45,), generator=generator)
    c, d = torch.exp2(exponents_out.double()), torch.exp2(exponents_in.double())
    scaled = [x.clone() if isinstance(x, torch.Tensor) else x for x in plain]
    matrix = (c[:, None] / d).float()
    for index, factor in (
        (0, matrix),
        (1, 1 / matrix),
        (2, matrix),
        (3, c.float()),
        (4, 1 / c.float()),
        (5, c.float()),
    ):
        scaled[index] *= factor
    forward_scale, backward_scale = (d**p, c**-p) if forward else (c**-p, d**p)
    for index, scale in ((6, forward_scale), (7, forward_scale), (8, backward_scale)):
        scaled[index][:-1] *= scale
    for arguments in (plain, scaled):
        there = moved(arguments, device)
        path_sweep(*there)
        arguments[:] = moved(there, "cpu")
    assert torch.equal(scaled[0] / matrix, plain[0])
    assert torch.equal(scaled[2] / matrix, plain[2])
    assert torch.equal(scaled[3] / c.float(), plain[3])
    carried = c**p if forward else d**-p
    for index in (8, 9):
        one, other = scaled[index][:-1] / carried, plain[index][:-1]
        shift = plain[index][-1] - scaled[index][-1]
        assert torch.equal(one, torch.ldexp(other, shift))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_channels_scaled_by_powers_of_two_scale_exactly(p: float, groups: int, device: str) -> None:
    """As for units of a dense layer: a channel's scale of 2^±60 changes no bit, up to that power of two."""
    generator = torch.Generator().manual_seed(5)
    c = torch.exp2(torch.randint(-60, 61, (8, 1, 1, 1), generator=generator).double())
    d = torch.exp2(torch.randint(-60, 61, (6 // groups,), generator=generator).double())
    into = d.repeat(groups)[:, None, None]
    scale = (c / d[:, None, None]).float()
    w, g = (torch.randn(8, 6 // groups, 3, 3, generator=generator) for _ in range(2))
    x, known = _positive((1, 6, 5, 7), generator), _positive((1, 8, 5, 7), generator)
    how = ([1, 1], [1, 1], [1, 1], groups)
    results = []
    for sums, factors in ((1.0, 1.0), (into**p, scale)):
        out = 1.0 if isinstance(sums, float) else c[:, 0] ** -p
        there = moved([w * factors, g / factors, x * sums, known * out], device)
        forward = path_convolution(there[2], there[0], p, *how)
        backward = path_convolution_backward(there[3], there[2], there[0], p, *how)
        path_convolution_update(there[0], there[1], None, there[2], there[3], 1.0, p, PLAIN, *how)
        results.append(moved([there[0], forward, backward], "cpu"))
    (one, forward, backward), (other, more_forward, more_backward) = results
    assert torch.equal(other / scale, one)
    assert torch.equal(more_forward / c[:, 0] ** p, forward)
    assert torch.equal(more_backward * into**p, backward)
    assert not torch.equal(one, w)


@pytest.mark.parametrize("size", [4, 2])
def test_bfloat16_convolutions_are_rounded_once(size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    w, g, m = (torch.randn(9, 5, 3, 3, generator=generator).bfloat16() for _ in range(3))
    x, known = _positive((1, 5, size + 2, size + 2), generator), _positive((1, 9, size, size), generator)
    kernel, reference = [w.clone(), g, m.clone(), x, known], [w.clone(), g, m.clone(), x, known]
    path_convolution_update(*kernel, 3.0, 2.0, FULL)
    with fw.reference_only():
        path_convolution_update(*reference, 3.0, 2.0, FULL)
        forward = path_convolution(x, w)
    assert not torch.equal(kernel[0], w)
    for index in (0, 2):
        torch.testing.assert_close(kernel[index], reference[index], rtol=2**-8, atol=0)
        assert (kernel[index] == reference[index]).float().mean() > 0.99
    torch.testing.assert_close(path_convolution(x, w), forward, rtol=1e-13, atol=0)


def test_a_convolution_without_paths_takes_no_step() -> None:
    """Channels whose sums are 0: their weights stay, and momentum goes on."""
    weight, grad = torch.ones(2, 2, 3, 3), torch.ones(2, 2, 3, 3)
    buffer = torch.ones(2, 2, 3, 3)
    x, known = torch.ones(1, 2, 3, 3, dtype=torch.float64), torch.ones(1, 2, 1, 1, dtype=torch.float64)
    x[:, 0], known[:, 1] = 0, 0
    path_convolution_update(weight, grad, buffer, x, known, 0.0, 2.0, (1.0, 0.5, 0.0, 1.0, 1.0))
    assert buffer.amin((2, 3)).tolist() == [[0.5, 1.5], [0.5, 0.5]]
    assert weight.amax((2, 3)).tolist() == [[0.5, -0.5], [0.5, 0.5]]


def test_no_path_no_step_but_momentum_goes_on() -> None:
    ones = torch.ones(2, 3)
    weight, buffer = ones.clone(), ones.clone()
    source, across = torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    source[1], source[-1], across[0], across[-1] = 0, 0, 0, 0
    rates = (1.0, 0.5, 0.0, 1.0, 1.0)
    fresh, mass = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    vectors = (source, source.clone(), across, fresh, mass)
    path_sweep(weight, ones, buffer, None, None, None, *vectors, True, 2.0, rates, PLAIN)
    assert weight.tolist() == [[0.5, 0.5, 0.5], [-0.5, 0.5, -0.5]]
    assert buffer.tolist() == [[0.5, 0.5, 0.5], [1.5, 0.5, 1.5]]


@pytest.mark.parametrize("forward", [True, False])
def test_bfloat16_is_rounded_once(forward: bool) -> None:
    """bfloat16 weights: the arithmetic is in double, the result is rounded to the nearest, as the reference does."""
    make = lambda: _sweep(30, 41, forward, 2.0, torch.bfloat16, torch.Generator().manual_seed(2), momentum=True)  # noqa: E731
    kernel, reference = make(), make()
    path_sweep(*kernel)
    with fw.reference_only():
        path_sweep(*reference)
    for index in (0, 2, 3, 5):
        torch.testing.assert_close(kernel[index], reference[index], rtol=2**-8, atol=0)
        assert (kernel[index] == reference[index]).float().mean() > 0.99
    torch.testing.assert_close(kernel[9], reference[9], rtol=1e-5, atol=0)
