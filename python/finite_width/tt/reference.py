"""The ops of the Tensor-Train wing in plain torch: the definition, the fallback and the test oracle.

A TT-matrix W [M, N] is a list of cores [r_{k-1}, m_k, n_k, r_k] with r_0 = r_d = 1, M = Π m_k, N = Π n_k. Cut at one
bond of rank r, its cores merge into a left half L [M1, N1, r] and a right half R [r, M2, N2], and

    W[(a c), (n k)] = Σ_r L[a, n, r] R[r, c, k].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

# What tt_linear's `plan` holds: (split, left_first, dense_forward, dense_input_grad, dense_core_grads, in_cores), and
# maybe a seventh entry.
#   split           number of cores in the left half
#   left_first      1: x meets L, then R; 0: x meets R, then L
#   dense_*         1: that pass builds W (or the gradient of W) from the halves
#   in_cores        0: the cores have four axes; k > 0: three, and the first k hold input modes, the others output modes
#   precision       of float32 in CUDA kernels: its place in precision.PRECISIONS
Plan = Sequence[int]


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function computes in the dtypes of its arguments, also under autocast.

    The callers have cast what is to be cast; products inside are summed wide, and torch's tensordot and linalg fail
    under autocast.
    """

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **kwargs)
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapped


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed: float32 for half-precision inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def as_matrix(cores: Sequence[Tensor], in_cores: int) -> list[Tensor]:
    """The cores with four axes [r_{k-1}, m_k, n_k, r_k]: where they have three, the missing mode is 1."""
    if not in_cores:
        return list(cores)
    return [core.unsqueeze(1 if k < in_cores else 2) for k, core in enumerate(cores)]


@without_autocast
def merge(cores: Sequence[Tensor]) -> Tensor:
    """Consecutive cores [r_{k-1}, m_k, n_k, r_k] as one core [r_left, Πm, Πn, r_right]."""
    merged = cores[0]
    for core in cores[1:]:
        left, m, n, _ = merged.shape
        _, p, q, right = core.shape
        product = torch.tensordot(merged, core, 1)  # [left, m, n, p, q, right]
        merged = product.permute(0, 1, 3, 2, 4, 5).reshape(left, m * p, n * q, right)
    return merged


def halves(cores: Sequence[Tensor], split: int) -> tuple[Tensor, Tensor]:
    """L [M1, N1, r] from the first `split` cores and R [r, M2, N2] from the others."""
    return merge(cores[:split])[0], merge(cores[split:])[..., 0]


@without_autocast
def dense(left: Tensor, right: Tensor) -> Tensor:
    """W [M1 M2, N1 N2] from its halves."""
    rows, columns = left.shape[0] * right.shape[1], left.shape[1] * right.shape[2]
    return torch.einsum("anr,rck->acnk", left, right).reshape(rows, columns)


