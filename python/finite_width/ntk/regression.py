"""Kernel regression and classification with a network's own NTK."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .. import _check
from .contract import Batch, Target
from .empirical import empirical_ntk
from .estimators import ClassifierProtocol, KernelEstimator, RegressorProtocol
from .forwards import outputs
from .inputs import map_tensors, row_count
from .operator import NTKOperator
from .plan import METHODS
from .solve import OPERATOR_COLUMNS, Operator, all_fit_dense, cholesky, solve


class NTKEstimator(KernelEstimator):
    """The NTK ridge system behind `NTKRegressor` and `NTKClassifier`.

    Kernels are held as [B, n, n], B systems at once: trace [1, N, N] (divided by O, the columns of y share it),
    diagonal [O, N, N], full [1, N·O, N·O].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ridge: float = 1e-4,
        compute: str = "trace",
        center: bool = False,
        solver: str = "auto",
        tol: float = 1e-6,
        jitter: float = 0.0,
        method: str = "auto",
        output: Any = None,
        memory_budget: int | None = None,
        check: bool = True,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.ridge = ridge
        self.compute = compute
        self.center = center
        self.solver = solver
        self.tol = tol
        self.jitter = jitter
        self.method = method
        self.output = output
        self.memory_budget = memory_budget
        self.check = check
        self.progress = progress

    def _check_parameters(self) -> None:
        _check.not_negative("ridge", self.ridge)
        _check.positive("tol", self.tol)
        _check.not_negative("jitter", self.jitter)
        _check.one_of("solver", self.solver, ("auto", "cholesky", "cg"))
        self._check_kernel_parameters()

    def _check_kernel_parameters(self) -> None:
        """Those that every solver hands to the kernel."""
        _check.one_of("compute", self.compute, ("trace", "diagonal", "full"))
        _check.one_of("method", self.method, METHODS)
        for name in ("center", "check", "progress"):
            _check.boolean(name, getattr(self, name))
        if self.memory_budget is not None:
            _check.positive_int("memory_budget", self.memory_budget)

    def _output_count(self, x: Any) -> int:
        return self._outputs(x, rows=2).shape[1]  # of one row, a model may squeeze its axis away

    def _fitted_entries(self) -> int:
        check_is_fitted(self, "dual_coef_")
        systems, size, _ = self.dual_coef_.shape
        return int(systems * size) * (self.n_outputs_ if self.compute == "full" else 1)

    def _fit_targets(self, x: Any, y: Tensor) -> None:
        self.n_outputs_ = self._output_count(x)
        if (self.center or self.compute != "trace") and y.shape[1] != self.n_outputs_:
            reason = "center=True" if self.center else f"compute={self.compute!r}"
            raise ValueError(
                f"with {reason} y must have one column per output of the model, "
                f"got {y.shape[1]} columns and {self.n_outputs_} outputs"
            )
        # The user's own tensors may change later, and predictions must not.
        self.x_fit_ = x = map_tensors(x, lambda each: each.detach().clone())
        if self.center:
            y = y - self._initial(x)
        self._fit_system(x, self._stack(y))

    def _fit_system(self, x: Any, y: Tensor) -> None:
        """Solve (K + ρI) α = y [B, n, k] and keep what predictions need."""
        systems, size, _ = y.shape
        method = self.solver
        if method == "auto":
            dense = systems > 1 or all_fit_dense(size, y.device, self.memory_budget)
            method = "cholesky" if dense else "cg"
        self.solver_, self.ridge_ = method, float(self.ridge)
        self._factor: Tensor | None = None
        self._operator: Operator | None = None
        if method == "cholesky":
            self._factor, self.jitter_ = cholesky(self._kernel(x), self.ridge, self.jitter)
            self.dual_coef_ = torch.cholesky_solve(y, self._factor)
            return
        if systems > 1:
            raise ValueError("solver='cg' solves compute='trace' and 'full'; compute='diagonal' needs 'cholesky'")
        self.jitter_ = 0.0
        self._operator = self._make_operator(x)
        solution = solve(self._operator, y[0], ridge=self.ridge_, method="cg", tol=self.tol, progress=self.progress)
        self.n_iter_, self.residual_ = solution.iterations, solution.residual
        self.dual_coef_ = solution.coefficients.unsqueeze(0)

    def _predict_block(self, x: Any, return_std: bool) -> tuple[Tensor, Tensor | None]:
        cross = self._kernel(x, self.x_fit_).double()
        mean = self._unstack(cross @ self.dual_coef_)
        if self.center:
            mean = mean + self._initial(x)
        if not return_std:
            return mean, None
        variance = self._prior(x) - self._explained(cross)
        return mean, self._unstack(variance.clamp_min(0).sqrt().unsqueeze(-1))

    def _initial(self, x: Any) -> Tensor:
        """f₀ [N, O], the model's own outputs."""
        return self._outputs(x).double()

    def _outputs(self, x: Any, rows: int | None = None) -> Tensor:
        return outputs(Target(self.model_, None, self.output), Batch("x", x), rows=rows)

    def _explained(self, cross: Tensor) -> Tensor:
        """diag(k (K + ρI)⁻¹ kᵀ) [B, m] for rows k [B, m, n] of the kernel."""
        if self._factor is not None:
            return torch.linalg.solve_triangular(self._factor, cross.mT, upper=False).square().sum(1)
        assert self._operator is not None
        rows = cross[0].T.contiguous()
        solution = solve(self._operator, rows, ridge=self.ridge_, method="cg", tol=self.tol, progress=self.progress)
        return (rows * solution.coefficients).sum(0, keepdim=True)

    def _kernel(self, x1: Any, x2: Any = None) -> Tensor:
        """The kernel [B, n, m] in the model's dtype."""
        K = empirical_ntk(self.model_, x1, x2, compute=self.compute, method=self.method, **self._keywords())
        if self.compute == "trace":
            return (K / self.n_outputs_).unsqueeze(0)
        if self.compute == "diagonal":
            return K.movedim(2, 0)
        rows, columns, outputs, _ = K.shape
        return K.transpose(1, 2).reshape(1, rows * outputs, columns * outputs)

    def _prior(self, x: Any) -> Tensor:
        """The kernel's diagonal at new points, [B, m] float64."""
        operator = NTKOperator(self.model_, x, **self._keywords())
        diagonal = operator.diagonal().double().reshape(row_count(x), -1)
        if self.compute == "trace":
            return diagonal.mean(1).unsqueeze(0)
        return diagonal.T if self.compute == "diagonal" else diagonal.reshape(1, -1)

    def _keywords(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "memory_budget": self.memory_budget,
            "check": self.check,
            "progress": self.progress,
        }

    def _make_operator(self, x: Any) -> Operator:
        operator = NTKOperator(self.model_, x, **self._keywords())
        return operator if self.compute == "full" or self.n_outputs_ == 1 else _TraceOperator(operator, self.n_outputs_)

    def _stack(self, y: Tensor) -> Tensor:
        """[N, C] -> right-hand sides [B, n, k]."""
        if self.compute == "diagonal":
            return y.T.unsqueeze(-1)
        return y.reshape(1, -1, 1) if self.compute == "full" else y.unsqueeze(0)

    def _unstack(self, f: Tensor) -> Tensor:
        """[B, m, k] -> [M, C]."""
        if self.compute == "diagonal":
            return f[..., 0].T
        return f.reshape(-1, self.n_outputs_) if self.compute == "full" else f[0]


