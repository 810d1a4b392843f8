"""What a module's graph cannot tell is refused, and tracing leaves the module as it was."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from pathsgd.networks import mlp
from pathsgd.test_calls import refused

P = fw.pathsgd


def shout(module, args, output):
    return 3 * output


def scale(module, args):
    return (args[0] * 10,)


@pytest.mark.parametrize("place", ["", "0", "1", "2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_layers_are_refused(kind, place) -> None:
    model = mlp(2, 3, 1)
    hook = shout if kind == "register_forward_hook" else scale
    handle = getattr(model.get_submodule(place), kind)(hook)
    refused(model, f"^{place or 'model'}: it has a forward hook, {hook.__name__}")
    handle.remove()
    P.path_norm(model)


def test_hooks_of_a_part_are_followed() -> None:
    """A part that is no layer runs while it is traced, with its hooks."""
    model = nn.Sequential(mlp(2, 3, bias=False), mlp(3, 1, bias=False)).double()
    model[0].register_forward_hook(lambda module, args, output: output + output)
    assert P.path_norm(model, 1).item() == 2 * P.path_norm(nn.Sequential(*model[0], *model[1]), 1).item()


def test_own_hooks_and_own_forwards_are_no_obstacle() -> None:
    model = mlp(2, 3, 1, norm=True)
    kept = P.PathSGD(model, 0.1)
    P.path_norm(model)
    P.path_norm(copy.deepcopy(model))
    model[0].forward = model[0].forward
    P.path_norm(model)
    del kept


@pytest.mark.parametrize("place", ["", "0"])
def test_a_forward_of_one_instance_is_refused(place) -> None:
    model = mlp(2, 3, 1)
    model.get_submodule(place).forward = lambda x: torch.tanh(x)
    refused(model, f"^{place or 'model'}: its forward was replaced on the instance")


class Skips(nn.Module):
    """Leaves a layer out at random while it trains."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(3, 3), nn.Linear(3, 2), draw

    def forward(self, x):
        if self.training and self.draw() < 0.5:
            return self.b(x)
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("draw", [lambda: torch.rand(1).item(), random.random])
def test_random_control_flow_is_refused(draw) -> None:
    before = torch.get_rng_state(), random.getstate()
    model = Skips(draw)
    start = torch.get_rng_state()
    refused(model, "draws random numbers")
    assert torch.equal(start, torch.get_rng_state())
    assert before[1] == random.getstate()
    P.path_norm(model.eval())


class Writes(nn.Module):
    """Keeps its activations and counts its calls."""

    def __init__(self, fails=False) -> None:
        super().__init__()
        self.a, self.b, self.fails = nn.Linear(3, 4), nn.Linear(4, 2), fails
        self.calls, self.seen, self.named, self.features = 0, ["first"], {"x": 1}, None
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.counter.add_(1)
        self.features = F.relu(self.a(x))
        self.seen.append(self.features)
        self.named["h"] = self.features
        self.extra = self.features
        if self.fails and x.sum() > 0:
            return x
        return self.b(self.features)


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_stays_as_it_was(fails) -> None:
    model = Writes(fails)
    seen = model.seen
    if fails:
        refused(model, "cannot follow")
    else:
        P.path_norm(model)
        P.PathSGD(model, 0.1)
    assert (model.calls, model.features, model.named, model.counter.item()) == (0, None, {"x": 1}, 0)
    assert model.seen is seen
    assert seen == ["first"]
    assert not hasattr(model, "extra")
    copy.deepcopy(model)


def test_constants_of_a_forward_are_refused() -> None:
    class Blurs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.a(x), torch.ones(2, 3))

    model = Blurs()
    refused(model, "made in the forward has no paths; make it a buffer")
    assert not hasattr(model, "_tensor_constant0")


def test_parameters_without_real_values_are_refused() -> None:
    for call in (P.path_norm, P.path_gamma, P.rescale_, lambda model: P.PathSGD(model, 0.1)):
        with pytest.raises(TypeError, match=r"^weight must be real, got torch\.complex64"):
            call(nn.Linear(2, 2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"^weight is on the meta device"):
            call(nn.Linear(2, 2, device="meta"))


def test_alpha_dropout_has_paths_in_eval_mode_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.5), nn.Linear(2, 1))
    refused(model, "^1: AlphaDropout in training mode")
    assert P.path_norm(model.eval()).item() == P.path_norm(nn.Sequential(model[0], model[2])).item()
