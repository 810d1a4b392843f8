"""Path-SGD's ops for a convolution: path sums through it in both directions, and its update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference
from .arguments import (
    DTYPES,
    UNCHANGED,
    amp_scaling,
    device_exponent,
    device_lr,
    finite_power,
    like_parameter,
    step_rates,
    write_back,
)

_convolution = _library.register("path_convolution", reference.path_convolution, reference.path_convolution)
_convolution_backward = _library.register(
    "path_convolution_backward",
    reference.path_convolution_backward,
    lambda known, x, *rest: torch.empty_like(x),
)
_convolution_update = _library.register(
    "path_convolution_update", reference.path_convolution_update, lambda *args: None
)

Window = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def path_convolution(
    x: Tensor,
    weight: Tensor,
    p: float = 2.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Path sums behind a convolution: F'[o, s] = Σ_{c, tap} |W[o, c, tap]|^p F[c, place under the tap].

    Args:
        x: F [1, C, *S], float64, one to three spatial axes.
        weight: [O, C / groups, *kernel], float32, float64 or bfloat16.
        p: at least 1, finite.
        stride, padding, dilation: one int per spatial axis.
        groups: as in torch's convolutions.

    Returns:
        F' [1, O, *S'], float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the argument's name; p < 1.
    """
    how = _window(x, weight, stride, padding, dilation, groups)
    result: Tensor = _convolution(x.contiguous(), weight.contiguous(), finite_power(p), *how)
    return result


def path_convolution_backward(
    known: Tensor,
    x: Tensor,
    weight: Tensor,
    p: float = 2.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Path sums in front of a convolution: B'[c, t] = Σ_{o, tap} |W[o, c, tap]|^p B[o, s], s under whose tap t lies.

    Args:
        known: B [1, O, *S'], float64.
        x: F [1, C, *S], for its shape.
        weight, p, stride, padding, dilation, groups: as for `path_convolution`.

    Returns:
        B' [1, C, *S], float64.

    Raises:
        ValueError, TypeError: as for `path_convolution`.
    """
    how = _window(x, weight, stride, padding, dilation, groups)
    _known(known, x, weight, how)
    dense = known.contiguous(), x.contiguous(), weight.contiguous()
    result: Tensor = _convolution_backward(*dense, finite_power(p), *how)
    return result


def path_convolution_update(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    x: Tensor,
    known: Tensor,
    exponent: float | Tensor = 0.0,
    p: float = 2.0,
    rates: Sequence[float] = UNCHANGED,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr: Tensor | None = None,
) -> None:
    """A convolution's update: `path_update` with mass[o, c, tap] = Σ_s B[o, s] F[c, place under the tap], never stored.

    Args:
        weight: [O, C / groups, *kernel], float32, float64 or bfloat16; written.
        grad, momentum: like weight; momentum may be None, and is written.
        x: F [1, C, *S], float64.
        known: B [1, O, *S'], float64.
        exponent, rates, grad_scale, found_inf, lr: as for `path_update`.
        p, stride, padding, dilation, groups: as for `path_convolution`.

    Raises:
        ValueError, TypeError: as for `path_convolution`.
    """
    how = _window(x, weight, stride, padding, dilation, groups)
    _known(known, x, weight, how)
    _check.is_tensor("grad", grad)
    like_parameter("grad", grad, "weight", weight)
    like_parameter("momentum", momentum, "weight", weight)
    written = [weight, momentum]
    dense = [None if each is None else each.contiguous() for each in written]
    sums = x.contiguous(), known.contiguous()
    step = device_exponent(exponent, weight), finite_power(p), step_rates("rates", rates)
    scaling = *amp_scaling(grad_scale, found_inf, weight), device_lr("lr", lr, weight)
    _convolution_update(dense[0], grad.contiguous(), dense[1], *sums, *step, *how, *scaling)
    write_back(written, dense)


def path_convolution_backward_unchecked(known: Tensor, x: Tensor, weight: Tensor, p: float, window: Window) -> Tensor:
    """`path_convolution_backward` in a step, behind a `path_convolution` that has checked the same arguments."""
    result: Tensor = _convolution_backward(known.contiguous(), x.contiguous(), weight.contiguous(), p, *window)
    return result


def path_convolution_update_unchecked(
    weight: Tensor, grad: Tensor, momentum: Tensor | None, x: Tensor, known: Tensor, *rest: Any
) -> None:
    """`path_convolution_update` likewise; rest: all the other arguments."""
    if all(each is None or each.is_contiguous() for each in (weight, grad, momentum)):
        _convolution_update(weight, grad, momentum, x.contiguous(), known.contiguous(), *rest)
    else:
        path_convolution_update(weight, grad, momentum, x, known, *rest)


def _window(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Window:
    """stride, padding, dilation and groups, checked against x and weight."""
    _check.is_tensor("x", x)
    _check.is_dtype("x", x, (torch.float64,))
    _check.is_tensor("weight", weight)
    _check.is_dtype("weight", weight, DTYPES)
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(f"weight must have shape [O, C / groups, *kernel] with 3 to 5 axes, got {list(weight.shape)}")
    if x.dim() != weight.dim() or x.shape[0] != 1:
        raise ValueError(f"x must have shape [1, C, *S] with {weight.dim()} axes, as weight has, got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but weight is on {weight.device}; move one of them")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != spatial or min(values) < least:
            raise ValueError(f"{name} must be {spatial} ints of at least {least}, got {list(values)}")
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"groups = {groups} does not fit x {list(x.shape)} and weight {list(weight.shape)}, [O, C / groups, ...]"
        )
    how = list(stride), list(padding), list(dilation), groups
    if min(_sizes(x, weight, how)) < 1:
        raise ValueError(f"weight {list(weight.shape)} is larger than the padded x {list(x.shape)}")
    return how


def _sizes(x: Tensor, weight: Tensor, how: Window) -> list[int]:
    """The spatial sizes of the convolution's output."""
    rows = zip(x.shape[2:], weight.shape[2:], *how[:3], strict=True)
    return [(size + 2 * pad - apart * (taps - 1) - 1) // step + 1 for size, taps, step, pad, apart in rows]


def _known(known: Tensor, x: Tensor, weight: Tensor, how: Window) -> None:
    _check.is_tensor("known", known)
    _check.like("known", known, "x", x)
    expected = [1, weight.shape[0], *_sizes(x, weight, how)]
    if list(known.shape) != expected:
        raise ValueError(f"known must have shape {expected}, as the convolution's output has, got {list(known.shape)}")
