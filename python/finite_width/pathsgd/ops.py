"""Path-SGD's ops for dense layers: one layer of a step, a chain's whole step, and the update alone."""

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
    dense_or_none,
    device_exponent,
    device_lr,
    finite_power,
    float64_vector,
    like_parameter,
    path_vector,
    step_rates,
    write_back,
)


def _fake(*args: Any) -> None:
    return None


_sweep = _library.register("path_sweep", reference.path_sweep, _fake)
_step = _library.register("path_step", reference.path_step, _fake)
_update = _library.register("path_update", reference.path_update, _fake)


def path_sweep(
    weight: Tensor,
    grad: Tensor | None,
    momentum: Tensor | None,
    bias: Tensor | None,
    bias_grad: Tensor | None,
    bias_momentum: Tensor | None,
    from_old: Tensor,
    from_new: Tensor,
    across: Tensor,
    fresh: Tensor,
    mass: Tensor,
    forward: bool,
    p: float = 2.0,
    weight_rates: Sequence[float] = UNCHANGED,
    bias_rates: Sequence[float] = UNCHANGED,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    weight_lr: Tensor | None = None,
    bias_lr: Tensor | None = None,
) -> None:
    """One dense layer of a Path-SGD step in one read: w ← keep·w − lr·g/γ, and the path vectors of old and new w.

    γ(W)[j, i] = (F[i] B[j])^(2/p), γ(b)[j] = B[j]^(2/p). Forward, F' = |W|^p F + |b|^p is carried and B is known;
    backward, B' = |W|^pᵀ B is carried and F is known. A path vector of n units is float64 [n + 1]: the values and,
    last, the power of two they share.

    Args:
        weight: [rows, cols], float32, float64 or bfloat16; written where grad is given.
        grad, momentum: [rows, cols] in the same dtype, or None; momentum is written.
        bias, bias_grad, bias_momentum: [rows], or None.
        from_old, from_new: the carried vector, of the old and of the new weights, on the side where the sweep enters:
            [cols + 1] forward, [rows + 1] backward.
        across: [rows + 1] forward, [cols + 1] backward. In: the known vector. Out: the carried vector, old weights.
        fresh: the same size. Out: the carried vector, new weights.
        mass: [2]. Out: Σ_j |b_j|^p B_j of old and new weights after a backward sweep, zeros after a forward one.
        forward: the direction.
        p: at least 1; inf takes maxima for sums.
        weight_rates, bias_rates: (lr, momentum, nesterov, keep, sign): keep multiplies the weight (decoupled decay),
            sign is −1 to maximise.
        grad_scale: one element, by which gradients are divided; read on the device, as GradScaler's is.
        found_inf: one element; where it is not 0, parameters and momenta stay as they are.
        weight_lr, bias_lr: float64 [2], lr and keep, in place of those in the rates; read on the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the argument's name; p < 1.
    """
    _check.is_tensor("weight", weight)
    _check.is_dtype("weight", weight, DTYPES)
    _check.has_dim("weight", weight, 2, "[rows, cols]")
    rows, cols = weight.shape
    like_parameter("grad", grad, "weight", weight)
    like_parameter("momentum", momentum, "weight", weight)
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.like("bias", bias, "weight", weight)
        if bias.shape != (rows,):
            raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}")
        like_parameter("bias_grad", bias_grad, "bias", bias)
        like_parameter("bias_momentum", bias_momentum, "bias", bias)
    for name, vector, units in (
        ("from_old", from_old, cols if forward else rows),
        ("from_new", from_new, cols if forward else rows),
        ("across", across, rows if forward else cols),
        ("fresh", fresh, rows if forward else cols),
        ("mass", mass, 1),
    ):
        path_vector(name, vector, units, weight)
    scaling = amp_scaling(grad_scale, found_inf, weight)
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    written = [weight, momentum, bias, bias_momentum, across, fresh, mass]
    dense = [None if each is None else each.contiguous() for each in written]
    w, m, b, bm, a, f, s = dense
    _sweep(
        w,
        dense_or_none(grad),
        m,
        b,
        dense_or_none(bias_grad if bias is not None else None),
        bm if bias is not None else None,
        from_old.contiguous(),
        from_new.contiguous(),
        a,
        f,
        s,
        forward,
        float(p),
        step_rates("weight_rates", weight_rates),
        step_rates("bias_rates", bias_rates),
        *scaling,
        device_lr("weight_lr", weight_lr, weight),
        device_lr("bias_lr", bias_lr, weight),
    )
    write_back(written, dense)


