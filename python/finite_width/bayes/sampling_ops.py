"""Noise and sampled weights as torch functions, and what the other variational ops share with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference

NARROW = (torch.bfloat16, torch.float16)  # what a sampled W may be stored as, beside the dtype of its distribution

_noise_op = _library.register(
    "bayes_noise", reference.noise, lambda like, seed, sample, stream: like.new_empty(like.shape)
)
_sample_op = _library.register(
    "bayes_sample",
    reference.sample,
    lambda mu, *rest: (mu.new_empty(mu.shape, dtype=rest[-1] or mu.dtype), mu.new_empty(())),
)
sample_backward_op = _library.register(
    "bayes_sample_backward",
    reference.sample_backward,
    lambda grad, grad_kl, mu, *_: (mu.new_empty(mu.shape), mu.new_empty(mu.shape)),
)


def loop(call: Callable[..., Any], info: Any, in_dims: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The vmap rule that calls once per row of the batch and stacks the results."""
    columns = [
        arg.unbind(dim) if dim is not None else (arg,) * info.batch_size for arg, dim in zip(args, in_dims, strict=True)
    ]
    rows = [call(*row) for row in zip(*columns, strict=True)]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(torch.stack(part) for part in zip(*rows, strict=True)), (0,) * len(rows[0])


def loop_vmap(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda info, in_dims, *args: loop(call, info, in_dims, args)


torch.library.register_vmap("finite_width::bayes_noise", loop_vmap(_noise_op), lib=_library._LIBRARY)
torch.library.register_vmap("finite_width::bayes_sample_backward", loop_vmap(sample_backward_op), lib=_library._LIBRARY)


def normal_of(like: Tensor, seed: Tensor, sample: int, stream: int) -> Tensor:
    """ε as a constant."""
    result: Tensor = _noise_op(like.detach(), seed, sample, stream)
    return result


def _dot(a: Tensor | None, b: Tensor) -> Tensor | float:
    return 0.0 if a is None else (a * b).sum()


def kl_tangent(
    mu: Tensor,
    rho: Tensor,
    prior_mean: Tensor | None,
    prior_std: float | None,
    dmu: Tensor | None,
    drho: Tensor | None,
    dmean: Tensor | None,
) -> Tensor:
    one = mu.new_ones(())
    grad_mu, grad_rho = reference.transform_backward(None, one, mu, rho, None, prior_mean, prior_std, False)
    by_mean = _dot(None if prior_mean is None else dmean, -grad_mu)
    return mu.new_zeros(()) + _dot(dmu, grad_mu) + _dot(drho, grad_rho) + by_mean


def mean_gradient(
    grad_kl: Tensor | None, mu: Tensor, prior_mean: Tensor | None, prior_std: float | None
) -> Tensor | None:
    """∂KL/∂prior_mean, for whoever learns the prior's mean."""
    if grad_kl is None or prior_mean is None or prior_std is None:
        return None
    return grad_kl * (prior_mean - mu) / prior_std**2


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _sample_op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mu, rho, seed, prior_mean, ctx.prior_std, ctx.stream, ctx.centred, ctx.dtype = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, rho, seed, prior_mean)
        ctx.save_for_forward(mu, rho, seed, prior_mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mu, rho, seed, prior_mean = ctx.saved_tensors
        prior_std, stream, centred = ctx.prior_std, ctx.stream, ctx.centred
        if torch.is_grad_enabled():  # the gradient is to be differentiated again: plain torch around the same noise
            normal = None if grad is None else normal_of(mu, seed, 0, stream)
            grad = None if grad is None else grad.to(mu.dtype)
            grads = reference.transform_backward(grad, grad_kl, mu, rho, normal, prior_mean, prior_std, centred)
        else:
            grads = sample_backward_op(grad, grad_kl, mu, rho, seed, prior_mean, prior_std, stream, centred)
        mean = mean_gradient(grad_kl, mu, prior_mean, prior_std) if ctx.needs_input_grad[3] else None
        return *grads, None, mean, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dmu: Tensor | None, drho: Tensor | None, _: Any, dmean: Tensor | None, *rest: Any) -> Any:
        mu, rho, seed, prior_mean = ctx.saved_tensors
        tangent = torch.zeros_like(mu)
        if dmu is not None and not ctx.centred:
            tangent = tangent + dmu
        if drho is not None:
            tangent = tangent + drho * torch.sigmoid(rho) * normal_of(mu, seed, 0, ctx.stream)
        tangent = tangent.to(ctx.dtype or mu.dtype)
        return tangent, kl_tangent(mu, rho, prior_mean, ctx.prior_std, dmu, drho, dmean)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop(_sample, info, in_dims, args)


