"""Path-SGD's ops in plain torch: what they mean, and what runs where no kernel is.

A path vector of n units is float64 [n + 1]: n values and, last, the power of two they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def power(w: Tensor, p: float) -> Tensor:
    """|w|^p in float64; |w| at p = ∞, where maxima stand for sums."""
    w = w.to(torch.float64)
    if p == 2:
        return w * w
    return w.abs() if p == 1 or math.isinf(p) else w.abs() ** p


def factor(values: Tensor, exponent: Tensor | float, p: float) -> Tensor:
    """(values 2^exponent)^(−2/p), a unit's part of 1/γ (p = ∞: squared inverse); 0 where no path is."""
    scale = torch.as_tensor(exponent, dtype=torch.float64)
    if p == 2:
        result = torch.ldexp(1 / values, -scale)
    elif p == 1 or math.isinf(p):
        result = torch.ldexp(1 / (values * values), -2 * scale)
    else:
        result = values ** (-2 / p) * torch.exp2(-2 * scale / p)
    # The largest is capped, so that a product of two stays finite, and 0 times it is 0.
    return torch.where(values > 0, result, 0.0).nan_to_num(0.0).clamp_max(2.0**500)


def apply_step(
    param: Tensor, grad: Tensor, momentum: Tensor | None, inverse_gamma: Tensor, rates: Sequence[float]
) -> None:
    """param ← keep · param − lr · step, in float64 and rounded once; momentum and Nesterov as in torch.optim.SGD."""
    lr, mu, nesterov, keep, sign = rates
    direction = grad.to(torch.float64) * (inverse_gamma * sign)
    step = direction
    if momentum is not None:
        momentum.copy_(mu * momentum.to(torch.float64) + direction)
        step = momentum.to(torch.float64)
        if nesterov:
            step = mu * step + direction
    param.copy_(param.to(torch.float64) * keep - lr * step)


def unscaled(rates: Sequence[float], grad_scale: Tensor | None) -> Sequence[float]:
    """Rates (lr, momentum, nesterov, keep, sign) whose sign divides gradients by the loss scale."""
    return rates if grad_scale is None else (*rates[:4], rates[4] / float(grad_scale))


def normalised(values: Tensor, exponent: Tensor) -> Tensor:
    """values · 2^exponent as a path vector whose largest value is in [0.5, 1)."""
    if values.numel() == 0:
        return torch.cat([values, exponent.new_zeros(1)])
    largest = values.max()
    shift = torch.frexp(largest).exponent.to(torch.float64)
    last = torch.where(largest > 0, exponent + shift, 0.0)
    return torch.cat([torch.ldexp(values, -shift), last.reshape(1)])


def _total(products: Tensor, dim: int, p: float) -> Tensor:
    if products.shape[dim] == 0:
        return products.sum(dim)
    return products.amax(dim) if math.isinf(p) else products.sum(dim)


def path_sweep(
    weight: Tensor,  # [rows, cols]
    grad: Tensor | None,
    momentum: Tensor | None,
    bias: Tensor | None,  # [rows]
    bias_grad: Tensor | None,
    bias_momentum: Tensor | None,
    from_old: Tensor,  # [cols + 1] forward, [rows + 1] backward
    from_new: Tensor,
    across: Tensor,  # [rows + 1] forward, [cols + 1] backward
    fresh: Tensor,
    mass: Tensor,  # [2]
    forward: bool,
    p: float,
    weight_rates: Sequence[float],
    bias_rates: Sequence[float],
    grad_scale: Tensor | None,  # [1], float32
    found_inf: Tensor | None,
) -> None:
    """One dense layer of a step: update by 1/γ, and carry F (forward) or B (backward) of old and new weights on."""
    if found_inf is not None and bool(found_inf):
        grad = bias_grad = None
    weight_rates, bias_rates = (unscaled(rates, grad_scale) for rates in (weight_rates, bias_rates))
    known, carried = across.clone(), (from_old.clone(), from_new.clone())
    out, into = (known, carried[0]) if forward else (carried[0], known)
    powers = [power(weight, p)]
    bias_powers = [power(bias, p)] if bias is not None else []
    if grad is not None:
        # The exponents go with the outer unit, as in the kernel.
        rows = factor(out[:-1], out[-1] + into[-1], p)
        apply_step(weight, grad, momentum, rows[:, None] * factor(into[:-1], 0.0, p), weight_rates)
    if bias is not None and bias_grad is not None:
        apply_step(bias, bias_grad, bias_momentum, factor(out[:-1], out[-1], p), bias_rates)
    powers.append(power(weight, p))
    if bias is not None:
        bias_powers.append(power(bias, p))
    mass.zero_()
    for index, (vector, target) in enumerate(zip(carried, (across, fresh), strict=True)):
        values, exponent = vector[:-1], vector[-1]
        if not forward:
            target.copy_(normalised(_total(powers[index] * values[:, None], 0, p), exponent))
            if bias is not None:
                mass[index] = _total(bias_powers[index] * values, 0, p)
            continue
        sums = _total(powers[index] * values, 1, p)
        if bias is not None:
            common = exponent.clamp_min(0.0)
            sums, extra = torch.ldexp(sums, exponent - common), torch.ldexp(bias_powers[index], -common)
            sums, exponent = torch.maximum(sums, extra) if math.isinf(p) else sums + extra, common
        target.copy_(normalised(sums, exponent))


def path_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor,
    exponent: float,
    p: float,
    rates: Sequence[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The update alone, where γ = (mass · 2^exponent)^(2/p) is known for every element."""
    if found_inf is not None and bool(found_inf):
        return
    rates = unscaled(rates, grad_scale)
    root = mass ** (-1 / p) * 2.0 ** (-exponent / p)
    root = torch.where(torch.isfinite(root), root, 0.0)
    apply_step(param, grad.to(torch.float64) * root, momentum, root, rates)


def path_convolution(
    x: Tensor,  # [1, C, ...]
    weight: Tensor,  # [O, C / groups, ...]
    p: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Path sums behind a convolution: x through |weight|^p, in float64."""
    none = [0] * len(stride)
    return torch.ops.aten.convolution(x, power(weight, p), None, stride, padding, dilation, False, none, groups)


def convolution_gradient(
    known: Tensor,  # [1, O, ...]
    x: Tensor,
    edges: Tensor,  # |weight|^p
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    which: int,
) -> Tensor:
    """The gradient of <known, convolution of x with edges> by x (0) or by the edges (1)."""
    wanted, none = [which == 0, which == 1, False], [0] * len(stride)
    how = (None, stride, padding, dilation, False, none, groups, wanted)
    result: Tensor = torch.ops.aten.convolution_backward(known, x, edges, *how)[which]
    return result


def path_convolution_backward(
    known: Tensor,
    x: Tensor,
    weight: Tensor,
    p: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Path sums from the convolution's input to the network's outputs, of those from its output."""
    return convolution_gradient(known, x, power(weight, p), stride, padding, dilation, groups, 0)


def path_convolution_update(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    x: Tensor,
    known: Tensor,
    exponent: float,
    p: float,
    rates: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """`path_update` with the mass that x and known make."""
    edges = weight.to(torch.float64)  # for its shape
    mass = convolution_gradient(known, x, edges, stride, padding, dilation, groups, 1)
    path_update(weight, grad, momentum, mass, exponent, p, rates, None, None)
