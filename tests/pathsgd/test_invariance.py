"""Rescaling hidden units does not change what Path-SGD trains: bit for bit with powers of two."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import finite_width as fw
from pathsgd.networks import Recurrent, ResNet18, lenet, mlp

NETWORKS = {
    "mlp": (lambda: mlp(12, 30, 20, 4), (12,)),
    "mlp, batch norm": (lambda: mlp(12, 30, 20, 4, norm=True), (12,)),
    "lenet": (lenet, (1, 28, 28)),
    "resnet18": (lambda: ResNet18(4), (3, 32, 32)),
    "rnn": (lambda: Recurrent(3, 16, 4, 2), (6, 3)),
}


def train(model, optimizer, shape, steps, dtype=torch.float32):
    """The losses of some steps on fixed random batches."""
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, *shape, generator=generator).to(dtype)
        target = torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start(name, seed=0):
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = make()
    other = copy.deepcopy(model)
    fw.pathsgd.rescale_(other, seed=seed + 1, power_of_two=True, input_shape=shape)
    return model, other, shape


def step_size(model, shape, p):
    """A power of two with which the first step moves the parameter that moves most by about half a percent."""
    twin = copy.deepcopy(model).double()
    before = [parameter.detach().clone() for parameter in twin.parameters()]
    train(twin, fw.pathsgd.PathSGD(twin, 1.0, p=p, input_shape=shape), shape, 1, torch.float64)
    moves = [
        ((now - then).norm() / then.norm()).item()
        for now, then in zip(twin.parameters(), before, strict=True)
        if then.norm() > 0
    ]
    return 2.0 ** round(math.log2(0.005 / max(moves)))


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_powers_of_two_train_bit_identically(name, p) -> None:
    model, other, shape = start(name)
    lr = step_size(model, shape, p)
    first = copy.deepcopy(model.state_dict())
    losses = [
        train(m, fw.pathsgd.PathSGD(m, lr, p=p, momentum=0.5, weight_decay=0.01, input_shape=shape), shape, steps(name))
        for m in (model, other)
    ]
    assert losses[0] == losses[1]
    assert all(map(torch.isfinite, map(torch.tensor, losses[0])))
    x = torch.randn(5, *shape)
    assert torch.equal(model(x), other(x))
    moved = [not torch.equal(value, first[key]) for key, value in model.named_parameters()]
    assert all(moved)


def steps(name: str) -> int:
    return 100 if name != "resnet18" else 8  # all 100: test_resnet18_for_100_steps


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_resnet18_for_100_steps(p) -> None:
    torch.manual_seed(0)
    model = ResNet18(16)
    other = copy.deepcopy(model)
    shape = (3, 32, 32)
    fw.pathsgd.rescale_(other, seed=1, power_of_two=True, input_shape=shape)
    lr = step_size(model, shape, p)
    losses = [train(m, fw.pathsgd.PathSGD(m, lr, p=p, input_shape=shape), shape, 100) for m in (model, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_sgd_is_not_invariant(name) -> None:
    model, other, shape = start(name)
    losses = [train(m, torch.optim.SGD(m.parameters(), 1e-3), shape, 10) for m in (model, other)]
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["mlp", "lenet", "rnn"])
def test_any_factors_in_float64(name) -> None:
    """Arbitrary factors: the functions stay together up to rounding."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().double()
    other = copy.deepcopy(model)
    fw.pathsgd.rescale_(other, seed=1, input_shape=shape)
    lr = step_size(model, shape, 2.0)
    for m in (model, other):
        train(m, fw.pathsgd.PathSGD(m, lr, input_shape=shape), shape, 30, torch.float64)
    x = torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-11, atol=1e-12)


def test_kappa_keeps_the_invariance() -> None:
    torch.manual_seed(0)
    model = Recurrent(2, 4, 4)
    other = copy.deepcopy(model)
    fw.pathsgd.rescale_(other, seed=1, power_of_two=True, input_shape=(4, 2))
    losses = [
        train(m, fw.pathsgd.PathSGD(m, 1e-3, shared="kappa", input_shape=(4, 2)), (4, 2), 10) for m in (model, other)
    ]
    assert losses[0] == losses[1]
