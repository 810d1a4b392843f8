"""Layers of the other wings take part in paths through the protocol `__path_weights__`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finite_width as fw


@pytest.mark.parametrize("layout", ["matrix", "in_out"])
def test_tt_layers_have_the_paths_of_their_cores(layout) -> None:
    """Φ at p = 1 is the norm of the matrix that the cores' absolute values make."""
    torch.manual_seed(0)
    model = nn.Sequential(fw.tt.TTLinear(12, 8, rank=3, layout=layout), nn.ReLU(), nn.Linear(8, 2)).double()
    layer = model[0]
    positive = fw.tt.TTLinear(12, 8, rank=3, layout=layout).double()
    positive.set_cores([core.detach().abs() for core in layer.cores])
    nn.init.zeros_(positive.bias)
    matrix = positive(torch.eye(12, dtype=torch.float64)).T  # [8, 12]
    values = matrix.sum(1) + layer.bias.abs()
    expected = (model[2].weight.abs() @ values + model[2].bias.abs()).sum()
    assert fw.pathsgd.path_norm(model, p=1, input_shape=(12,)).item() == pytest.approx(expected.item(), rel=1e-12)
    gamma = fw.pathsgd.path_gamma(model, p=1, input_shape=(12,))
    assert set(gamma) == {name for name, _ in model.named_parameters()}
    assert all((values > 0).all() for values in gamma.values())
    optimizer = fw.pathsgd.PathSGD(model, 1e-4, input_shape=(12,))
    model(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
    before = layer.core_0.clone()
    gamma = fw.pathsgd.path_gamma(model, input_shape=(12,))
    optimizer.step()
    torch.testing.assert_close(before - layer.core_0, 1e-4 * layer.core_0.grad / gamma["0.core_0"])


def test_bayesian_layers_have_paths_in_mean_mode_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(fw.bayes.BayesLinear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"^0: .*mean mode"):
        fw.pathsgd.path_norm(model, input_shape=(5,))
    plain = nn.Sequential(model[0].mean_layer(), nn.ReLU(), model[2])
    with fw.bayes.mean_mode(model):
        norm = fw.pathsgd.path_norm(model, input_shape=(5,))
        gamma = fw.pathsgd.path_gamma(model, input_shape=(5,))
    torch.testing.assert_close(norm, fw.pathsgd.path_norm(plain))
    torch.testing.assert_close(gamma["0.weight_mu"], fw.pathsgd.path_gamma(plain)["0.weight"])


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_bias_beside_values_of_another_size(p) -> None:
    """Behind 2^(110 p) and 2^(−50 p) values carry a large exponent, and are small beside the bias all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), fw.tt.TTLinear(4, 4, rank=2, bias=True),
        nn.Linear(4, 1),
    ).double()  # fmt: skip
    for big, small in ((2.0**110, 2.0**-50), (2.0**300, 2.0**-300), (2.0**-300, 2.0**-100)):
        nn.init.constant_(model[0].weight, big)
        nn.init.constant_(model[1].weight, small)
        powers = [each.detach().abs().pow(p).requires_grad_() for each in model.parameters()]
        names = [name for name, _ in model[2].named_parameters()]
        x = torch.ones(1, 4, dtype=torch.float64) @ powers[0].T @ powers[1].T
        x = torch.func.functional_call(model[2], dict(zip(names, powers[2:-2], strict=True)), (x,))
        phi = (x @ powers[-2].T + powers[-1]).sum()
        assert fw.pathsgd.path_norm(model, p, power=True).item() == pytest.approx(phi.item(), rel=1e-12)
        masses = torch.autograd.grad(phi, powers)
        for found, mass in zip(fw.pathsgd.path_gamma(model, p).values(), masses, strict=True):
            torch.testing.assert_close(found, mass ** (2 / p), rtol=1e-10, atol=0)
