"""Activations without an axis of channels, squeezed ones, and reductions of the batch's axis."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw

P = fw.pathsgd


def filled(*layers):
    model = nn.Sequential(*layers).double()
    for each in model.parameters():
        nn.init.ones_(each)
    return model


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("layer", [nn.AdaptiveAvgPool1d(4), nn.AvgPool1d(2), nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(4)])
def test_pools_between_linear_layers(layer, p) -> None:
    """On [N, 8] torch pools each sample: 8 inputs, 8 units, and every unit in one window of two."""
    model = filled(nn.Linear(8, 8, bias=False), copy.deepcopy(layer), nn.Linear(4, 1, bias=False))
    weight = 0.5 if "Avg" in type(layer).__name__ else 1.0
    assert P.path_norm(model, p, power=True).item() == pytest.approx(64 * weight**p, rel=1e-12)
    torch.testing.assert_close(
        P.path_gamma(model, p)["2.weight"], torch.full((1, 4), (16 * weight**p) ** (2 / p)).double()
    )
    x = torch.randn(5, 8, dtype=torch.float64)
    before = model(x)
    P.rescale_(model, seed=0)
    torch.testing.assert_close(model(x), before)


class Pooled(nn.Module):
    """A Linear on [N, 4, 4], a pool without channels, and the sum."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.a, self.pool = nn.Linear(4, 4, bias=False), pool

    def forward(self, x):
        return self.pool(self.a(x)).sum((1, 2))


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((3, None)), nn.MaxPool2d(2, 1), nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), lambda x: F.avg_pool2d(x, 2), nn.AvgPool2d(2, divisor_override=-3),
    ],
)  # fmt: skip
def test_pools_of_planes(pool, p) -> None:
    model = filled(Pooled(pool))
    pixels = torch.eye(16, dtype=torch.float64).view(16, 4, 4)  # a batch of unit vectors: the pool's matrix
    expected = 4 * (pool(pixels).abs() ** p).sum().item()
    assert P.path_norm(model, p, power=True, input_shape=(4, 4)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ceil", [False, True])
def test_a_window_that_fits_by_its_padding(ceil) -> None:
    """MaxPool3d(3, 1, 1) of 2³ voxels: each of the 8 windows holds all 8."""
    model = filled(nn.Conv3d(1, 1, 1, bias=False), nn.MaxPool3d(3, 1, 1, ceil_mode=ceil))
    assert P.path_norm(model, 2, power=True, input_shape=(1, 2, 2, 2)).item() == 64


def test_pools_in_ceil_mode_leave_out_windows_in_the_padding() -> None:
    for size in range(3, 9):
        pool = nn.MaxPool1d(2, 3, 1, ceil_mode=True)
        units = torch.eye(size, dtype=torch.float64)[:, None]
        model = filled(nn.Conv1d(1, 1, 1, bias=False), pool)
        assert P.path_norm(model, 1, power=True, input_shape=(1, size)).item() == pool(units).sum().item()


class Squeezed(nn.Module):
    """A picture that a convolution makes one row, then pooled and read."""

    def __init__(self, squeeze) -> None:
        super().__init__()
        self.conv, self.pool, self.out, self.squeeze = (
            nn.Conv2d(1, 3, (4, 1)),
            nn.AvgPool1d(2),
            nn.Linear(3, 2),
            squeeze,
        )

    def forward(self, x):
        return self.out(self.pool(self.squeeze(F.relu(self.conv(x)))).mean(-1))


@pytest.mark.parametrize("squeeze", [torch.Tensor.squeeze, torch.squeeze, lambda x: x.squeeze((0, 2))])
def test_squeezing_leaves_the_batch(squeeze) -> None:
    """A walk has one sample, whose batch axis of 1 stays; a batch of several is not squeezed either."""
    torch.manual_seed(0)
    model = Squeezed(lambda x: x.squeeze(2)).double()
    other = Squeezed(lambda x: x.squeeze() if squeeze is torch.Tensor.squeeze else squeeze(x)).double()
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 1, 4, 6, dtype=torch.float64)
    before = model(x)
    assert P.path_norm(other, input_shape=(1, 4, 6)).item() == P.path_norm(model, input_shape=(1, 4, 6)).item()
    factors = P.rescale_(other, seed=0, input_shape=(1, 4, 6))
    assert len(factors) == 3
    torch.testing.assert_close(other(x), before)


class Reduces(nn.Module):
    def __init__(self, reduce) -> None:
        super().__init__()
        self.a, self.o, self.reduce = nn.Linear(3, 4), nn.Linear(4, 1), reduce

    def forward(self, x):
        return self.o(self.reduce(F.relu(self.a(x))))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda h: h.mean(-2), lambda h: h.mean(0, keepdim=True) + h, lambda h: h.sum((0,)),
        lambda h: torch.mean(h, dim=(-2,)), lambda h: torch.sum(h, 0),
    ],
)  # fmt: skip
def test_the_batch_is_no_axis_to_reduce(reduce) -> None:
    for call in (P.path_norm, P.path_gamma, P.rescale_, lambda model: P.PathSGD(model, 0.1)):
        with pytest.raises(
            ValueError, match=r"the model.s forward: (mean|sum) over axis 0 .* batch.*input_shape \(3,\)"
        ):
            call(Reduces(reduce))


def test_the_same_reduction_of_an_axis_in_front() -> None:
    model = Reduces(lambda h: h.mean(-2)).double()
    a, o = model.a.weight.detach().abs(), model.o.weight.detach().abs()
    expected = (o @ (a.sum(1) + model.a.bias.detach().abs())).item() + model.o.bias.abs().item()
    assert P.path_norm(model, 1, input_shape=(7, 3)).item() == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(P.path_norm(Reduces(lambda h: h.transpose(0, 1).mean(0)), input_shape=(7, 3)).item())
