"""Priors over weights: Gaussian (KL in closed form), scale mixture (Monte-Carlo KL), and MOPED's trained mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from .. import _check

# A KL holds 1/σ² in float32: the least and the largest σ whose square is a normal float32 number.
_LEAST_STD, _LARGEST_STD = 1.1e-19, 1.8e19


def _check_std(name: str, std: Any) -> None:
    _check.positive(name, std)
    if not _LEAST_STD <= std <= _LARGEST_STD:
        raise ValueError(
            f"{name} must lie between {_LEAST_STD} and {_LARGEST_STD}, so that float32 holds its square, got {std}"
        )


@runtime_checkable
class Prior(Protocol):
    """Any prior: an object with log_prob(weight), differentiable; its KL is estimated from the sampled weight."""

    def log_prob(self, weight: Tensor) -> Tensor:
        """The log density, element by element or summed."""
        ...


@dataclass(frozen=True)
class GaussianPrior:
    """p(w) = N(w; mean, std²) for every weight and bias on its own; KL in closed form.

    Args:
        std: standard deviation (not the variance), > 0.
        mean: one number for all weights. Other than 0, the layer keeps it as a buffer of the weight's size.

    Raises:
        ValueError: std <= 0, not finite, or so small or large that float32 does not hold its square.

    Example:
        >>> import finite_width as fw
        >>> fw.bayes.GaussianPrior(std=0.1)
        GaussianPrior(std=0.1, mean=0.0)
    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        _check_std("std", self.std)
        _check.number("mean", self.mean)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")

    def log_prob(self, weight: Tensor) -> Tensor:
        """log N(weight; mean, std²), element by element."""
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * ((weight - float(self.mean)) / float(self.std)) ** 2 - constant


@dataclass(frozen=True)
class ScaleMixturePrior:
    """p(w) = pi N(w; 0, std1²) + (1 - pi) N(w; 0, std2²); its KL is estimated from the sampled weight.

    Source: Blundell et al., "Weight uncertainty in neural networks", ICML 2015, eq. 7.

    Args:
        pi: weight of the first component, in (0, 1).
        std1, std2: standard deviations, > 0.

    Raises:
        ValueError: pi outside (0, 1), a standard deviation that is not positive.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.ScaleMixturePrior().log_prob(torch.zeros(2)).shape
        torch.Size([2])
    """

    pi: float = 0.5
    std1: float = 1.0
    std2: float = 0.0025

    def __post_init__(self) -> None:
        _check_std("std1", self.std1)
        _check_std("std2", self.std2)
        _check.number("pi", self.pi)
        if not 0 < self.pi < 1:
            raise ValueError(f"pi must lie in (0, 1), got {self.pi}")

    def log_prob(self, weight: Tensor) -> Tensor:
        """The log density of the mixture, element by element."""
        # log(a + b) = log a + softplus(log b - log a), each log a constant plus a multiple of w². With the wider
        # component as a, log b - log a is never large, and nothing cancels.
        parts = sorted(((self.std1, self.pi), (self.std2, 1 - self.pi)), reverse=True)
        (wide, narrow) = (math.log(pi / std) - 0.5 * math.log(2 * math.pi) for std, pi in parts)
        slope, steeper = (-0.5 / std**2 for std, _ in parts)
        square = weight * weight
        return wide + slope * square - F.logsigmoid(wide - narrow + (slope - steeper) * square)


@dataclass(frozen=True)
class MopedPrior:
    """p(w) = N(w; the layer's initial mean, std²); with `convert(init="moped")` that is the trained weight.

    The posterior starts at the trained weight with σ = delta |w|.

    Source: Krishnan et al., "Specifying weight priors in Bayesian deep neural networks with empirical Bayes", AAAI
    2020.

    Args:
        std: standard deviation around the trained weight, > 0.
        delta: initial σ over |w|, > 0.

    Raises:
        ValueError: std or delta not positive.

    Example:
        >>> import finite_width as fw
        >>> fw.bayes.MopedPrior()
        MopedPrior(std=1.0, delta=0.1)
    """

    std: float = 1.0
    delta: float = 0.1

    def __post_init__(self) -> None:
        _check_std("std", self.std)
        _check.positive("delta", self.delta)


def check_prior(prior: Any) -> None:
    """Raise TypeError unless `prior` is one of the priors, or has a method log_prob."""
    if isinstance(prior, GaussianPrior | MopedPrior):
        return
    if isinstance(prior, type) or not isinstance(prior, Prior):
        raise TypeError(
            "prior must be a GaussianPrior, ScaleMixturePrior, MopedPrior or an object with a method log_prob(weight), "
            f"got {prior!r}"
        )
