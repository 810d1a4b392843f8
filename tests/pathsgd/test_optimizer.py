"""PathSGD as an optimizer: its steps against γ from scratch, and everything a torch.optim.Optimizer has to stand."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from finite_width.pathsgd import chain as chain_module
from finite_width.pathsgd import dense_chain
from pathsgd.networks import Recurrent, lenet, mlp

PathSGD = fw.pathsgd.PathSGD


def backward(model, seed, shape=(6,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, *shape, generator=generator, dtype=torch.float64).to(dtype)
    model.zero_grad()
    F.cross_entropy(model(x).float(), torch.arange(8) % 2).backward()


def by_definition(
    model, lr, p=2.0, momentum=0.0, nesterov=False, weight_decay=0.0, maximize=False, every=1, shape=None
):
    """A function that takes one step with γ computed from scratch."""
    buffers, state = {}, {"count": 0}

    def step():
        if state["count"] % every == 0:
            state["gamma"] = fw.pathsgd.path_gamma(model, p, input_shape=shape)
        state["count"] += 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gamma = state["gamma"][name]
                direction = torch.where(gamma > 0, parameter.grad / gamma, 0.0) * (-1 if maximize else 1)
                taken = direction
                if momentum:
                    buffers[name] = momentum * buffers.get(name, torch.zeros_like(direction)) + direction
                    taken = direction + momentum * buffers[name] if nesterov else buffers[name]
                parameter.mul_(1 - lr * weight_decay).sub_(lr * taken)

    return step


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}],
)
def test_steps_by_definition(p, settings, every) -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    other, first = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = PathSGD(model, 1e-3, p=p, update_every=every, **settings)
    step = by_definition(other, 1e-3, p, every=every, **settings)
    for seed in range(7):
        backward(model, seed)
        backward(other, seed)
        optimizer.step()
        step()
    for (name, one), two, begin in zip(model.named_parameters(), other.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=name)
        assert not torch.equal(one, begin)


@pytest.mark.parametrize(
    ("make", "shape"), [(lenet, (1, 28, 28)), (lambda: Recurrent(3, 5, 2), (4, 3))], ids=["lenet", "rnn"]
)
@pytest.mark.parametrize("every", [1, 2])
def test_network_steps_by_definition(make, shape, every) -> None:
    torch.manual_seed(0)
    model = make().double()
    other = copy.deepcopy(model)
    optimizer = PathSGD(model, 1e-4, momentum=0.9, update_every=every, input_shape=shape)
    step = by_definition(other, 1e-4, momentum=0.9, every=every, shape=shape)
    for seed in range(4):
        backward(model, seed, shape)
        backward(other, seed, shape)
        optimizer.step()
        step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_eval_batchnorm_chain_by_definition() -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2, norm=True).double().eval()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    other = copy.deepcopy(model)
    optimizer, step = PathSGD(model, 1e-3), by_definition(other, 1e-3)
    assert optimizer._stages is not None
    for seed in range(5):
        backward(model, seed)
        backward(other, seed)
        optimizer.step()
        step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_training_batchnorm_uses_the_batches_deviation(every) -> None:
    """As running statistics that happen to be the batch's, with a zero mean."""
    torch.manual_seed(0)
    model = mlp(6, 11, 2, norm=True).double()
    frozen = copy.deepcopy(model).eval()
    x = torch.randn(8, 6, dtype=torch.float64)
    frozen[1].running_var = model[0](x).detach().var(0, unbiased=False)
    frozen[1].running_mean.zero_()
    gamma = fw.pathsgd.path_gamma(frozen)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = PathSGD(model, 1e-3, update_every=every)
    F.cross_entropy(model(x), torch.arange(8) % 2).backward()
    optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(before[name] - value, 1e-3 * value.grad / gamma[name], rtol=1e-6, atol=1e-12)
    with pytest.raises(RuntimeError, match="saw no batch"):
        optimizer.step()


