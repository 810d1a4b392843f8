"""Path norm, γ, max norm and rescaling against enumerated paths and known vectors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import finite_width as fw
from finite_width.pathsgd.masses import masses
from finite_width.pathsgd.rescale import Units
from finite_width.pathsgd.structure import trace
from pathsgd.networks import Dag, Recurrent, ResNet18, enumerate_paths, lenet, mlp


def known_network(bias: bool) -> nn.Sequential:
    model = mlp(2, 2, 1, bias=bias)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2], [3, 4]]))
        model[2].weight.copy_(torch.tensor([[5.0, -6]]))
        if bias:
            model[0].bias.copy_(torch.tensor([1.0, -1]))
            model[2].bias.fill_(2.0)
    return model


@pytest.mark.parametrize(
    ("p", "power", "power_bias", "second", "second_bias"),
    [(1, 57, 70, [9, 49], [16, 64]), (2, 1025, 1090, [5, 25], [6, 26]), (math.inf, 24, 24, [4, 16], [4, 16])],
)
def test_known_vectors(p, power, power_bias, second, second_bias) -> None:
    for bias, phi, last in ((False, power, second), (True, power_bias, second_bias)):
        model = known_network(bias)
        assert fw.pathsgd.path_norm(model, p, power=True).item() == phi
        gamma = fw.pathsgd.path_gamma(model, p)
        assert gamma["0.weight"].tolist() == [[25, 25], [36, 36]]
        assert gamma["2.weight"].tolist() == [last]
        if bias:
            assert gamma["0.bias"].tolist() == [25, 36]
            assert gamma["2.bias"].tolist() == [1]
    assert abs(fw.pathsgd.path_norm(known_network(False)).item() - 32.0156) < 1e-4
    assert abs(fw.pathsgd.path_norm(known_network(True)).item() - 33.0151) < 1e-4


def test_known_recurrent_vector() -> None:
    model = Recurrent(1, 1, 1, bias=False)
    for parameter, value in zip(model.parameters(), (3.0, 2.0, 5.0), strict=True):
        nn.init.constant_(parameter, value)
    assert fw.pathsgd.path_norm(model, power=True, input_shape=(3, 1)).item() == 4725
    structure = trace(model, (3, 1))
    kappa1, kappa = masses(structure, 2.0).of, masses(structure, 2.0, shared="kappa").of
    wx, wh, wo = model.parameters()
    assert (kappa1[wx].item(), kappa1[wh].item(), kappa1[wo].item()) == (525, 2025, 189)
    assert (kappa[wx].item(), kappa[wh].item(), kappa[wo].item()) == (525, 2025 + 1800, 189)


@st.composite
def dags(draw):
    width, count = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    widths, spec, sizes = [width], [], []
    for _ in range(count):
        source, other = draw(st.integers(0, len(widths) - 1)), draw(st.integers(0, len(widths) - 1))
        kind = draw(st.sampled_from(["linear", "linear", "add", "cat"]))
        apart = widths[source] != widths[other]
        if (kind == "add" and apart) or (kind == "cat" and widths[source] + widths[other] > 6):
            kind = "linear"
        size = draw(st.integers(1, 3)) if kind == "linear" else widths[source] + (kind == "cat") * widths[other]
        spec.append((kind, source) if kind == "linear" else (kind, source, other))
        sizes.append(size)
        widths.append(size)
    spec.append(("linear", len(widths) - 1))
    sizes.append(draw(st.integers(1, 2)))
    model = Dag(spec, width, sizes, bias=draw(st.booleans())).double()
    torch.manual_seed(draw(st.integers(0, 10**6)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        if draw(st.integers(0, 4)) == 0:
            parameter.data.view(-1)[0] = 0  # dead edges
    return model, width


@settings(max_examples=60, deadline=None)
@given(dags(), st.sampled_from([1.0, 2.0, 3.5]))
def test_against_enumerated_paths(dag, p) -> None:
    model, width = dag
    paths = enumerate_paths(model, width)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def weight(edge):
        return tensors[edge[0]][edge[1]].item()

    phi = fw.pathsgd.path_norm(model, p, input_shape=(width,), power=True)
    assert phi.item() == pytest.approx(paths.total(weight, p), rel=1e-10)
    assert math.exp(fw.pathsgd.path_norm(model, p, input_shape=(width,), log=True).item()) == pytest.approx(
        paths.total(weight, p) ** (1 / p), rel=1e-10
    )
    gamma = fw.pathsgd.path_gamma(model, p, input_shape=(width,))
    for name, values in gamma.items():
        for index in torch.cartesian_prod(*map(torch.arange, values.shape)).reshape(-1, values.dim()).tolist():
            expected = paths.gamma(weight, (name, tuple(index)), p)
            assert values[tuple(index)].item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    before = model(torch.ones(2, width, dtype=torch.float64))
    if Units(trace(model, (width,))).find()[1] == 0:
        with pytest.raises(ValueError, match="no hidden unit"):
            fw.pathsgd.rescale_(model, seed=0, input_shape=(width,))
        return
    fw.pathsgd.rescale_(model, seed=0, input_shape=(width,))
    torch.testing.assert_close(model(torch.ones(2, width, dtype=torch.float64)), before, rtol=1e-10, atol=1e-10)
    again = fw.pathsgd.path_norm(model, p, input_shape=(width,), power=True).item()
    assert again == pytest.approx(phi.item(), rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.sampled_from([1.0, 2.0, 3.5]), st.integers(0, 10**6))
def test_path_norm_is_the_least_max_norm(sizes, p, seed) -> None:
    """φ_p = min over rescalings of μ^d, reached by balance_ and by no random rescaling undercut."""
    torch.manual_seed(seed)
    model = mlp(*sizes, 1, bias=False).double()
    phi = fw.pathsgd.path_norm(model, p).item()
    depth = len(sizes)
    for trial in range(3):
        if depth > 1:
            fw.pathsgd.rescale_(model, seed=trial)
        assert fw.pathsgd.max_norm(model, p).item() ** depth >= phi * (1 - 1e-9)
    mu = fw.pathsgd.balance_(model, p).item()
    assert fw.pathsgd.max_norm(model, p).item() == pytest.approx(mu, rel=1e-9)
    assert mu**depth == pytest.approx(phi, rel=1e-9)
    assert fw.pathsgd.path_norm(model, p).item() == pytest.approx(phi, rel=1e-9)


def test_balance_with_biases_is_least() -> None:
    torch.manual_seed(0)
    model = mlp(3, 4, 4, 2).double()
    mu = fw.pathsgd.balance_(model).item()
    assert fw.pathsgd.max_norm(model).item() == pytest.approx(mu, rel=1e-9)
    for seed in range(20):
        other = copy.deepcopy(model)
        fw.pathsgd.rescale_(
            other, factors=torch.exp(0.05 * torch.randn(8, generator=torch.Generator().manual_seed(seed)))
        )
        assert fw.pathsgd.max_norm(other).item() >= mu * (1 - 1e-9)


def test_chain_and_network_agree() -> None:
    """The sweeps' γ against the |w|^p network's, BatchNorm included."""
    torch.manual_seed(0)
    model = mlp(5, 9, 7, 3, norm=True).double().eval()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for p in (1.0, 2.0, 3.0):
        chain = fw.pathsgd.path_gamma(model, p)
        found = masses(trace(model), p)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(chain[name], found.of[parameter] ** (2 / p), rtol=1e-11, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_batchnorm_folds_into_its_layer(p) -> None:
    torch.manual_seed(1)
    model = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    )
    norm = model[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    # Two edges in a row, w and w_bn/σ, and a bias edge of its own beside the layer's bias.
    folded = copy.deepcopy(model)
    folded[1] = nn.Identity()
    with torch.no_grad():
        folded[0].weight.mul_(scale.view(-1, 1, 1, 1))
        bias = (model[0].bias * scale).abs() ** p + (norm.bias - norm.running_mean * scale).abs() ** p
        folded[0].bias.copy_(bias ** (1 / p))
    one, other = (fw.pathsgd.path_norm(m, p, input_shape=(2, 4, 4)).item() for m in (model, folded))
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((2, 5)),
        nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.Conv2d(2, 3, 3, dilation=2, bias=False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_layers_against_their_matrix(layer, p) -> None:
    """Each layer is a matrix of edges: Φ = Σ|entries|^p (in a max pool, a window has edges of weight 1)."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    shape = (2, 7, 7)
    basis = torch.eye(98, dtype=torch.float64).view(98, *shape)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), layer).double()
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[:, :, 0, 0] = torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        bias = getattr(layer, "bias", None)
        constant = layer(torch.zeros(1, *shape, dtype=torch.float64)) if not isinstance(layer, nn.MaxPool2d) else 0
        responses = layer(basis) - constant
        expected = (responses.abs() ** p).sum().item()
        if bias is not None:
            expected += (constant.abs() ** p).sum().item()
    assert fw.pathsgd.path_norm(model, p, input_shape=shape, power=True).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_path_norm_is_differentiable(p) -> None:
    """Against central differences; BatchNorm's folded bias moves with weight and bias."""
    torch.manual_seed(0)
    model = mlp(3, 4, 2, norm=True).double().eval()
    model[1].running_mean.normal_()
    fw.pathsgd.path_norm(model, p).backward()
    for parameter in model.parameters():
        for index in range(parameter.numel()):
            values, step = parameter.data.view(-1), 1e-5
            before = values[index].item()
            ends = []
            for sign in (1, -1):
                values[index] = before + sign * step
                ends.append(fw.pathsgd.path_norm(model, p).item())
            values[index] = before
            slope = (ends[0] - ends[1]) / (2 * step)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_depth_leaves_no_range() -> None:
    """200 layers of width 100: Φ leaves float64's range at p = 1, its logarithm and Path-SGD's steps do not."""
    torch.manual_seed(0)
    sizes = [100] * 201
    model = mlp(*sizes, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    logs = torch.zeros(100, dtype=torch.float64)
    values = torch.ones(100, dtype=torch.float64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            values = layer.weight.double().abs() @ values
            logs, values = logs + values.max().log(), values / values.max()
    expected = (logs[0] + values.sum().log()).item()
    assert expected > 710  # e^710 is infinite
    assert fw.pathsgd.path_norm(model, p=1, log=True).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (nn.GELU(), "1", "f\\(c x\\)"), (nn.Tanh(), "1", "f\\(c x\\)"), (nn.LayerNorm(4), "1", "all units"),
        (nn.LSTM(4, 4), "1", "gates"), (nn.PReLU(), "1", "slope"), (nn.Softmax(1), "1", "loss"),
        (nn.ReLU6(), "1", "saturates"),
    ],
)  # fmt: skip
def test_operations_without_paths_are_named(module, name, reason) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 1))
    with pytest.raises(ValueError, match=f"{name}: {type(module).__name__} has no paths.*{reason}"):
        fw.pathsgd.path_norm(model)
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), module))
    with pytest.raises(ValueError, match=r"1\.1: "):
        fw.pathsgd.PathSGD(nested, lr=0.1)


