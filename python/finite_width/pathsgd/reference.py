"""Path-SGD's ops in plain torch: what they mean, and what runs where no kernel is.

A path vector of n units is float64 [n + 1]: n values and, last, the power of two they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


# lr, momentum, nesterov, keep, sign; lr, keep and sign may be tensors.
Rates = Sequence[Any]


def apply_step(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    inverse_gamma: Tensor,
    rates: Rates,
    found_inf: Tensor | None = None,
) -> None:
    """param ← keep · param − lr · step, in float64 and rounded once; momentum and Nesterov as in torch.optim.SGD.

    Where found_inf is not 0, parameter and momentum stay.
    """
    lr, mu, nesterov, keep, sign = rates
    direction = grad.to(torch.float64) * (inverse_gamma * sign)
    step = direction
    if momentum is not None:
        moved = (mu * momentum.to(torch.float64) + direction).to(momentum.dtype)
        step = moved.to(torch.float64)
        if nesterov:
            step = mu * step + direction
        momentum.copy_(_unless(found_inf, moved, momentum))
    param.copy_(_unless(found_inf, param.to(torch.float64) * keep - lr * step, param))


def _unless(found_inf: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The new values, or where found_inf is not 0 the old ones; nothing is read on the host."""
    return new if found_inf is None else torch.where(found_inf.reshape(()) != 0, old.to(new.dtype), new)


def rates_now(rates: Rates, grad_scale: Tensor | None, lr: Tensor | None) -> Rates:
    """Rates with the lr and keep of a tensor of their own, where there is one, and a sign that divides by the scale."""
    if lr is not None:
        rates = (lr[0], *rates[1:3], lr[1], rates[4])
    return rates if grad_scale is None else (*rates[:4], rates[4] / grad_scale.reshape(()).to(torch.float64))


def two_to(exponent: Tensor) -> Tensor:
    """2^exponent for whole exponents in float64, clamped to normal numbers; exact on every device."""
    return (exponent.clamp(-1022, 1023).to(torch.int64) + 1023 << 52).view(torch.float64)


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
    weight_lr: Tensor | None,  # [2], float64: lr and keep
    bias_lr: Tensor | None,
) -> None:
    """One dense layer of a step: update by 1/γ, and carry F (forward) or B (backward) of old and new weights on."""
    weight_rates = rates_now(weight_rates, grad_scale, weight_lr)
    bias_rates = rates_now(bias_rates, grad_scale, bias_lr)
    known, carried = across.clone(), (from_old.clone(), from_new.clone())
    out, into = (known, carried[0]) if forward else (carried[0], known)
    powers = [power(weight, p)]
    bias_powers = [power(bias, p)] if bias is not None else []
    if grad is not None:
        # The exponents go with the outer unit, as in the kernel.
        rows = factor(out[:-1], out[-1] + into[-1], p)
        apply_step(weight, grad, momentum, rows[:, None] * factor(into[:-1], 0.0, p), weight_rates, found_inf)
    if bias is not None and bias_grad is not None:
        apply_step(bias, bias_grad, bias_momentum, factor(out[:-1], out[-1], p), bias_rates, found_inf)
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


def given(entry: Tensor) -> Tensor | None:
    """A list's tensor; None for the empty one that stands for nothing."""
    return entry if entry.numel() else None


