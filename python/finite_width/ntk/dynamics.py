"""Gradient flow of a linearised network, from its kernel alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _check


class Flow(NamedTuple):
    """What `gradient_flow` returns: outputs along gradient flow, in y's dtype.

    Attributes:
        train: [N] or [N, C], as y, on the training points; with a leading axis T for a tensor of times.
        test: [M] or [M, C] on the test points, likewise; None where K_test is None.
    """

    train: Tensor
    test: Tensor | None


def gradient_flow(
    K_train: Tensor,
    y: Tensor,
    K_test: Tensor | None,
    t: Tensor | float,
    *,
    f0_train: Tensor | float = 0.0,
    f0_test: Tensor | float = 0.0,
    loss: str = "sum",
) -> Flow:
    """Outputs of a network trained by gradient flow on squares, with a constant kernel.

    f_t(X) = y + e^(−ηtK)(f₀(X) − y), f_t(x) = f₀(x) + K(x, X) K⁻¹ (I − e^(−ηtK)) (y − f₀(X)), with η = 1 for
    loss="sum". Zero initial outputs give the mean over an ensemble whose initial outputs average to zero.

    Args:
        K_train: [N, N], one kernel for all columns of y; or [N, N, O, O] (compute="full"). Its dtype tells which of
            its eigenvalues are rounding and do not count: those below N · eps of the largest. So pass a kernel that was
            computed in float32 as it is (after K_train.double() its rounding would be fitted, with large errors at late
            times), and compute it in float64 where small eigenvalues matter.
        y: [N] or [N, C]; [N, O] for a full kernel.
        K_test: [M, N] or [M, N, O, O], test points against training points; None for the training points alone.
        t: time, a number or [T], at least 0, inf allowed; learning rate × steps of small-step gradient descent.
        f0_train: initial outputs, like y, or a number.
        f0_test: initial outputs on the test points, [M] or [M, C], or a number.
        loss: "sum": ½ Σ (f − y)²; "mean": that divided by the number of entries of y (torch's `mse_loss` is twice
            this, so its time runs twice as fast).

    Returns:
        `Flow(train, test)`: [N] and [M] like y for a number t; with a leading axis T for a tensor t. In y's dtype,
        computed in float64.

    Raises:
        ValueError: shapes that do not fit, no rows, a K_train that is not symmetric, NaN or infinite values
            (but infinite times), negative times.
        TypeError: other dtypes; a time or initial outputs that are neither a real number nor a tensor.

    Source:
        Lee et al., "Wide neural networks of any depth evolve as linear models under gradient descent", NeurIPS 2019,
        equations 10 and 11.

    Example:
        >>> import torch, finite_width as fw
        >>> K, y = torch.eye(2), torch.ones(2)
        >>> fw.ntk.gradient_flow(K, y, None, float("inf")).train
        tensor([1., 1.])
    """
    _check.one_of("loss", loss, ("sum", "mean"))
    for name, value in (("K_train", K_train), ("y", y), *([("K_test", K_test)] if K_test is not None else [])):
        _check.is_tensor(name, value)
        _check.is_float(name, value)
        _check.is_dense(name, value)
        _check.has_values(name, value)
        _check.is_finite(name, value)
    sizes = K_train.shape
    if len(sizes) not in (2, 4) or sizes[::2] != sizes[1::2] or 0 in sizes:
        raise ValueError(f"K_train must have shape [N, N] or [N, N, O, O] with N, O > 0, got {list(sizes)}")
    rows = K_train.shape[0]
    outputs = K_train.shape[2] if K_train.dim() == 4 else 1
    if y.dim() not in (1, 2) or y.shape[0] != rows:
        raise ValueError(f"y must have shape [{rows}] or [{rows}, C], as K_train has {rows} rows, got {list(y.shape)}")
    if K_train.dim() == 4 and y.shape[1:].numel() != outputs:
        raise ValueError(
            f"y must have shape [{rows}, {outputs}], as K_train has {outputs} outputs, got {list(y.shape)}"
        )
    if K_test is not None and (K_test.dim() != K_train.dim() or K_test.shape[1:] != K_train.shape[1:]):
        raise ValueError(f"K_test must have shape [M, {str(list(K_train.shape[1:]))[1:]}, got {list(K_test.shape)}")
    matrix = _matrix(K_train)
    _check.is_symmetric("K_train", matrix, K_train.dtype)
    times = _real("t", t, y)
    if times.dim() > 1:
        raise ValueError(f"t must be a number or have shape [T], got {list(times.shape)}")
    if not bool((times >= 0).all()):  # nor NaN
        raise ValueError(f"t must be at least 0, got {float(times[~(times >= 0)][0]):g}")

    initial = _initial("f0_train", f0_train, y, y.shape)
    columns = (outputs, 1) if K_train.dim() == 4 else (1, -1)
    missing = (y.double() - initial).reshape(rows * columns[0], columns[1])
    eigenvalues, Q = torch.linalg.eigh(matrix)
    # Below this an eigenvalue is the kernel's rounding; a direction without one never moves.
    floor = eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(K_train.dtype).eps
    eigenvalues = torch.where(eigenvalues > floor, eigenvalues, 0.0)
    speed = eigenvalues if loss == "sum" else eigenvalues / y.numel()
    exponent = torch.where(speed > 0, speed * times.reshape(-1, 1), 0.0)  # [T, n]; 0 · inf would be NaN
    learned = -torch.expm1(-exponent).unsqueeze(-1) * (Q.mT @ missing)  # [T, n, k]
    shape = [*times.shape, *y.shape]
    train = initial + (Q @ learned).reshape(shape)
    if K_test is None:
        return Flow(train.to(y.dtype), None)
    inverse = torch.where(eigenvalues > 0, 1 / eigenvalues, 0.0)
    weights = Q @ (inverse.unsqueeze(-1) * learned)
    shape = [*times.shape, K_test.shape[0], *y.shape[1:]]
    initial_test = _initial("f0_test", f0_test, y, torch.Size([K_test.shape[0], *y.shape[1:]]))
    test = initial_test + (_matrix(K_test) @ weights).reshape(shape)
    return Flow(train.to(y.dtype), test.to(y.dtype))


def _matrix(K: Tensor) -> Tensor:
    """[N, M] or [N, M, O, O] -> [N, M] or [N·O, M·O], float64."""
    if K.dim() == 4:
        K = K.transpose(1, 2).flatten(2).flatten(0, 1)
    return K.double()


def _initial(name: str, value: Tensor | float, y: Tensor, shape: torch.Size) -> Tensor:
    """The initial outputs as float64 of this shape."""
    initial = _real(name, value, y).detach()
    _check.is_finite(name, initial)
    if initial.dim() and initial.shape != shape:
        raise ValueError(f"{name} must be a number or have shape {list(shape)}, got {list(initial.shape)}")
    return initial.expand(shape)


def _real(name: str, value: Any, like: Tensor) -> Tensor:
    """A number, tensor or array as float64, on the device of `like`."""
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None
    if found.is_complex():
        raise TypeError(f"{name} must be real, got complex values")
    return found.to(like.device, torch.float64)
