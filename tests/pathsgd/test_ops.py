"""Path-SGD's ops through the battery, and what they promise beyond it: exact scaling, range, zero γ."""

from __future__ import annotations

import math

import pytest
import torch

import finite_width as fw
from finite_width.pathsgd.ops import path_sweep, path_update
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
        samples.append(_sweep(0, 4, forward, 2.0, dtype, generator))
        samples.append(_sweep(4, 0, forward, 2.0, dtype, generator))
        strided = _sweep(7, 10, forward, 2.0, dtype, generator)
        strided[0] = torch.randn(10, 7, generator=generator, dtype=torch.float64).to(dtype).T
        samples.append(strided)
    return [Sample(tuple(sample)) for sample in samples]


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
    strided = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype).T
    samples.append(Sample((strided, strided.clone(), None, torch.rand(5, 4, dtype=torch.float64), 0.0, 2.0, PLAIN)))
    return samples


ROW = torch.ones(3)
CASES = [
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
