"""Checks of arguments that several of Path-SGD's ops take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
UNCHANGED = (0.0, 0.0, 0.0, 1.0, 1.0)  # lr, momentum, nesterov, keep, sign


def like_parameter(name: str, value: Tensor | None, of: str, param: Tensor) -> None:
    """A tensor beside a parameter, such as its gradient, or None: of the parameter's shape, dtype and device."""
    if value is None:
        return
    _check.is_tensor(name, value)
    _check.like(name, value, of, param)
    if value.shape != param.shape:
        raise ValueError(f"{name} must have shape {list(param.shape)}, as {of} has, got {list(value.shape)}")


def float64_vector(name: str, value: Tensor, size: int, holds: str, like: Tensor) -> None:
    """A float64 vector of this size, on the weight's device."""
    _check.is_tensor(name, value)
    _check.is_dtype(name, value, (torch.float64,))
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], {holds}, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but weight is on {like.device}; move one of them")


def path_vector(name: str, value: Tensor, units: int, like: Tensor) -> None:
    """The path sums of a layer's units, and their exponent behind them."""
    float64_vector(name, value, units + 1, "one value per unit and the exponent", like)


def step_rates(name: str, rates: Sequence[float]) -> list[float]:
    """lr, momentum, nesterov, keep and sign."""
    if len(rates) != 5:
        raise ValueError(f"{name} must hold lr, momentum, nesterov, keep and sign, got {len(rates)} numbers")
    return [float(rate) for rate in rates]


def amp_scaling(
    grad_scale: Tensor | None, found_inf: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
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


def device_lr(name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """lr and keep in a tensor, checked."""
    if value is not None:
        float64_vector(name, value, 2, "lr and keep", like)
        value = value.contiguous()
    return value


def device_exponent(exponent: float | Tensor, like: Tensor) -> Tensor:
    """On the device: one number, float64."""
    if not isinstance(exponent, Tensor):
        return torch.full((), float(exponent), dtype=torch.float64, device=like.device)
    _check.is_dtype("exponent", exponent, (torch.float64,))
    if exponent.numel() != 1:
        raise ValueError(f"exponent must have one element, got shape {list(exponent.shape)}")
    if exponent.device != like.device:
        raise ValueError(f"exponent is on {exponent.device}, but the parameter is on {like.device}; move one of them")
    return exponent


def number(name: str, value: Any) -> float:
    """The value as a float, of a number or a tensor of one element."""
    if not isinstance(value, Tensor):
        _check.number(name, value)
    elif value.dtype == torch.bool:
        raise TypeError(f"{name} must be a number, got a tensor of bool")
    elif value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    elif value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {list(value.shape)}")
    return float(value)


def path_power(p: Any) -> float:
    """p of the path norm, which may be ∞."""
    power = number("p", p)
    if not power >= 1:
        raise ValueError(f"p must be at least 1, got {power:g}")
    return power


def finite_power(p: float) -> float:
    """p, where p = ∞ is not defined."""
    power = number("p", p)
    if not 1 <= power < float("inf"):
        raise ValueError(f"p must be at least 1 and finite, got {power:g}")
    return power


def dense_or_none(value: Tensor | None) -> Tensor | None:
    """The tensor, or a contiguous copy of it."""
    return None if value is None else value.contiguous()


def write_back(written: Sequence[Tensor | None], dense: Sequence[Tensor | None]) -> None:
    """Copies what the op wrote into arguments that were not contiguous."""
    for target, source in zip(written, dense, strict=True):
        if target is not None and source is not None and target is not source:
            target.copy_(source)
