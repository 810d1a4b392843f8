"""Regression and classification with the NNGP (conjugate) kernel: the last layer refitted by ridge regression."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .. import _check
from .estimators import ClassifierProtocol, KernelEstimator, RegressorProtocol
from .inputs import row_count
from .nngp import features
from .solve import cholesky


class NNGPEstimator(KernelEstimator):
    """Ridge regression on the last hidden features h; the smaller of hᵀh [D, D] and hhᵀ [N, N] is factorised."""

    def __init__(
        self,
        model: nn.Module,
        *,
        ridge: float = 0.1,
        layer: str | None = None,
        normalize: bool = False,
        jitter: float = 0.0,
        check: bool = True,
    ) -> None:
        self.model = model
        self.ridge = ridge
        self.layer = layer
        self.normalize = normalize
        self.jitter = jitter
        self.check = check

    def _check_parameters(self) -> None:
        _check.not_negative("ridge", self.ridge)
        _check.not_negative("jitter", self.jitter)
        _check.boolean("normalize", self.normalize)
        _check.boolean("check", self.check)

    def _output_count(self, x: Any) -> int:
        return 1  # the last layer is replaced: its outputs do not count

    def _fitted_entries(self) -> int:
        check_is_fitted(self, "coef_")
        return sum(self.coef_.shape) + self._factor.shape[0]

    def _features(self, x: Any) -> Tensor:
        h = features(self.model_, x, layer=self.layer, check=self.check).double()
        return h / h.shape[1] ** 0.5 if self.normalize else h

    def _fit_targets(self, x: Any, y: Tensor) -> None:
        h = self._features(x)
        self.ridge_ = float(self.ridge)  # set_params changes nothing that is fitted
        self._features_fit: Tensor | None = None
        if h.shape[1] <= row_count(x):
            self._factor, self.jitter_ = cholesky(h.mT @ h, self.ridge, self.jitter)
            self.coef_ = torch.cholesky_solve(h.mT @ y, self._factor)
        else:
            self._features_fit = h
            self._factor, self.jitter_ = cholesky(h @ h.mT, self.ridge, self.jitter)
            self.coef_ = h.mT @ torch.cholesky_solve(y, self._factor)

    def _predict_block(self, x: Any, return_std: bool) -> tuple[Tensor, Tensor | None]:
        h = self._features(x)
        mean = h @ self.coef_
        if not return_std:
            return mean, None
        if self._features_fit is None:  # ρ h (hᵀh + ρI)⁻¹ hᵀ, the same by Woodbury's identity
            half = torch.linalg.solve_triangular(self._factor, h.mT, upper=False)
            variance = (self.ridge_ + self.jitter_) * half.square().sum(0)
        else:
            half = torch.linalg.solve_triangular(self._factor, self._features_fit @ h.mT, upper=False)
            variance = h.square().sum(1) - half.square().sum(0)
        return mean, variance.clamp_min(0).sqrt().unsqueeze(1)


class NNGPRegressor(RegressorProtocol, NNGPEstimator):
    """The network's last layer refitted by ridge regression: W = (hᵀh + ρI)⁻¹hᵀy, f(x) = h(x) W.

    In kernel form f(x) = K(x, X)(K(X, X) + ρI)⁻¹y with K of `nngp_kernel`: the posterior mean of the Gaussian process
    that the network tends to at initialisation, with the finite network's own features.

    Args:
        model: any `nn.Module` with a linear layer; `fit` keeps a copy.
        ridge: ρ ≥ 0, in the units of the kernel.
        layer: the qualified name of the layer whose inputs are the features; default the last `nn.Linear` called.
        normalize: divide the kernel by the width, as neural-tangents does (ρ then means width times as much).
        jitter: what a failed Cholesky factorisation may add to the diagonal, relative to its mean; 0: nothing.
        check: as in `nngp_kernel`.

    Attributes:
        model_: the copy of the model that predictions use.
        coef_: float64 tensor [width, C], the refitted layer W.
        ridge_, jitter_: the ridge of the fit; what the diagonal got beyond it.

    Raises:
        ValueError: from `fit`: a negative ridge or jitter, x and y that do not fit, NaN or infinite entries, features
            whose system is not positive definite, and what `nngp_kernel` raises.
        TypeError: from `fit`: a setting that is no number, a model that is no `nn.Module`, targets that are not real.

    Source:
        Lee et al., "Deep neural networks as Gaussian processes", ICLR 2018, equation 8.

    Example:
        >>> import torch, finite_width as fw
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
        >>> regressor = fw.ntk.NNGPRegressor(model, ridge=1e-4).fit(x, x[:, 0] ** 2)
        >>> regressor.score(x, x[:, 0] ** 2) > 0.99
        True
    """


class NNGPClassifier(ClassifierProtocol, NNGPEstimator):
    """Classification by least squares on the last hidden features.

    Two classes are fitted as targets 0/1 with the threshold 0.5; more as one-hot targets, and the largest wins.

    Args:
        model, ridge, layer, normalize, jitter, check: as in `NNGPRegressor`.

    Attributes:
        classes_: the sorted labels; the others as in `NNGPRegressor`.

    Raises:
        ValueError, TypeError: from `fit`, as `NNGPRegressor`; also for fewer than two classes.

    Example:
        >>> import torch, finite_width as fw
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(40, 2)
        >>> fw.ntk.NNGPClassifier(model).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0)
        1.0
    """
