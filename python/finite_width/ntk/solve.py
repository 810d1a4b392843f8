"""Kernel ridge systems (K + ρI) x = y: Cholesky where it fits, preconditioned block conjugate gradients where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import _check
from .fingerprint import describe
from .operator import NTKOperator
from .problem import SMALL, free_memory
from .ranks import job
from .stored import StoredKernel, is_stored

# Columns solved together: beyond this the small [s, s] problems of block CG cost more than they save.
_BLOCK = 64
# Columns that an operator takes at once: it may hold a vector of all parameters for each.
OPERATOR_COLUMNS = 16
# Rows of a stored kernel converted to float64 at a time.
_ROWS = 1024


class Operator(Protocol):
    """What `solve` asks of a matrix that is never formed: `NTKOperator` is one."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, other: Tensor, /) -> Tensor: ...
    def to_dense(self) -> Tensor: ...


@dataclass(frozen=True)
class Solution:
    """The solution of a kernel ridge system, and how it was found.

    Attributes:
        coefficients: [N] or [N, C], like the right-hand side.
        method: "cholesky" or "cg".
        iterations: products with the kernel (0 for Cholesky; the preconditioner's one is counted).
        residual: the largest ‖y − (K + ρI)x‖ / ‖y‖ over the columns.
        jitter: what was added to the diagonal beyond the ridge; 0 unless asked for.
    """

    coefficients: Tensor
    method: str
    iterations: int
    residual: float
    jitter: float


