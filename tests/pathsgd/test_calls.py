"""Operations called in their less usual ways: counted rightly or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from pathsgd.networks import mlp

P = fw.pathsgd


class Calls(nn.Module):
    """Two Linear layers with `call` between them."""

    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.o, self.call = nn.Linear(4, 4), nn.Linear(4, 2), call

    def forward(self, x):
        return self.o(self.call(self, self.a(x)))


class Pools(nn.Module):
    """A convolution, and a pool as `pool` says."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv1d(1, 2, 3), pool

    def forward(self, x):
        return self.pool(self.conv(x))


def refused(model, message, **settings) -> None:
    for call in (P.path_norm, P.path_gamma, P.rescale_, lambda each, **named: P.PathSGD(each, 0.1, **named)):
        with pytest.raises(ValueError, match=message):
            call(model, **settings)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: torch.add(x, F.relu(x), alpha=2),
        lambda m, x: x.add(F.relu(x), alpha=2),
        lambda m, x: x.add_(F.relu(x), alpha=0.5),
        lambda m, x: torch.add(input=x, other=x),
        lambda m, x: x - F.relu(x),
        lambda m, x: torch.sub(x, x, alpha=2),
        lambda m, x: x.mean(()),
    ],
)
def test_sums_that_are_not_plain_are_refused(call) -> None:
    refused(Calls(call), "paths|dimensions|must add")


def test_alpha_is_named() -> None:
    refused(Calls(lambda m, x: torch.add(x, x, alpha=2)), r"the model.s forward: add must add two .* without alpha")
    assert P.path_norm(Calls(lambda m, x: torch.add(x, x, alpha=1))) > 0


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (lambda x: F.max_pool1d(x, 2, 1, 0, 2), "dilated max pool"),
        (lambda x: F.max_pool1d(x, 2, dilation=2), "dilated max pool"),
        (lambda x: torch.max_pool1d(x, 2, 1, 0, 2), "dilated max pool"),
        (lambda x: F.max_pool1d(x, 2, return_indices=True)[0], "no paths"),
        (nn.MaxPool1d(2, dilation=(2,)), "dilated max pool"),
        (nn.MaxPool1d(2, return_indices=True), "returns its indices"),
        (nn.AdaptiveMaxPool1d(2, return_indices=True), "returns its indices"),
    ],
)
def test_pools_that_are_refused(pool, message) -> None:
    refused(Pools(pool), message, input_shape=(1, 9))


@pytest.mark.parametrize("ceil", [False, True])
def test_functional_pools_are_as_their_layers(ceil) -> None:
    torch.manual_seed(0)
    layer = Pools(nn.MaxPool1d(2, 2, 0, 1, ceil_mode=ceil))
    for call in (
        lambda x: F.max_pool1d(x, 2, 2, 0, 1, ceil),
        lambda x: F.max_pool1d(x, 2, ceil_mode=ceil, dilation=1),
        lambda x: F.max_pool1d(input=x, kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=ceil),
        lambda x: torch.max_pool1d(x, 2, 2, 0, 1, ceil),
    ):
        model = Pools(call)
        model.load_state_dict(layer.state_dict())
        assert P.path_norm(model, input_shape=(1, 9)).item() == P.path_norm(layer, input_shape=(1, 9)).item()
        model(torch.ones(1, 1, 9))


class Sequence(nn.Module):
    def __init__(self, batch_first, before=lambda x: x) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 3, nonlinearity="relu", batch_first=batch_first)
        self.before = before

    def forward(self, x):
        return self.rnn(self.before(x))[0]


def test_an_rnn_finds_its_batch_on_its_axis() -> None:
    refused(Sequence(False), "rnn: an RNN with batch_first=False has its batch on axis 1", input_shape=(5, 2))
    refused(Sequence(True, lambda x: x.transpose(0, 1)), "rnn: an RNN with batch_first=True", input_shape=(5, 2))
    torch.manual_seed(0)
    first, second = Sequence(True), Sequence(False, lambda x: x.transpose(0, 1))
    second.load_state_dict(first.state_dict())
    assert P.path_norm(first, input_shape=(5, 2)).item() == P.path_norm(second, input_shape=(5, 2)).item()


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.relu(input=m.a(input=x)),
        lambda m, x: torch.flatten(input=m.a(x), start_dim=1),
        lambda m, x: F.linear(input=x, weight=m.a.weight, bias=m.a.bias),
        lambda m, x: F.linear(x, bias=m.a.bias, weight=m.a.weight),
    ],
)
def test_inputs_by_keyword(call) -> None:
    torch.manual_seed(0)
    model, plain = Calls(call), Calls(lambda m, x: m.a(x))
    model.load_state_dict(plain.state_dict())
    assert P.path_norm(model).item() == P.path_norm(plain).item()
    P.PathSGD(model, 0.1)