def resumed(make, shape, settings, at, total, dtype=torch.float32):
    torch.manual_seed(0)
    model = make().to(dtype)
    optimizer = PathSGD(model, **settings, input_shape=shape)
    for seed in range(total):
        if seed == at:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        backward(model, seed, shape, dtype)
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    torch.manual_seed(1)
    other = make().to(dtype)
    other.load_state_dict(saved["model"])
    optimizer = PathSGD(other, **settings, input_shape=shape)
    optimizer.load_state_dict(saved["optimizer"])
    for seed in range(at, total):
        backward(other, seed, shape, dtype)
        optimizer.step()
    return model, other


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize(
    ("make", "shape", "settings", "dtype"),
    [
        (lambda: mlp(6, 11, 9, 2), (6,), {"lr": 1e-2, "momentum": 0.9}, torch.float32),
        (lambda: mlp(6, 11, 9, 2), (6,), {"lr": 1e-2, "update_every": 3}, torch.float32),
        (lambda: mlp(6, 11, 9, 2, norm=True), (6,), {"lr": 1e-2}, torch.float32),
        (lambda: mlp(6, 11, 9, 2, norm=True), (6,), {"lr": 1e-2, "update_every": 3}, torch.float32),
        (lambda: mlp(6, 11, 9, 2), (6,), {"lr": 1e-2, "momentum": 0.9, "master_weights": True}, torch.bfloat16),
        (lambda: Recurrent(3, 5, 2), (4, 3), {"lr": 1e-2, "update_every": 3}, torch.float32),
        (lenet, (1, 28, 28), {"lr": 1e-5, "update_every": 3}, torch.float32),
    ],
)
def test_resuming_continues_bit_for_bit(make, shape, settings, dtype, at) -> None:
    model, other = resumed(make, shape, settings, at, 8, dtype)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_of_another_structure_is_refused() -> None:
    model, other = mlp(6, 5, 2), mlp(6, 4, 2)
    optimizer, target = PathSGD(model, 0.1), PathSGD(other, 0.5)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="another structure"):
        target.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match='no entry "path"'):
        target.load_state_dict(torch.optim.SGD(other.parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="p = 1"):
        target.load_state_dict(PathSGD(other, 0.1, p=1).state_dict())
    assert target.state_dict() == before


def edit_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def edit_pointer(model):
    model[0].weight.data = model[0].weight.data * 1.5


def edit_data(model):
    model[0].weight.data.mul_(1.5)


@pytest.mark.parametrize("edit", [edit_in_place, edit_pointer, edit_data])
@pytest.mark.parametrize("at", [2, 3])
def test_weights_changed_outside(edit, at) -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    other = copy.deepcopy(model)
    optimizer = PathSGD(model, 1e-3)
    for seed in range(6):
        if seed == at:
            edit(model)
            edit(other)
            hidden = edit is edit_data
        backward(model, seed)
        backward(other, seed)
        if seed == at and hidden:
            with pytest.warns(UserWarning, match="changed outside the optimizer") as told:
                optimizer.step()
            assert told[0].filename == __file__  # where step() was called
            other.load_state_dict(model.state_dict())  # that step's γ was of the weights before, as the warning says
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        by_definition(other, 1e-3)()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_no_change_from_outside(value, p) -> None:
    """A gradient that is not finite: no warning, and the optimizer is sound once good weights are written back."""
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    good = copy.deepcopy(model.state_dict())
    optimizer = PathSGD(model, 1e-3, p=p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            backward(model, seed)
            if seed == 2:
                model[2].weight.grad[3, 4] = value
                model[0].bias.grad.fill_(value)
            optimizer.step()
        assert not torch.isfinite(model[2].weight).all()
        if math.isinf(p):  # maxima pass over NaN, so that writing good weights back is a change like any other
            return
        for name, parameter in model.named_parameters():
            parameter.data.copy_(good[name])  # without a trace
        other = copy.deepcopy(model)
        for seed in range(5, 8):
            backward(model, seed)
            backward(other, seed)
            optimizer.step()
            by_definition(other, 1e-3, p)()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_refresh_after_a_hidden_edit() -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 2).double()
    optimizer = PathSGD(model, 1e-3)
    backward(model, 0)
    optimizer.step()
    edit_data(model)
    optimizer.refresh()
    other = copy.deepcopy(model)
    backward(model, 1)
    backward(other, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    by_definition(other, 1e-3)()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_frozen_parameters_carry_paths() -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    model[2].weight.requires_grad_(False)
    gamma = fw.pathsgd.path_gamma(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = PathSGD(model, 0.0, params=[{"params": model[0].parameters(), "lr": 1e-3}, {"params": [model[4].bias]}])
    for seed in range(2):
        backward(model, seed)
        gradient = model[0].weight.grad.clone()
        gamma = fw.pathsgd.path_gamma(model)
        old = model[0].weight.clone()
        optimizer.step()
        torch.testing.assert_close(old - model[0].weight, 1e-3 * gradient / gamma["0.weight"], rtol=1e-7, atol=1e-15)
    for name in ("2.weight", "2.bias", "4.weight", "4.bias"):
        assert torch.equal(before[name], model.get_parameter(name))


def test_dead_units_and_zero_gamma() -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 8, 2).double()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 0
        model[4].weight[:, 5] = 0
    optimizer = PathSGD(model, 1e-3, momentum=0.9)
    for seed in range(5):
        backward(model, seed)
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model[0].weight[3].abs().sum() == 0


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_unit_scaled_by_two_to_the_60(p) -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 8, 2)
    other = copy.deepcopy(model)
    factors = torch.ones(16, dtype=torch.float64)
    factors[[0, 1, 9, 12]] = torch.tensor([2.0**60, 2.0**-60, 2.0**60, 2.0**-60], dtype=torch.float64)
    fw.pathsgd.rescale_(other, factors=factors)
    for m in (model, other):
        optimizer = PathSGD(m, 1e-3, p=p, momentum=0.9)
        for seed in range(6):
            backward(m, seed, dtype=torch.float32)
            optimizer.step()
    x = torch.randn(4, 6)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_200_layers(p) -> None:
    """Path vectors far outside float32 (and, at p = 1, Φ outside float64); the steps are those of a balanced net."""
    torch.manual_seed(0)
    model = mlp(*[32] * 201, bias=False)
    scale = 2.0**3 if p == 1 else 0.25
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    log_phi = fw.pathsgd.path_norm(model, p, log=True, power=True).item()
    assert abs(log_phi) > math.log(torch.finfo(torch.float32).max)
    optimizer = PathSGD(model, 1.0, p=p)
    # lr = 1 and g = 1/w give the step γ^(-1) / w: finite and not zero where it is representable.
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for vector in (*optimizer._vectors.forward, *optimizer._vectors.backward):
        assert torch.isfinite(vector).all()
        assert vector[:-1].max() >= 0.5
    stored = optimizer._chain.path_total()
    assert (math.log(stored[0]) + stored[1] * math.log(2)) == pytest.approx(log_phi, rel=1e-9)


def test_state_is_at_most_16_bytes_a_unit() -> None:
    model = mlp(784, 100, 100, 10)
    optimizer = PathSGD(model, 1e-3)
    layers = 3
    assert optimizer._vectors.nbytes() <= 16 * (784 + 100 + 100 + 10) + 16 * (layers + 1)


# The ops that a chain's step calls: one for the whole, or one a layer.
WAYS = pytest.mark.parametrize(("module", "op"), [(dense_chain, "path_step_unchecked"),
                                                  (chain_module, "path_sweep_unchecked")])  # fmt: skip


@WAYS
def test_interrupted_step_is_finished_first(module, op, monkeypatch, request) -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2)
    other = copy.deepcopy(model)
    optimizer, twin = PathSGD(model, 1e-3), PathSGD(other, 1e-3)
    optimizer._has_step_kernel = module is dense_chain
    original = getattr(module, op)
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for seed in range(4):
        backward(model, seed, dtype=torch.float32)
        backward(other, seed, dtype=torch.float32)
        twin.step()
        if seed != 2:
            optimizer.step()
            continue
        with monkeypatch.context() as patch:

            def interrupted(*args):
                original(*args)
                signal.raise_signal(signal.SIGINT)

            patch.setattr(module, op, interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@WAYS
def test_failed_sweep_is_recomputed(module, op, monkeypatch) -> None:
    """After an error in the middle of a step, the next one starts from the weights as they are."""
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    optimizer = PathSGD(model, 1e-3)
    optimizer._has_step_kernel = module is dense_chain
    backward(model, 0)
    optimizer.step()
    calls, original = [], getattr(module, op)

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        original(*args)
        if module is dense_chain:  # one call is the whole step
            raise MemoryError

    backward(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, op, failing)
        with pytest.raises(MemoryError):
            optimizer.step()
    other = copy.deepcopy(model)
    backward(model, 2)
    backward(other, 2)
    optimizer.step()
    by_definition(other, 1e-3)()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_gradient_accumulation_closure_hooks_and_tensor_lr() -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 2).double()
    optimizer = PathSGD(model, torch.tensor(1e-3))
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    x = torch.randn(8, 6, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        for part in x.split(4):
            loss = model(part).square().mean() / 2
            loss.backward()
        return loss

    first = optimizer.step(closure)
    assert calls == ["pre", "post"]
    for _ in range(5):
        last = optimizer.step(closure)
    assert last < first


SCHEDULERS = {
    "StepLR": {"step_size": 2}, "ExponentialLR": {"gamma": 0.9}, "CosineAnnealingLR": {"T_max": 5},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": 9}, "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch}, "LinearLR": {}, "PolynomialLR": {}, "ConstantLR": {},
    "MultiStepLR": {"milestones": [2]}, "CosineAnnealingWarmRestarts": {"T_0": 3}, "ReduceLROnPlateau": {},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name) -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 2)
    optimizer = PathSGD(model, 1e-3, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
    for seed in range(4):
        backward(model, seed, dtype=torch.float32)
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert torch.isfinite(model[0].weight).all()


def test_grad_scaler() -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 2)
    other = copy.deepcopy(model)
    optimizer, plain = PathSGD(model, 1e-3), PathSGD(other, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 6)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        other(x).square().mean().backward()
        plain.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_bfloat16_with_master_weights() -> None:
    """Steps far below a bfloat16 digit add up in the float32 copy, and are lost without it."""
    moved = []
    for master in (True, False):
        torch.manual_seed(0)
        model = mlp(6, 8, 2).bfloat16()
        start = model[0].weight.clone()
        optimizer = PathSGD(model, 1e-5, master_weights=master)
        for _ in range(60):
            backward(model, 0, dtype=torch.bfloat16)
            optimizer.step()
        moved.append((model[0].weight - start).abs().sum().item())
    assert moved[0] > moved[1]