class _TraceOperator:
    """trace(Θ)/O [N, N] from the operator Θ [N·O, N·O]: the vector once per output, the diagonal of what comes back.

    The operator holds a vector of all parameters for each column, so that it gets a few of them at a time.
    """

    def __init__(self, operator: NTKOperator, outputs: int) -> None:
        self.operator, self.outputs = operator, outputs
        self.shape = torch.Size([side // outputs for side in operator.shape])
        self.dtype, self.device = operator.dtype, operator.device

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return torch.cat([self._columns(part) for part in v.split(OPERATOR_COLUMNS, 1)], 1)

    def _columns(self, v: Tensor) -> Tensor:
        identity = torch.eye(self.outputs, dtype=v.dtype, device=v.device)
        total = v.new_zeros(self.shape[0], v.shape[1])
        for chosen in torch.arange(self.outputs, device=v.device).split(max(1, OPERATOR_COLUMNS // v.shape[1])):
            # [n, a, b, c]: the vectors in the place of output a, for each b of the chosen outputs
            spread = torch.einsum("nc,ab->nabc", v, identity[:, chosen]).reshape(v.shape[0] * self.outputs, -1)
            result = (self.operator @ spread).reshape(self.shape[0], self.outputs, len(chosen), -1)
            total += result[:, chosen].diagonal(dim1=1, dim2=2).sum(-1)
        return total / self.outputs

    def to_dense(self) -> Tensor:
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)


class NTKRegressor(RegressorProtocol, NTKEstimator):
    """Kernel ridge regression with a network's empirical NTK: f(x) = Θ(x, X)(Θ(X, X) + ρI)⁻¹ y.

    That is the mean prediction of an ensemble of infinitely trained, linearised networks whose initial outputs average
    to zero; with `center=True` it is this very network, linearised at its parameters and trained: f₀(x) +
    Θ(x, X)(Θ(X, X) + ρI)⁻¹(y − f₀(X)).

    Args:
        model: any `nn.Module`; its parameters with `requires_grad` define the kernel. `fit` keeps a copy.
        ridge: ρ ≥ 0, in the units of the kernel.
        compute: "trace": all columns of y share the kernel trace(Θ)/O; "diagonal": each output its own kernel;
            "full": the [N·O, N·O] kernel with its correlations between outputs. The last two need one column of y
            per output.
        center: fit y − f₀ and add f₀ back.
        solver: "cholesky", "cg" (conjugate gradients on `NTKOperator`, the kernel never formed), or "auto":
            Cholesky where the kernel fits in `memory_budget`. Under torch.distributed all ranks make the same calls
            with the last two; what fits is then the first rank's decision.
        tol: relative residual at which conjugate gradients stop.
        jitter: what a failed Cholesky factorisation may add to the diagonal, relative to its mean; 0: nothing.
        method, output, memory_budget, check, progress: as in `empirical_ntk`.

    Attributes:
        model_: the copy of the model that predictions use.
        dual_coef_: float64 tensor [B, n, k] of (K + ρI)⁻¹ y; [1, N, C] for compute="trace".
        x_fit_: the training inputs, as tensors.
        solver_, ridge_, jitter_: the solver and the ridge used; what the diagonal got beyond the ridge.
        n_iter_, residual_: of conjugate gradients.

    Raises:
        ValueError: from `fit`: a setting out of its range, an unknown one, x and y that do not fit, NaN or infinite
            entries, a kernel that is not positive definite, and what `empirical_ntk` raises.
        TypeError: from `fit`: a setting that is no number, a model that is no `nn.Module`, targets that are not real.

    Source:
        Jacot, Gabriel, Hongler, "Neural tangent kernel", NeurIPS 2018, section 5; Lee et al., "Wide neural networks of
        any depth evolve as linear models under gradient descent", NeurIPS 2019, equation 14.

    Example:
        >>> import torch, finite_width as fw
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
        >>> regressor = fw.ntk.NTKRegressor(model, ridge=1e-3).fit(x, x[:, 0] ** 2)
        >>> regressor.score(x, x[:, 0] ** 2) > 0.99
        True
    """


class NTKClassifier(ClassifierProtocol, NTKEstimator):
    """Classification by least squares with a network's empirical NTK.

    Two classes on a model with one output are fitted as targets 0/1 with the threshold 0.5; else one-hot targets, all
    columns sharing the kernel trace(Θ)/O (compute="trace"), and the largest column wins.

    Args:
        model, ridge, compute, center, solver, tol, jitter, method, output, memory_budget, check, progress:
            as in `NTKRegressor`.

    Attributes:
        classes_: the sorted labels; the others as in `NTKRegressor`.

    Raises:
        ValueError, TypeError: from `fit`, as `NTKRegressor`; also for fewer than two classes.

    Example:
        >>> import torch, finite_width as fw
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(40, 2)
        >>> fw.ntk.NTKClassifier(model).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0)
        1.0
    """
