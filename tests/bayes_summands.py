"""How far a variational op may be from its reference: roundings times the size of what is summed, entry by entry.

The bound is derived, not fitted. With u = 2^-24, the unit roundoff of float32:

- a normal is off by at most 8u of itself: the polynomial of the logarithm ½u and its steps 4u, halved by the root, the
  root ½u, the angle 1u and its polynomials 2u, their product ½u, and the reference's own rounding ½u;
- σ and its relatives by at most 8u of themselves: the exponential 3u, log1p's polynomial 3u, products and quotient 2u;
- a relative error of s is as large an absolute one of log s: hence a summand 1 beside log s; so is the rounding of the
  product of s whose log the kernel takes, 1u a factor;
- a sum of n terms by at most n u of the sum of their absolute values, in any order; what else multiplies or adds, 1u.

float64 ops use the same float32 noise and are otherwise exact at this scale: 8u of what has noise in it, rounded up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from finite_width.bayes import reference

Sizes = tuple[list[Tensor], list[Tensor]]
UNIT = 2.0**-24
NOISE, SIGMA, REST = 8, 8, 8  # roundings


def roundings(terms: int) -> tuple[float, float]:
    """The bound for float32 and float64 ops, in sizes, where entries are sums of so many terms."""
    return (terms + NOISE + SIGMA + REST) * UNIT, (NOISE + 2) * UNIT


@dataclass
class Weights:
    """Sizes of one tensor of weights: of W = μ + σ ε, of its KL, and of the gradients."""

    mu: Tensor
    rho: Tensor
    normal: Tensor  # |ε|
    mean: Tensor | None = None
    std: float | None = None
    centred: bool = False

    @property
    def weight(self) -> Tensor:
        noise = reference.softplus(self.rho).sigma * self.normal
        return noise if self.centred else self.mu.abs() + noise

    @property
    def distance(self) -> Tensor:
        return self.mu.abs() + (0 if self.mean is None else self.mean.abs())

    @property
    def kl(self) -> Tensor:
        if self.std is None:
            return self.mu.new_zeros(())
        sigma = reference.softplus(self.rho).sigma
        logs = self.rho.abs() + (sigma.log() - self.rho.clamp_max(0)).abs() + 1
        return (logs + abs(math.log(self.std)) + 0.5 + (sigma**2 + self.distance**2) / (2 * self.std**2)).sum()

    def gradients(self, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of μ, ρ and the prior's mean, from |∂W|, with |∂kl| = 1."""
        parts = reference.softplus(self.rho)
        to_mu, to_rho, to_mean = (torch.zeros_like(self.mu) for _ in range(3))
        if grad is not None:
            to_mu = to_mu if self.centred else to_mu + grad
            to_rho = to_rho + grad * self.normal * parts.derivative
        if self.std is not None:
            to_mean = self.distance / self.std**2
            to_mu = to_mu + to_mean
            to_rho = to_rho + parts.sigma * parts.derivative / self.std**2 + parts.derivative_over_sigma
        return to_mu, to_rho, to_mean


def _normal(like: Tensor, seed: Tensor, sample: int, stream: int) -> Tensor:
    return reference.noise(like, seed, sample, stream).abs()


def _ramp(like: Tensor) -> Tensor:
    """|cotangent| of the fuzz test for a result of this shape."""
    return torch.linspace(-1, 0.7, like.numel(), dtype=like.dtype).reshape(like.shape).abs()


def noise(like: Tensor, seed: Tensor, sample: int, stream: int) -> Sizes:
    return [_normal(like, seed, sample, stream), like.abs()], []


def sample(
    mu: Tensor, rho: Tensor, seed: Tensor, mean: Tensor | None, std: float | None, stream: int, centred: bool
) -> Sizes:
    w = Weights(mu, rho, _normal(mu, seed, 0, stream), mean, std, centred)
    to_mu, to_rho, to_mean = w.gradients(_ramp(mu))
    return [w.weight, w.kl], [to_mu, to_rho] + ([] if mean is None else [to_mean])


def kl(mu: Tensor, rho: Tensor, mean: Tensor | None, std: float) -> Sizes:
    w = Weights(mu, rho, torch.zeros_like(mu), mean, std)
    to_mu, to_rho, to_mean = w.gradients(None)
    return [w.kl], [to_mu, to_rho] + ([] if mean is None else [to_mean])


def linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_mean: Tensor | None,
    bias_mean: Tensor | None,
    std: float | None,
) -> Sizes:
    w = Weights(weight_mu, weight_rho, _normal(weight_mu, seed, 0, 0), weight_mean, std)
    y, total = x.abs() @ w.weight.mT, w.kl
    grad = _ramp(y)
    pairs = [w.gradients(grad.mT @ x.abs())]
    if bias_mu is not None and bias_rho is not None:
        b = Weights(bias_mu, bias_rho, _normal(bias_mu, seed, 0, 1), bias_mean, std)
        y, total = y + b.weight, total + b.kl
        pairs.append(b.gradients(grad.sum(0)))
    means = [pair[2] for pair, mean in zip(pairs, (weight_mean, bias_mean), strict=False) if mean is not None]
    return [y, total], [grad @ w.weight, *(part for pair in pairs for part in pair[:2]), *means]


def local(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_mean: Tensor | None,
    bias_mean: Tensor | None,
    std: float | None,
) -> Sizes:
    """Variances are sums of positive terms, so a deviation is off by half as many roundings, relative to itself."""
    deviation = reference.local_deviation(x, weight_rho, bias_rho)
    normal = _normal(deviation, seed, 0, 2)
    w = Weights(weight_mu, weight_rho, torch.zeros_like(weight_mu), weight_mean, std)
    y, total = x.abs() @ weight_mu.abs().mT + deviation * normal, w.kl
    grad = _ramp(y)
    still = deviation == 0
    by_variance = torch.where(still, 0.0, grad * normal / (2 * torch.where(still, 1.0, deviation)))

    def pair(weights: Weights, by_mu: Tensor, by_square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to_mu, to_rho, to_mean = weights.gradients(None)
        parts = reference.softplus(weights.rho)
        return to_mu + by_mu, to_rho + 2 * by_square * parts.sigma * parts.derivative, to_mean

    pairs = [pair(w, grad.mT @ x.abs(), by_variance.mT @ (x * x))]
    if bias_mu is not None and bias_rho is not None:
        b = Weights(bias_mu, bias_rho, torch.zeros_like(bias_mu), bias_mean, std)
        y, total = y + bias_mu.abs(), total + b.kl
        pairs.append(pair(b, grad.sum(0), by_variance.sum(0)))
    grad_x = grad @ weight_mu.abs() + 2 * x.abs() * (by_variance @ reference.sigma(weight_rho) ** 2)
    means = [one[2] for one, mean in zip(pairs, (weight_mean, bias_mean), strict=False) if mean is not None]
    return [y, total], [grad_x, *(part for one in pairs for part in one[:2]), *means]


def linear_samples(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    first: int,
    samples: int,
) -> Sizes:
    rows = x.abs().expand(samples, *x.shape[1:])
    outputs = []
    for s in range(samples):
        y = rows[s] @ Weights(weight_mu, weight_rho, _normal(weight_mu, seed, first + s, 0)).weight.mT
        if bias_mu is not None and bias_rho is not None:
            y = y + Weights(bias_mu, bias_rho, _normal(bias_mu, seed, first + s, 1)).weight
        outputs.append(y)
    left = [t.abs() for t in (x, weight_mu, weight_rho, bias_mu, bias_rho) if t is not None]
    return [torch.stack(outputs), *left], []
