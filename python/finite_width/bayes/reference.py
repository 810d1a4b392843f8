"""The variational ops in plain torch: W = μ + softplus(ρ) ∘ ε, its KL, and the gradients of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
LEAST_VARIANCE = 1e-30  # below, an output of local reparametrisation has no noise


class Softplus(NamedTuple):
    """σ = softplus(ρ), log σ, σ' and σ'/σ; each finite for every finite ρ, since nothing divides by σ."""

    sigma: Tensor
    log_sigma: Tensor
    derivative: Tensor
    derivative_over_sigma: Tensor


def sigma(rho: Tensor) -> Tensor:
    """softplus(ρ) alone, without the threshold of F.softplus."""
    return -F.logsigmoid(-rho)


def log_sigma(rho: Tensor) -> Tensor:
    """log softplus(ρ) alone; for small ρ, where σ may round to 0, ρ + log(log1p(e) / e) with e = exp(ρ)."""
    low = rho < -15
    by_rho = rho - torch.exp(torch.where(low, rho, -15.0)) / 2
    return torch.where(low, by_rho, torch.log(sigma(torch.where(low, 0.0, rho))))


def softplus(rho: Tensor) -> Softplus:
    """With e = exp(-|ρ|): σ = e s for ρ < 0 and σ = s for ρ >= 0, where s >= ln 2; so log σ = min(ρ, 0) + log s."""
    e = torch.exp(-rho.abs())
    negative = rho < 0
    small = e < 1e-5
    safe = torch.where(small, 1.0, e)
    q = torch.where(small, 1 - e / 2 + e * e / 3, torch.log1p(safe) / safe)  # log1p(e) / e
    scale = sigma(rho)
    s = torch.where(negative, q, scale)
    log_sigma = torch.where(negative, rho, 0.0) + torch.log(s)
    return Softplus(scale, log_sigma, torch.sigmoid(rho), 1 / ((1 + e) * s))


def philox(block: Tensor, seed: Tensor, sample: int, stream: int) -> list[Tensor]:
    """Philox4x32-10 of counters (block low, block high, sample, stream): four int64 tensors of 32-bit words."""
    c0, c1 = block & _WORD, block >> 32
    c2, c3 = torch.full_like(block, sample), torch.full_like(block, stream)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64; the high half survives the sign
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two words -> two normals, in float64 from the float32 number u that csrc/bayes/gaussian_math.h defines."""
    u = (x.to(torch.float32).double() * 2.0**-32 + 2.0**-33).to(torch.float32).double()  # two roundings, both exact
    radius = torch.sqrt(-2 * torch.log(u))
    quadrant, low = y >> 30, y & 0x3FFFFFFF
    quarter_turns = quadrant + torch.where(low >= 0x20000000, low - 0x40000000, low).double() * 2.0**-30
    angle = quarter_turns * (math.pi / 2)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def noise(like: Tensor, seed: Tensor, sample: int, stream: int) -> Tensor:
    """Normals of the shape and dtype of `like`; float32 noise in every dtype (csrc/common/philox.h says which)."""
    count = like.numel()
    block = torch.arange((count + 63) // 64 * 16, device=like.device)
    words = philox(block, seed.reshape(()), sample, stream)
    normals = torch.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])])
    flat = normals.reshape(4, -1, 16).transpose(0, 1).reshape(-1)[:count]
    return flat.reshape(like.shape).to(torch.float32).to(like.dtype)


def transform(
    mu: Tensor, rho: Tensor, normal: Tensor, prior_mean: Tensor | None, prior_std: float | None, centred: bool
) -> tuple[Tensor, Tensor]:
    """W = μ + σ ε (σ ε where centred), and KL(N(μ, σ²) || N(prior_mean, prior_std²)) (0 without a prior_std)."""
    parts = softplus(rho)
    weight = parts.sigma * normal if centred else mu + parts.sigma * normal
    if prior_std is None:
        return weight, mu.new_zeros(())
    distance = mu if prior_mean is None else mu - prior_mean
    spread = parts.sigma * parts.sigma + distance * distance
    terms = math.log(prior_std) - 0.5 + spread * (0.5 / prior_std**2) - parts.log_sigma
    return weight, terms.sum(dtype=torch.float64).to(mu.dtype)


