"""The variational ops as torch functions: autograd, torch.func, torch.compile; argument checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference

_noise_op = _library.register(
    "bayes_noise", reference.noise, lambda like, seed, sample, stream: like.new_empty(like.shape)
)
_sample_op = _library.register(
    "bayes_sample",
    reference.sample,
    lambda mu, *_: (mu.new_empty(mu.shape), mu.new_empty(())),
)
_sample_backward_op = _library.register(
    "bayes_sample_backward",
    reference.sample_backward,
    lambda grad, grad_kl, mu, *_: (mu.new_empty(mu.shape), mu.new_empty(mu.shape)),
)
_kl_op = _library.register("bayes_kl", reference.kl, lambda mu, *_: mu.new_empty(()))
_linear_op = _library.register(
    "bayes_linear",
    reference.linear,
    lambda x, weight_mu, *_: (x.new_empty(x.shape[0], weight_mu.shape[0]), x.new_empty(())),
)


def _fake_linear_backward(
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


_linear_backward_op = _library.register("bayes_linear_backward", reference.linear_backward, _fake_linear_backward)
_linear_samples_op = _library.register(
    "bayes_linear_samples",
    reference.linear_samples,
    lambda x, weight_mu, weight_rho, bias_mu, bias_rho, seed, first, samples: x.new_empty(
        samples, x.shape[1], weight_mu.shape[0]
    ),
)


def _loop(call: Callable[..., Any], info: Any, in_dims: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The vmap rule that calls once per row of the batch and stacks the results."""
    columns = [
        arg.unbind(dim) if dim is not None else (arg,) * info.batch_size for arg, dim in zip(args, in_dims, strict=True)
    ]
    rows = [call(*row) for row in zip(*columns, strict=True)]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(torch.stack(part) for part in zip(*rows, strict=True)), (0,) * len(rows[0])


