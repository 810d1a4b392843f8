"""Checks on what users pass: each raises a ValueError or TypeError that names the argument and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def is_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless value is a torch.Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def is_module(name: str, value: Any) -> None:
    """Raise TypeError unless value is a torch.nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def is_float(name: str, value: Tensor) -> None:
    """Raise TypeError unless the tensor is float32 or float64."""
    is_dtype(name, value, (torch.float32, torch.float64))


def is_dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the tensor has one of the given dtypes."""
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")


def is_finite(name: str, value: Tensor, advice: str = "all must be finite") -> None:
    """Raise ValueError where the tensor holds a NaN or an infinity; `advice` ends the message."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinite entries; {advice}")


def is_dense(name: str, value: Tensor) -> None:
    """Raise TypeError unless the tensor has the usual strided layout."""
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {value.layout}; pass its .to_dense()")


def has_values(name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor on the meta device."""
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; pass a tensor of a real device")


def is_symmetric(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless a finite matrix [N, N] is its transpose: an algorithm that reads one triangle needs that.

    Args:
        dtype: whose rounding is allowed for; None stands for the matrix's own.
    """
    value, tolerance = value.detach(), torch.finfo(dtype or value.dtype).eps ** 0.5
    largest = max(map(abs, map(float, value.aminmax()))) if value.numel() else 0.0
    for rows, columns in zip(value.split(1024), value.split(1024, 1), strict=True):  # no second matrix is held
        difference = float((rows - columns.mT).abs().amax())
        if difference > tolerance * largest:
            raise ValueError(
                f"{name} must be symmetric, but differs from its transpose by up to {difference:.2g} (its largest "
                f"entry is {largest:.2g}); pass the kernel of one set of points with itself"
            )


def has_dim(name: str, value: Tensor, dim: int, shape: str) -> None:
    """Raise ValueError unless the tensor has `dim` axes; `shape` names them, such as "[N, D]"."""
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype (TypeError) and one device (ValueError)."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, but {other_name} has {other.dtype}; convert one of them")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}; move one of them")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def boolean(name: str, value: Any) -> None:
    """Raise TypeError unless value is True or False, Python's or numpy's."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def number(name: str, value: Any) -> None:
    """Raise TypeError unless value is a real number, Python's or numpy's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def positive(name: str, value: Any) -> None:
    """Raise unless value is a number (TypeError) above 0 and finite (ValueError)."""
    number(name, value)
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def not_negative(name: str, value: Any) -> None:
    """Raise unless value is a number (TypeError) of at least 0 and finite (ValueError)."""
    number(name, value)
    if not (value >= 0 and isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Raise unless value is an int, numpy's included (TypeError), of at least `least` if given (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def positive_int(name: str, value: Any) -> None:
    """Raise unless value is an int (TypeError) of at least 1 (ValueError)."""
    integer(name, value, least=1)


def ints(name: str, value: Any, count: int, least: int = 1) -> tuple[int, ...]:
    """One int for all axes, or one for each of `count` axes, as a tuple; raise unless each is at least `least`."""
    each = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(each) != count:
        raise ValueError(f"{name} must be an int or have {count} entries, got {value}")
    for entry in each:
        integer(name, entry, least=least)
    return each
