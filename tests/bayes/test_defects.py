"""Known defects of variational layers elsewhere, each a test: gradients, scale of the KL, extreme ρ, parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
from finite_width.bayes import BayesConv2d, BayesLinear, ops
from finite_width.bayes.layers import draw_seed


def explicit(layer: BayesLinear, x: Tensor, seed: Tensor) -> Tensor:
    """The layer's output at the noise of `seed`, in plain torch and float64-safe: the oracle."""
    weight = layer.weight_mu + F.softplus(layer.weight_rho) * ops.noise(layer.weight_mu.detach(), seed, 0, 0)
    assert layer.bias_mu is not None
    assert layer.bias_rho is not None
    bias = layer.bias_mu + F.softplus(layer.bias_rho) * ops.noise(layer.bias_mu.detach(), seed, 0, 1)
    return F.linear(x, weight, bias)


def exact_kl(layer: Any, std: float) -> Tensor:
    """By torch.distributions, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for mu, rho in ((layer.weight_mu, layer.weight_rho), (layer.bias_mu, layer.bias_rho)):
        q = torch.distributions.Normal(mu.double(), F.softplus(rho.double()))
        total = total + torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, std)).sum()
    return total


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_two_forwards_before_one_backward() -> None:
    """Elsewhere the noise is a buffer that the second forward overwrites: relative error 0.8 in ρ's gradient."""
    layer = BayesLinear(6, 4, init_std=0.5, dtype=torch.float64)
    x1, x2 = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.manual_seed(7)
    ours = gradients((layer(x1) ** 2).sum() + (layer(x2) ** 3).sum() + fw.bayes.kl(layer), layer)
    torch.manual_seed(7)
    seeds = draw_seed(x1.device), draw_seed(x1.device)
    right = gradients(
        (explicit(layer, x1, seeds[0]) ** 2).sum() + (explicit(layer, x2, seeds[1]) ** 3).sum() + exact_kl(layer, 1.0),
        layer,
    )
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1024, 1024), (37, 11)])
def test_kl_is_a_sum_over_all_weights(shape: tuple[int, int]) -> None:
    """Elsewhere it is a mean over each tensor: 5.06 for 1,266,536."""
    layer = BayesLinear(*shape, init_std=0.05, prior=fw.bayes.GaussianPrior(std=0.1))
    right = float(exact_kl(layer, 0.1).detach())
    assert fw.bayes.kl(layer).item() == pytest.approx(right, rel=1e-5)
    layer(torch.ones(2, shape[0]))
    assert fw.bayes.kl(layer).item() == pytest.approx(right, rel=1e-5)  # as fused into the forward
    assert right > 0.1 * math.prod(shape)


def test_prior_std_is_a_standard_deviation() -> None:
    """Elsewhere an argument called prior_variance is used as a standard deviation."""
    sigma = 0.25
    layer = BayesLinear(50, 50, bias=False, init_std=sigma, prior=fw.bayes.GaussianPrior(std=sigma))
    nn.init.zeros_(layer.weight_mu)
    assert abs(fw.bayes.kl(layer).item()) < 1e-6 * 2500  # q = p
    torch.manual_seed(0)
    weight = layer(torch.eye(50)).detach()
    assert float(weight.std()) == pytest.approx(sigma, rel=0.05)


def test_no_duplicate_parameters() -> None:
    """Elsewhere 4.20 million parameters stand for 2.10 million."""
    layer = BayesLinear(1024, 1024)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (1024 * 1024 + 1024)
    assert list(layer.state_dict()) == ["weight_mu", "weight_rho", "bias_mu", "bias_rho"]