def _loop_vmap(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda info, in_dims, *args: _loop(call, info, in_dims, args)


torch.library.register_vmap("finite_width::bayes_noise", _loop_vmap(_noise_op), lib=_library._LIBRARY)
for _name, _op in (
    ("bayes_sample_backward", _sample_backward_op),
    ("bayes_linear_backward", _linear_backward_op),
    ("bayes_linear_samples", _linear_samples_op),
):
    torch.library.register_vmap(f"finite_width::{_name}", _loop_vmap(_op), lib=_library._LIBRARY)


def _normal(like: Tensor, seed: Tensor, sample: int, stream: int) -> Tensor:
    """ε as a constant."""
    result: Tensor = _noise_op(like.detach(), seed, sample, stream)
    return result


def _dot(a: Tensor | None, b: Tensor) -> Tensor | float:
    return 0.0 if a is None else (a * b).sum()


def _kl_tangent(
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
    return mu.new_zeros(()) + _dot(dmu, grad_mu) + _dot(drho, grad_rho) + _dot(dmean, -grad_mu)


def _mean_gradient(
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
        mu, rho, seed, prior_mean, ctx.prior_std, ctx.stream, ctx.centred = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, rho, seed, prior_mean)
        ctx.save_for_forward(mu, rho, seed, prior_mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mu, rho, seed, prior_mean = ctx.saved_tensors
        prior_std, stream, centred = ctx.prior_std, ctx.stream, ctx.centred
        if torch.is_grad_enabled():  # the gradient is to be differentiated again: plain torch around the same noise
            normal = None if grad is None else _normal(mu, seed, 0, stream)
            grads = reference.transform_backward(grad, grad_kl, mu, rho, normal, prior_mean, prior_std, centred)
        else:
            grads = _sample_backward_op(grad, grad_kl, mu, rho, seed, prior_mean, prior_std, stream, centred)
        mean = _mean_gradient(grad_kl, mu, prior_mean, prior_std) if ctx.needs_input_grad[3] else None
        return *grads, None, mean, None, None, None

    @staticmethod
    def jvp(ctx: Any, dmu: Tensor | None, drho: Tensor | None, _: Any, dmean: Tensor | None, *rest: Any) -> Any:
        mu, rho, seed, prior_mean = ctx.saved_tensors
        tangent = torch.zeros_like(mu)
        if dmu is not None and not ctx.centred:
            tangent = tangent + dmu
        if drho is not None:
            tangent = tangent + drho * torch.sigmoid(rho) * _normal(mu, seed, 0, ctx.stream)
        return tangent, _kl_tangent(mu, rho, prior_mean, ctx.prior_std, dmu, drho, dmean)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _loop(_sample, info, in_dims, args)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _kl_op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mu, rho, prior_mean, ctx.prior_std = inputs
        ctx.save_for_backward(mu, rho, prior_mean)
        ctx.save_for_forward(mu, rho, prior_mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, rho, prior_mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = reference.transform_backward(None, grad, mu, rho, None, prior_mean, ctx.prior_std, False)
        else:
            grads = _sample_backward_op(None, grad, mu, rho, None, prior_mean, ctx.prior_std, 0, False)
        mean = _mean_gradient(grad, mu, prior_mean, ctx.prior_std) if ctx.needs_input_grad[2] else None
        return *grads, mean, None

    @staticmethod
    def jvp(ctx: Any, dmu: Tensor | None, drho: Tensor | None, dmean: Tensor | None, _: Any) -> Tensor:
        mu, rho, prior_mean = ctx.saved_tensors
        return _kl_tangent(mu, rho, prior_mean, ctx.prior_std, dmu, drho, dmean)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _loop(_kl, info, in_dims, args)


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
                normal, grad_weight = _normal(weight_mu, seed, 0, 0), grad_y.mT @ x
                if needs[0]:
                    grads[0] = grad_y @ (weight_mu + reference.softplus(weight_rho).sigma * normal)
            grads[1:3] = reference.transform_backward(
                grad_weight, grad_kl, weight_mu, weight_rho, normal, weight_mean, prior_std, False
            )
            if bias_mu is not None:
                normal = None if grad_y is None else _normal(bias_mu, seed, 0, 1)
                grad_bias = None if grad_y is None else grad_y.sum(0)
                grads[3:5] = reference.transform_backward(
                    grad_bias, grad_kl, bias_mu, bias_rho, normal, bias_mean, prior_std, False
                )
        elif grad_y is None:
            grads[1:3] = _sample_backward_op(
                None, grad_kl, weight_mu, weight_rho, None, weight_mean, prior_std, 0, False
            )
            if bias_mu is not None:
                grads[3:5] = _sample_backward_op(None, grad_kl, bias_mu, bias_rho, None, bias_mean, prior_std, 1, False)
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
            _mean_gradient(grad_kl, weight_mu, weight_mean, prior_std) if needs[6] else None,
            _mean_gradient(grad_kl, bias_mu, bias_mean, prior_std) if needs[7] else None,
        )
        return *grads, None, *means, None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dweight_rho: Any, dbias: Any, dbias_rho: Any, *rest: Any) -> Any:
        x, weight_mu, weight_rho, bias_mu, bias_rho, seed, weight_mean, bias_mean = ctx.saved_tensors
        _, dweight_mean, dbias_mean, _ = rest
        normal = _normal(weight_mu, seed, 0, 0)
        tangent = x.new_zeros(x.shape[0], weight_mu.shape[0])
        if dx is not None:
            tangent = tangent + dx @ (weight_mu + reference.softplus(weight_rho).sigma * normal).mT
        if dweight is not None:
            tangent = tangent + x @ dweight.mT
        if dweight_rho is not None:
            tangent = tangent + x @ (dweight_rho * torch.sigmoid(weight_rho) * normal).mT
        std = ctx.prior_std
        kl = _kl_tangent(weight_mu, weight_rho, weight_mean, std, dweight, dweight_rho, dweight_mean)
        if bias_mu is not None:
            if dbias is not None:
                tangent = tangent + dbias
            if dbias_rho is not None:
                tangent = tangent + dbias_rho * torch.sigmoid(bias_rho) * _normal(bias_mu, seed, 0, 1)
            kl = kl + _kl_tangent(bias_mu, bias_rho, bias_mean, std, dbias, dbias_rho, dbias_mean)
        return tangent, kl

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[0] is not None and not any(dim is not None for dim in in_dims[1:]):
            # x alone is batched: one sample for all, so the batch joins the rows.
            x = args[0].movedim(in_dims[0], 0)
            y, kl = _linear(x.reshape(-1, x.shape[-1]), *args[1:])
            return (y.reshape(*x.shape[:2], -1), kl), (0, None)
        return _loop(_linear, info, in_dims, args)


_sample = _library.differentiable(_sample_op, _Sample)
_kl = _library.differentiable(_kl_op, _KL)
_linear = _library.differentiable(_linear_op, _Linear)
# For a layer, whose own tensors fit each other.
linear_unchecked = _linear


def _check_weights(
    name: str, mu: Tensor, rho: Tensor, prior_mean: Tensor | None, prior_std: float | None = None
) -> None:
    _check.is_tensor(f"{name}mu", mu)
    _check.is_float(f"{name}mu", mu)
    for other_name, other in ((f"{name}rho", rho), (f"{name}prior_mean", prior_mean)):
        if other is None and other_name.endswith("prior_mean"):
            continue
        _check.is_tensor(other_name, other)
        assert other is not None
        _check.like(other_name, other, f"{name}mu", mu)
        if other.shape != mu.shape:
            raise ValueError(f"{other_name} must have the shape of {name}mu {list(mu.shape)}, got {list(other.shape)}")
    if prior_std is not None and not (prior_std > 0 and math.isfinite(prior_std)):
        raise ValueError(f"prior_std must be positive and finite, got {prior_std}")


def _check_seed(seed: Tensor, like: Tensor) -> None:
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
    _check_seed(seed, like)
    return _normal(like, seed, sample, stream)


def sample(
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    prior_mean: Tensor | None = None,
    prior_std: float | None = None,
    stream: int = 0,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sample W = μ + softplus(ρ) ∘ ε and KL(N(μ, σ²) || N(prior_mean, prior_std²)), in one pass.

    Args:
        mu, rho: any one shape, float32 or float64.
        seed: int64, one element; backward makes the same ε from it.
        prior_mean: the shape of mu; None is 0.
        prior_std: None leaves the KL out (it is 0 then).
        stream: which tensor of the layer the noise is for.
        centred: W = softplus(ρ) ∘ ε, without μ.

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
    _check_weights("", mu, rho, prior_mean, prior_std)
    _check_seed(seed, mu)
    result: tuple[Tensor, Tensor] = _sample(mu, rho, seed, prior_mean, prior_std, stream, centred)
    return result


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
    _check_weights("", mu, rho, prior_mean, prior_std)
    result: Tensor = _kl(mu, rho, prior_mean, prior_std)
    return result


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
    _check_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, 2, "[batch, in]")
    _check_weights("weight_", weight_mu, weight_rho, weight_prior_mean, prior_std)
    if bias_mu is not None and bias_rho is not None:
        _check_weights("bias_", bias_mu, bias_rho, bias_prior_mean)
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
    _check_weights("weight_", weight_mu, weight_rho, None)
    _check.has_dim("weight_mu", weight_mu, 2, "[out, in]")
    _check.like("weight_mu", weight_mu, "x", x)
    if weight_mu.shape[1] != x.shape[-1]:
        raise ValueError(f"x must have {weight_mu.shape[1]} columns, as many as weight_mu, got {list(x.shape)}")
    if (bias_mu is None) != (bias_rho is None):
        raise ValueError("bias_mu and bias_rho go together: give both or neither")
    if bias_mu is not None and bias_rho is not None:
        _check_weights("bias_", bias_mu, bias_rho, None)
        _check.like("bias_mu", bias_mu, "x", x)
        if bias_mu.shape != (weight_mu.shape[0],):
            raise ValueError(f"bias_mu must have shape [{weight_mu.shape[0]}], got {list(bias_mu.shape)}")
    _check_seed(seed, x)
