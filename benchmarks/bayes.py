"""Variational layers: forward and backward of one layer with its KL, the noise, sampled prediction.

The layer cases are what a training step costs: y = layer(x), loss = mean(y²) + KL/N, backward to x and all parameters,
gradients set to None before. nn.Linear is the baseline, without a KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
import harness
from finite_width.bayes import ops
from harness import Case

BATCH, NUM_DATA, SIGMA = 128, 60_000, 0.05
RHO = math.log(math.expm1(SIGMA))


class _Plain(nn.Module):
    """The parameters of a variational layer, for the forms in plain torch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        device = harness.DEVICE
        self.weight_mu = nn.Parameter(torch.randn(size, size, device=device) / math.sqrt(size))
        self.weight_rho = nn.Parameter(torch.full((size, size), RHO, device=device))
        self.bias_mu = nn.Parameter(torch.zeros(size, device=device))
        self.bias_rho = nn.Parameter(torch.full((size,), RHO, device=device))
        self.pairs = ((self.weight_mu, self.weight_rho), (self.bias_mu, self.bias_rho))


class Usual(_Plain):
    """As usually written: σ = log(1 + exp ρ), log q - log p at the sampled weight."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sampled, kl = [], x.new_zeros(())
        for mu, rho in self.pairs:
            sigma = torch.log1p(torch.exp(rho))
            w = mu + sigma * torch.randn_like(mu)
            log_q = -0.5 * math.log(2 * math.pi) - torch.log(sigma) - (w - mu) ** 2 / (2 * sigma**2)
            log_p = -0.5 * math.log(2 * math.pi) - w**2 / 2
            kl = kl + (log_q.sum() - log_p.sum())
            sampled.append(w)
        return F.linear(x, *sampled), kl


def _closed_kl(pairs: Any, sigmas: list[Tensor]) -> Tensor:
    terms = [(0.5 * (s * s + mu * mu) - torch.log(s) - 0.5).sum() for (mu, _), s in zip(pairs, sigmas, strict=True)]
    return terms[0] + terms[1]


class Closed(_Plain):
    """A sampled weight and the KL in closed form."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = [F.softplus(rho) for _, rho in self.pairs]
        sampled = [mu + s * torch.randn_like(mu) for (mu, _), s in zip(self.pairs, sigmas, strict=True)]
        return F.linear(x, *sampled), _closed_kl(self.pairs, sigmas)


