"""What estimators take and give back: arrays or tensors, tuples and dicts of them, in the model's own kind."""

from __future__ import annotations

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


def model_kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the floating dtype of the model's parameters and buffers; CPU and float32 where it has none."""
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() or value.is_complex():
            return value.device, value.dtype.to_real() if value.is_complex() else value.dtype
    return torch.device("cpu"), torch.float32


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
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"x must hold numbers, got an array of dtype {array.dtype}")
        tensor = torch.from_numpy(np.array(array, order="C"))
        return tensor.to(device, dtype if array.dtype.kind == "f" else torch.int64)

    return map_tensors(x, convert), False


def targets_from_user(y: Any, rows: int, kind: tuple[torch.device, torch.dtype]) -> tuple[Tensor, bool]:
    """(y as float64 [N, C] on the device, whether it was [N])."""
    tensor = y.detach() if isinstance(y, Tensor) else torch.from_numpy(np.array(y, dtype=np.float64))
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
