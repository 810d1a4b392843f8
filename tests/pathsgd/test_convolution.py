"""The optimizer's path sums through convolutions against autograd's: values, and the range that they have to bear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import finite_width as fw
from finite_width.pathsgd.convolution import ConvolutionMass
from finite_width.pathsgd.masses import masses
from finite_width.pathsgd.structure import trace
from pathsgd.networks import ResNet18, lenet

NETWORKS = {
    "lenet": (lenet, (1, 28, 28)),
    "resnet18": (lambda: ResNet18(4).eval(), (3, 32, 32)),
    "grouped, strided, dilated": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 6, (3, 2), 1, (2, 0), (2, 1), 3, bias=False),
            nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
        ),
        (4, 9, 8),
    ),
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 3, 3, padding="same")), (2, 11)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 5, 2), nn.ReLU(), nn.Conv3d(5, 3, 2, 2)), (2, 5, 4, 6)),
}  # fmt: skip


def network(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make()
    with torch.no_grad():
        model(torch.zeros(2, *shape))
    return model, shape


def both(model, shape, p):
    """The masses of both ways, by parameter name, at one exponent."""
    structure = trace(model, shape)
    results = []
    for fused in (False, True):
        found = masses(structure, p, fused=fused)
        kinds = {type(mass) for parameter, mass in found.of.items() if parameter.dim() > 2}
        assert ConvolutionMass in kinds if fused else kinds == {torch.Tensor}
        dense = found.dense()
        exponent = torch.tensor(float(found.exponent), dtype=torch.float64)
        results.append({name: dense[value].ldexp(exponent) for name, value in model.named_parameters()})
    return results


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_sums_are_those_of_autograd(name, p) -> None:
    model, shape = network(name)
    exact, found = both(model, shape, p)
    for key in exact:
        torch.testing.assert_close(found[key], exact[key], rtol=1e-12, atol=0.0)


def test_a_weight_of_two_convolutions_has_the_sum_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.last(self.conv(self.conv(x).relu()).relu())

    torch.manual_seed(0)
    model = Twice()
    exact, found = both(model, (3, 5, 5), 2.0)
    for key in exact:
        torch.testing.assert_close(found[key], exact[key], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_channels_scaled_by_two_to_the_60_change_no_bit(p) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    other = copy.deepcopy(model)
    # Each weight between the two layers takes both factors, and has to stay a normal float32.
    exponents = torch.tensor([60, -60, 60, 0, 31, -60, 40, -40, 7, 0, 40, -40], dtype=torch.float64)
    factors = torch.ldexp(torch.ones(12, dtype=torch.float64), exponents)
    fw.pathsgd.rescale_(other, factors=factors, input_shape=(2, 9, 9))
    one, two = both(model, (2, 9, 9), p)[1], both(other, (2, 9, 9), p)[1]
    for name, before in model.named_parameters():
        moved = other.get_parameter(name).double().abs() ** p
        assert torch.equal(one[name] * before.double().abs() ** p, two[name] * moved)


def test_a_channel_with_tiny_weights_behind_it_stays_alive() -> None:
    """|w|^2 of 1e-25 is 0 in float32; the weights in front of it have a mass all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[2].weight[:, 1] *= 1e-25
        model[4].weight[:, 2] *= 1e-25
        model[0].weight[3] *= 1e-25
        model[0].weight[0, 0, 0, 0] = 1e-30
    exact, found = both(model, (2, 9, 9), 2.0)
    for key in exact:
        assert (found[key] > 0).all()
        torch.testing.assert_close(found[key], exact[key], rtol=1e-12, atol=0.0)
