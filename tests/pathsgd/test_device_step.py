"""PathSGD's steps where the kernels for a device are in force: the same as on the CPU, and nothing read on the host.

Everywhere they run on the CPU's kernel of `path_step`, or on its reference; in the host emulation
(tests/test_cuda_on_host.py) and on a GPU (tests/test_cuda_device.py) on CUDA's kernels.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import finite_width as fw
from finite_width import _library
from finite_width.pathsgd import dense_chain
from finite_width.pathsgd import optimizer as optimizer_module
from pathsgd.networks import Recurrent, ResNet18, lenet, mlp

PathSGD = fw.pathsgd.PathSGD


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers take the way that they take on a GPU."""
    monkeypatch.setattr(_library, "has_kernel", lambda name, device: True)
    monkeypatch.setattr(optimizer_module, "is_remote", lambda device: True)


def on_cpu(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An optimizer that goes layer by layer, as the CPU does without `path_step`'s kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "has_kernel", lambda name, device: False)
        return PathSGD(model, *args, **kwargs)


def backward(model: nn.Module, seed: int, shape: tuple[int, ...] = (6,), scaler: Any = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, *shape, generator=generator, dtype=torch.float64).to(dtype)
    model.zero_grad()
    loss = F.cross_entropy(model(x).double(), torch.arange(8) % 2)
    (loss if scaler is None else scaler.scale(loss)).backward()


def same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-13}
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, **tolerance, msg=name)


class HostRead(Exception):
    """A value of a tensor was asked for on the host."""


READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class NoHostReads(TorchDispatchMode):
    """Raises where a step asks for a tensor's value; on a GPU that would wait for the device.

    `allowed` is a tensor that lives on the host by design.
    """

    def __init__(self, allowed: Tensor | None = None) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allowed = self.allowed is not None and args[0] is self.allowed
        if func._schema.name in READS and not allowed:
            raise HostRead(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(allowed: Tensor | None = None) -> Iterator[None]:
    """NoHostReads, and what does not pass the dispatcher: tolist, numpy, and tensors made of host numbers."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HostRead("a copy between host and device")

    with pytest.MonkeyPatch.context() as patch, NoHostReads(allowed):
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(torch, "tensor", refuse)
        patch.setattr(torch, "from_numpy", refuse)
        yield


SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "update_every": 3},
]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_are_those_of_the_cpu(settings: dict[str, Any], p: float) -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    other, first = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, theirs = PathSGD(model, 1e-3, p=p, **settings), on_cpu(other, 1e-3, p=p, **settings)
    for seed in range(7):
        for one, stepper in ((model, optimizer), (other, theirs)):
            backward(one, seed)
            stepper.step()
        same(model, other)
    assert not torch.equal(model[0].weight, first[0].weight)
    assert (optimizer._chain is None) == (settings.get("update_every", 1) > 1)


def chain_in_evaluation() -> nn.Module:
    model = mlp(6, 11, 9, 2, norm=True).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return model


NETWORKS = [
    pytest.param(chain_in_evaluation, (6,), id="batchnorm, evaluation"),
    pytest.param(lambda: mlp(6, 11, 9, 2, norm=True), (6,), id="batchnorm, training"),
    pytest.param(lenet, (1, 28, 28), id="lenet"),
    pytest.param(lambda: Recurrent(3, 5, 2), (4, 3), id="rnn"),
]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("make", "shape"), NETWORKS)
def test_other_networks_step_as_on_the_cpu(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make().double()
    other = copy.deepcopy(model)
    optimizers = (
        PathSGD(model, 1e-4, momentum=0.9, input_shape=shape),
        on_cpu(other, 1e-4, momentum=0.9, input_shape=shape),
    )
    for seed in range(4):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            backward(one, seed, shape)
            optimizer.step()
    same(model, other)


@pytest.mark.usefixtures("on_device")
def test_two_hundred_layers_stay_in_range() -> None:
    """Φ is far beyond float64 there; exponents on the device carry it, in the |w|^p network as well."""
    torch.manual_seed(0)
    for wrap in (lambda layers: nn.Sequential(*layers), lambda layers: Residual(nn.Sequential(*layers))):
        layers = [layer for _ in range(200) for layer in (nn.Linear(6, 6), nn.ReLU())]
        for layer in layers[::2]:
            layer.weight.data.mul_(20)
        model = wrap([*layers, nn.Linear(6, 6)]).double()
        other = copy.deepcopy(model)
        optimizers = PathSGD(model, 1e-4, input_shape=(6,)), on_cpu(other, 1e-4, input_shape=(6,))
        for seed in range(2):
            for one, optimizer in zip((model, other), optimizers, strict=True):
                generator = torch.Generator().manual_seed(seed)
                for parameter in one.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                optimizer.step()
        same(model, other)


class Residual(nn.Module):
    """x + inner(x): no chain."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1, "capturable": True}])
def test_a_chain_s_step_reads_nothing_on_the_host(settings: dict[str, Any]) -> None:
    """Also where a GradScaler and a learning rate on the device take part, and when it looks for surprises."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("finite_width::path_step", "CPU"):
        pytest.skip("the reference of path_step reads its state; no kernel is loaded")
    model, lr = mlp(6, 11, 9, 2), torch.full((), 1e-3)
    optimizer = PathSGD(model, lr, **settings)
    backward(model, 0)
    optimizer.step()
    with no_host_reads(allowed=optimizer._chain._copy):
        for _ in range(dense_chain._LOOK_EVERY + 1):
            optimizer.grad_scale, optimizer.found_inf = torch.full((), 8.0), torch.zeros(1)
            lr.mul_(0.9)
            optimizer.step()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("make", "shape"), [*NETWORKS, pytest.param(ResNet18, (3, 16, 16), id="resnet"),
                        pytest.param(lambda: mlp(6, 11, 2).bfloat16(), (6,), id="bfloat16, frozen")]
)  # fmt: skip
def test_other_steps_read_nothing_on_the_host(make: Any, shape: tuple[int, ...]) -> None:
    model, lr = make(), torch.full((), 1e-4)
    # A frozen bfloat16 weight beside float32 copies: not one op for the whole chain.
    mixed = next(model.parameters()).dtype == torch.bfloat16
    if mixed:
        model[0].weight.requires_grad_(False)
    optimizer = PathSGD(model, lr, momentum=0.9, input_shape=shape, master_weights=mixed)
    for _ in range(2):
        backward(model, 0, shape)
        with no_host_reads():
            optimizer.grad_scale, optimizer.found_inf = torch.full((), 8.0), torch.zeros(1)
            optimizer.step()


def test_the_check_for_host_reads_sees_the_cpu_s_step() -> None:
    for make, shape in ((lambda: mlp(6, 11, 2), (6,)), (lenet, (1, 28, 28))):
        model = make()
        optimizer = on_cpu(model, 1e-4, input_shape=shape)
        backward(model, 0, shape)
        with pytest.raises(HostRead), no_host_reads():
            optimizer.step()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("make", "shape"), [*NETWORKS, pytest.param(lambda: mlp(6, 11, 9, 2), (6,), id="mlp")])
def test_a_gradscaler_s_scale_and_found_inf(make: Any, shape: tuple[int, ...]) -> None:
    """A scale of a power of two changes no bit; a step with an infinite gradient changes no weight and no momentum."""
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    optimizers = [PathSGD(m, 1e-4, momentum=0.9, input_shape=shape) for m in (model, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for seed in range(4):
        backward(model, seed, shape)
        optimizers[0].step()
        if seed == 2:
            kept = copy.deepcopy([list(other.parameters()), optimizers[1].state_dict()["state"]])
            backward(other, seed, shape, scaler)
            next(other.parameters()).grad.view(-1)[0] = math.inf
            scaler.step(optimizers[1])
            scaler.update()
            for one, two in zip(other.parameters(), kept[0], strict=True):
                assert torch.equal(one, two)
            for index, state in optimizers[1].state_dict()["state"].items():
                assert torch.equal(state["momentum_buffer"], kept[1][index]["momentum_buffer"])
            assert scaler.get_scale() == 2.0**9
        backward(other, seed, shape, scaler)
        scaler.step(optimizers[1])
        scaler.update()
    # The skipped step turned the sweep's direction: the same γ, summed in another order.
    same(model, other, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("on_device")
def test_a_learning_rate_on_the_device() -> None:
    torch.manual_seed(0)
    models = [mlp(6, 11, 9, 2)]
    models.append(copy.deepcopy(models[0]))
    rates = torch.tensor(1e-3), 1e-3
    optimizers = [
        PathSGD(model, 0.0, params=[{"params": model[:2].parameters(), "lr": lr, "weight_decay": 0.1},
                                    {"params": model[2:].parameters(), "lr": lr}])
        for model, lr in zip(models, rates, strict=True)
    ]  # fmt: skip
    for seed in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, seed)
            optimizer.step()
        rates[0].mul_(0.5)
        for group in optimizers[1].param_groups:
            group["lr"] *= 0.5
    same(*models, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("on_device")
def test_a_change_from_outside_is_told_some_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_chain, "_LOOK_EVERY", 1)
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    optimizer = PathSGD(model, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
        model[0].weight.data.mul_(1.5)  # without a trace
        backward(model, 3)
        optimizer.step()
    other = copy.deepcopy(model)
    theirs = on_cpu(other, 1e-3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(4, 8):
            for one, stepper in ((model, optimizer), (other, theirs)):
                backward(one, seed)
                stepper.step()
    assert ["changed outside the optimizer" in str(each.message) for each in told] == [True]
    same(model, other)  # the sweep that met the change left vectors of the weights as they are


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("visible", [True, False])
def test_changed_weights_and_refresh(visible: bool) -> None:
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2).double()
    optimizer = PathSGD(model, 1e-3)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    if visible:
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    else:
        model[0].weight.data.mul_(1.5)
        optimizer.refresh()
    other = copy.deepcopy(model)
    theirs = on_cpu(other, 1e-3)
    for seed in range(3, 6):
        for one, stepper in ((model, optimizer), (other, theirs)):
            backward(one, seed)
            stepper.step()
    same(model, other)
    assert int(optimizer._chain.state[3]) == 0


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("replays", [0, 1, 2])
@pytest.mark.parametrize("at", [2, 3])
def test_resuming_continues_bit_for_bit(at: int, replays: int) -> None:
    """Also where steps were taken of which Python knows nothing, as a graph's replays are."""
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2)
    optimizer = PathSGD(model, 1e-2, momentum=0.9)
    for seed in range(6):
        if seed == at:
            backward(model, seed)
            for _ in range(replays):
                optimizer._chain.step(optimizer._gradients().get, (None, None))
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        backward(model, seed)
        optimizer.step()
    other = mlp(6, 11, 9, 2)
    other.load_state_dict(saved[0])
    resumed = PathSGD(other, 1e-2, momentum=0.9)
    resumed.load_state_dict(saved[1])
    for seed in range(at, 6):
        backward(other, seed)
        resumed.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_capturable_where_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match="capturable=True is not supported by PathSGD for parameters on cpu"):
        on_cpu(mlp(6, 2), 0.1, capturable=True)


@pytest.mark.usefixtures("on_device")
def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="capturable=True needs update_every=1"):
        PathSGD(mlp(6, 2), 0.1, capturable=True, update_every=2)
    model, other = mlp(6, 5, 2), mlp(6, 5, 2)
    optimizer, plain = PathSGD(model, 1e-3, capturable=True), PathSGD(other, 1e-3)
    for each in (model, other):
        backward(each, 0)
    monkeypatch.setattr(optimizer_module, "_capturing", lambda tensor: True)
    with pytest.raises(RuntimeError, match="capturable=False"):
        plain.step()
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer.step()
    monkeypatch.setattr(optimizer_module, "_capturing", lambda tensor: False)
    optimizer.step()
    with torch.no_grad():
        model[0].weight.mul_(2)
    monkeypatch.setattr(optimizer_module, "_capturing", lambda tensor: True)
    with pytest.raises(RuntimeError, match=r"call refresh\(\) before the capture"):
        optimizer.step()
    optimizer.refresh()
    optimizer.step()