@without_autocast
def split_gradient(gradient: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the cores, given that of what `merge` makes of them, [r_left, Πm, Πn, r_right]."""
    result = []
    for k, core in enumerate(cores):
        rank_left, m, n, rank_right = core.shape
        before = merge(cores[:k]) if k else _unit(core, rank_left)
        after = merge(cores[k + 1 :]) if k + 1 < len(cores) else _unit(core, rank_right)
        _, p, q, _ = before.shape
        _, s, t, _ = after.shape
        parts = gradient.reshape(gradient.shape[0], p, m, s, q, n, t, gradient.shape[-1])
        result.append(torch.einsum("apqb,apmsqntz,cstz->bmnc", before, parts, after))
    return result


def _unit(like: Tensor, rank: int) -> Tensor:
    """The merge of no cores: the identity of the given rank as a core [rank, 1, 1, rank]."""
    return torch.eye(rank, dtype=like.dtype, device=like.device)[:, None, None, :]


@without_autocast
def tt_linear(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, plan: Plan) -> Tensor:
    """x [B, N] -> x Wᵀ + bias [B, M]."""
    split, left_first, dense_forward, _, _, in_cores = plan[:6]
    wide = accumulation_dtype(x.dtype)
    left, right = halves([core.to(wide) for core in as_matrix(cores, in_cores)], split)
    rows = x.to(wide)
    if dense_forward:
        y = rows @ dense(left, right).mT
    else:
        y = _contract(rows, left, right, left_first)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype).contiguous()


def _contract(x: Tensor, left: Tensor, right: Tensor, left_first: int) -> Tensor:
    """x [B, N] -> [B, M] through the halves, without W."""
    inputs = x.reshape(x.shape[0], left.shape[1], right.shape[2])
    if left_first:
        y = torch.einsum("bark,rck->bac", torch.einsum("anr,bnk->bark", left, inputs), right)
    else:
        y = torch.einsum("anr,bnrc->bac", left, torch.einsum("bnk,rck->bnrc", inputs, right))
    return y.reshape(x.shape[0], left.shape[0] * right.shape[1])


@without_autocast
def tt_linear_backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], plan: Plan, needs: Sequence[int]
) -> list[Tensor]:
    """The gradients of Σ grad · tt_linear(x, cores, bias).

    Args:
        grad: [B, M].
        x: [B, N].
        needs: whether the gradients of (x, the cores, the bias) are wanted.

    Returns:
        What is wanted, in order: [B, N]; one tensor for each core; [M].
    """
    split, left_first, _, dense_input_grad, dense_core_grads, in_cores = plan[:6]
    needs_x, needs_cores, needs_bias = needs
    wide = accumulation_dtype(x.dtype)
    wide_cores = [core.to(wide) for core in as_matrix(cores, in_cores)]
    left, right = halves(wide_cores, split)
    out, rows = grad.to(wide), x.to(wide)
    result = []
    if needs_x and dense_input_grad:
        result.append(out @ dense(left, right))
    elif needs_x:  # Wᵀ is the TT-matrix of the cores with their two modes swapped
        result.append(_contract(out, left.transpose(0, 1), right.transpose(1, 2), 1 - left_first))
    if needs_cores:
        if dense_core_grads:
            weight = (out.mT @ rows).reshape(left.shape[0], right.shape[1], left.shape[1], right.shape[2])
            left_grad = torch.einsum("acnk,rck->anr", weight, right)
            right_grad = torch.einsum("acnk,anr->rck", weight, left)
        else:
            inputs = rows.reshape(-1, left.shape[1], right.shape[2])
            outputs = out.reshape(-1, left.shape[0], right.shape[1])
            if left_first:
                left_grad = torch.einsum("bark,bnk->anr", torch.einsum("bac,rck->bark", outputs, right), inputs)
                right_grad = torch.einsum("bark,bac->rck", torch.einsum("anr,bnk->bark", left, inputs), outputs)
            else:
                left_grad = torch.einsum("bnrc,bac->anr", torch.einsum("bnk,rck->bnrc", inputs, right), outputs)
                right_grad = torch.einsum("bnrc,bnk->rck", torch.einsum("anr,bac->bnrc", left, outputs), inputs)
        parts = split_gradient(left_grad[None], wide_cores[:split])
        parts += split_gradient(right_grad[..., None], wide_cores[split:])
        result += [part.reshape(core.shape) for part, core in zip(parts, cores, strict=True)]
    if needs_bias:
        result.append(out.sum(0))
    return [value.to(x.dtype).contiguous() for value in result]


@without_autocast
def tt_chain(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, groups: Sequence[int], left_first: int) -> Tensor:
    """x [B, N] -> x Wᵀ + bias [B, M], one group of merged cores after another, from the left or from the right.

    Args:
        groups: how many consecutive cores each group merges; they add up to the number of cores.
    """
    merged, start = [], 0
    for size in groups:
        merged.append(merge(cores[start : start + size]))
        start += size
    # Every size is named: an empty batch leaves a -1 open.
    batch, left = x.shape
    done = 1
    if left_first:
        state = x  # [B, outputs so far, r, inputs to come]
        for core in merged:
            rank, m, n, rank_right = core.shape
            left //= n
            weight = core.permute(1, 3, 0, 2).reshape(m * rank_right, rank * n)
            state = weight @ state.reshape(batch, done, rank * n, left)
            done *= m
    else:
        state = x  # [B, inputs to come, r, outputs so far]
        for core in reversed(merged):
            rank, m, n, rank_right = core.shape
            left //= n
            state = core.reshape(rank * m, n * rank_right) @ state.reshape(batch, left, n * rank_right, done)
            done *= m
    y = state.reshape(batch, done)
    return y if bias is None else y + bias
