"""Batch and instance norm by their formulas, since torch's backward of a single row can be wrong.

On the CPU, torch 2.13 reads the cotangent of a batch of one row in the wrong order where it lies with channels last: in
batch norm after `flatten(2).transpose(1, 2)`, which makes the pixels of an image tokens, and in instance norm, which
folds rows into channels. Kernels are sums over single rows, so that they meet it where training does not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._interrupts import FunctionMode


def before(end: int, value: Tensor, input: Tensor) -> Tensor:
    """The value, which lies along the input's axes just before `end`, in a shape that meets them."""
    return value.reshape(*value.shape, *[1] * (input.dim() - end))


def scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None, end: int) -> Tensor:
    """normal * weight + bias, where both lie along the normalised input's axes just before `end`."""
    result = normal if weight is None else normal * before(end, weight, normal)
    return result if bias is None else result + before(end, bias, normal)


def running(
    input: Tensor, mean: Tensor | None, var: Tensor | None, own: bool, eps: float
) -> tuple[Tensor, Tensor] | None:
    """Running statistics [C] as mean and 1 / σ, in a shape that meets the input [N, C, ...].

    Returns:
        None where the norm takes the batch's own statistics, or torch raises.
    """
    if own or mean is None or var is None or eps < 0:
        return None
    return before(2, mean, input), before(2, (var + eps).rsqrt(), input)


def by_running(input: Tensor, mean: Tensor, rate: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(input - mean) * rate * weight + bias of [N, C, ...], in an order whose backward is one product."""
    slope = rate if weight is None else rate * before(2, weight, input)
    shift = -mean * slope
    return input * slope + (shift if bias is None else shift + before(2, bias, input))


def by_instance(input: Tensor, eps: float) -> Tensor | None:
    """Each channel of each row of [N, C, ...] with mean 0 and variance 1 over its positions.

    Returns:
        None where there are none to average over: torch raises.
    """
    if input.dim() < 3 or input.shape[2:].numel() <= 1:
        return None
    flat = input.flatten(2)
    return F.layer_norm(flat, flat.shape[2:], None, None, eps).view(input.shape)


def one_dtype(input: Tensor, *others: Tensor | None) -> bool:
    """Whether a norm's tensors are of one floating dtype: else torch decides how they are promoted."""
    return input.is_floating_point() and all(value is None or value.dtype == input.dtype for value in others)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """F.batch_norm of running statistics; NotImplemented for another, and where torch raises."""
    if not one_dtype(input, running_mean, running_var, weight, bias):
        return NotImplemented
    statistics = running(input, running_mean, running_var, training, eps)
    return NotImplemented if statistics is None else by_running(input, *statistics, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """F.instance_norm, which leaves running statistics as they are; NotImplemented where torch raises."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if not one_dtype(input, weight, bias):
        return NotImplemented
    normal = by_instance(input, eps)
    return NotImplemented if normal is None else scaled(normal, weight, bias, 2)


def torchs_order(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A norm with F's order of arguments, called with that of torch.batch_norm and torch.instance_norm; none by name.

    Args:
        norm: of (*leading, input, running_mean, running_var, weight, bias, use of the batch, momentum, eps).
    """

    def call(*args: Any, **named: Any) -> Any:
        if named:
            return NotImplemented
        *leading, input, weight, bias, running_mean, running_var, own, momentum, eps, _ = args
        return norm(*leading, input, running_mean, running_var, weight, bias, own, momentum, eps)

    return call


_FORMULAS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    torch.batch_norm: torchs_order(batch_norm),
    torch.instance_norm: torchs_order(instance_norm),
}


def norms_by_formula(rows: int) -> AbstractContextManager[Any]:
    """Formulas for a forward of so many rows that torch differentiates: of one row. The mode costs 8 µs a call."""
    return NormsByFormula() if rows == 1 else nullcontext()


class NormsByFormula(FunctionMode):
    """Inside, batch norm of running statistics and instance norm are computed by their formulas."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        formula = _FORMULAS.get(func)
        if formula is not None:
            result = formula(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))