def pieces(weights: Sequence[Tensor], vectors: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Views of a chain's path vectors in one piece: F_0 ... F_L, B_0 ... B_L, and [4] masses of each layer."""
    sizes = [weights[0].shape[1] + 1, *(weight.shape[0] + 1 for weight in weights)]
    found = vectors.split([*sizes, *sizes, *[4] * len(weights)])
    return found[: len(sizes)], found[len(sizes) : 2 * len(sizes)], found[2 * len(sizes) :]


KNOWS_FORWARD, KNOWS_BACKWARD = 1, 2  # state[0]: whether F or B is of the weights as they are


def path_step(
    weights: Sequence[Tensor],  # [rows, cols] each, from the input on
    grads: Sequence[Tensor],  # as the weights, or empty for none; the same below
    momenta: Sequence[Tensor],
    biases: Sequence[Tensor],  # [rows] each, or empty
    bias_grads: Sequence[Tensor],
    bias_momenta: Sequence[Tensor],
    vectors: Tensor,  # `pieces`; F_0 and B_L are 1 before and after
    state: Tensor,  # [4]: what is known, Φ, its exponent, how many sweeps met another Φ
    p: float,
    rates: Sequence[float],  # ten a layer: the weight's and the bias's
    lrs: Sequence[Tensor],  # none, or two a layer, [2] or empty
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rebuild: int,
) -> None:
    """A step of a chain in the direction whose vectors are known, which leaves the other direction's.

    With `rebuild`, F (1) or B (2) is made of the weights first, in a sweep that updates nothing.
    """
    forward, backward, masses = pieces(weights, vectors)
    layers = len(weights)

    def sweep(knows: int, update: bool) -> None:
        to_front = knows == KNOWS_BACKWARD
        for index in range(layers) if to_front else range(layers - 1, -1, -1):
            known, carried = (backward, forward) if to_front else (forward, backward)
            start, end = (index, index + 1) if to_front else (index + 1, index)
            outer = 0 if to_front else layers
            of = [given(each[index]) for each in (grads, momenta, biases, bias_grads, bias_momenta)]
            if not update:
                of[0] = of[3] = None
            old = carried[start] if start == outer else known[start]
            exponents = torch.stack([old[-1], carried[start][-1]])
            now = [given(each) for each in lrs[2 * index : 2 * index + 2]] or [None, None]
            arguments: tuple[Any, ...] = (
                *(weights[index], *of, old, carried[start], known[end], carried[end], masses[index][:2], to_front, p),
                *(rates[10 * index : 10 * index + 5], rates[10 * index + 5 : 10 * index + 10]),
                *(grad_scale, found_inf, *now),
            )
            path_sweep(*arguments)
            masses[index][2:].copy_(exponents)
        far = (backward[layers], forward[layers]) if to_front else (forward[0], backward[0])
        met, left = (
            _path_total(vector, [] if to_front else [mass[which::2] for mass in masses], p)
            for which, vector in enumerate(far)
        )
        stored = state[1:3].clone()
        differs = (torch.log2(met[0]) - torch.log2(stored[0]) + met[1] - stored[1]).abs() >= 1e-7
        differs = torch.where((met[0] > 0) & (stored[0] > 0), differs, met[0] != stored[0])
        comparable = ~(torch.isnan(met[0]) | torch.isnan(stored[0]))
        if update:
            state[3] += (differs & comparable).to(state.dtype)
        state[0] = KNOWS_FORWARD if to_front else KNOWS_BACKWARD
        state[1:3].copy_(left)
        for vector in (forward[0], backward[layers]):
            vector[:-1].fill_(1.0)
            vector[-1].zero_()

    if rebuild:
        sweep(KNOWS_FORWARD if rebuild == KNOWS_BACKWARD else KNOWS_BACKWARD, False)
    sweep(int(state[0]), True)


def _path_total(vector: Tensor, masses: Sequence[Tensor], p: float) -> Tensor:
    """[value, exponent] of a path vector's sum and bias masses [mass, exponent]; NaN where one is not finite."""
    own = vector[:-1].max() if math.isinf(p) and len(vector) > 1 else vector[:-1].sum()
    pairs = torch.stack([torch.stack([own, vector[-1]]), *masses])
    live = pairs[:, 0] > 0
    top = torch.where(live, pairs[:, 1], -torch.inf).max()
    terms = torch.where(live, torch.ldexp(pairs[:, 0], (pairs[:, 1] - top).clamp_min(-5000)), 0.0)
    value = terms.max() if math.isinf(p) else terms.sum()
    found = torch.stack([value, torch.where(value > 0, top, 0.0)])
    return torch.where(torch.isfinite(pairs[:, 0]).all(), found, found.new_tensor([math.nan, 0.0]))


def path_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor,
    exponent: Tensor,  # [1], float64
    p: float,
    rates: Sequence[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Tensor | None,  # [2], float64: lr and keep
) -> None:
    """The update alone, where γ = (mass · 2^exponent)^(2/p) is known for every element."""
    root = mass ** (-1 / p) * torch.exp2(-exponent.reshape(()) / p)
    root = torch.where(torch.isfinite(root), root, 0.0)
    how = rates_now(rates, grad_scale, lr)
    apply_step(param, grad.to(torch.float64) * root, momentum, root, how, found_inf)


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
    exponent: Tensor,
    p: float,
    rates: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Tensor | None,
) -> None:
    """`path_update` with the mass that x and known make."""
    edges = weight.to(torch.float64)  # for its shape
    mass = convolution_gradient(known, x, edges, stride, padding, dilation, groups, 1)
    path_update(weight, grad, momentum, mass, exponent, p, rates, grad_scale, found_inf, lr)