@pytest.mark.parametrize("edit", ["in place", "through data", "before the first step after loading"])
def test_master_weights_take_over_what_was_written(edit) -> None:
    """The edited elements begin where they were set; the others keep the digits that bfloat16 has no room for."""
    torch.manual_seed(0)
    model = mlp(6, 8, 2).bfloat16()
    optimizer = PathSGD(model, 1e-5, master_weights=True)
    for seed in range(3):
        backward(model, seed, dtype=torch.bfloat16)
        optimizer.step()
    if edit == "before the first step after loading":
        optimizer.load_state_dict(optimizer.state_dict())
    kept = optimizer.state[model[0].weight]["master_weight"].clone()
    weight = model[0].weight.data if edit == "through data" else model[0].weight
    with torch.no_grad():
        weight[2].fill_(5.0)
    if edit != "before the first step after loading":
        optimizer.refresh()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, 3, dtype=torch.bfloat16)
    optimizer.step()
    kept[2] = 5.0
    assert torch.equal(optimizer.state[model[0].weight]["master_weight"], kept)
    assert torch.equal(model[0].weight, kept.bfloat16())


def test_copies_and_pickles_are_refused() -> None:
    optimizer = PathSGD(mlp(6, 8, 2), 1e-3)
    for call in (copy.deepcopy, copy.copy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
        with pytest.raises(TypeError, match="PathSGD cannot be copied or pickled"):
            call(optimizer)


def test_optimizer_marks_the_weights_as_changed() -> None:
    model = mlp(6, 8, 2)
    out = model(torch.randn(4, 6)).sum()
    backward_grads = [torch.ones_like(parameter) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), backward_grads, strict=True):
        parameter.grad = grad
    PathSGD(model, 1e-3).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_dropout_is_the_identity_and_view_is_a_chain() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = x.view(x.size(0), -1)
            return self.b(F.dropout(torch.relu(self.a(x)), 0.5, self.training))

    torch.manual_seed(0)
    model = Net()
    plain = nn.Sequential(model.a, nn.ReLU(), model.b)
    gamma, expected = fw.pathsgd.path_gamma(model), fw.pathsgd.path_gamma(plain)
    for one, two in zip(gamma.values(), expected.values(), strict=True):
        assert torch.equal(one, two)
    assert PathSGD(model, 0.1, input_shape=(2, 3))._stages is not None


