"""The variational linear layer as torch functions: one sample of W for a batch, or many samples for prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference
from .kl_ops import kl_backward_op, without_none
from .sampling_ops import check_seed, check_weights, kl_tangent, loop, loop_vmap, mean_gradient, normal_of

_linear_op = _library.register(
    "bayes_linear",
    reference.linear,
    lambda x, weight_mu, *_: (x.new_empty(x.shape[0], weight_mu.shape[0]), x.new_empty(())),
)


def fake_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    bias = 0 if bias_mu is None else bias_mu.shape[0]
    grad_x = x.new_empty(x.shape) if rest[-1] else x.new_empty(0)
    shape = weight_mu.shape
    return grad_x, x.new_empty(shape), x.new_empty(shape), x.new_empty(bias), x.new_empty(bias)


_linear_backward_op = _library.register("bayes_linear_backward", reference.linear_backward, fake_linear_backward)
_linear_samples_op = _library.register(
    "bayes_linear_samples",
    reference.linear_samples,
    lambda x, weight_mu, weight_rho, bias_mu, bias_rho, seed, first, samples: x.new_empty(
        samples, x.shape[1], weight_mu.shape[0]
    ),
)
for _name, _op in (("bayes_linear_backward", _linear_backward_op), ("bayes_linear_samples", _linear_samples_op)):
    torch.library.register_vmap(f"finite_width::{_name}", loop_vmap(_op), lib=_library._LIBRARY)


def kl_gradients(
    grad_kl: Tensor | None,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    weight_mean: Tensor | None,
    bias_mean: Tensor | None,
    prior_std: float | None,
) -> list[Tensor | None]:
    """∂weight_mu, ∂weight_rho, ∂bias_mu, ∂bias_rho where the KL alone has a cotangent."""
    if grad_kl is None or prior_std is None:
        return [None] * 4
    mu, rho, means = [weight_mu], [weight_rho], [weight_mean]
    if bias_mu is not None and bias_rho is not None:
        mu, rho, means = [*mu, bias_mu], [*rho, bias_rho], [*means, bias_mean]
    grads = kl_backward_op(grad_kl, mu, rho, without_none(means, weight_mu), [prior_std] * len(mu))
    return [grads[0], grads[1], None, None] if len(mu) == 1 else [grads[0], grads[2], grads[1], grads[3]]


class _Linear(torch.autograd.Function):
    """Saves its inputs alone: backward makes W again, panel by panel, from the seed."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _linear_op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.prior_std = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_mean, bias_mean = ctx.saved_tensors
        prior_std, needs = ctx.prior_std, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 5
        if torch.is_grad_enabled():  # to be differentiated again: plain torch around the same noise
            normal = grad_weight = None
            if grad_y is not None:
                normal, grad_weight = normal_of(weight_mu, seed, 0, 0), grad_y.mT @ x
                if needs[0]:
                    grads[0] = grad_y @ (weight_mu + reference.softplus(weight_rho).sigma * normal)
            grads[1:3] = reference.transform_backward(
                grad_weight, grad_kl, weight_mu, weight_rho, normal, weight_mean, prior_std, False
            )
            if bias_mu is not None:
                normal = None if grad_y is None else normal_of(bias_mu, seed, 0, 1)
                grad_bias = None if grad_y is None else grad_y.sum(0)
                grads[3:5] = reference.transform_backward(
                    grad_bias, grad_kl, bias_mu, bias_rho, normal, bias_mean, prior_std, False
                )
        elif grad_y is None:
            grads[1:] = kl_gradients(
                grad_kl, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean, prior_std
            )
        else:
            grads[:] = _linear_backward_op(
                grad_y,
                grad_kl,
                x,
                weight_mu,
                weight_rho,
                bias_mu,
                bias_rho,
                seed,
                weight_mean,
                bias_mean,
                prior_std,
                needs[0],
            )
            grads[0] = grads[0] if needs[0] else None
            if bias_mu is None:
                grads[3:5] = None, None
        means = (
            mean_gradient(grad_kl, weight_mu, weight_mean, prior_std) if needs[6] else None,
            mean_gradient(grad_kl, bias_mu, bias_mean, prior_std) if needs[7] else None,
        )
        return *grads, None, *means, None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dweight_rho: Any, dbias: Any, dbias_rho: Any, *rest: Any) -> Any:
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_mean, bias_mean = ctx.saved_tensors
        _, dweight_mean, dbias_mean, _ = rest
        normal = normal_of(weight_mu, seed, 0, 0)
        tangent = x.new_zeros(x.shape[0], weight_mu.shape[0])
        if dx is not None:
            tangent = tangent + dx @ (weight_mu + reference.softplus(weight_rho).sigma * normal).mT
        if dweight is not None:
            tangent = tangent + x @ dweight.mT
        if dweight_rho is not None:
            tangent = tangent + x @ (dweight_rho * torch.sigmoid(weight_rho) * normal).mT
        std = ctx.prior_std
        kl = kl_tangent(weight_mu, weight_rho, weight_mean, std, dweight, dweight_rho, dweight_mean)
        if bias_mu is not None:
            if dbias is not None:
                tangent = tangent + dbias
            if dbias_rho is not None:
                tangent = tangent + dbias_rho * torch.sigmoid(bias_rho) * normal_of(bias_mu, seed, 0, 1)
            kl = kl + kl_tangent(bias_mu, bias_rho, bias_mean, std, dbias, dbias_rho, dbias_mean)
        return tangent, kl

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[0] is not None and not any(dim is not None for dim in in_dims[1:]):
            # x alone is batched: one sample for all, so the batch joins the rows.
            x = args[0].movedim(in_dims[0], 0)
            y, kl = _linear(x.reshape(-1, x.shape[-1]), *args[1:])
            return (y.reshape(*x.shape[:2], -1), kl), (0, None)
        return loop(_linear, info, in_dims, args)


