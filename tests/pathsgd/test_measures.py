"""The path norm and γ at the ends of their range: no path at all, and more than float64 holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import finite_width as fw
from pathsgd.networks import mlp

P = fw.pathsgd


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_a_head_of_zeros_has_slope_zero(p) -> None:
    """As torch.linalg.vector_norm has it: such a norm can stand in a loss from the first step on."""
    model = mlp(2, 3, 1, bias=False).double()
    nn.init.zeros_(model[2].weight)
    norm = P.path_norm(model, p)
    norm.backward()
    assert norm.item() == 0
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in model.parameters())


def test_a_weight_that_is_not_a_number_shows() -> None:
    model = mlp(2, 3, 1)
    model[0].weight.data[0, 0] = math.nan
    assert P.path_norm(model).isnan()


def lines(count, value):
    """`count` Linear(1, 1) with this weight."""
    model = mlp(*[1] * (count + 1), bias=False).double()
    for each in model.parameters():
        nn.init.constant_(each, value)
    return model


def test_path_norms_at_the_ends_of_the_range() -> None:
    assert P.path_norm(lines(80, 2.0**15), 1).item() == math.inf
    assert P.path_norm(lines(80, 2.0**15), 1, power=True).item() == math.inf
    assert P.path_norm(lines(80, 2.0**-15), 1).item() == 0
    assert P.path_norm(lines(68, 2.0**15), 1, power=True).item() == 2.0**1020
    assert P.path_norm(lines(68, 2.0**15), 2).item() == pytest.approx(2.0**1020, rel=1e-12)
    assert P.path_norm(lines(80, 2.0**15), 1, log=True).item() == pytest.approx(1200 * math.log(2), rel=1e-12)
    gamma = P.path_gamma(lines(40, 2.0**15), 1)
    assert gamma["0.weight"].item() == math.inf  # 2^1170
    assert P.path_gamma(lines(35, 2.0**15), 1)["0.weight"].item() == 2.0**1020