def solve(
    K_or_operator: Tensor | Operator | Any,
    y: Tensor,
    *,
    ridge: float,
    method: str = "auto",
    tol: float = 1e-6,
    max_iterations: int | None = None,
    rank: int | None = None,
    jitter: float = 0.0,
    memory_budget: int | None = None,
    progress: bool = False,
) -> Solution:
    """Solve a kernel ridge system: (K + ρI) x = y, K symmetric positive semi-definite.

    The arithmetic is float64 whatever the kernel's dtype, so that the solver adds nothing to the kernel's own error.
    Conjugate gradients act on all columns of `y` at once (one product with K serves them all), preconditioned by a
    randomised Nyström approximation: about the `rank` largest eigenvalues of K stop counting.

    Args:
        K_or_operator: [N, N], float32 or float64; or an operator with `shape`, `dtype`, `device`, `@` and
            `to_dense()`, such as `NTKOperator`; or a stored kernel, such as the Zarr array of
            `empirical_ntk(..., out=)`, [N, N] or [N, N, O, O], which conjugate gradients read panel by panel. Under
            torch.distributed the ranks share the products with a stored kernel and with `NTKOperator`; all of them
            make the same call. A tensor must be symmetric; of what is not in memory that is not tested, and with
            another kernel the solution is wrong.
        y: [N] or [N, C], on the same device.
        ridge: ρ ≥ 0, in the units of K.
        method: "cholesky", "cg", or "auto": Cholesky where a float64 copy of K fits in `memory_budget`.
        tol: conjugate gradients stop at ‖y − (K + ρI)x‖ ≤ tol ‖y‖, for every column.
        max_iterations: of conjugate gradients, for each block of at most 64 columns of `y`; default 10 N (rounding
            makes more than N necessary).
        rank: of the preconditioner; default min(N / 4, 256) for a stored kernel and min(N / 4, 64) for an operator,
            where each direction costs a product. 0 switches it off.
        jitter: asked for, a failed Cholesky factorisation is retried with jitter · mean(diag K) on the diagonal,
            then ten and a hundred times as much; what was added is in the result. 0: a failure is an error.
        memory_budget: bytes for the dense solver, and for what conjugate gradients keep of a stored kernel instead of
            reading it for every product; default a quarter of what is free.
        progress: show a bar of the iterations.

    Returns:
        A `Solution`; its `coefficients` have the shape and dtype of `y`.

    Raises:
        ValueError: shapes that do not fit, no rows, NaN or infinite entries in K or y, a negative ridge or rank, a
            kernel that is not symmetric or not positive definite, ranks that make different calls.
        TypeError: other dtypes.

    Source:
        Dubrulle, "Retooling the method of block conjugate gradients", ETNA 12 (2001), algorithm BCGrQ;
        Frangella, Tropp, Udell, "Randomized Nyström preconditioning", SIMAX 44 (2023), algorithms 2.1 and 5.1.

    Example:
        >>> import torch, finite_width as fw
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> fw.ntk.solve(K, torch.tensor([1.0, 0.0]), ridge=1.0).coefficients
        tensor([ 0.3750, -0.1250])
    """
    _check.one_of("method", method, ("auto", "cholesky", "cg"))
    _check_settings(ridge, tol, max_iterations, rank, jitter, memory_budget)
    _check.is_tensor("y", y)
    _check.is_float("y", y)
    _check.is_dense("y", y)
    _check.has_values("y", y)
    if is_stored(K_or_operator) and not hasattr(K_or_operator, "to_dense"):
        K_or_operator = StoredKernel(K_or_operator, memory_budget)
    size = _check_square(K_or_operator)
    if y.dim() not in (1, 2) or y.shape[0] != size:
        raise ValueError(f"y must have shape [{size}] or [{size}, C], as K has {size} rows, got {list(y.shape)}")
    if y.device != K_or_operator.device:
        raise ValueError(f"y is on {y.device}, but K is on {K_or_operator.device}; move one of them")
    _check.is_finite("y", y)
    columns = y.double().reshape(size, -1)
    # Norms of very large or small columns would overflow or vanish. A power of two, so that nothing is rounded.
    scale = torch.exp2(torch.frexp(columns.abs().amax(0)).exponent.double() - 1)
    columns = columns / scale
    shared = isinstance(K_or_operator, NTKOperator | StoredKernel)
    if isinstance(K_or_operator, Tensor):
        refuse_unless_finite(K_or_operator)
        _check.is_symmetric("K_or_operator", K_or_operator)
    elif shared:
        asked = {"ridge": ridge, "method": method, "tol": tol, "jitter": jitter}
        _refuse_other_calls(K_or_operator, {"y": y, "max_iterations": max_iterations, "rank": rank, **asked})
    if method == "auto":
        fits = all_fit_dense if shared else fits_dense
        method = "cholesky" if fits(size, y.device, memory_budget) else "cg"
    if method == "cholesky":
        K = K_or_operator if isinstance(K_or_operator, Tensor) else K_or_operator.to_dense()
        factor, added = cholesky(K, ridge, jitter)
        x = torch.cholesky_solve(columns, factor)
        residual = _relative(columns - K.double() @ x - (ridge + added) * x, columns)
        iterations = 0
    elif columns.numel() == 0:
        x, iterations, residual, added = columns, 0, 0.0, 0.0
    else:
        added = 0.0
        default_rank = min(size // 4, 256 if isinstance(K_or_operator, Tensor | StoredKernel) else 64)
        x, iterations, residual = _conjugate_gradients(
            _product(K_or_operator),
            columns,
            ridge=float(ridge),
            tol=tol,
            max_iterations=10 * size if max_iterations is None else max_iterations,
            rank=default_rank if rank is None else min(rank, size),
            precision=torch.finfo(K_or_operator.dtype).eps,
            progress=progress,
        )
    return Solution((x * scale).reshape(y.shape).to(y.dtype), method, iterations, residual, added)


def _check_settings(
    ridge: float, tol: float, max_iterations: int | None, rank: int | None, jitter: float, memory_budget: int | None
) -> None:
    """Checks the numbers."""
    _check.not_negative("ridge", ridge)
    _check.positive("tol", tol)
    _check.not_negative("jitter", jitter)
    if max_iterations is not None:
        _check.positive_int("max_iterations", max_iterations)
    if rank is not None:
        _check.integer("rank", rank, least=0)
    if memory_budget is not None:
        _check.positive_int("memory_budget", memory_budget)


def cholesky(K: Tensor, ridge: float, jitter: float = 0.0) -> tuple[Tensor, float]:
    """The lower float64 factor of K + ρI, and the jitter it took (0 unless `jitter` asks for some).

    Args:
        K: [..., N, N].
        ridge: ρ.
        jitter: relative to mean(diag K); tried once, ten and a hundred times as large after a failure.

    Raises:
        ValueError: K + ρI is not positive definite in float64, or not finite; the message says what helps.
    """
    refuse_unless_finite(K)
    system = K.to(torch.float64, copy=True)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    scale = float(diagonal.mean()) if diagonal.numel() else 0.0
    added = 0.0
    diagonal += ridge
    for step in (0.0, jitter, 10 * jitter, 100 * jitter):
        wanted = step * max(scale, 0.0)
        diagonal += wanted - added
        added = wanted
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed.any():
            return factor, added
        if jitter == 0:
            break
    raise ValueError(
        f"K + {ridge:g} I is not positive definite (mean of K's diagonal {scale:.3g}, jitter {added:.3g}). "
        "Raise ridge, compute the kernel in float64, or ask for jitter, such as jitter=1e-6"
    )


def refuse_unless_finite(K: Tensor) -> None:
    """Raise ValueError where a kernel holds a NaN or an infinity."""
    _check.is_finite("K", K, "look at the model's outputs and parameters")


def fits_dense(size: int, device: torch.device, memory_budget: int | None) -> bool:
    """Whether a float64 matrix [size, size] and its factor fit in the budget (default: a quarter of what is free)."""
    budget = free_memory(device) // 4 if memory_budget is None else memory_budget
    return 2 * 8 * size * size <= budget


def all_fit_dense(size: int, device: torch.device, memory_budget: int | None) -> bool:
    """`fits_dense`, as the first rank finds it: ranks that share products must choose alike, whatever is free."""
    if memory_budget is None and 2 * 8 * size * size <= SMALL:
        return True  # on every rank, so that none waits for the others
    return job().agree(lambda: fits_dense(size, device, memory_budget))


def _refuse_other_calls(K: Any, arguments: dict[str, Any]) -> None:
    """Raise on every rank where the ranks do not make the same call: each would wait for products that never come."""
    ranks = job()
    if ranks.size == 1:
        return
    kernel = K.fingerprint() if isinstance(K, NTKOperator) else {"shape": str(K.shape), "dtype": str(K.dtype)}
    mine = {name: describe(value, {}) for name, value in arguments.items()}
    every = ranks.gather((kernel, mine))
    if any(other != kernel for other, _ in every):
        kind = "operators of different models or data" if isinstance(K, NTKOperator) else "stored kernels that differ"
        raise ValueError(f"the ranks have {kind}; give all of them the same")
    differing = [name for name in mine if any(other[name] != mine[name] for _, other in every)]
    if differing:
        raise ValueError(f"the ranks call solve with different {', '.join(differing)}; give all of them the same")


def _check_square(K: Tensor | Operator) -> int:
    if isinstance(K, Tensor):
        _check.is_float("K_or_operator", K)
        _check.is_dense("K_or_operator", K)
        _check.has_values("K_or_operator", K)
    elif not hasattr(K, "__matmul__") or not hasattr(K, "shape"):
        raise TypeError(f"K_or_operator must be a tensor or an operator with shape and @, got {type(K).__name__}")
    shape = list(K.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"K_or_operator must be square [N, N] with N > 0, got {shape}")
    return int(shape[0])


def _product(K: Tensor | Operator) -> Callable[[Tensor], Tensor]:
    """v [N, S] float64 -> K v, float64; a stored float32 kernel is converted row block by row block."""
    if isinstance(K, StoredKernel):
        return lambda v: K @ v  # float64 already
    if isinstance(K, NTKOperator):
        ranks, parts = job(), OPERATOR_COLUMNS
        return lambda v: torch.cat([K.product(part.to(K.dtype), ranks).double() for part in v.split(parts, 1)], 1)
    if not isinstance(K, Tensor):
        return lambda v: torch.cat([(K @ part.to(K.dtype)).double() for part in v.split(OPERATOR_COLUMNS, 1)], 1)
    if K.dtype == torch.float64:
        return lambda v: K @ v
    return lambda v: torch.cat([rows.double() @ v for rows in K.split(_ROWS)])


def _relative(residual: Tensor, y: Tensor) -> float:
    """The largest column of ‖residual‖ / ‖y‖; a zero column counts as solved by zero."""
    norms = y.norm(dim=0)
    ratios = residual.norm(dim=0) / torch.where(norms > 0, norms, torch.ones_like(norms))
    return float(ratios.max()) if ratios.numel() else 0.0


@dataclass(frozen=True)
class _Nystrom:
    """P^(±1/2) for P = U (Λ + ρ) Uᵀ / (λ_min + ρ) + (I − U Uᵀ): the top of the spectrum flattened."""

    basis: Tensor  # [N, rank], orthonormal
    root: Tensor  # [rank], sqrt((λ + ρ) / (λ_min + ρ))

    def apply(self, v: Tensor, power: int) -> Tensor:
        scale = self.root if power == 1 else 1 / self.root
        return v + self.basis @ ((scale - 1).unsqueeze(1) * (self.basis.mT @ v))


def _nystrom(product: Callable[[Tensor], Tensor], like: Tensor, ridge: float, rank: int, precision: float) -> _Nystrom:
    """The randomised Nyström approximation of the kernel from one product with `rank` random directions."""
    generator = torch.Generator().manual_seed(0)
    size = like.shape[0]
    directions = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(like.device)
    directions = torch.linalg.qr(directions).Q
    image = product(directions)
    # The shift keeps the small matrix positive definite in the kernel's own precision.
    shift = precision * size**0.5 * float(torch.linalg.matrix_norm(image))
    image = image + shift * directions
    small = directions.mT @ image
    factor, failed = torch.linalg.cholesky_ex((small + small.mT) / 2)
    if failed.any():  # a kernel whose noise outweighs it in these directions: no preconditioner is the safe one
        return _Nystrom(like.new_zeros(size, 1), like.new_ones(1))
    half = torch.linalg.solve_triangular(factor.mT, image, upper=True, left=False)
    basis, values, _ = torch.linalg.svd(half, full_matrices=False)
    eigenvalues = (values.square() - shift).clamp_min(0)
    lowest = eigenvalues[-1] + ridge
    if lowest <= 0:
        lowest = eigenvalues[eigenvalues > 0].min() if (eigenvalues > 0).any() else like.new_ones(())
    return _Nystrom(basis, ((eigenvalues + ridge).clamp_min(lowest) / lowest).sqrt())


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    ridge: float,
    tol: float,
    max_iterations: int,
    rank: int,
    precision: float,
    progress: bool,
) -> tuple[Tensor, int, float]:
    """(x, iterations, residual) for every column of y [N, C], in blocks of columns that share one preconditioner."""

    def checked(v: Tensor) -> Tensor:
        image = product(v)
        if bool(torch.isfinite(v).all()):
            refuse_unless_finite(image)
        return image

    iterations = 0
    preconditioner = None
    if rank and y.shape[1] and y.any():
        preconditioner = _nystrom(checked, y, ridge, rank, precision)
        iterations = 1

    def system(v: Tensor) -> Tensor:
        return checked(v) + ridge * v

    solved, worst = [], 0.0
    with tqdm(total=None, desc="conjugate gradients", unit="it", disable=not progress) as bar:
        for block in y.split(min(_BLOCK, max(y.shape[0] // 2, 1)), dim=1):
            x, residual, begun = torch.zeros_like(block), block, iterations
            # The recurrence drifts from the true residual; a restart from what is left takes it on.
            for _ in range(3):
                left_over = max_iterations - (iterations - begun)
                step, used = _block_cg(system, residual, block, tol, left_over, preconditioner, bar)
                before = _relative(residual, block)
                candidate = x + step
                left = block - system(candidate)
                iterations += used + 1
                after = _relative(left, block)
                if after < before:
                    x, residual = candidate, left
                if after <= tol or after > 0.5 * before or iterations - begun >= max_iterations:
                    break
            solved.append(x)
            worst = max(worst, _relative(residual, block))
    if worst > tol:
        from sklearn.exceptions import ConvergenceWarning  # here, since scikit-learn takes seconds to import

        warnings.warn(
            f"conjugate gradients stopped at a relative residual of {worst:.2g} after {iterations} products, "
            f"above tol={tol:g}. Raise ridge, rank or max_iterations, or compute the kernel in float64",
            ConvergenceWarning,
            stacklevel=3,
        )
    return torch.cat(solved, dim=1), iterations, worst


def _block_cg(
    system: Callable[[Tensor], Tensor],
    residual: Tensor,
    y: Tensor,
    tol: float,
    max_iterations: int,
    preconditioner: _Nystrom | None,
    bar: Any,
) -> tuple[Tensor, int]:
    """BCGrQ: the directions are kept orthonormal by a QR step, so columns that depend on each other do no harm."""

    def split(v: Tensor) -> Tensor:
        return v if preconditioner is None else preconditioner.apply(v, -1)

    goal = tol * y.norm(dim=0)
    x = torch.zeros_like(residual)
    basis, coefficients = torch.linalg.qr(split(residual))
    directions = basis
    for iteration in range(max_iterations):
        image = split(system(split(directions)))
        curvature = directions.mT @ image
        step, singular = torch.linalg.inv_ex(curvature)
        if singular:  # so is K + ρI; what was found so far stays
            return split(x), iteration + 1
        x = x + directions @ (step @ coefficients)
        basis, triangle = torch.linalg.qr(basis - image @ step)
        coefficients = triangle @ coefficients
        directions = basis + directions @ triangle.mT
        left = basis @ coefficients
        norms = (left if preconditioner is None else preconditioner.apply(left, 1)).norm(dim=0)
        bar.update()
        bar.set_postfix_str(f"residual {float((norms / y.norm(dim=0).clamp_min(1e-300)).max()):.1e}", refresh=False)
        if bool((norms <= goal).all()):
            return split(x), iteration + 1
    return split(x), max_iterations
