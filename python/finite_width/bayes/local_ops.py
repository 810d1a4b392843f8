"""Local reparametrisation of the linear layer as a torch function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference
from .linear_ops import check_distributions, fake_linear_backward, kl_gradients
from .sampling_ops import kl_tangent, loop, loop_vmap, mean_gradient, normal_of

_OUTPUT = 2  # the noise's stream


def _fake_local(x: Tensor, weight_mu: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], weight_mu.shape[0])
    return x.new_empty(shape), x.new_empty(()), x.new_empty(shape)


_local_op = _library.register("bayes_local", reference.local, _fake_local)
_local_backward_op = _library.register("bayes_local_backward", reference.local_backward, fake_linear_backward)
torch.library.register_vmap("finite_width::bayes_local_backward", loop_vmap(_local_backward_op), lib=_library._LIBRARY)


class _Local(torch.autograd.Function):
    """Saves its inputs and the deviation of each output; backward makes σ² and ε again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _local_op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.prior_std = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        ctx.save_for_forward(*tensors, output[2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_kl: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, deviation = ctx.saved_tensors
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_mean, bias_mean = tensors
        prior_std, needs = ctx.prior_std, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 5
        if torch.is_grad_enabled():  # to be differentiated again: plain torch around the same noise
            grad = x.new_zeros(deviation.shape) if grad_y is None else grad_y
            found = reference.local_gradients(
                *(grad, grad_kl, x, weight_mu, weight_rho, bias_mu, bias_rho, normal_of(grad, seed, 0, _OUTPUT)),
                *(weight_mean, bias_mean, prior_std, reference.local_deviation(x, weight_rho, bias_rho)),
            )
            grads[: len(found)] = found
        elif grad_y is None:
            grads[1:] = kl_gradients(
                grad_kl, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean, prior_std
            )
        else:
            grads[:] = _local_backward_op(grad_y, grad_kl, *tensors, prior_std, deviation, needs[0])
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
        *tensors, _ = ctx.saved_tensors
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_mean, bias_mean = tensors
        _, dweight_mean, dbias_mean, _ = rest
        # Made again, since the saved one is a constant to a derivative of this one.
        deviation = reference.local_deviation(x, weight_rho, bias_rho)
        sigma = reference.sigma(weight_rho)
        tangent, by_variance = torch.zeros_like(deviation), torch.zeros_like(deviation)
        if dx is not None:
            tangent, by_variance = tangent + dx @ weight_mu.mT, by_variance + 2 * (x * dx) @ (sigma**2).mT
        if dweight is not None:
            tangent = tangent + x @ dweight.mT
        if dweight_rho is not None:
            by_variance = by_variance + (x * x) @ (2 * sigma * torch.sigmoid(weight_rho) * dweight_rho).mT
        std = ctx.prior_std
        kl = kl_tangent(weight_mu, weight_rho, weight_mean, std, dweight, dweight_rho, dweight_mean)
        if bias_mu is not None:
            if dbias is not None:
                tangent = tangent + dbias
            if dbias_rho is not None:
                by_variance = by_variance + 2 * reference.sigma(bias_rho) * torch.sigmoid(bias_rho) * dbias_rho
            kl = kl + kl_tangent(bias_mu, bias_rho, bias_mean, std, dbias, dbias_rho, dbias_mean)
        still = deviation == 0
        by_noise = by_variance * normal_of(deviation, seed, 0, _OUTPUT) / (2 * torch.where(still, 1.0, deviation))
        return tangent + torch.where(still, 0.0, by_noise), kl, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop(_local, info, in_dims, args)


_local = _library.differentiable(_local_op, _Local)
# For a layer, whose own tensors fit each other.
local_unchecked = _local


def local(
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
    """Local reparametrisation: each output has its own noise, with the mean and variance that the weights give it.

    y = x μᵀ + b + d ∘ ε,   d² = x² (σ²)ᵀ + σ_b²

    σ² and its gradient exist one panel at a time; besides its arguments, d is saved for backward.

    Args:
        x: [batch, in], float32 or float64, any strides.
        weight_mu, weight_rho: [out, in], the dtype of x.
        bias_mu, bias_rho: [out], or both None.
        seed: int64, one element.
        weight_prior_mean, bias_prior_mean: [out, in] and [out]; None is 0.
        prior_std: None leaves the KL out (it is 0 then).

    Returns:
        y [batch, out], and the KL, a scalar. Where d² <= 1e-30, an output has no noise and no gradient through d.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, prior_std that is not positive.

    Source: Kingma, Salimans and Welling 2015, "Variational dropout and the local reparameterization trick", eq. 6.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> mu, rho = torch.zeros(3, 2), torch.zeros(3, 2)
        >>> ops.local(torch.ones(5, 2), mu, rho, None, None, torch.tensor(1))[0].shape
        torch.Size([5, 3])
    """
    check_distributions(
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_prior_mean, bias_prior_mean, prior_std
    )
    y, kl, _ = _local(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_prior_mean, bias_prior_mean, prior_std)
    return y, kl