def test_a_chain_by_keyword_takes_steps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.o = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.o(input=F.relu(self.norm(input=self.a(input=x))))

    optimizer = P.PathSGD(model := Net(), 1e-3)
    assert optimizer._stages is not None
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()


def test_further_arguments_of_a_layer_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def __path_weights__(self):
            return ("weight",)

        def forward(self, x, y):
            return x * self.weight + y

    model = Calls(lambda m, x: m.two(x, x))
    model.two = Two()
    refused(model, "two: a layer takes its input alone here, and is called with 2 arguments")


@pytest.mark.parametrize("name", ["flatten", "view", "size", "dim", "add", "relu"])
def test_a_layer_may_have_the_name_of_a_method(name) -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: getattr(m, name)(x))
    setattr(model, name, nn.Linear(4, 4))
    plain = nn.Sequential(model.a, getattr(model, name), model.o)
    assert P.path_norm(model).item() == P.path_norm(plain).item()
    gamma, expected = P.path_gamma(model), P.path_gamma(plain)
    for one, two in ((f"{name}.weight", "1.weight"), ("a.bias", "0.bias"), ("o.weight", "2.weight")):
        torch.testing.assert_close(gamma[one], expected[two])


def test_arguments_are_named() -> None:
    model = mlp(4, 3, 2)
    for settings, error, message in (
        ({"p": "2"}, TypeError, "p must be a number, got str"),
        ({"p": None}, TypeError, "p must be a number, got NoneType"),
        ({"lr": "a"}, TypeError, "lr must be a number, got str"),
        ({"lr": True}, TypeError, "lr must be a number, got bool"),
        ({"lr": torch.tensor(True)}, TypeError, "lr must be a number, got a tensor of bool"),
        ({"lr": None}, TypeError, "lr must be a number, got NoneType"),
        ({"momentum": "a"}, TypeError, "momentum must be a number, got str"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got NoneType"),
        ({"lr": torch.tensor(1j)}, TypeError, r"lr must be real, got torch\.complex64"),
        ({"nesterov": "no", "momentum": 0.9}, TypeError, "nesterov must be True or False, got 'no'"),
        ({"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
        ({"master_weights": "no"}, TypeError, "master_weights must be True or False, got 'no'"),
        ({"input_shape": 4}, TypeError, "input_shape must be a tuple of ints .*, got 4"),
        ({"input_shape": "a"}, TypeError, "input_shape must be a tuple of ints .*, got 'a'"),
        ({"input_shape": (2.5,)}, TypeError, "input_shape must be a tuple of ints"),
    ):
        with pytest.raises(error, match=message):
            P.PathSGD(model, **{"lr": 0.1, **settings})
    for call in (P.path_norm, P.path_gamma, P.max_norm, P.balance_):
        with pytest.raises(TypeError, match="p must be a number, got str"):
            call(model, "2")
        with pytest.raises(TypeError, match="p must be real"):
            call(model, torch.tensor(1j))
    for name in ("power", "log"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'x'"):
            P.path_norm(model, **{name: "x"})
    lazy = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    refused(lazy, r"0\.weight is not initialised yet: run the model once", input_shape=(4,))
    lazy(torch.ones(1, 4))
    P.PathSGD(lazy, 0.1)


class Rows(nn.Module):
    """F.linear with a weight of one row without its axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(F.relu(self.a(x)), self.w)


def test_a_weight_of_one_axis() -> None:
    torch.manual_seed(0)
    model = Rows().double()
    plain = nn.Sequential(model.a, nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    plain[2].weight = nn.Parameter(model.w.detach()[None])
    assert P.path_norm(model).item() == pytest.approx(P.path_norm(plain).item(), rel=1e-12)
    assert P.max_norm(model).item() == pytest.approx(P.max_norm(plain).item(), rel=1e-12)
    gamma, expected = P.path_gamma(model), P.path_gamma(plain)
    torch.testing.assert_close(gamma["w"], expected["2.weight"][0])
    torch.testing.assert_close(gamma["a.weight"], expected["0.weight"])
    optimizer, before = P.PathSGD(model, 1e-3), model.w.detach().clone()
    x = torch.randn(5, 3, dtype=torch.float64)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.w, before - 1e-3 * model.w.grad / gamma["w"])
    y = model(x)
    assert len(P.rescale_(model, seed=0)) == 4
    torch.testing.assert_close(model(x), y)


def test_an_input_shape_that_does_not_fit_is_named() -> None:
    pictures = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    for model, shape in ((pictures, (1, 9, 9)), (mlp(4, 3, 2), (5,)), (pictures, (1,))):
        refused(model, r"input_shape \(.*\) does not fit the model", input_shape=shape)