def test_gradient_of_the_prior_reaches_mu() -> None:
    """Elsewhere it vanishes: -0.006 for -70."""
    for prior in (fw.bayes.GaussianPrior(std=0.1), fw.bayes.ScaleMixturePrior(0.5, 0.1, 0.1)):
        layer = BayesLinear(100, 100, bias=False, prior=prior, init_std=1e-3)
        nn.init.constant_(layer.weight_mu, -0.7)
        (gradient,) = torch.autograd.grad(fw.bayes.kl(layer), layer.weight_mu)
        assert float(gradient.mean()) == pytest.approx(-70, rel=1e-3)


EXTREMES = [-1e4, -200.0, -104.0, -90.0, -88.0, -87.3, -50.0, -17.0, -1.0, 0.0, 1.0, 17.0, 89.0, 200.0, 1e4]


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", EXTREMES)
def test_extreme_rho(rho: float, dtype: torch.dtype, estimator: str) -> None:
    """Elsewhere: KL inf from ρ = -104 down, NaN from 89 up. Output, KL and gradients are finite, and KL is right."""
    layer = BayesLinear(3, 2, estimator=estimator, dtype=dtype)
    nn.init.constant_(layer.weight_rho, rho)
    assert layer.bias_rho is not None
    nn.init.constant_(layer.bias_rho, rho)
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    y = layer(x)
    kl = fw.bayes.kl(layer)
    grads = torch.autograd.grad(y.sum() + kl, [x, *layer.parameters()])
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(kl))
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    # log σ = ρ + O(e^ρ) below, σ = ρ + O(e^-ρ) above: exact in float64.
    log_sigma = rho if rho < -40 else math.log(math.log1p(math.exp(rho)) if rho < 40 else rho)
    sigma2 = 0.0 if rho < -40 else math.exp(2 * log_sigma)
    total = sum(float((mu.detach().double() ** 2).sum()) for mu in (layer.weight_mu, layer.bias_mu) if mu is not None)
    right = 8 * (-log_sigma + sigma2 / 2 - 0.5) + total / 2
    assert kl.item() == pytest.approx(right, rel=2e-6, abs=2e-6)
    (kl_rho,) = torch.autograd.grad(fw.bayes.kl(layer), layer.weight_rho)
    slope = 1.0 if rho < -40 else 1 / (1 + math.exp(-rho))
    over = 1.0 if rho < -40 else slope / math.exp(log_sigma)
    expected = (0.0 if rho < -40 else math.exp(log_sigma) * slope) - over
    assert float(kl_rho[0, 0]) == pytest.approx(expected, rel=3e-6, abs=3e-6)


@pytest.mark.parametrize("rho", [-1e4, -104.0, -17.0, 17.0, 1e4])
def test_extreme_rho_of_a_mixture_prior(rho: float) -> None:
    layer = BayesLinear(3, 2, prior=fw.bayes.ScaleMixturePrior())
    nn.init.constant_(layer.weight_rho, rho)
    loss = layer(torch.randn(4, 3)).sum() + fw.bayes.kl(layer)
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(g).all()) for g in gradients(loss, layer))


def test_convolution_two_forwards_before_one_backward() -> None:
    layer = BayesConv2d(2, 3, 3, init_std=0.5, dtype=torch.float64)
    x1, x2 = torch.randn(2, 2, 2, 5, 5, dtype=torch.float64)
    torch.manual_seed(9)
    ours = gradients((layer(x1) ** 2).sum() + (layer(x2) ** 3).sum() + fw.bayes.kl(layer), layer)
    torch.manual_seed(9)
    losses = exact_kl(layer, 1.0)
    for x, power in ((x1, 2), (x2, 3)):
        seed = draw_seed(x.device)
        weight = layer.weight_mu + F.softplus(layer.weight_rho) * ops.noise(layer.weight_mu.detach(), seed, 0, 0)
        assert layer.bias_mu is not None
        assert layer.bias_rho is not None
        bias = layer.bias_mu + F.softplus(layer.bias_rho) * ops.noise(layer.bias_mu.detach(), seed, 0, 1)
        losses = losses + (F.conv2d(x, weight, bias) ** power).sum()
    for a, b in zip(ours, gradients(losses, layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