def path_sweep_unchecked(weight: Tensor, grad: Tensor | None, momentum: Tensor | None, *rest: Any) -> None:
    """`path_sweep` in a step, whose small vectors are our own: a step has no time to check them again and again.

    Args:
        weight, grad, momentum: as for `path_sweep`, of one shape and dtype.
        rest: all the other arguments; the vectors are contiguous.
    """
    if all(each is None or each.is_contiguous() for each in (weight, grad, momentum, *rest[:3])):
        _sweep(weight, grad, momentum, *rest)
    else:
        path_sweep(weight, grad, momentum, *rest)


def path_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    bias_grads: Sequence[Tensor | None],
    bias_momenta: Sequence[Tensor | None],
    vectors: Tensor,
    state: Tensor,
    p: float = 2.0,
    rates: Sequence[float] = (),
    lrs: Sequence[Tensor | None] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rebuild: int = 0,
) -> None:
    """A step of a chain of dense layers, `path_sweep` of each, in a direction that is read on the device.

    Where B is of the weights as they are, the sweep goes forward and leaves F; where F is, backward, and it leaves B.
    So the same call, or the same captured graph, makes a chain's steps one after another, three passes each.

    Args:
        weights: [rows, cols] each, from the input on, of one dtype and device, contiguous; written.
        grads, momenta: as long as weights, None for those that have none; momenta are written.
        biases, bias_grads, bias_momenta: likewise, [rows] each.
        vectors: float64 in one piece: F_0 ... F_L, then B_0 ... B_L (a path vector of n units has n + 1), then [4]
            for each layer: its bias masses of old and new weights, and their exponents. F_0 and B_L must hold ones with
            exponent 0, and do so afterwards.
        state: float64 [4]: 1 where F is of the weights as they are, 2 where B is; Φ as the last sweep left it and its
            exponent; how many sweeps have met weights of another Φ than that.
        p: at least 1; inf takes maxima for sums.
        rates: ten a layer, (lr, momentum, nesterov, keep, sign) of the weight and of the bias; none changes nothing.
        lrs: none at all, or two a layer, as weight_lr and bias_lr of `path_sweep`.
        grad_scale, found_inf: as for `path_sweep`.
        rebuild: 1 or 2 makes F or B of the weights first, in a sweep that updates nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the argument's name; p < 1.
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor")
    beside = {"grads": grads, "momenta": momenta, "biases": biases}
    beside |= {"bias_grads": bias_grads, "bias_momenta": bias_momenta}
    for name, entries in beside.items():
        if len(entries) != len(weights):
            raise ValueError(f"{name} must be as long as weights, {len(weights)}, got {len(entries)}")
    for i, weight in enumerate(weights):
        _check.is_tensor(f"weights[{i}]", weight)
        _check.is_dtype(f"weights[{i}]", weight, DTYPES)
        _check.has_dim(f"weights[{i}]", weight, 2, "[rows, cols]")
        _check.like(f"weights[{i}]", weight, "weights[0]", weights[0])
        if i and weight.shape[1] != weights[i - 1].shape[0]:
            raise ValueError(f"weights[{i}] must have {weights[i - 1].shape[0]} columns, got {list(weight.shape)}")
        like_parameter(f"grads[{i}]", grads[i], f"weights[{i}]", weight)
        like_parameter(f"momenta[{i}]", momenta[i], f"weights[{i}]", weight)
        bias = biases[i]
        if bias is not None:
            _check.like(f"biases[{i}]", bias, f"weights[{i}]", weight)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"biases[{i}] must have shape [{weight.shape[0]}], got {list(bias.shape)}")
            like_parameter(f"bias_grads[{i}]", bias_grads[i], f"biases[{i}]", bias)
            like_parameter(f"bias_momenta[{i}]", bias_momenta[i], f"biases[{i}]", bias)
    units = weights[0].shape[1] + sum(weight.shape[0] for weight in weights)
    size = 2 * (units + len(weights) + 1) + 4 * len(weights)
    float64_vector("vectors", vectors, size, "F, B and the layers' masses", weights[0])
    float64_vector("state", state, 4, "what is known, Φ, its exponent and a count", weights[0])
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    if rates and len(rates) != 10 * len(weights):
        raise ValueError(f"rates must hold ten numbers a layer, {10 * len(weights)}, got {len(rates)}")
    if lrs and len(lrs) != 2 * len(weights):
        raise ValueError(f"lrs must hold two tensors a layer, {2 * len(weights)}, got {len(lrs)}")
    if rebuild not in (0, 1, 2):
        raise ValueError(f"rebuild must be 0, 1 or 2, got {rebuild}")
    for i, each in enumerate(lrs):
        device_lr(f"lrs[{i}]", each, weights[0])
    written = [*weights, *momenta, *biases, *bias_momenta, vectors, state]
    if not all(each is None or each.is_contiguous() for each in written):
        raise ValueError(
            "weights, momenta, biases, bias_momenta, vectors and state must be contiguous: they are written"
        )
    scaling = amp_scaling(grad_scale, found_inf, weights[0])
    numbers = [float(rate) for rate in rates] or [*UNCHANGED, *UNCHANGED] * len(weights)
    none = vectors.new_empty(0)
    lists = [[none if each is None else each.contiguous() for each in entries] for entries in beside.values()]
    path_step_unchecked(
        *(list(weights), *lists, vectors, state, float(p), numbers),
        *([none if each is None else each for each in lrs], *scaling, rebuild),
    )


def path_step_unchecked(*args: Any) -> None:
    """`path_step` of an optimizer, whose tensors fit each other and are contiguous; an empty one stands for none."""
    _step(*args)


def path_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor,
    exponent: float | Tensor = 0.0,
    p: float = 2.0,
    rates: Sequence[float] = UNCHANGED,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr: Tensor | None = None,
) -> None:
    """The update alone: w ← keep·w − lr·g/γ with γ = (mass · 2^exponent)^(2/p); no step where mass is 0.

    Args:
        param: any shape, float32, float64 or bfloat16; written.
        grad, momentum: like param; momentum may be None, and is written.
        mass: float64, of param's shape: ∂Φ/∂|w|^p, up to the exponent.
        exponent: the power of two that multiplies mass; a float64 tensor of one element is read on the device.
        p: at least 1, finite.
        rates: (lr, momentum, nesterov, keep, sign).
        grad_scale, found_inf, lr: as for `path_sweep`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the argument's name; p < 1.
    """
    _check.is_tensor("param", param)
    _check.is_dtype("param", param, DTYPES)
    _check.is_tensor("grad", grad)
    like_parameter("grad", grad, "param", param)
    like_parameter("momentum", momentum, "param", param)
    _check.is_tensor("mass", mass)
    _check.is_dtype("mass", mass, (torch.float64,))
    if mass.shape != param.shape:
        raise ValueError(f"mass must have shape {list(param.shape)}, as param has, got {list(mass.shape)}")
    finite_power(p)
    scaling = amp_scaling(grad_scale, found_inf, param)
    written = [param, momentum]
    dense = [None if each is None else each.contiguous() for each in written]
    step = device_exponent(exponent, param), float(p), step_rates("rates", rates), *scaling, device_lr("lr", lr, param)
    _update(dense[0], grad.contiguous(), dense[1], mass.contiguous(), *step)
    write_back(written, dense)