def test_protocol_layers_take_part() -> None:
    """A layer with __path_weights__ runs its own forward on |w|^p; here, a product of two matrices."""

    class Factored(nn.Module):
        def __init__(self, inputs, rank, outputs):
            super().__init__()
            self.down = nn.Parameter(torch.randn(rank, inputs))
            self.up = nn.Parameter(torch.randn(outputs, rank))
            self.bias = nn.Parameter(torch.randn(outputs))

        def __path_weights__(self):
            return ("down", "up", "bias")

        def forward(self, x):
            return x @ self.down.T @ self.up.T + self.bias

    torch.manual_seed(0)
    layer = Factored(6, 3, 5)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 2)).double()
    same = mlp(6, 3, 5, 2).double()
    with torch.no_grad():
        same[0].weight.copy_(layer.down)
        same[0].bias.zero_()
        same[2].weight.copy_(layer.up)
        same[2].bias.copy_(layer.bias)
        same[4].load_state_dict(model[2].state_dict())
    gamma = fw.pathsgd.path_gamma(model, input_shape=(6,))
    expected = fw.pathsgd.path_gamma(same)
    for one, two in (("0.down", "0.weight"), ("0.up", "2.weight"), ("0.bias", "2.bias"), ("2.weight", "4.weight")):
        torch.testing.assert_close(gamma[one], expected[two])
    optimizer = PathSGD(model, 1e-3, input_shape=(6,))
    backward(model, 0)
    before = layer.down.clone()
    optimizer.step()
    torch.testing.assert_close(before - layer.down, 1e-3 * layer.down.grad / gamma["0.down"])