class Local(_Plain):
    """Local reparametrisation and the KL in closed form."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = [F.softplus(rho) for _, rho in self.pairs]
        mean = F.linear(x, self.weight_mu, self.bias_mu)
        variance = F.linear(x * x, sigmas[0] ** 2, sigmas[1] ** 2)
        return mean + variance.sqrt() * torch.randn_like(mean), _closed_kl(self.pairs, sigmas)


def step(module: nn.Module, x: Tensor, forward: Callable[[], tuple[Tensor, Tensor | None]]) -> Callable[[], None]:
    leaves = [x, *module.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        y, kl = forward()
        loss = y.square().mean()
        (loss if kl is None else loss + kl / NUM_DATA).backward()

    return run


def plain_step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    return step(module, x, lambda: module(x))


def _ours(size: int, x: Tensor, estimator: str) -> Callable[[], None]:
    layer = fw.bayes.BayesLinear(size, size, estimator=estimator, init_std=SIGMA, device=harness.DEVICE)
    return step(layer, x, lambda: (layer(x), fw.bayes.kl(layer)))


def _peers(size: int, x: Tensor) -> dict[str, Any]:
    """Published layers, where they are installed; σ = 0.05 as in ours."""
    peers: dict[str, Any] = {}
    try:
        from bayesian_torch.layers import LinearFlipout, LinearReparameterization

        for name, kind in (("Reparameterization", LinearReparameterization), ("Flipout", LinearFlipout)):
            layer = kind(size, size, posterior_rho_init=RHO).to(harness.DEVICE)
            peers[f"bayesian-torch {name}"] = plain_step(layer, x)
    except ImportError as error:
        peers["bayesian-torch"] = f"not installed: pip install --no-deps bayesian-torch ({error})"
    try:
        from blitz.modules import BayesianLinear

        blitz = BayesianLinear(size, size, posterior_rho_init=RHO).to(harness.DEVICE)
        peers["blitz"] = step(blitz, x, lambda: (blitz(x), blitz.log_variational_posterior - blitz.log_prior))
    except ImportError as error:
        peers["blitz"] = f"not installed: pip install --no-deps blitz-bayesian-pytorch ({error})"
    try:
        import torchbnn

        bnn = torchbnn.BayesLinear(0, SIGMA, size, size).to(harness.DEVICE)
        kl_loss = torchbnn.BKLLoss(reduction="sum")
        peers["torchbnn"] = step(bnn, x, lambda: (bnn(x), kl_loss(bnn)))
    except ImportError as error:
        peers["torchbnn"] = f"not installed: pip install --no-deps torchbnn ({error})"
    return peers


def _layer(size: int, against_usual: float, against_linear: float = 1.4) -> Case:
    """A layer's training step. The aims hold like with like, but for one: "local, plain torch" is another estimator.

    Args:
        against_linear: our time over nn.Linear's that is aimed at.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH, size, device=harness.DEVICE, requires_grad=True)
    linear = nn.Linear(size, size, device=harness.DEVICE)
    usual, closed, local = (plain_step(kind(size), x) for kind in (Usual, Closed, Local))
    return Case(
        name=f"layer {size}",
        what=f"{size}→{size} with bias, batch {BATCH}, float32, forward + KL + backward to x, μ, ρ",
        implementations={
            "nn.Linear": step(linear, x, lambda: (linear(x), None)),
            "finite-width": _ours(size, x, "weight"),
            "finite-width flipout": _ours(size, x, "flipout"),
            "finite-width local": _ours(size, x, "local"),
            "as usually written": usual,
            "closed KL, plain torch": closed,
            "local, plain torch": local,
        },
        peers=_peers(size, x),
        baseline="nn.Linear",
        flops=6.0 * BATCH * size * size,
        bytes=24.0 * size * size,
        targets={
            ("finite-width", "nn.Linear"): 1 / against_linear,
            ("finite-width", "as usually written"): against_usual,
            ("finite-width", "closed KL, plain torch"): 2.0,
            ("finite-width", "local, plain torch"): 2.0,
            ("finite-width local", "local, plain torch"): 2.0,
        },
        limit=240.0,
    )


def _accuracy() -> Case:
    """Output, KL and all gradients at one given seed, against plain torch in float64 at the same noise."""
    size = 1024
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(harness.DEVICE)

    x, mu, bias = randn(BATCH, size), randn(size, size) / math.sqrt(size), randn(size)
    rho, bias_rho = RHO + randn(size, size), RHO + randn(size)
    seed = torch.tensor(1234, device=harness.DEVICE)
    cotangent = randn(BATCH, size)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, mu, rho, bias, bias_rho)]
        y, kl = ops.linear(*leaves, seed, None, None, 1.0)
        gradients = torch.autograd.grad((y * cotangent.to(dtype)).sum() + kl / size, leaves)
        return y, kl / kl.detach().clone().sqrt(), *gradients

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        with fw.reference_only():
            return run(dtype)

    return Case(
        name="accuracy 1024",
        what="y, √KL and every gradient at one seed; float32 kernel and plain torch at the same noise",
        implementations={
            "finite-width": lambda: run(torch.float32),
            "plain torch, same noise": lambda: plain(torch.float32),
        },
        baseline="plain torch, same noise",
        exact=lambda: plain(torch.float64),
        memory=False,
    )


