"""The KL of one tensor of weights or of many, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference
from .sampling_ops import check_weights, kl_tangent, loop, mean_gradient

Tensors = Sequence[Tensor]
MaybeTensors = Sequence[Tensor | None]

_kl_op = _library.register("bayes_kl", reference.kl, lambda mu, *_: mu[0].new_empty(()))
kl_backward_op = _library.register(
    "bayes_kl_backward",
    reference.kl_backward,
    lambda grad, mu, *_: [each.new_empty(each.shape) for each in (*mu, *mu)],
)


class _KL(torch.autograd.Function):
    """The KL of several tensors; an autograd.Function sees tensors alone, so the lists come one after another."""

    @staticmethod
    def forward(prior_std: Sequence[float], *tensors: Any) -> Tensor:
        result: Tensor = _kl_op(*_thirds(tensors), prior_std)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.prior_std, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _kl_gradients(grad, ctx.saved_tensors, ctx.prior_std, ctx.needs_input_grad[1:])
        return None, *grads[0], *grads[1], *grads[2]

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> Tensor:
        rows = zip(*_thirds(ctx.saved_tensors), ctx.prior_std, *_thirds(tangents), strict=True)
        terms = [kl_tangent(mu, rho, reference.given(mean), std, *row) for mu, rho, mean, std, *row in rows]
        return torch.stack(terms).sum()

    @staticmethod
    def vmap(info: Any, in_dims: Any, prior_std: Sequence[float], *tensors: Any) -> Any:
        return loop(lambda *row: _kl(*_thirds(row), prior_std), info, in_dims[1:], tensors)


def _thirds(values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    count = len(values) // 3
    return list(values[:count]), list(values[count : 2 * count]), list(values[2 * count :])


def _kl_gradients(grad: Tensor, tensors: Sequence[Any], prior_std: Sequence[float], needs: Sequence[bool]) -> Any:
    """Lists of ∂μ, ∂ρ and ∂prior_mean."""
    mu, rho, means = _thirds(tensors)
    if torch.is_grad_enabled():
        grads = reference.kl_backward(grad, mu, rho, means, prior_std)
    else:
        grads = kl_backward_op(grad, mu, rho, means, prior_std)
    to_means = [
        mean_gradient(grad, each, reference.given(mean), std) if need else None
        for each, mean, std, need in zip(mu, means, prior_std, _thirds(needs)[2], strict=True)
    ]
    return grads[: len(mu)], grads[len(mu) :], to_means


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mu, rho, means, ctx.prior_std = inputs
    ctx.save_for_backward(*mu, *rho, *means)


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = [need for each in ctx.needs_input_grad[:3] for need in each]
    return *_kl_gradients(grad, ctx.saved_tensors, ctx.prior_std, needs), None


def _kl_vmap(info: Any, in_dims: Any, mu: Any, rho: Any, means: Any, prior_std: Any) -> Any:
    dims = [dim for each in in_dims[:3] for dim in each]
    return loop(lambda *row: _kl(*_thirds(row), prior_std), info, dims, (*mu, *rho, *means))


def _kl_backward_vmap(info: Any, in_dims: Any, grad: Any, mu: Any, rho: Any, means: Any, prior_std: Any) -> Any:
    dims = [in_dims[0], *(dim for each in in_dims[1:4] for dim in each)]
    call = lambda grad, *row: tuple(kl_backward_op(grad, *_thirds(row), prior_std))  # noqa: E731
    rows, dim = loop(call, info, dims, (grad, *mu, *rho, *means))
    return list(rows), list(dim)


# For torch.compile, which refuses a Function with a jvp; and for a raw op that meets vmap inside a backward pass.
_library.derivatives(_kl_op, setup_context=_kl_setup, backward=_kl_backward, vmap=_kl_vmap)
torch.library.register_vmap("finite_width::bayes_kl_backward", _kl_backward_vmap, lib=_library._LIBRARY)
_apply_kl = _library.applied(_KL)


def _kl(mu: Tensors, rho: Tensors, means: Tensors, prior_std: Sequence[float]) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = _kl_op(mu, rho, means, prior_std)
    elif _library.nothing_to_differentiate():
        result = _library.below_autograd(_kl_op, mu, rho, means, prior_std)
    else:
        result = _apply_kl(prior_std, *mu, *rho, *means)
    return result


def without_none(prior_mean: MaybeTensors, like: Tensor) -> list[Tensor]:
    """With an empty tensor for each None: torch's registered autograd takes no lists that hold both."""
    nothing = like.detach().new_empty(0)
    return [nothing if mean is None else mean for mean in prior_mean]


def kl(mu: Tensor, rho: Tensor, prior_mean: Tensor | None = None, prior_std: float = 1.0) -> Tensor:
    """KL(N(μ, softplus(ρ)²) || N(prior_mean, prior_std²)), summed over all elements.

    KL = Σ log(σp/σ) + (σ² + (μ - prior_mean)²) / (2σp²) - ½

    Args:
        mu, rho: any one shape, float32 or float64.
        prior_mean: the shape of mu; None is 0.
        prior_std: σp > 0.

    Returns:
        A scalar; finite for every finite ρ, also where σ rounds to 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, prior_std that is not positive.

    Example:
        >>> import math, torch
        >>> from finite_width.bayes import ops
        >>> rho = torch.full((4,), math.log(math.e - 1))  # σ = 1
        >>> abs(float(ops.kl(torch.zeros(4), rho))) < 1e-6
        True
    """
    check_weights("", mu, rho, prior_mean, prior_std)
    return _kl([mu], [rho], without_none([prior_mean], mu), [prior_std])


def kl_sum(mu: Tensors, rho: Tensors, prior_mean: MaybeTensors, prior_std: Sequence[float]) -> Tensor:
    """The KL of several tensors together, in one pass: Σ `kl(mu[i], rho[i], prior_mean[i], prior_std[i])`.

    Args:
        mu, rho: lists of tensors as for `kl`, of one dtype and device; at least one.
        prior_mean, prior_std: as many; None is a prior mean of 0.

    Returns:
        A scalar, added up in float64.

    Raises:
        TypeError, ValueError: lists of different lengths or none at all; tensors that do not fit, named.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> mu, rho = [torch.zeros(3), torch.ones(2, 2)], [torch.zeros(3), torch.zeros(2, 2)]
        >>> float(ops.kl_sum(mu, rho, [None, None], [1.0, 0.5])) > 0
        True
    """
    if not len(mu) == len(rho) == len(prior_mean) == len(prior_std) > 0:
        lengths = [len(mu), len(rho), len(prior_mean), len(prior_std)]
        raise ValueError(f"mu, rho, prior_mean and prior_std must be lists of one length, at least 1, got {lengths}")
    for i in range(len(mu)):
        check_weights("", mu[i], rho[i], prior_mean[i], prior_std[i], suffix=f"[{i}]")
        _check.like(f"mu[{i}]", mu[i], "mu[0]", mu[0])
    return kl_sum_unchecked(mu, rho, prior_mean, prior_std)


def kl_sum_unchecked(mu: Tensors, rho: Tensors, prior_mean: MaybeTensors, prior_std: Sequence[float]) -> Tensor:
    """For layers, whose own tensors fit each other."""
    return _kl(mu, rho, without_none(prior_mean, mu[0]), prior_std)
