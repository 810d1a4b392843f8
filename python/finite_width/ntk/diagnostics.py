"""What people ask of a kernel: its spectrum, how much it can fit, whether it knows the targets, how far it moved."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check


def spectrum(K: Tensor) -> Tensor:
    """The eigenvalues of a kernel, largest first.

    Args:
        K: [N, N], symmetric, float32 or float64.

    Returns:
        [N] float64; negative ones are rounding, and stay visible.

    Raises:
        ValueError: not square, not symmetric, NaN or infinite entries.
        TypeError: other dtypes.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.ntk.spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([3., 1.], dtype=torch.float64)
    """
    _square("K", K)
    _check.is_symmetric("K", K)
    values: Tensor = torch.linalg.eigvalsh(K.double()).flip(0)
    return values


def effective_dimension(K: Tensor, ridge: float) -> float:
    """How many directions a ridge regression with this kernel fits: tr K(K + ρI)⁻¹ = Σ λ / (λ + ρ).

    Args:
        K: [N, N], symmetric, float32 or float64.
        ridge: ρ > 0, in the units of K.

    Returns:
        A number from 0 to N.

    Raises:
        ValueError: not square, not symmetric, NaN or infinite entries, a ridge that is not positive.
        TypeError: other dtypes.

    Source:
        Zhang, "Learning bounds for kernel regression using effective data dimensionality", Neural Computation 17
        (2005); Hastie, Tibshirani, Friedman, "The elements of statistical learning", equation 5.16.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.ntk.effective_dimension(torch.eye(4), ridge=1.0)
        2.0
    """
    _check.positive("ridge", ridge)
    values = spectrum(K).clamp_min(0)
    return float((values / (values + ridge)).sum())


def target_alignment(K: Tensor, y: Tensor, *, center: bool = False) -> float:
    """How much of the kernel points along the targets: ⟨K, y yᵀ⟩ / (‖K‖ ‖y yᵀ‖), Frobenius.

    Args:
        K: [N, N], symmetric, float32 or float64.
        y: [N] or [N, C]: real targets, ±1, or one-hot.
        center: take means off in feature space first (H K H and H y with H = I − 11ᵀ/N), so that a constant part of
            the kernel does not count.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries, a kernel or targets that are zero (after centring).
        TypeError: other dtypes, complex targets.

    Source:
        Cristianini et al., "On kernel-target alignment", NeurIPS 2001; Cortes, Mohri, Rostamizadeh, "Algorithms for
        learning kernels based on centered alignment", JMLR 13 (2012), definition 4 (centred).

    Example:
        >>> import torch, finite_width as fw
        >>> y = torch.tensor([1.0, -1.0])
        >>> round(fw.ntk.target_alignment(torch.outer(y, y), y), 6)
        1.0
    """
    size = _square("K", K)
    _check.is_tensor("y", y)
    _check.is_dense("y", y)
    _check.has_values("y", y)
    if y.dim() not in (1, 2) or y.shape[0] != size:
        raise ValueError(f"y must have shape [{size}] or [{size}, C], as K has {size} rows, got {list(y.shape)}")
    if y.is_complex():
        raise TypeError(f"y must be real, got {str(y.dtype).removeprefix('torch.')}; pass y.real and y.imag as columns")
    _check.is_finite("y", y)
    if not (K.any() and y.any()):
        raise ValueError("K and y must not be zero")
    K, columns = _scaled(K)[0], _scaled(y)[0].reshape(size, -1)
    if center:
        K = K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()
        columns = columns - columns.mean(0)
    scale = torch.linalg.matrix_norm(K) * torch.linalg.matrix_norm(columns.mT @ columns)
    if not scale > 0:
        raise ValueError("K and y must not be zero" + (" after centring: is y constant?" if center else ""))
    return max(-1.0, min(1.0, float((columns * (K @ columns)).sum() / scale)))  # rounding may pass 1


def drift(K0: Tensor, K1: Tensor, *, kind: str = "relative") -> float:
    """How far a kernel moved, such as over training.

    Args:
        K0: the earlier kernel, any shape.
        K1: the later kernel, the same shape.
        kind: "relative": ‖K₁ − K₀‖ / ‖K₀‖; "cosine": 1 − ⟨K₀, K₁⟩ / (‖K₀‖ ‖K₁‖), blind to a mere change of scale.

    Returns:
        A number ≥ 0; 0 for a kernel that did not move.

    Raises:
        ValueError: different shapes, NaN or infinite entries, a kernel that is zero.
        TypeError: other dtypes.

    Source:
        Fort et al., "Deep learning versus kernel learning", NeurIPS 2020, equation 4 (kernel distance).

    Example:
        >>> import torch, finite_width as fw
        >>> fw.ntk.drift(torch.eye(3), 2 * torch.eye(3)), fw.ntk.drift(torch.eye(3), 2 * torch.eye(3), kind="cosine")
        (1.0, 0.0)
    """
    _check.one_of("kind", kind, ("relative", "cosine"))
    for name, value in (("K0", K0), ("K1", K1)):
        _check.is_tensor(name, value)
        _check.is_float(name, value)
        _check.is_dense(name, value)
        _check.has_values(name, value)
        _check.is_finite(name, value)
    if K0.shape != K1.shape:
        raise ValueError(f"K0 and K1 must have the same shape, got {list(K0.shape)} and {list(K1.shape)}")
    if not K0.any() or (kind == "cosine" and not K1.any()):
        raise ValueError("K0 must not be zero" if not K0.any() else "K1 must not be zero for kind='cosine'")
    before, size = _scaled(K0.flatten())
    if kind == "relative":
        change, change_size = _scaled(K1.double().flatten() - K0.double().flatten())
        return float(change.norm() / before.norm() * (change_size / size))
    after, _ = _scaled(K1.flatten())
    return max(0.0, 1 - float(before @ after / (before.norm() * after.norm())))


def _scaled(value: Tensor) -> tuple[Tensor, Tensor]:
    """The values over the largest one, in float64, and that one: so no square overflows or vanishes."""
    value = value.double()
    largest = value.abs().amax()
    return value / torch.where(largest > 0, largest, 1.0), largest


def _square(name: str, K: Tensor) -> int:
    _check.is_tensor(name, K)
    _check.is_float(name, K)
    _check.is_dense(name, K)
    _check.has_values(name, K)
    if K.dim() != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"{name} must be square [N, N], got {list(K.shape)}")
    _check.is_finite(name, K)
    return K.shape[0]