def test_bad_input() -> None:
    model = mlp(6, 8, 2)
    outside = nn.Parameter(torch.ones(3))
    for settings, error, message in (
        ({"lr": -0.1}, ValueError, "lr must be at least 0"),
        ({"lr": math.nan}, ValueError, "lr must be at least 0"),
        ({"lr": torch.ones(2)}, ValueError, "one element"),
        ({"lr": 0.1, "p": 0.5}, ValueError, "p must be at least 1"),
        ({"lr": 0.1, "momentum": -1.0}, ValueError, "momentum must be"),
        ({"lr": 0.1, "weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"lr": 0.1, "nesterov": True}, ValueError, "nesterov needs"),
        ({"lr": 0.1, "update_every": 0}, ValueError, "update_every must be at least 1"),
        ({"lr": 0.1, "shared": "kappa3"}, ValueError, "shared must be one of"),
        ({"lr": 0.1, "batchnorm": "none"}, ValueError, "batchnorm must be one of"),
        ({"lr": 0.1, "params": [outside]}, ValueError, "not inside model"),
        ({"lr": 0.1, "capturable": True}, ValueError, "capturable=True is not supported"),
        ({"lr": 0.1, "input_shape": (0,)}, ValueError, "input_shape must hold sizes"),
        ({"lr": 0.1, "input_shape": (7,)}, ValueError, "input_shape"),
    ):
        with pytest.raises(error, match=message):
            PathSGD(model, **settings)
    with pytest.raises(ValueError, match="input_shape is needed"):
        PathSGD(lenet(), 0.1)
    with pytest.raises(ValueError, match="no parameters"):
        PathSGD(nn.ReLU(), 0.1)
    with pytest.raises(TypeError, match="must be float32"):
        PathSGD(mlp(6, 8, 2).half(), 0.1)
    optimizer = PathSGD(model, 0.1)
    with pytest.raises(ValueError, match="not inside model"):
        optimizer.add_param_group({"params": [outside]})
    assert len(optimizer.param_groups) == 1
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients; 2\.weight"):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


DISTRIBUTED = """
    import gc, os, sys, torch, torch.nn.functional as F
    import torch.distributed as dist
    from torch import nn
    import finite_width as fw
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    optimizer = fw.pathsgd.PathSGD(model, 1e-3, momentum=0.9)
    torch.manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 2).backward()
        optimizer.step()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(both[0], both[1])
    # A thread of gloo's that frees a Python object while Python ends, ends it with an error. Threads are joined when
    # the last reference to their group goes, and DistributedDataParallel holds one.
    del model, optimizer
    gc.collect()
    dist.destroy_process_group()
"""


def test_two_processes_keep_the_same_weights(tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    where = f"file://{tmp_path}/meeting"
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), where], env=os.environ, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        errors = worker.communicate(timeout=120)[1]
        assert worker.returncode == 0, errors.decode()
