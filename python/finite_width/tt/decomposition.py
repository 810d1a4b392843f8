"""TT-SVD, rounding and reconstruction of Tensor Trains."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, isfinite, ldexp, prod, sqrt
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .modes import as_modes, check_modes
from .reference import merge, without_autocast

Ranks = int | Sequence[int] | None


def _check_accuracy(eps: float | None, max_rank: Ranks, bonds: int) -> list[int | None]:
    """The limit of each bond's rank."""
    one_given(eps=eps, max_rank=max_rank)
    if eps is not None:
        _check.number("eps", eps)
        if not (isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a relative error of at least 0, got {eps}")
    return check_ranks("max_rank", max_rank, bonds)


def one_given(**limits: Any) -> None:
    """Raise ValueError unless at least one of the limits of a train is given."""
    if all(value is None for value in limits.values()):
        *most, last = limits
        raise ValueError(f"give {', '.join(most)} or {last}, or several of them; got none")


def check_ranks(name: str, ranks: Ranks, bonds: int) -> list[int | None]:
    """One limit for each bond from None, one integer, or one integer for each bond."""
    if ranks is None:
        return [None] * bonds
    several = isinstance(ranks, Sequence) and not isinstance(ranks, str)
    each: list[Any] = [_plain(rank) for rank in (ranks if several else [ranks])]  # type: ignore[union-attr]
    if several and len(each) != bonds:
        raise ValueError(f"{name} must be an int or have {bonds} entries, one for each bond, got {each}")
    for rank in each:
        _check.positive_int(name, rank)
    return each if several else each * bonds


def _plain(value: Any) -> Any:
    """An integer of numpy's as Python's; anything else as it is."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _check_values(name: str, tensor: Tensor) -> None:
    _check.is_tensor(name, tensor)
    _check.is_float(name, tensor)
    _check.is_finite(name, tensor, "its decomposition is not defined")


def _truncation(values: Tensor, tolerance: float, limit: int | None) -> int:
    """The smallest rank whose dropped singular values have a norm of at most the tolerance; at least 1."""
    tails = values.double().square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k] = ‖values[k:]‖
    rank = int((tails > tolerance).sum())
    return max(1, min(rank, len(values), limit or len(values)))


def _floor(values: Tensor, shape: Sequence[int]) -> float:
    """Singular values under this are rounding errors of the decomposition: they count as zero."""
    largest = float(values[0]) if len(values) else 0.0
    return largest * max(shape) * torch.finfo(values.dtype).eps


def _power_of_two(tensor: Tensor) -> float:
    """Near the largest absolute entry; 1 for zeros. Divided by it, the tensor has the same digits.

    Norms square their entries: those of a float64 tensor beyond 1e±154 would be infinite or zero.
    """
    largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
    limit = 1021 if tensor.dtype == torch.float64 else 125  # so that the inverse is a normal number too
    return ldexp(1.0, max(-limit, min(frexp(largest)[1] - 1, limit))) if largest else 1.0


@without_autocast
def tt_svd(tensor: Tensor, *, eps: float | None = None, max_rank: Ranks = None) -> list[Tensor]:
    """Tensor Train of a tensor by successive truncated SVDs: A[i1, ..., id] ≈ G1[i1] G2[i2] ··· Gd[id].

    With eps, each of the d − 1 unfoldings drops at most δ = eps ‖A‖ / √(d − 1), so that the error is at most
    eps ‖A‖ (Frobenius). Exact zero singular values are always dropped: the ranks of a tensor that has an exact train
    are found.

    Args:
        tensor: [n_1, ..., n_d], float32 or float64.
        eps: relative error.
        max_rank: limit of all ranks, or one for each of the d − 1 bonds. With eps, both hold.

    Returns:
        d cores [r_{k-1}, n_k, r_k], r_0 = r_d = 1.

    Raises:
        ValueError: neither eps nor max_rank, a rank of 0, NaN or infinite values.

    Source: Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33(5), 2011, algorithm 1.

    Example:
        >>> import torch, finite_width as fw
        >>> i = torch.arange(4.0)
        >>> cores = fw.tt.tt_svd(i[:, None, None] + i[:, None] + i, eps=1e-5)
        >>> [list(core.shape) for core in cores]
        [[1, 4, 2], [2, 4, 2], [2, 4, 1]]
    """
    _check_values("tensor", tensor)
    if tensor.dim() < 1 or tensor.numel() == 0:
        raise ValueError(f"tensor must have at least one axis and one element, got shape {list(tensor.shape)}")
    modes, bonds = list(tensor.shape), tensor.dim() - 1
    limits = _check_accuracy(eps, max_rank, bonds)
    scale = _power_of_two(tensor)
    rest = tensor / scale
    tolerance = (eps or 0.0) * float(rest.detach().double().norm()) / sqrt(max(bonds, 1))
    cores, rank = [], 1
    for mode, limit in zip(modes[:-1], limits, strict=True):
        unfolding = rest.reshape(rank * mode, -1)
        u, values, vt = torch.linalg.svd(unfolding, full_matrices=False)
        kept = _truncation(values, max(tolerance, _floor(values, unfolding.shape)), limit)
        cores.append(u[:, :kept].reshape(rank, mode, kept).contiguous())
        rest, rank = values[:kept, None] * vt[:kept], kept
    return [*cores, (rest * scale).reshape(rank, modes[-1], 1).contiguous()]


def tt_matrix_svd(
    weight: Tensor,
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    *,
    eps: float | None = None,
    max_rank: Ranks = None,
) -> list[Tensor]:
    """TT-matrix of a weight [M, N]: the Tensor Train over the pairs of modes (m_k, n_k).

    Args:
        weight: [M, N], float32 or float64.
        out_modes: d factors of M.
        in_modes: d factors of N.
        eps, max_rank: as in `tt_svd`.

    Returns:
        d cores [r_{k-1}, m_k, n_k, r_k].

    Raises:
        ValueError: modes that do not multiply to M and N, and all that `tt_svd` raises.

    Source: Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015, section 3.

    Example:
        >>> import torch, finite_width as fw
        >>> cores = fw.tt.tt_matrix_svd(torch.eye(64), (4, 4, 4), (4, 4, 4), eps=1e-5)
        >>> [list(core.shape) for core in cores]
        [[1, 4, 4, 1], [1, 4, 4, 1], [1, 4, 4, 1]]
    """
    _check_values("weight", weight)
    _check.has_dim("weight", weight, 2, "[M, N]")
    out_modes, in_modes = as_modes("out_modes", out_modes), as_modes("in_modes", in_modes)
    check_modes("out_modes", out_modes, weight.shape[0], "the rows of weight")
    check_modes("in_modes", in_modes, weight.shape[1], "the columns of weight")
    if len(out_modes) != len(in_modes):
        raise ValueError(f"out_modes and in_modes must be of one length, got {out_modes} and {in_modes}")
    count = len(out_modes)
    order = [axis for k in range(count) for axis in (k, count + k)]
    pairs = weight.reshape(*out_modes, *in_modes).permute(order)
    cores = tt_svd(pairs.reshape([m * n for m, n in zip(out_modes, in_modes, strict=True)]), eps=eps, max_rank=max_rank)
    return [
        core.reshape(core.shape[0], m, n, core.shape[2]) for core, m, n in zip(cores, out_modes, in_modes, strict=True)
    ]


def is_list_of_cores(cores: Any) -> None:
    """Raise TypeError unless the cores come in a list, a tuple or torch's list of parameters."""
    if not isinstance(cores, (list, tuple, nn.ParameterList)):
        raise TypeError(f"cores must be a list or tuple of tensors, got {type(cores).__name__}")


def check_cores(cores: Sequence[Tensor], axes: Sequence[int] = (3, 4)) -> None:
    """Raise unless these are the cores of one train: dimensions, dtype, device and adjoining ranks."""
    is_list_of_cores(cores)
    if len(cores) == 0:
        raise ValueError("cores must hold at least one core, got none")
    before, axis_count = 1, None
    for k, core in enumerate(cores):  # names are made for an error alone: this is on the way of every call
        if not isinstance(core, Tensor):
            _check.is_tensor(f"cores[{k}]", core)
        shape = core.shape
        axis_count = axis_count or len(shape)
        if len(shape) not in axes or len(shape) != axis_count:
            wanted = " or ".join(f"{n} axes" for n in axes)
            raise ValueError(f"cores[{k}] must have {wanted}, as all the others, got shape {list(shape)}")
        if core.dtype != cores[0].dtype or core.device != cores[0].device:
            _check.like(f"cores[{k}]", core, "cores[0]", cores[0])
        if shape[0] != before:
            source = f"the last axis of cores[{k - 1}]" if k else "the boundary"
            raise ValueError(f"cores[{k}] must begin with rank {before}, that of {source}, got {list(shape)}")
        if min(shape) < 1:
            raise ValueError(f"cores[{k}] must have sizes of at least 1, got {list(shape)}")
        before = shape[-1]
    if before != 1:
        raise ValueError(f"cores[{len(cores) - 1}] must end with rank 1, got {list(cores[-1].shape)}")


@without_autocast
def tt_to_dense(cores: Sequence[Tensor]) -> Tensor:
    """The full tensor [n_1, ..., n_d] of three-axis cores, or the full matrix [M, N] of four-axis cores.

    Args:
        cores: [r_{k-1}, n_k, r_k] or [r_{k-1}, m_k, n_k, r_k] each.

    Returns:
        [n_1, ..., n_d], or [Π m_k, Π n_k]; differentiable.

    Raises:
        ValueError: cores that do not fit together.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.tt.tt_to_dense([torch.ones(1, 2, 3, 5), torch.ones(5, 4, 2, 1)]).shape
        torch.Size([8, 6])
    """
    check_cores(cores)
    if cores[0].dim() == 4:
        return merge(cores)[0, :, :, 0]
    dense = cores[0]
    for core in cores[1:]:
        dense = torch.tensordot(dense, core, 1)
    return dense.squeeze(0).squeeze(-1)


@without_autocast
def tt_round(cores: Sequence[Tensor], *, eps: float | None = None, max_rank: Ranks = None) -> list[Tensor]:
    """The same tensor with smaller ranks: a QR sweep from the right, then truncated SVDs from the left.

    Args:
        cores: [r_{k-1}, n_k, r_k] or [r_{k-1}, m_k, n_k, r_k] each.
        eps, max_rank: as in `tt_svd`; the error is relative to the tensor that the cores stand for.

    Returns:
        The cores, of the same kind.

    Raises:
        ValueError: as `tt_svd`, and for cores that do not fit together.

    Source: Oseledets 2011, algorithm 2.

    Example:
        >>> import torch, finite_width as fw
        >>> a, b = torch.rand(1, 4, 6), torch.rand(6, 5, 1)
        >>> a[..., 2:] = 0  # rank 2 in truth
        >>> [list(core.shape) for core in fw.tt.tt_round([a, b], eps=1e-5)]
        [[1, 4, 2], [2, 5, 1]]
    """
    check_cores(cores)
    for k, core in enumerate(cores):
        _check_values(f"cores[{k}]", core)
    bonds = len(cores) - 1
    limits = _check_accuracy(eps, max_rank, bonds)
    middles = [core.shape[1:-1] for core in cores]
    scales = [_power_of_two(core) for core in cores]
    flat = [
        (core / scale).reshape(core.shape[0], -1, core.shape[-1]) for core, scale in zip(cores, scales, strict=True)
    ]
    for k in range(bonds, 0, -1):  # every core but the first gets orthonormal rows
        rank, mode, rank_right = flat[k].shape
        q, r = torch.linalg.qr(flat[k].reshape(rank, mode * rank_right).mT)
        flat[k] = q.mT.reshape(-1, mode, rank_right)
        flat[k - 1] = torch.tensordot(flat[k - 1], r.mT, 1)
    tolerance = (eps or 0.0) * float(flat[0].detach().double().norm()) / sqrt(max(bonds, 1))
    for k, limit in enumerate(limits):
        rank, mode, rank_right = flat[k].shape
        u, values, vt = torch.linalg.svd(flat[k].reshape(rank * mode, rank_right), full_matrices=False)
        kept = _truncation(values, max(tolerance, _floor(values, (rank * mode, rank_right))), limit)
        flat[k] = u[:, :kept].reshape(rank, mode, kept)
        flat[k + 1] = torch.tensordot(values[:kept, None] * vt[:kept], flat[k + 1], 1)
    return [
        (core * scale).reshape(core.shape[0], *middle, core.shape[-1]).contiguous()
        for core, middle, scale in zip(flat, middles, scales, strict=True)
    ]


@without_autocast
def relative_error(cores: Sequence[Tensor], dense: Tensor) -> float:
    """‖TT − A‖ / ‖A‖ (Frobenius); 0 for A = 0 met exactly."""
    return relative_distance(tt_to_dense(cores), dense.reshape(_dense_shape(cores)))


@torch.no_grad()
def relative_distance(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ (Frobenius), in float64; ‖found‖ for wanted = 0."""
    wanted = wanted.double()
    scale = _power_of_two(wanted)
    difference, norm = float((found.double() / scale - wanted / scale).norm()), float((wanted / scale).norm())
    return difference / norm if norm else difference


def _dense_shape(cores: Sequence[Tensor]) -> list[int]:
    if cores[0].dim() == 3:
        return [core.shape[1] for core in cores]
    return [prod(core.shape[1] for core in cores), prod(core.shape[2] for core in cores)]