_sample = _library.differentiable(_sample_op, _Sample)
# For layers, whose own tensors fit each other.
sample_unchecked = _sample


def check_weights(
    name: str, mu: Tensor, rho: Tensor, prior_mean: Tensor | None, prior_std: float | None = None, suffix: str = ""
) -> None:
    mu_name = f"{name}mu{suffix}"
    _check.is_tensor(mu_name, mu)
    _check.is_float(mu_name, mu)
    for part, other in (("rho", rho), ("prior_mean", prior_mean)):
        if other is None and part == "prior_mean":
            continue
        other_name = f"{name}{part}{suffix}"
        _check.is_tensor(other_name, other)
        assert other is not None
        _check.like(other_name, other, mu_name, mu)
        if other.shape != mu.shape:
            raise ValueError(f"{other_name} must have the shape of {mu_name} {list(mu.shape)}, got {list(other.shape)}")
    if prior_std is not None and not (prior_std > 0 and math.isfinite(prior_std)):
        raise ValueError(f"prior_std{suffix} must be positive and finite, got {prior_std}")


def check_seed(seed: Tensor, like: Tensor) -> None:
    _check.is_tensor("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {str(seed.dtype).removeprefix('torch.')}")
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element, got shape {list(seed.shape)}")
    if seed.device != like.device:
        raise ValueError(f"seed is on {seed.device}, but the weights are on {like.device}; move one of them")


def noise(like: Tensor, seed: Tensor, sample: int = 0, stream: int = 0) -> Tensor:
    """The normals ε that the layers use: Philox4x32-10 and Box-Muller, a function of its arguments alone.

    Args:
        like: gives the shape, dtype (float32 or float64) and device. The noise is float32 noise in every dtype.
        seed: int64, one element: the Philox key.
        sample, stream: counter words: which sample of a prediction, which tensor of a layer (0 weight, 1 bias).

    Returns:
        A tensor like `like`; the same bits for any number of threads and any instruction set.

    Raises:
        TypeError: a dtype that is neither float32 nor float64, or a seed that is not int64.
        ValueError: a seed of several elements.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> ops.noise(torch.empty(2, 3), torch.tensor(1)).shape
        torch.Size([2, 3])
    """
    _check.is_tensor("like", like)
    _check.is_float("like", like)
    check_seed(seed, like)
    return normal_of(like, seed, sample, stream)


def sample(
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    prior_mean: Tensor | None = None,
    prior_std: float | None = None,
    stream: int = 0,
    centred: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One sample W = μ + softplus(ρ) ∘ ε and KL(N(μ, σ²) || N(prior_mean, prior_std²)), in one pass.

    Args:
        mu, rho: any one shape, float32 or float64.
        seed: int64, one element; backward makes the same ε from it.
        prior_mean: the shape of mu; None is 0.
        prior_std: None leaves the KL out (it is 0 then).
        stream: which tensor of the layer the noise is for.
        centred: W = softplus(ρ) ∘ ε, without μ.
        dtype: of W: that of mu if left out; bfloat16 or float16 where mu is float32. The KL and the gradients by μ and
            ρ have the dtype of mu.

    Returns:
        W with the shape of mu, and the KL, a scalar.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, prior_std that is not positive.

    Example:
        >>> import torch
        >>> from finite_width.bayes import ops
        >>> weight, kl = ops.sample(torch.zeros(3), torch.zeros(3), torch.tensor(1), prior_std=1.0)
        >>> weight.shape, float(kl) > 0
        (torch.Size([3]), True)
    """
    check_weights("", mu, rho, prior_mean, prior_std)
    check_seed(seed, mu)
    if dtype not in (None, mu.dtype) and (mu.dtype != torch.float32 or dtype not in NARROW):
        raise TypeError(f"dtype must be that of mu, or bfloat16 or float16 where mu is float32, got {dtype}")
    result: tuple[Tensor, Tensor] = _sample(mu, rho, seed, prior_mean, prior_std, stream, centred, dtype)
    return result