def _kl() -> Case:
    """The KL of a model and its gradients: one call for all tensors, against one for each."""
    layers, size = 10, 256
    model = nn.Sequential(*(fw.bayes.BayesLinear(size, size, init_std=SIGMA) for _ in range(layers))).to(harness.DEVICE)
    pairs = [pair[:2] for layer in model for pair in layer.distributions()]

    def gradients(value: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            value().backward()

        return run

    def closed() -> Tensor:
        sigmas = [F.softplus(rho) for _, rho in pairs]
        return torch.stack(
            [(0.5 * (s * s + mu * mu) - torch.log(s) - 0.5).sum() for (mu, _), s in zip(pairs, sigmas, strict=True)]
        ).sum()

    return Case(
        name="kl",
        what=f"KL of {layers} layers {size}→{size} with bias and its gradients, float32, before any forward",
        implementations={
            "finite-width": gradients(lambda: fw.bayes.kl(model)),
            "a call for each tensor": gradients(lambda: torch.stack([ops.kl(*pair) for pair in pairs]).sum()),
            "plain torch": gradients(closed),
        },
        baseline="a call for each tensor",
        bytes=24.0 * layers * size * (size + 1),
    )


def _noise() -> Case:
    count = 2**20
    like = torch.empty(count, device=harness.DEVICE)
    seed = torch.tensor(1, device=harness.DEVICE)
    return Case(
        name="noise",
        what="2^20 normals, float32 (3 billion a second: 0.350 ms)",
        implementations={"finite-width": lambda: ops.noise(like, seed), "torch.randn": lambda: torch.randn(count)},
        baseline="torch.randn",
        bytes=4.0 * count,
        min_runs=200,
        memory=False,
    )


def _sampling(size: int) -> Case:
    """Sample + KL (12 bytes a weight) and its backward (20), without products, against copies of as many bytes."""
    mu, grad = (torch.randn(size, size, device=harness.DEVICE) for _ in range(2))
    rho = torch.full((size, size), RHO, device=harness.DEVICE)
    seed, one = torch.tensor(7, device=harness.DEVICE), torch.ones((), device=harness.DEVICE)
    backward = torch.ops.finite_width.bayes_sample_backward
    narrow = grad.bfloat16()
    return Case(
        name=f"sampling {size}",
        what=f"{size}×{size} float32: W and its KL; ∂μ and ∂ρ from ∂W; copies of 12 and 20 bytes a weight",
        implementations={
            "copy, 12 bytes a weight": harness.copy_of(12.0 * size * size),
            "copy, 20 bytes a weight": harness.copy_of(20.0 * size * size),
            "sample + KL": lambda: ops.sample(mu, rho, seed, None, 1.0),
            "backward": lambda: backward(grad, one, mu, rho, seed, None, 1.0, 0, False),
            "sample + KL, W in bfloat16": lambda: ops.sample(mu, rho, seed, None, 1.0, dtype=torch.bfloat16),
            "backward, ∂W in bfloat16": lambda: backward(narrow, one, mu, rho, seed, None, 1.0, 0, False),
        },
        baseline="copy, 12 bytes a weight",
        targets={
            ("sample + KL", "copy, 12 bytes a weight"): 0.75,
            ("backward", "copy, 20 bytes a weight"): 0.75,
        },
        memory=False,
    )


def _without_products(size: int) -> Case:
    """W, its KL, and the gradients by μ and ρ from ∂W and ∂KL: what a layer costs beside its products."""
    modules = [_Plain(size) for _ in range(3)]
    cotangents = torch.randn(size, size, device=harness.DEVICE), torch.ones((), device=harness.DEVICE)
    seed = torch.tensor(7, device=harness.DEVICE)

    def usual(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.log1p(torch.exp(rho))
        w = mu + sigma * torch.randn_like(mu)
        log_q = -0.5 * math.log(2 * math.pi) - torch.log(sigma) - (w - mu) ** 2 / (2 * sigma**2)
        return w, (log_q.sum() - (-0.5 * math.log(2 * math.pi) - w**2 / 2).sum())

    def closed(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        sigma = F.softplus(rho)
        kl = (0.5 * (sigma * sigma + mu * mu) - torch.log(sigma) - 0.5).sum()
        return mu + sigma * torch.randn_like(mu), kl

    def run(module: _Plain, form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[], None]:
        pair = module.weight_mu, module.weight_rho

        def both() -> None:
            for leaf in pair:
                leaf.grad = None
            torch.autograd.backward(form(*pair), cotangents)

        return both

    return Case(
        name=f"without products {size}",
        what=f"{size}×{size} float32: W, its KL and both gradients, forward and backward, no matrix product",
        implementations={
            "finite-width": run(modules[0], lambda mu, rho: ops.sample(mu, rho, seed, None, 1.0)),
            "as usually written": run(modules[1], usual),
            "closed KL, plain torch": run(modules[2], closed),
        },
        baseline="as usually written",
        bytes=32.0 * size * size,
        targets={("finite-width", "as usually written"): 8.0, ("finite-width", "closed KL, plain torch"): 4.0},
        memory=False,
    )


def _products(size: int, how: str) -> Case:
    """The whole layer with its products in another precision: the ratio is reported, not aimed at."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, size, device=harness.DEVICE, requires_grad=True)
    linear, usual = nn.Linear(size, size, device=harness.DEVICE), Usual(size)
    calls = {
        "nn.Linear": step(linear, x, lambda: (linear(x).float(), None)),
        "finite-width": _ours(size, x, "weight"),
        "finite-width local": _ours(size, x, "local"),
        "as usually written": plain_step(usual, x),
    }

    def tf32(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                call()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return run

    def bfloat16(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(harness.DEVICE, dtype=torch.bfloat16):
                call()

        return run

    wrap = tf32 if how == "TF32" else bfloat16
    return Case(
        name=f"layer {size}, {how}",
        what=f"{size}→{size} with bias, batch {BATCH}, products in {how}: forward + KL + backward to x, μ, ρ",
        implementations={name: wrap(call) for name, call in calls.items()},
        baseline="nn.Linear",
        memory=False,
    )


def _ten_layers(size: int) -> Case:
    """Small layers, where launches count: a whole training step of ten of them."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, size, device=harness.DEVICE, requires_grad=True)
    ours = nn.Sequential(*(fw.bayes.BayesLinear(size, size, init_std=SIGMA) for _ in range(10))).to(harness.DEVICE)
    usual, closed = (nn.ModuleList(kind(size) for _ in range(10)) for kind in (Usual, Closed))
    linear = nn.Sequential(*(nn.Linear(size, size) for _ in range(10))).to(harness.DEVICE)

    def through(layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
        y, total = x, x.new_zeros(())
        for layer in layers:
            y, kl = layer(y)
            total = total + kl
        return y, total

    return Case(
        name=f"ten layers of {size}",
        what=f"ten {size}→{size} with bias, batch {BATCH}, float32: forward + KL + backward to x, μ, ρ",
        implementations={
            "nn.Linear": step(linear, x, lambda: (linear(x), None)),
            "finite-width": step(ours, x, lambda: (ours(x), fw.bayes.kl(ours))),
            "as usually written": step(usual, x, lambda: through(usual)),
            "closed KL, plain torch": step(closed, x, lambda: through(closed)),
        },
        baseline="as usually written",
        targets={("finite-width", "as usually written"): 5.0},
        memory=False,
    )


def _predict() -> Case:
    torch.manual_seed(0)
    size, batch, samples = 1024, 16, 32
    model = nn.Sequential(fw.bayes.BayesLinear(size, size), nn.Tanh(), fw.bayes.BayesLinear(size, size))
    model = model.to(harness.DEVICE)
    x = torch.randn(batch, size, device=harness.DEVICE)
    layers = [model[0], model[2]]

    @torch.no_grad()
    def loop() -> Tensor:
        outputs = []
        for _ in range(samples):
            h = x
            for index, layer in enumerate(layers):
                weights = [
                    mu + F.softplus(rho) * torch.randn_like(mu)
                    for mu, rho in ((layer.weight_mu, layer.weight_rho), (layer.bias_mu, layer.bias_rho))
                ]
                h = F.linear(torch.tanh(h) if index else h, *weights)
            outputs.append(h)
        return torch.stack(outputs).mean(0)

    return Case(
        name="predict",
        what=f"{samples} samples, 2 layers {size}→{size}, batch {batch}, float32",
        implementations={
            "finite-width": lambda: fw.bayes.predict(model, x, samples=samples).mean,
            "torch loop": loop,
        },
        baseline="torch loop",
        flops=2.0 * samples * 2 * batch * size * size,
        targets={("finite-width", "torch loop"): 5.0},
    )


CASES: dict[str, Callable[[], Case]] = {
    "layer 1024": lambda: _layer(1024, 3.7),
    "layer 4096": lambda: _layer(4096, 12.0),
    "accuracy 1024": _accuracy,
    "kl": _kl,
    "noise": _noise,
    "predict": _predict,
}


def gpu_cases(scale: int = 1) -> dict[str, Callable[[], Case]]:
    """The cases of a GPU; a scale makes them smaller, to see that they run."""
    size, small = 4096 // scale, 256 // scale
    return {
        f"sampling {size}": lambda: _sampling(size),
        f"without products {size}": lambda: _without_products(size),
        f"layer {size}": lambda: _layer(size, 8.0, 1.7),
        f"layer {size}, TF32": lambda: _products(size, "TF32"),
        f"layer {size}, bfloat16": lambda: _products(size, "bfloat16"),
        f"ten layers of {small}": lambda: _ten_layers(small),
        "accuracy 1024": _accuracy,
        "noise": _noise,
        "predict": _predict,
    }


if harness.DEVICE != "cpu":
    CASES = gpu_cases()