def transform_backward(
    grad: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    normal: Tensor | None,
    prior_mean: Tensor | None,
    prior_std: float | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """∂μ = ∂W + ∂kl (μ - prior_mean)/σp²;  ∂ρ = (∂W ε + ∂kl σ/σp²) σ' - ∂kl σ'/σ."""
    parts = softplus(rho)
    grad_mu, grad_rho = torch.zeros_like(mu), torch.zeros_like(rho)
    if grad is not None:
        assert normal is not None
        grad_mu = grad_mu if centred else grad_mu + grad
        grad_rho = grad_rho + grad * normal * parts.derivative
    if grad_kl is not None and prior_std is not None:
        distance = mu if prior_mean is None else mu - prior_mean
        grad_mu = grad_mu + grad_kl * distance / prior_std**2
        kl_rho = parts.sigma * parts.derivative / prior_std**2 - parts.derivative_over_sigma
        grad_rho = grad_rho + grad_kl * kl_rho
    return grad_mu, grad_rho


def sample(
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    prior_mean: Tensor | None,
    prior_std: float | None,
    stream: int,
    centred: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One sample of W, rounded to dtype where one is given, and the KL."""
    weight, total = transform(mu, rho, noise(mu, seed, 0, stream), prior_mean, prior_std, centred)
    return weight.to(dtype or mu.dtype).contiguous(), total


def sample_backward(
    grad: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor | None,
    prior_mean: Tensor | None,
    prior_std: float | None,
    stream: int,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """∂μ and ∂ρ from ∂W (None: 0), in any of W's dtypes, and ∂kl (None: 0)."""
    grad = None if grad is None else grad.to(mu.dtype)
    normal = None if grad is None or seed is None else noise(mu, seed, 0, stream)
    grads = transform_backward(grad, grad_kl, mu, rho, normal, prior_mean, prior_std, centred)
    return grads[0].contiguous(), grads[1].contiguous()


def kl(mu: Sequence[Tensor], rho: Sequence[Tensor], prior_mean: Sequence[Tensor], prior_std: Sequence[float]) -> Tensor:
    """Σ KL(N(μ, σ²) || N(prior_mean, prior_std²)) over all elements of all tensors; an empty prior_mean is 0."""
    rows = zip(mu, rho, prior_mean, prior_std, strict=True)
    parts = [transform(m, r, torch.zeros_like(m), given(mean), std, False)[1] for m, r, mean, std in rows]
    return torch.stack(parts).sum(dtype=torch.float64).to(mu[0].dtype)


def kl_backward(
    grad: Tensor,
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    prior_mean: Sequence[Tensor],
    prior_std: Sequence[float],
) -> list[Tensor]:
    """∂μ of each tensor, then ∂ρ of each."""
    rows = zip(mu, rho, prior_mean, prior_std, strict=True)
    pairs = [transform_backward(None, grad, m, r, None, given(mean), std, False) for m, r, mean, std in rows]
    return [pair[half].contiguous() for half in range(2) for pair in pairs]


def given(prior_mean: Tensor) -> Tensor | None:
    """A list's prior mean; None for the empty tensor that stands for 0 there."""
    return prior_mean if prior_mean.numel() else None


def linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b with one sample of W (stream 0) and b (stream 1), and the KL of both."""
    weight, total = sample(weight_mu, weight_rho, seed, weight_prior_mean, prior_std, 0, False)
    y = x @ weight.mT
    if bias_mu is not None and bias_rho is not None:
        bias, bias_kl = sample(bias_mu, bias_rho, seed, bias_prior_mean, prior_std, 1, False)
        y, total = y + bias, total + bias_kl
    return y.contiguous(), total


def linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """∂x, ∂weight_mu, ∂weight_rho, ∂bias_mu, ∂bias_rho; empty tensors where there is no bias, or x needs none."""
    normal = noise(weight_mu, seed, 0, 0)
    weight = transform(weight_mu, weight_rho, normal, None, None, False)[0]
    grad_x = grad_y @ weight if needs_x else x.new_empty(0)
    grads = transform_backward(
        grad_y.mT @ x, grad_kl, weight_mu, weight_rho, normal, weight_prior_mean, prior_std, False
    )
    grad_x, grad_mu, grad_rho = (grad.contiguous() for grad in (grad_x, *grads))
    if bias_mu is None or bias_rho is None:
        return grad_x, grad_mu, grad_rho, x.new_empty(0), x.new_empty(0)
    grad_bias = transform_backward(
        grad_y.sum(0),
        grad_kl,
        bias_mu,
        bias_rho,
        noise(bias_mu, seed, 0, 1),
        bias_prior_mean,
        prior_std,
        False,
    )
    return grad_x, grad_mu, grad_rho, *grad_bias


def local(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x μᵀ + b + d ∘ ε with d² = x² (σ²)ᵀ + σ_b² and ε of stream 2; the KL of weight and bias; d."""
    mean = x @ weight_mu.mT
    total = transform(weight_mu, weight_rho, torch.zeros_like(weight_mu), weight_prior_mean, prior_std, False)[1]
    if bias_mu is not None and bias_rho is not None:
        mean = mean + bias_mu
        zeros = torch.zeros_like(bias_mu)
        total = total + transform(bias_mu, bias_rho, zeros, bias_prior_mean, prior_std, False)[1]
    deviation = local_deviation(x, weight_rho, bias_rho)
    y = mean + deviation * noise(mean, seed, 0, 2)
    return y.contiguous(), total, deviation.contiguous()


def local_deviation(x: Tensor, weight_rho: Tensor, bias_rho: Tensor | None) -> Tensor:
    """d = √(x² (σ²)ᵀ + σ_b²), 0 with derivative 0 where the variance is tiny."""
    variance = (x * x) @ (sigma(weight_rho) ** 2).mT
    if bias_rho is not None:
        variance = variance + sigma(bias_rho) ** 2
    tiny = variance <= LEAST_VARIANCE
    return torch.where(tiny, 0.0, torch.sqrt(torch.where(tiny, 1.0, variance)))


def local_gradients(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    normal: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
    deviation: Tensor,
) -> tuple[Tensor, ...]:
    """∂x, ∂weight_mu, ∂weight_rho, and ∂bias_mu, ∂bias_rho where there is a bias."""
    still = deviation == 0
    grad_variance = torch.where(still, 0.0, grad_y * normal / (2 * torch.where(still, 1.0, deviation)))
    grad_x = grad_y @ weight_mu + 2 * x * (grad_variance @ sigma(weight_rho) ** 2)

    def pair(by_mu: Tensor, by_variance: Tensor, mu: Tensor, rho: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        kl_mu, kl_rho = transform_backward(None, grad_kl, mu, rho, None, mean, prior_std, False)
        parts = softplus(rho)
        return by_mu + kl_mu, 2 * by_variance * parts.sigma * parts.derivative + kl_rho

    by_variance = grad_variance.mT @ (x * x)
    result = grad_x, *pair(grad_y.mT @ x, by_variance, weight_mu, weight_rho, weight_prior_mean)
    if bias_mu is None or bias_rho is None:
        return result
    return *result, *pair(grad_y.sum(0), grad_variance.sum(0), bias_mu, bias_rho, bias_prior_mean)


def local_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
    deviation: Tensor,
    needs_x: bool,
) -> tuple[Tensor, ...]:
    """The five gradients from d of the forward pass; empty tensors where there is no bias, or x needs none."""
    grads = local_gradients(
        *(grad_y, grad_kl, x, weight_mu, weight_rho, bias_mu, bias_rho, noise(grad_y, seed, 0, 2)),
        *(weight_prior_mean, bias_prior_mean, prior_std, deviation),
    )
    grad_x, *rest = (grad.contiguous() for grad in grads)
    empty = () if bias_mu is not None else (x.new_empty(0), x.new_empty(0))
    return grad_x if needs_x else x.new_empty(0), *rest, *empty


def linear_samples(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    first: int,
    samples: int,
) -> Tensor:
    """y[s] = x[s] W_sᵀ + b_s for the samples first, first + 1, ... of W; x [samples or 1, batch, in]."""
    scale = sigma(weight_rho)
    outputs = []
    for s in range(samples):
        weight = weight_mu + scale * noise(weight_mu, seed, first + s, 0)
        y = x[s if x.shape[0] > 1 else 0] @ weight.mT
        if bias_mu is not None and bias_rho is not None:
            y = y + bias_mu + sigma(bias_rho) * noise(bias_mu, seed, first + s, 1)
        outputs.append(y)
    return torch.stack(outputs)
