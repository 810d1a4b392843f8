"""Models converted after their PathSGD was made, gradients of their own dtype, and steps in inference mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from pathsgd.networks import Residual, mlp

PathSGD, path_gamma = fw.pathsgd.PathSGD, fw.pathsgd.path_gamma


def convolution():
    return nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))


KINDS = {
    "chain": (lambda: mlp(3, 4, 2), (3,)),
    "norm": (lambda: mlp(3, 4, 2, norm=True).eval(), (3,)),
    "residual": (Residual, (3,)),
    "convolution": (convolution, (3, 1)),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_age = pytest.mark.parametrize("every", [1, 2])


def start(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make().to(dtype)
    optimizer = PathSGD(model, 0.01, input_shape=shape, **settings)
    give_gradients(model)
    return model, optimizer


def give_gradients(model) -> None:
    for each in model.parameters():
        each.grad = torch.ones_like(each)


def last(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def expected(model, kind):
    gamma = path_gamma(model, input_shape=KINDS[kind][1])
    return {
        name: each.detach().double() - 0.01 * each.grad.double() / gamma[name]
        for name, each in model.named_parameters()
    }


@each_kind
@each_age
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_in_half_precision_stops_the_step_before_it_begins(kind, every, frozen) -> None:
    model, optimizer = start(kind, update_every=every)
    layer = last(model).half()
    give_gradients(model)
    if frozen:
        layer.weight.grad = layer.bias.grad = None
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    if frozen and kind in ("residual", "convolution"):
        optimizer.step()  # there a frozen layer is read in float64, whatever its dtype
        return
    with pytest.raises(TypeError, match=r"(weight|bias) must be float32, .* got torch\.float16"):
        optimizer.step()
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@each_kind
@each_age
def test_gradients_of_their_own_dtype(kind, every) -> None:
    model, optimizer = start(kind, torch.float64, update_every=every)
    weight = last(model).weight
    weight.grad = None
    weight.grad_dtype = torch.float32
    weight.grad = torch.ones(weight.shape)
    wanted = expected(model, kind)
    optimizer.step()
    for name, each in model.named_parameters():
        torch.testing.assert_close(each, wanted[name])


@each_kind
def test_momentum_goes_on_in_the_dtype_of_a_converted_model(kind) -> None:
    model, optimizer = start(kind, momentum=0.9)
    optimizer.step()
    model.double()
    give_gradients(model)
    gamma = path_gamma(model, input_shape=KINDS[kind][1])
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    moved = {name: optimizer.state[each]["momentum_buffer"].double() for name, each in model.named_parameters()}
    optimizer.step()
    for name, each in model.named_parameters():
        step = 0.9 * moved[name] + each.grad / gamma[name]
        torch.testing.assert_close(each, before[name] - 0.01 * step)
        assert optimizer.state[each]["momentum_buffer"].dtype == torch.float64


@each_kind
def test_steps_and_measures_in_inference_mode(kind) -> None:
    model, optimizer = start(kind, torch.float64)
    wanted, shape = expected(model, kind), KINDS[kind][1]
    gamma = path_gamma(model, input_shape=shape)
    with torch.inference_mode():
        for name, each in path_gamma(model, input_shape=shape).items():
            torch.testing.assert_close(each, gamma[name])
        optimizer.step()
    for name, each in model.named_parameters():
        torch.testing.assert_close(each, wanted[name])


def test_a_filter_that_is_a_buffer() -> None:
    class Blurs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.register_buffer("kernel", torch.full((1, 1, 3, 3), 1 / 9))

        def forward(self, x):
            return self.conv(F.conv2d(x, self.kernel, padding=1))

    torch.manual_seed(0)
    model = Blurs().double()
    optimizer = PathSGD(model, 1e-3, update_every=2, input_shape=(1, 6, 6))
    give_gradients(model)
    kernel, gamma, before = model.kernel.clone(), path_gamma(model, input_shape=(1, 6, 6)), model.conv.weight.clone()
    optimizer.step()
    torch.testing.assert_close(model.conv.weight, before - 1e-3 / gamma["conv.weight"])
    other = PathSGD(model, 1e-3, update_every=2, input_shape=(1, 6, 6))
    other.load_state_dict(optimizer.state_dict())
    other.step()
    torch.testing.assert_close(model.conv.weight, before - 2e-3 / gamma["conv.weight"])
    assert torch.equal(model.kernel, kernel)