def test_bad_input() -> None:
    model = mlp(3, 4, 2)
    with pytest.raises(ValueError, match="p must be at least 1"):
        fw.pathsgd.path_norm(model, 0.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fw.pathsgd.path_norm(3)
    with pytest.raises(ValueError, match="input_shape is needed"):
        fw.pathsgd.path_norm(lenet())
    with pytest.raises(ValueError, match="no parameters"):
        fw.pathsgd.path_norm(nn.Sequential(nn.ReLU()), input_shape=(3,))
    with pytest.raises(ValueError, match="4 hidden units, got 3"):
        fw.pathsgd.rescale_(model, factors=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no hidden unit"):
        fw.pathsgd.rescale_(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"powers of two.*got 3"):
        fw.pathsgd.rescale_(model, factors=[1.0, 2.0, 3.0, 4.0], power_of_two=True)
    with pytest.raises(ValueError, match="factors must be positive and finite, got -2"):
        fw.pathsgd.rescale_(model, factors=[1.0, -2.0, 3.0, 4.0])
    with pytest.raises(TypeError, match="seed must be an int, got str"):
        fw.pathsgd.rescale_(model, seed="a")
    with pytest.raises(ValueError, match="chain of Linear"):
        fw.pathsgd.balance_(lenet(), input_shape=(1, 28, 28))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: mlp(6, 8, 5, 3), (6,)), (lenet, (1, 28, 28)), (lambda: ResNet18(4), (3, 32, 32)), (Recurrent, (5, 3))],
    ids=["mlp", "lenet", "resnet18", "rnn"],
)
def test_rescaling_by_powers_of_two_keeps_every_bit(make, shape) -> None:
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    factors = fw.pathsgd.rescale_(other, seed=1, power_of_two=True, input_shape=shape)
    assert len(factors.unique()) > 3
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    x = torch.randn(4, *shape)
    assert torch.equal(model(x), other(x))
