"""BatchNorm in training mode: which batches feed a step, and the hook that records them."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings

import pytest
import torch
from torch import nn

import finite_width as fw
from pathsgd.networks import mlp

PathSGD = fw.pathsgd.PathSGD


def start(**settings):
    torch.manual_seed(0)
    model = mlp(4, 6, 2, norm=True).double()
    return model, PathSGD(model, 1e-3, **settings)


def batch(seed, scale=1.0):
    return scale * torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model, x):
    return model(x).square().mean()


def train(before_step, **settings):
    """The weights after a step on batch 0 and one on batch 1, with `before_step` between them."""
    model, optimizer = start(**settings)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(seed)).backward()
        optimizer.step()
        if seed == 0:
            before_step(model, optimizer)
    return model


def skip_after_forward(model, optimizer):
    loss_of(model, batch(9, 100.0))


def skip_after_backward(model, optimizer):
    optimizer.zero_grad()
    loss_of(model, batch(9, 100.0)).backward()


def skip_by_scaler(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(9, 100.0)) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()


def skip_infinite(model, optimizer):
    """By the model's own zero_grad, of which an optimizer knows nothing."""
    loss_of(model, batch(9, 1e300)).backward()
    model[1].reset_running_stats()
    model.zero_grad()


@pytest.mark.parametrize("skip", [skip_after_forward, skip_after_backward, skip_by_scaler, skip_infinite])
def test_skipped_batches_feed_no_step(skip) -> None:
    for one, two in zip(train(skip).parameters(), train(lambda *args: None).parameters(), strict=True):
        assert torch.equal(one, two)


def test_zero_grad_between_forward_and_backward() -> None:
    model, optimizer = start()
    other, usual = start()
    for seed in range(3):
        loss = loss_of(model, batch(seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        usual.zero_grad()
        loss_of(other, batch(seed)).backward()
        usual.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("twice", [False, True])
def test_accumulated_batches_are_averaged(twice) -> None:
    """Each forward once, also where its backward runs twice."""
    model, optimizer = start()
    sigma = []
    for seed in range(3):
        sigma.append((model[0](batch(seed)).detach().var(0, unbiased=False) + model[1].eps).sqrt())
        loss = loss_of(model, batch(seed))
        if twice and seed == 1:
            loss.backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(optimizer._batches.deviations()[model[1]], torch.stack(sigma).mean(0))
    state = optimizer._batches.state(model)
    optimizer._batches.load(state, model)
    torch.testing.assert_close(optimizer._batches.deviations()[model[1]], torch.stack(sigma).mean(0))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x).detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batchnorm_that_no_gradient_reaches(frozen) -> None:
    torch.manual_seed(0)
    model = Detached().double()
    model.body.requires_grad_(not frozen)
    optimizer = PathSGD(model, 1e-3)
    for seed in range(2):
        loss_of(model, batch(seed)).backward()
        optimizer.step()


def test_a_compiled_model_stays_one_graph() -> None:
    model, optimizer = start()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss_of(compiled, batch(0)).backward()
    optimizer.step()


def test_the_hook_goes_with_the_optimizer() -> None:
    model, optimizer = start()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loss_of(twin, batch(0)).backward()  # a copy feeds nothing
    assert not optimizer._batches.seen
    del optimizer
    gc.collect()
    assert not model[1]._forward_hooks
    torch.jit.script(model)


@pytest.mark.parametrize("settings", [{"batchnorm": "running"}, {}])
def test_moving_running_statistics_are_noticed(settings) -> None:
    """γ of each step is of the statistics as they are, and no warning speaks of changed weights."""
    model, optimizer = start(**settings)
    if not settings:
        model.eval()
    with torch.no_grad():
        model(batch(7))
    for seed in range(5):
        if not settings:
            with torch.no_grad():
                model[1].running_var.mul_(1.5)
        loss_of(model, batch(seed)).backward()
        before = {name: value.clone() for name, value in model.named_parameters()}
        gamma = fw.pathsgd.path_gamma(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, before[name] - 1e-3 * value.grad / gamma[name], rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()


class Twice(nn.Module):
    """One BatchNorm in two places, and one in none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.unused = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.c(torch.relu(self.norm(self.b(torch.relu(self.norm(self.a(x)))))))


def test_a_batchnorm_in_two_places() -> None:
    """Each place has a σ of its own in training mode; running statistics are one for both."""
    torch.manual_seed(0)
    model = Twice().double()
    optimizer, running = PathSGD(model, 1e-3), PathSGD(model, 1e-3, batchnorm="running")
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match="norm: a BatchNorm in training mode that a forward calls 2 times"):
        optimizer.step()
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    running.step()
    model.eval()
    loss_of(model, batch(0)).backward()
    optimizer.step()


def test_a_batchnorm_that_the_forward_leaves_out() -> None:
    model = mlp(4, 6, 2, norm=True).double()
    model[1].register_module("spare", nn.BatchNorm1d(3))
    optimizer = PathSGD(model, 1e-3)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"^1: a BatchNorm in training mode saw no batch"):
        optimizer.step()
