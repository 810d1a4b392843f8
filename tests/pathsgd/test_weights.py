"""How a model may hold and read its weights: through views, tied, by a parametrization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import finite_width as fw
from finite_width.pathsgd.masses import masses
from finite_width.pathsgd.structure import trace
from pathsgd.networks import Recurrent, mlp

P = fw.pathsgd


class Tied(nn.Module):
    """An autoencoder whose decoder is a view of its encoder's weight."""

    def __init__(self, view=lambda weight: weight.transpose(0, 1), inputs: int = 4, hidden: int = 3) -> None:
        super().__init__()
        self.e, self.view = nn.Linear(inputs, hidden), view

    def forward(self, x):
        return F.linear(F.relu(self.e(x)), self.view(self.e.weight))


class Viewed(nn.Module):
    """A convolution and a Linear whose weights and bias are views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.flat = nn.Parameter(torch.randn(18)), nn.Parameter(torch.randn(12))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = F.relu(F.conv1d(x, self.kernel.view(3, 2, 3), padding=1))
        return F.linear(torch.flatten(x, 1), self.flat.reshape(1, 12), self.bias[:1])


class Reads(nn.Module):
    """A Linear followed by something that reads a parameter or an activation as `read` says."""

    def __init__(self, read) -> None:
        super().__init__()
        self.a, self.W, self.read = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), read

    def forward(self, x):
        return self.read(self, F.relu(self.a(x)))


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "view", [lambda w: w.transpose(0, 1), lambda w: w.T, lambda w: w.t(), lambda w: torch.permute(w, (1, 0)).clone()]
)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_tied_weights_count_every_use(view, p) -> None:
    torch.manual_seed(0)
    model = Tied(view).double()
    weight, bias = (each.detach().abs().pow(p).requires_grad_() for each in (model.e.weight, model.e.bias))
    phi = (weight.T @ (weight.sum(1) + bias)).sum()
    assert P.path_norm(model, p, power=True).item() == pytest.approx(phi.item(), rel=1e-12)
    gamma = P.path_gamma(model, p)
    for found, mass in zip(gamma.values(), torch.autograd.grad(phi, (weight, bias)), strict=True):
        torch.testing.assert_close(found, mass ** (2 / p))
    optimizer, before = P.PathSGD(model, 1e-3, p=p), values(model)
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name] - 1e-3 * value.grad / gamma[name])
    assert P.max_norm(model) > 0


def test_kappa_counts_the_second_use_of_a_view() -> None:
    """Φ = a² with a = w²: κ1 = 2a, κ2 = 2a."""
    model = Tied(inputs=1, hidden=1)
    nn.init.constant_(model.e.weight, 3.0)
    nn.init.zeros_(model.e.bias)
    assert masses(trace(model), 2.0, shared="kappa").of[model.e.weight].item() == 36


def test_views_train_as_parameters_do() -> None:
    torch.manual_seed(0)
    model = Viewed().double()
    layers = [nn.Conv1d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)]
    plain = nn.Sequential(*layers).double()
    with torch.no_grad():
        plain[0].weight.copy_(model.kernel.view(3, 2, 3))
        plain[3].weight.copy_(model.flat.view(1, 12))
        plain[3].bias.copy_(model.bias[:1])
    optimizers = [P.PathSGD(each, 1e-3, momentum=0.9, input_shape=(2, 4)) for each in (model, plain)]
    for _ in range(3):
        x = torch.randn(5, 2, 4, dtype=torch.float64)
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.flatten()[: two.numel()], two.flatten())


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: F.linear(x, F.relu(m.W)),
        lambda m, x: F.linear(x, m.W + m.W),
        lambda m, x: F.linear(x, torch.cat([m.W, m.W])),
        lambda m, x: F.linear(x, m.W.mean(0, keepdim=True)),
        lambda m, x: F.linear(x, m.a(m.W)),
        lambda m, x: F.linear(x, x),
        lambda m, x: F.linear(m.W, m.W),
        lambda m, x: x.T * 2,
        lambda m, x: x // 2,
        lambda m, x: x.data,
    ],
)
def test_other_readings_of_a_parameter_are_refused(read) -> None:
    for call in (P.path_norm, lambda model: P.PathSGD(model, 0.1), P.rescale_):
        with pytest.raises(ValueError, match=r"^(the model's forward|a): "):
            call(Reads(read))


def test_sizes_of_a_parameter_are_no_uses() -> None:
    model = Reads(lambda m, x: F.linear(x.view(-1, m.W.shape[1] * 2 // 2), m.W, None))
    plain = nn.Sequential(model.a, nn.ReLU(), nn.Linear(4, 4, bias=False))
    plain[2].weight = model.W
    assert P.path_norm(model).item() == P.path_norm(plain).item()


def computed(kind):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    if kind == "conv":
        model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    if kind == "rnn":
        model = nn.Sequential(Recurrent(4, 3).rnn)
        parametrizations.orthogonal(model[0], "weight_hh_l0")
    elif kind == "prune":
        prune.l1_unstructured(model[0], "weight", 2)
    elif kind == "old":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(model[0])
    else:
        parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize("kind", ["linear", "conv", "rnn", "prune", "old"])
def test_computed_weights_are_refused(kind) -> None:
    model = computed(kind)
    before, shape = values(model), {"rnn": (5, 4), "conv": (4, 1)}.get(kind, (4,))
    for call in (P.path_norm, P.path_gamma, P.rescale_, lambda model, **named: P.PathSGD(model, 0.1, **named)):
        with pytest.raises(ValueError, match=r"^0: weight.*computed from other tensors"):
            call(model, input_shape=shape)
    assert unchanged(model, before)


def test_a_gradient_without_a_path_is_refused() -> None:
    model = mlp(4, 3, 2)
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    optimizer = P.PathSGD(model, 0.1)
    before = values(model)
    (model[0](torch.ones(2, 4)).sum() * model.temperature).backward()
    with pytest.raises(ValueError, match="temperature has a gradient, but no path"):
        optimizer.step()
    assert unchanged(model, before)
    model.temperature.grad = None
    optimizer.step()
    recurrent = Recurrent(3, 4, 2)
    optimizer = P.PathSGD(recurrent, 0.1, input_shape=(1, 3))  # a sequence of one step: weight_hh is on no path
    recurrent(torch.ones(2, 4, 3)).sum().backward()
    with pytest.raises(ValueError, match="weight_hh_l0 has a gradient"):
        optimizer.step()
