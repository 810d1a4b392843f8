"""What estimators take and give back: arrays or tensors, tuples and dicts of them, in the model's own kind."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _check


def tensors_of(x: Any, name: str = "x") -> list[Tensor]:
    """The tensors of an input: a tensor, or a tuple, list or dict of tensors."""
    tensors = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple | list) else [x]
    if not tensors or not all(isinstance(each, Tensor) for each in tensors):
        raise TypeError(f"{name} must be a tensor, or a tuple or dict of tensors, got {type(x).__name__}")
    return tensors


def map_tensors(x: Any, function: Any) -> Any:
    """The same structure with the function applied to each of its tensors or arrays."""
    if isinstance(x, dict):
        return {key: function(each) for key, each in x.items()}
    if isinstance(x, tuple):
        return tuple(function(each) for each in x)
    return function(x)


def row_count(x: Any, name: str = "x") -> int:
    """The rows that all tensors of an input share.

    Raises:
        TypeError: not a tensor, nor a tuple, list or dict of tensors.
        ValueError: no rows, or tensors that disagree.
    """
    tensors = tensors_of(x, name)
    if any(each.dim() == 0 for each in tensors):
        raise ValueError(f"{name} must have rows along its first axis, got a scalar tensor")
    rows = {each.shape[0] for each in tensors}
    if len(rows) > 1:
        raise ValueError(f"the tensors of {name} must have the same number of rows, got {sorted(rows)}")
    if rows == {0}:
        raise ValueError(f"{name} is empty: it has shape {[list(each.shape) for each in tensors]}")
    return rows.pop()


def refuse_nan(x: Any) -> None:
    """Raise ValueError on NaN; on infinities in a single tensor only, since several may hold a mask of -inf."""
    for each in tensors_of(x):
        bad = torch.isnan(each) if each is not x else ~torch.isfinite(each)
        if bool(bad.any()):
            raise ValueError("x holds NaN or infinite entries")


def row_cuts(rows: int, size: int) -> Iterable[tuple[int, int]]:
    """(begin, end) of blocks of `size` rows; one row left over joins the last, as a model may squeeze its axis away."""
    return pairwise([*range(0, max(rows - 1, 1), size), rows])


def row_blocks(x: Any, size: int) -> Iterator[Any]:
    """The input cut into blocks of `size` rows, the last one shorter or longer by one."""
    for begin, end in row_cuts(row_count(x), size):
        yield map_tensors(x, lambda each, begin=begin, end=end: each[begin:end])


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: a module keeps a tensor that was computed from parameters, which torch does not copy.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"model cannot be copied: {error}. A forward has left a computed tensor in a module, as the older "
            "torch.nn.utils.weight_norm does; torch.nn.utils.parametrizations.weight_norm keeps none"
        ) from error


def model_kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the floating dtype of the model's parameters and buffers; CPU and float32 where it has none."""
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() or value.is_complex():
            return value.device, value.dtype.to_real() if value.is_complex() else value.dtype
    return torch.device("cpu"), torch.float32


def numbers(name: str, value: Any) -> np.ndarray:
    """What numpy reads in the user's value, as an array of a kind that torch knows, with memory of its own.

    Raises:
        TypeError: it holds anything but real numbers: numpy would make numbers of strings, dates and complex ones too.
        ValueError: rows of different lengths.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers (real ones, or booleans), got an array of dtype {array.dtype}")
    known = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    return np.array(array, dtype=known, order="C")


def from_user(x: Any, model: nn.Module) -> tuple[Any, bool]:
    """(x as tensors, whether they came as torch's): arrays move to the model's device and floating dtype.

    Tensors are taken as they are, so that a wrong device or dtype is an error to see. Integer arrays stay integers
    (tokens, categories); anything numpy can read, such as a data frame or nested lists, counts as an array.
    """
    if any(
        isinstance(each, Tensor) for each in (x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else [x])
    ):
        return x, True
    device, dtype = model_kind(model)

    def convert(value: Any) -> Tensor:
        array = numbers("x", value)
        tensor = torch.from_numpy(array)
        return tensor.to(device, dtype if array.dtype.kind == "f" else torch.int64)

    return map_tensors(x, convert), False


def targets_from_user(y: Any, rows: int, kind: tuple[torch.device, torch.dtype]) -> tuple[Tensor, bool]:
    """(y as float64 [N, C] on the device, whether it was [N])."""
    tensor = y.detach() if isinstance(y, Tensor) else torch.from_numpy(numbers("y", y))
    _check.is_dense("y", tensor)
    _check.has_values("y", tensor)
    if tensor.is_complex():
        raise TypeError("y must be real, got complex numbers")
    if tensor.dim() not in (1, 2) or tensor.shape[0] != rows:
        raise ValueError(f"y must have shape [{rows}] or [{rows}, C], as x has {rows} rows, got {list(tensor.shape)}")
    tensor = tensor.to(kind[0], torch.float64)
    _check.is_finite("y", tensor)
    return tensor.reshape(rows, -1), tensor.dim() == 1


def to_user(value: Tensor, as_torch: bool) -> Any:
    """A tensor, or a numpy array where the user gave arrays."""
    return value if as_torch else value.cpu().numpy()
