"""The variational linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from .._gemm import gemm
from . import ops, reference
from .layers import SIGN_IN, SIGN_OUT, BayesLayer, draw_seed, perturb, signs, with_means


class BayesLinear(BayesLayer):
    """A linear layer with a Gaussian over each weight: y = x Wᵀ + b, W ~ N(μ, σ²), σ = softplus(ρ).

    Each call draws fresh noise, in training and in evaluation mode; `mean_mode` gives the mean network.

    Args:
        in_features, out_features: sizes.
        bias: whether there is a bias (with a distribution of its own).
        prior: GaussianPrior (default: std 1), ScaleMixturePrior, MopedPrior or an object with log_prob(weight).
        estimator: "weight": one sample of W for the batch, fused with the KL (the cheapest); "flipout": one sample,
            its sign flipped at random for each example (less gradient noise, two products); "local": samples y
            itself (least gradient noise, two products).
        init_std: σ at the start; default 0.1 / √in_features.
        device, dtype: of the parameters; float32 or float64.

    Raises:
        ValueError: sizes < 1, init_std <= 0, an unknown estimator.
        TypeError: something that is not a prior, another dtype.

    Source: Blundell et al. 2015 ("weight"); Wen et al. 2018 (flipout); Kingma et al. 2015 (local).

    Example:
        >>> import torch, finite_width as fw
        >>> layer = fw.bayes.BayesLinear(3, 2)
        >>> layer(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        prior: Any = None,
        estimator: str = "weight",
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.positive_int("in_features", in_features)
        _check.positive_int("out_features", out_features)
        super().__init__((out_features, in_features), bias, prior, estimator, init_std, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        _check.is_tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [..., {self.in_features}], got {list(x.shape)}")
        if self._mean_mode:
            return F.linear(x, self.weight_mu, self.bias_mu)
        if self._predictions and (prediction := self._prediction()) is not None:
            return self._predict(x, prediction)
        self._check_dtypes(x)
        rows = x.reshape(-1, self.in_features)
        # Under autocast torch's own product takes x and W to the lower precision; μ, ρ and the KL stay float32.
        autocast = torch.is_autocast_enabled(x.device.type)
        seed = draw_seed(x.device)
        if self.estimator == "weight":
            if autocast or self.prior_std is None:
                weight, bias = self._sampled(seed)
                y = _product(rows, weight, bias, autocast)
            else:
                y = self._fused(ops.linear_unchecked, rows, seed)
        elif self.estimator == "flipout":
            weight, bias = self._perturbation(seed)
            flipped = rows * signs(rows, seed, SIGN_IN)
            mean = _product(rows, self.weight_mu, self.bias_mu, autocast)
            change = _product(flipped, weight, bias, autocast)
            y = mean + change * signs(change, seed, SIGN_OUT)
        elif not autocast:
            y = self._fused(ops.local_unchecked, rows, seed)
        else:
            mean = F.linear(rows, self.weight_mu, self.bias_mu).to(self.weight_mu.dtype)
            with torch.autocast(x.device.type, enabled=False):  # float16 holds no variance under 6e-8
                wide = rows.to(self.weight_mu.dtype)
                bias = None if self.bias_rho is None else reference.sigma(self.bias_rho) ** 2
                variance = F.linear(wide * wide, self.weight_std() ** 2, bias)
            y = perturb(mean, variance, seed)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _fused(self, op: Callable[..., Any], rows: Tensor, seed: Tensor) -> Tensor:
        """y and the KL in one op; keeps the KL."""
        parameters, buffers = self.four_parameters(), self._buffers
        if rows.device != parameters[0].device:
            _check.like("x", rows, "weight_mu", parameters[0])
        # The other checks of ops.linear and ops.local hold by construction, or were made by forward.
        y, kl, *_ = op(
            rows,
            *parameters,
            seed,
            buffers["weight_prior_mean"],
            buffers["bias_prior_mean"],
            self.prior_std,
        )
        if self.prior_std is not None:
            self._keep(kl, [kl])
        result: Tensor = y
        return result

    def _predict(self, x: Tensor, draw: Any) -> Tensor:
        if draw.rehearsal:
            return draw.stand_in(self, x, F.linear(x, self.weight_mu, self.bias_mu), -1)
        seed, first, count = draw.of(self, x)
        # Under autocast a layer before this one may give its narrow dtype, which is also that of the result; the
        # samples are float32.
        autocast = self._product_dtype()
        if autocast is not None and x.dtype in ops.NARROW:
            x = x.to(self.weight_mu.dtype)
        with torch.no_grad():
            y = ops.linear_samples(
                x.reshape(count, -1, self.in_features),
                self.weight_mu,
                self.weight_rho,
                self.bias_mu,
                self.bias_rho,
                seed,
                first,
                count,
            )
        y = y if autocast is None else y.to(autocast)
        return y.reshape(*x.shape[:-1], self.out_features)

    def mean_layer(self) -> nn.Linear:
        """The nn.Linear of the mean network, with copies of μ."""
        layer = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias_mu is not None,
            device=self.weight_mu.device,
            dtype=self.weight_mu.dtype,
        )
        return with_means(layer, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}, "
            f"{super().extra_repr()}"
        )


def _product(x: Tensor, weight: Tensor | None, bias: Tensor | None, autocast: bool) -> Tensor:
    """x Wᵀ + b, on this library's GEMM except under autocast."""
    assert weight is not None
    return F.linear(x, weight, bias) if autocast else gemm(x, weight.mT, bias)
