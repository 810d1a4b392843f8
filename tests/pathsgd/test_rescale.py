"""What rescale_ and balance_ refuse, with nothing changed, and networks at the ends of their range."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import finite_width as fw
from pathsgd.networks import mlp
from pathsgd.test_weights import Tied, Viewed, unchanged, values

P = fw.pathsgd


def twice():
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)]
    return nn.Sequential(*layers[:4], layers[2], layers[3], layers[4])


@pytest.mark.parametrize(
    ("make", "message"), [(twice, "2.weight: a layer that is called more"), (Tied, "through a view"), (Viewed, "view")]
)
def test_what_cannot_be_rescaled_stays_as_it_is(make, message) -> None:
    model = make()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        P.rescale_(model, seed=0, input_shape=(2, 4) if make is Viewed else None)
    assert unchanged(model, before)


@pytest.mark.parametrize(("factor", "value"), [(1e30, 1e20), (1e-30, 1e-20), (1e200, 1.0), (1e-200, 1.0), (1e200, 0.0)])
def test_factors_that_leave_the_dtype_are_refused(factor, value) -> None:
    model = mlp(4, 3, 2, 1)
    nn.init.constant_(model[2].weight, value)
    before = values(model)
    with pytest.raises(ValueError, match=r"factors would take 2\.weight out of the range of torch\.float32"):
        P.rescale_(model, factors=[1.0, 1.0, 1.0, factor, 1.0])
    assert unchanged(model, before)


@pytest.mark.parametrize("dead", ["last", "middle", "all"])
def test_balance_refuses_a_network_without_live_paths(dead) -> None:
    model = mlp(4, 3, 3, 2, bias=False)
    for layer in {"last": [4], "middle": [2], "all": [0, 2, 4]}[dead]:
        nn.init.zeros_(model[layer].weight)
    before = values(model)
    with pytest.raises(ValueError, match="no path of which all weights are live"):
        P.balance_(model)
    assert unchanged(model, before)


def test_balance_of_a_zero_head_with_a_bias() -> None:
    """The output's bias alone is a path: μ is its size, and stays finite."""
    torch.manual_seed(0)
    model = mlp(4, 3, 2)
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, 0.5)
    assert P.balance_(model).item() == pytest.approx(0.5)
    assert P.max_norm(model).item() == pytest.approx(0.5)


def test_balance_of_a_network_beyond_the_range_of_its_products() -> None:
    """At the first scale the products overflow, and 0 · ∞ stands at a dead unit."""
    torch.manual_seed(0)
    model = mlp(*[8] * 60, 1, bias=False).double()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for each in model[::2]:
            each.weight.mul_(1e6)
            each.weight[:, 3] = 0
        for each in copied[::2]:
            each.weight[:, 3] = 0
    assert P.balance_(model).item() == pytest.approx(1e6 * P.balance_(copied).item(), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_balance_refuses_weights_that_are_not_finite(value) -> None:
    model = mlp(4, 3, 2)
    model[0].weight.data[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        P.balance_(model)


class Constant(nn.Module):
    """A fixed filter between two convolutions, as `kernel` makes it."""

    def __init__(self, kernel) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.register_buffer("kernel", kernel)

    def forward(self, x):
        x = torch.relu(torch.nn.functional.conv2d(torch.relu(self.a(x)), self.kernel, groups=3))
        return self.c(torch.relu(self.b(x)))


@pytest.mark.parametrize("kernel", [torch.ones(3, 1, 3, 3), torch.ones(1, 1, 3, 3).expand(3, 1, 3, 3)])
def test_buffers_are_constants(kernel) -> None:
    torch.manual_seed(0)
    model = Constant(kernel).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = model(x)
    assert len(P.rescale_(model, seed=0, input_shape=(3, 5, 5))) == 4  # the units behind b alone
    assert torch.equal(model.kernel, kernel.double())
    torch.testing.assert_close(model(x), before)


def test_a_linear_map_of_a_buffer() -> None:
    model = mlp(3, 4, 4, 2).double()
    weight = model[2].weight.detach()
    del model[2].weight
    model[2].register_buffer("weight", weight.clone())
    with pytest.raises(ValueError, match="no hidden unit"):
        P.rescale_(model, seed=0)
    assert torch.equal(model[2].weight, weight)


def aliased(how):
    model = mlp(3, 3, 3, 2)
    if how == "same":
        model[2].weight.data = model[0].weight.data
    elif how == "overlapping":
        flat = torch.randn(12)
        model[0].weight.data, model[2].weight.data = flat[:9].view(3, 3), flat[3:].view(3, 3)
    elif how == "buffer":
        model.register_buffer("copy", model[2].weight.detach()[:1])
    else:
        model[2].weight.data = torch.randn(3, 1).expand(3, 3)
    return model


@pytest.mark.parametrize("how", ["same", "overlapping", "buffer", "expanded"])
def test_shared_memory_is_refused(how) -> None:
    model = aliased(how)
    before = values(model)
    with pytest.raises(ValueError, match=r"weight.*share.? memory|copy shares memory"):
        P.rescale_(model, seed=0)
    assert unchanged(model, before)


def test_weights_side_by_side_in_one_memory() -> None:
    torch.manual_seed(0)
    model = mlp(3, 3, 3, 2)
    flat = torch.randn(18)
    model[0].weight.data, model[2].weight.data = flat[9:].view(3, 3), flat[:9].view(3, 3).T
    x = torch.randn(4, 3)
    before = model(x)
    P.rescale_(model, seed=0, power_of_two=True)
    assert torch.equal(model(x), before)
