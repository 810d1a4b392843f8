"""Many ridges on one NTK and one eigendecomposition, chosen by closed-form leave-one-out errors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _check
from .estimators import RegressorProtocol
from .regression import NTKEstimator
from .solve import refuse_unless_finite


class NTKRidgeCV(RegressorProtocol, NTKEstimator):
    """`NTKRegressor` with the ridge chosen by leave-one-out: one kernel, one eigendecomposition for all ridges.

    With K = QΛQᵀ every ridge costs a matrix product: α = Q(Λ + ρI)⁻¹Qᵀy, and the error at a point that was left out
    is eᵢ = αᵢ / [(K + ρI)⁻¹]ᵢᵢ, exactly what refitting without it would give. With compute="full" a point is all its
    outputs: eᵢ = Gᵢᵢ⁻¹αᵢ with the [O, O] blocks Gᵢᵢ of (K + ρI)⁻¹. The ridge with the least mean square is taken.

    Args:
        model: any `nn.Module`, as in `NTKRegressor`.
        ridges: the ridges ρ > 0 to try, in the units of the kernel.
        compute, center, method, output, memory_budget, check, progress: as in `NTKRegressor`.

    Attributes:
        ridge_: the chosen ridge.
        loo_mse_: numpy [R], the mean squared leave-one-out error of each ridge; inf, with a warning, for ridges so
            small that K + ρI is not positive definite (the kernel's rounding makes eigenvalues negative).
        loo_predictions_: tensor [N, C], the leave-one-out predictions at the chosen ridge.
        best_score_: −min(loo_mse_), as in scikit-learn's RidgeCV.
        model_, x_fit_, dual_coef_: as in `NTKRegressor`.

    Raises:
        ValueError: from `fit`: no ridges, one that is not positive and finite, and as `NTKRegressor`.
        TypeError: from `fit`: ridges that are no sequence of numbers, and as `NTKRegressor`.

    Source:
        Rifkin, Lippert, "Notes on regularized least squares", MIT-CSAIL-TR-2007-025, sections 3 and 4.

    Example:
        >>> import torch, finite_width as fw
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
        >>> regressor = fw.ntk.NTKRidgeCV(model, ridges=[1e-4, 1e2]).fit(x, x[:, 0] ** 2)
        >>> regressor.ridge_
        0.0001
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ridges: Sequence[float] = (1e-6, 1e-4, 1e-2, 1.0, 100.0),
        compute: str = "trace",
        center: bool = False,
        method: str = "auto",
        output: Any = None,
        memory_budget: int | None = None,
        check: bool = True,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.ridges = ridges
        self.compute = compute
        self.center = center
        self.method = method
        self.output = output
        self.memory_budget = memory_budget
        self.check = check
        self.progress = progress

    def _check_parameters(self) -> None:
        self._check_kernel_parameters()
        if np.ndim(self.ridges) != 1:
            raise TypeError(f"ridges must be a sequence of numbers, got {self.ridges!r}")
        if len(self.ridges) == 0:
            raise ValueError("ridges must hold at least one ridge, got none")
        for ridge in self.ridges:  # a leave-one-out error needs a ridge above 0
            _check.positive("ridges", ridge)

    def _fit_system(self, x: Any, y: Tensor) -> None:
        K = self._kernel(x).double()
        refuse_unless_finite(K)
        # Eigenvalues below zero are the kernel's rounding, and stay: K + ρI is what a refit would solve.
        self._eigenvalues, self._eigenvectors = torch.linalg.eigh(K)
        rotated = self._eigenvectors.mT @ y
        ridges = [float(ridge) for ridge in self.ridges]
        self.loo_mse_ = np.full(len(ridges), np.inf)
        errors: dict[int, Tensor] = {}
        for place, ridge in enumerate(ridges):
            error = self._leave_one_out(rotated, ridge) if self._is_solvable(ridge) else None
            if error is not None and not bool(error.isnan().any()):
                errors[place], self.loo_mse_[place] = error, float(error.square().mean())
        self._report_what_is_too_small([ridge for place, ridge in enumerate(ridges) if place not in errors])
        best = min(errors, key=lambda place: float(self.loo_mse_[place]))
        self.ridge_ = ridges[best]
        self.best_score_ = -float(self.loo_mse_[best])
        self.dual_coef_ = self._eigenvectors @ (rotated / (self._eigenvalues + self.ridge_).unsqueeze(-1))
        left_out = self._unstack(y) - errors[best]
        self.loo_predictions_ = left_out + self._initial(x) if self.center else left_out

    def _is_solvable(self, ridge: float) -> bool:
        """Whether K + ρI is positive definite in float64, as a Cholesky factorisation would find."""
        lowest, largest = self._eigenvalues[:, 0] + ridge, self._eigenvalues[:, -1].abs()
        return bool((lowest > torch.finfo(torch.float64).eps * largest).all())

    def _report_what_is_too_small(self, refused: list[float]) -> None:
        """Warn of ridges without an error; raise where none is left."""
        if not refused:
            return
        named = ", ".join(f"{ridge:g}" for ridge in refused)
        reason = (
            f"too small for this kernel, whose smallest eigenvalue is {float(self._eigenvalues[:, 0].min()):.2g} by "
            "rounding. Raise them, or compute the kernel in float64"
        )
        if len(refused) == len(self.ridges):
            raise ValueError(f"ridges: all of them ({named}) are {reason}")
        warnings.warn(f"ridges {named} are {reason}; loo_mse_ is inf for them", stacklevel=5)

    def _leave_one_out(self, rotated: Tensor, ridge: float) -> Tensor:
        """y − prediction without the point [N, C], from Qᵀy [B, n, k]."""
        Q, inverse = self._eigenvectors, 1 / (self._eigenvalues + ridge)
        alpha = Q @ (inverse.unsqueeze(-1) * rotated)
        if self.compute != "full":
            return self._unstack(alpha / (Q.square() @ inverse.unsqueeze(-1)))
        rows = Q[0].reshape(-1, self.n_outputs_, Q.shape[-1])
        blocks = (rows * inverse[0]) @ rows.mT
        errors: Tensor = torch.linalg.solve(blocks, alpha.reshape(-1, self.n_outputs_, 1))[..., 0]
        return errors

    def _explained(self, cross: Tensor) -> Tensor:
        weights = 1 / (self._eigenvalues + self.ridge_)
        return ((cross @ self._eigenvectors).square() @ weights.unsqueeze(-1))[..., 0]
