"""Path-SGD's ops: one dense layer of a step, the update alone, and path sums through a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library
from . import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
UNCHANGED = (0.0, 0.0, 0.0, 1.0, 1.0)  # lr, momentum, nesterov, keep, sign


def _fake(*args: Any) -> None:
    return None


_sweep = _library.register("path_sweep", reference.path_sweep, _fake)
_step = _library.register("path_step", reference.path_step, _fake)
_update = _library.register("path_update", reference.path_update, _fake)
_convolution = _library.register("path_convolution", reference.path_convolution, reference.path_convolution)
_convolution_backward = _library.register(
    "path_convolution_backward",
    reference.path_convolution_backward,
    lambda known, x, *rest: torch.empty_like(x),
)
_convolution_update = _library.register("path_convolution_update", reference.path_convolution_update, _fake)


def _companion(name: str, value: Tensor | None, of: str, param: Tensor) -> None:
    if value is None:
        return
    _check.is_tensor(name, value)
    _check.like(name, value, of, param)
    if value.shape != param.shape:
        raise ValueError(f"{name} must have shape {list(param.shape)}, as {of} has, got {list(value.shape)}")


def _doubles(name: str, value: Tensor, size: int, holds: str, like: Tensor) -> None:
    _check.is_tensor(name, value)
    _check.is_float(name, value, (torch.float64,))
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], {holds}, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but weight is on {like.device}; move one of them")


def _vector(name: str, value: Tensor, units: int, like: Tensor) -> None:
    _doubles(name, value, units + 1, "one value per unit and the exponent", like)


def _rates(name: str, rates: Sequence[float]) -> list[float]:
    if len(rates) != 5:
        raise ValueError(f"{name} must hold lr, momentum, nesterov, keep and sign, got {len(rates)} numbers")
    return [float(rate) for rate in rates]


def _scaling(grad_scale: Tensor | None, found_inf: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both, checked, in float32 as GradScaler has them."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is None:
            continue
        _check.is_tensor(name, value)
        _check.is_float(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, but the parameter is on {like.device}; move one of them")
    return (
        grad_scale if grad_scale is None else grad_scale.float(),
        found_inf if found_inf is None else found_inf.float(),
    )


def _lr(name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """lr and keep in a tensor, checked."""
    if value is not None:
        _doubles(name, value, 2, "lr and keep", like)
        value = value.contiguous()
    return value


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
    _check.is_float("weight", weight, DTYPES)
    _check.has_dim("weight", weight, 2, "[rows, cols]")
    rows, cols = weight.shape
    _companion("grad", grad, "weight", weight)
    _companion("momentum", momentum, "weight", weight)
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.like("bias", bias, "weight", weight)
        if bias.shape != (rows,):
            raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}")
        _companion("bias_grad", bias_grad, "bias", bias)
        _companion("bias_momentum", bias_momentum, "bias", bias)
    for name, vector, units in (
        ("from_old", from_old, cols if forward else rows),
        ("from_new", from_new, cols if forward else rows),
        ("across", across, rows if forward else cols),
        ("fresh", fresh, rows if forward else cols),
        ("mass", mass, 1),
    ):
        _vector(name, vector, units, weight)
    scaling = _scaling(grad_scale, found_inf, weight)
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    written = [weight, momentum, bias, bias_momentum, across, fresh, mass]
    dense = [None if each is None else each.contiguous() for each in written]
    w, m, b, bm, a, f, s = dense
    _sweep(
        w,
        _dense(grad),
        m,
        b,
        _dense(bias_grad if bias is not None else None),
        bm if bias is not None else None,
        from_old.contiguous(),
        from_new.contiguous(),
        a,
        f,
        s,
        forward,
        float(p),
        _rates("weight_rates", weight_rates),
        _rates("bias_rates", bias_rates),
        *scaling,
        _lr("weight_lr", weight_lr, weight),
        _lr("bias_lr", bias_lr, weight),
    )
    _write_back(written, dense)


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
    lists = {"grads": grads, "momenta": momenta, "biases": biases, "bias_grads": bias_grads}
    for name, entries in {**lists, "bias_momenta": bias_momenta}.items():
        if len(entries) != len(weights):
            raise ValueError(f"{name} must be as long as weights, {len(weights)}, got {len(entries)}")
    for i, weight in enumerate(weights):
        _check.is_tensor(f"weights[{i}]", weight)
        _check.is_float(f"weights[{i}]", weight, DTYPES)
        _check.has_dim(f"weights[{i}]", weight, 2, "[rows, cols]")
        _check.like(f"weights[{i}]", weight, "weights[0]", weights[0])
        if i and weight.shape[1] != weights[i - 1].shape[0]:
            raise ValueError(f"weights[{i}] must have {weights[i - 1].shape[0]} columns, got {list(weight.shape)}")
        _companion(f"grads[{i}]", grads[i], f"weights[{i}]", weight)
        _companion(f"momenta[{i}]", momenta[i], f"weights[{i}]", weight)
        bias = biases[i]
        if bias is not None:
            _check.like(f"biases[{i}]", bias, f"weights[{i}]", weight)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"biases[{i}] must have shape [{weight.shape[0]}], got {list(bias.shape)}")
            _companion(f"bias_grads[{i}]", bias_grads[i], f"biases[{i}]", bias)
            _companion(f"bias_momenta[{i}]", bias_momenta[i], f"biases[{i}]", bias)
    units = weights[0].shape[1] + sum(weight.shape[0] for weight in weights)
    size = 2 * (units + len(weights) + 1) + 4 * len(weights)
    _doubles("vectors", vectors, size, "F, B and the layers' masses", weights[0])
    _doubles("state", state, 4, "what is known, Φ, its exponent and a count", weights[0])
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    if rates and len(rates) != 10 * len(weights):
        raise ValueError(f"rates must hold ten numbers a layer, {10 * len(weights)}, got {len(rates)}")
    if lrs and len(lrs) != 2 * len(weights):
        raise ValueError(f"lrs must hold two tensors a layer, {2 * len(weights)}, got {len(lrs)}")
    if rebuild not in (0, 1, 2):
        raise ValueError(f"rebuild must be 0, 1 or 2, got {rebuild}")
    for i, each in enumerate(lrs):
        _lr(f"lrs[{i}]", each, weights[0])
    written = [*weights, *momenta, *biases, *bias_momenta, vectors, state]
    if not all(each is None or each.is_contiguous() for each in written):
        raise ValueError(
            "weights, momenta, biases, bias_momenta, vectors and state must be contiguous: they are written"
        )
    scaling = _scaling(grad_scale, found_inf, weights[0])
    numbers = [float(rate) for rate in rates] or [*UNCHANGED, *UNCHANGED] * len(weights)
    path_step_unchecked(
        *(list(weights), grads, momenta, biases, bias_grads, bias_momenta, vectors, state, float(p), numbers, lrs),
        *(*scaling, rebuild),
    )


def path_step_unchecked(weights: list[Tensor], *rest: Any) -> None:
    """`path_step` of an optimizer, whose tensors fit each other and are contiguous, gradients aside."""
    *lists, vectors, state, p, rates, lrs, grad_scale, found_inf, rebuild = rest
    none, no_lr = weights[0].new_empty(0), vectors.new_empty(0)
    full = [[none if each is None else each.contiguous() for each in entries] for entries in lists]
    lrs = [no_lr if each is None else each for each in lrs]
    _step(weights, *full, vectors, state, p, rates, lrs, grad_scale, found_inf, rebuild)


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
    _check.is_float("param", param, DTYPES)
    _check.is_tensor("grad", grad)
    _companion("grad", grad, "param", param)
    _companion("momentum", momentum, "param", param)
    _check.is_tensor("mass", mass)
    _check.is_float("mass", mass, (torch.float64,))
    if mass.shape != param.shape:
        raise ValueError(f"mass must have shape {list(param.shape)}, as param has, got {list(mass.shape)}")
    _finite(p)
    scaling = _scaling(grad_scale, found_inf, param)
    written = [param, momentum]
    dense = [None if each is None else each.contiguous() for each in written]
    step = _exponent(exponent, param), float(p), _rates("rates", rates), *scaling, _lr("lr", lr, param)
    _update(dense[0], grad.contiguous(), dense[1], mass.contiguous(), *step)
    _write_back(written, dense)


def _exponent(exponent: float | Tensor, like: Tensor) -> Tensor:
    """On the device: one number, float64."""
    if not isinstance(exponent, Tensor):
        return torch.full((), float(exponent), dtype=torch.float64, device=like.device)
    _check.is_float("exponent", exponent, (torch.float64,))
    if exponent.numel() != 1:
        raise ValueError(f"exponent must have one element, got shape {list(exponent.shape)}")
    if exponent.device != like.device:
        raise ValueError(f"exponent is on {exponent.device}, but the parameter is on {like.device}; move one of them")
    return exponent


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
    result: Tensor = _convolution(x.contiguous(), weight.contiguous(), _finite(p), *how)
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
    result: Tensor = _convolution_backward(*dense, _finite(p), *how)
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
    _companion("grad", grad, "weight", weight)
    _companion("momentum", momentum, "weight", weight)
    written = [weight, momentum]
    dense = [None if each is None else each.contiguous() for each in written]
    sums = x.contiguous(), known.contiguous()
    step = _exponent(exponent, weight), _finite(p), _rates("rates", rates)
    scaling = *_scaling(grad_scale, found_inf, weight), _lr("lr", lr, weight)
    _convolution_update(dense[0], grad.contiguous(), dense[1], *sums, *step, *how, *scaling)
    _write_back(written, dense)


Window = tuple[list[int], list[int], list[int], int]


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
    _check.is_float("x", x, (torch.float64,))
    _check.is_tensor("weight", weight)
    _check.is_float("weight", weight, DTYPES)
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


def _finite(p: float) -> float:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p must be at least 1 and finite, got {p}")
    return float(p)


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _write_back(written: Sequence[Tensor | None], dense: Sequence[Tensor | None]) -> None:
    """Copies what the op wrote into arguments that were not contiguous."""
    for target, source in zip(written, dense, strict=True):
        if target is not None and source is not None and target is not source:
            target.copy_(source)