_linear = _library.differentiable(_linear_op, _Linear)
# For a layer, whose own tensors fit each other.
linear_unchecked = _linear


def linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None = None,
    bias_prior_mean: Tensor | None = None,
    prior_std: float | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b with one sample of W and b for the whole batch, and the KL of both.

    W and ∂W exist one panel at a time; backward makes W again from the seed. Nothing of W's size is saved.

    Args:
        x: [batch, in], float32 or float64, any strides.
        weight_mu, weight_rho: [out, in], the dtype of x.
        bias_mu, bias_rho: [out], or both None.
        seed: int64, one element.
        weight_prior_mean, bias_prior_mean: [out, in] and [out]; None is 0.
        prior_std: None leaves the KL out (it is 0 then).

    Returns:
        y [batch, out], and the KL, a scalar.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, prior_std that is not positive.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> mu, rho = torch.zeros(3, 2), torch.zeros(3, 2)
        >>> ops.linear(torch.ones(5, 2), mu, rho, None, None, torch.tensor(1))[0].shape
        torch.Size([5, 3])
    """
    check_distributions(
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_prior_mean, bias_prior_mean, prior_std
    )
    result: tuple[Tensor, Tensor] = _linear(
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_prior_mean, bias_prior_mean, prior_std
    )
    return result


def linear_samples(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    first: int,
    samples: int,
) -> Tensor:
    """y[s] = x[s] W_sᵀ + b_s for samples first, first + 1, ... of the weights; for prediction, without gradient.

    Args:
        x: [samples, batch, in], or [1, batch, in] for the same x in every sample.
        weight_mu, weight_rho, bias_mu, bias_rho, seed: as for `linear`.
        first: number of the first sample.
        samples: how many.

    Returns:
        [samples, batch, out].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, samples < 1.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> mu, rho = torch.zeros(3, 2), torch.zeros(3, 2)
        >>> ops.linear_samples(torch.ones(1, 5, 2), mu, rho, None, None, torch.tensor(1), 0, 4).shape
        torch.Size([4, 5, 3])
    """
    _check_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, 3, "[samples or 1, batch, in]")
    _check.positive_int("samples", samples)
    if x.shape[0] not in (1, samples):
        raise ValueError(f"x must have shape [{samples} or 1, batch, in], got {list(x.shape)}")
    result: Tensor = _linear_samples_op(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, first, samples)
    return result


def _check_linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    dim: int,
    shape: str,
) -> None:
    _check.is_tensor("x", x)
    _check.is_float("x", x)
    _check.has_dim("x", x, dim, shape)
    check_weights("weight_", weight_mu, weight_rho, None)
    _check.has_dim("weight_mu", weight_mu, 2, "[out, in]")
    _check.like("weight_mu", weight_mu, "x", x)
    if weight_mu.shape[1] != x.shape[-1]:
        raise ValueError(f"x must have {weight_mu.shape[1]} columns, as many as weight_mu, got {list(x.shape)}")
    if (bias_mu is None) != (bias_rho is None):
        raise ValueError("bias_mu and bias_rho go together: give both or neither")
    if bias_mu is not None and bias_rho is not None:
        check_weights("bias_", bias_mu, bias_rho, None)
        _check.like("bias_mu", bias_mu, "x", x)
        if bias_mu.shape != (weight_mu.shape[0],):
            raise ValueError(f"bias_mu must have shape [{weight_mu.shape[0]}], got {list(bias_mu.shape)}")
    check_seed(seed, x)


def check_distributions(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    weight_prior_mean: Tensor | None,
    bias_prior_mean: Tensor | None,
    prior_std: float | None,
) -> None:
    """Raise for the arguments of a layer whose x is [batch, in]."""
    _check_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, 2, "[batch, in]")
    check_weights("weight_", weight_mu, weight_rho, weight_prior_mean, prior_std)
    if bias_mu is not None and bias_rho is not None:
        check_weights("bias_", bias_mu, bias_rho, bias_prior_mean)
