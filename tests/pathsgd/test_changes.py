"""A model that was changed after its PathSGD was made, and states of a model that is built another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import finite_width as fw
from pathsgd.networks import Residual, mlp

PathSGD, path_gamma = fw.pathsgd.PathSGD, fw.pathsgd.path_gamma


def give_gradients(model) -> None:
    for each in model.parameters():
        each.grad = torch.ones_like(each)


def replace_layer(model):
    model[0] = nn.Linear(3, model[0].out_features).double().requires_grad_(False)


def replace_weight(model):
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def remove_bias(model):
    model[0].bias = None


def prune(model):
    l1_unstructured(model[0], "weight", 2)


@pytest.mark.parametrize("change", [replace_layer, replace_weight, remove_bias, prune])
@pytest.mark.parametrize("make", [lambda: mlp(3, 4, 2), lambda: nn.Sequential(nn.Linear(3, 3), Residual())])
@pytest.mark.parametrize("settings", [{}, {"update_every": 2}])
def test_replaced_parts_are_noticed(change, make, settings) -> None:
    model = make().double()
    optimizer = PathSGD(model, 0.1, **settings)
    give_gradients(model)
    optimizer.step()
    change(model)
    give_gradients(model)
    before = [each.clone() for each in model.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^0(\.weight|\.bias)?: this (module|parameter) was replaced or removed"):
            optimizer.step()
        optimizer.refresh()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [lambda: mlp(3, 4, 2), lambda: nn.Sequential(nn.Linear(3, 3), Residual())])
def test_buffers_as_weights_are_read_as_they_are(make) -> None:
    """A weight that is a buffer may be replaced, by `model.double()` for one."""
    model = make()
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", weight)
    optimizer = PathSGD(model, 0.1)
    model.double()
    for _ in range(3):
        model[0].weight = 2 * model[0].weight
        give_gradients(model)
        gamma, before = path_gamma(model), {name: each.detach().clone() for name, each in model.named_parameters()}
        optimizer.step()
        for name, each in model.named_parameters():
            torch.testing.assert_close(each, before[name] - 0.1 * each.grad / gamma[name])


def small(pool=None, size=6, **settings):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), pool or nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(2)]
    model = nn.Sequential(*layers, nn.Dropout(0.1)).double()
    model(torch.ones(1, 1, size, size, dtype=torch.float64))
    return model, PathSGD(model, 1e-3, update_every=3, input_shape=(1, size, size), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": nn.AvgPool2d(2)}, "another structure"),
        ({"pool": nn.MaxPool2d(2, 2, ceil_mode=True)}, "another structure"),
        ({"size": 7}, "another structure"),
        ({"shared": "kappa"}, "made with shared='kappa1', this optimizer has shared='kappa'"),
        ({"batchnorm": "running"}, "made with batchnorm='batch'"),
    ],
)
def test_states_of_another_structure_are_refused(arguments, message) -> None:
    """With update_every above 1 a state holds γ, which belongs to the structure in every detail."""
    model, optimizer = small()
    give_gradients(model)
    optimizer.step()
    state = optimizer.state_dict()
    _, other = small(**arguments)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    same, other = small()
    same[-1].p = 0.5  # no part of γ
    other.load_state_dict(state)


def test_arguments_of_functions_are_part_of_the_structure() -> None:
    class Net(nn.Module):
        def __init__(self, size) -> None:
            super().__init__()
            self.conv, self.size = nn.Conv1d(1, 2, 3), size

        def forward(self, x):
            return F.max_pool1d(self.conv(x), self.size, 1, self.size // 2)

    states = [PathSGD(Net(size), 0.1, input_shape=(1, 9)).state_dict()["path"]["structure"] for size in (3, 3, 5)]
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_state_must_be_a_dict(state) -> None:
    with pytest.raises(TypeError, match=f"state_dict must be a dict.*got {type(state).__name__}"):
        PathSGD(mlp(3, 2), 0.1).load_state_dict(state)
