"""A parameter, or a value made from parameters, that joins all rows: by a sum, a product or as a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..made import common_axes
from .eligible import ordinary

if TYPE_CHECKING:
    from ..capture import Capture


def added(capture: Capture, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Rows plus a parameter, or a value made from parameters, that all rows share."""
    return NotImplemented if alpha != 1 else _with_shared(capture, input, other, product=False)


def subtracted(capture: Capture, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Rows minus such a one: plus its negative, a made value."""
    if alpha != 1 or not isinstance(input, Tensor) or not isinstance(other, Tensor) or not other.requires_grad:
        return NotImplemented
    if common_axes(input.shape, other.shape) is None:
        return NotImplemented
    return _with_shared(capture, input, -other, product=False)


def multiplied(capture: Capture, input: Any, other: Any) -> Any:
    """Rows times a parameter, or a value made from parameters, that all rows share."""
    return _with_shared(capture, input, other, product=True)


def _with_shared(capture: Capture, one: Any, two: Any, product: bool) -> Any:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return NotImplemented
    for value, shared in ((one, two), (two, one)):
        axes = common_axes(value.shape, shared.shape) if shared.requires_grad else None
        if axes is None or not _is_shared(capture, value.shape, shared) or not ordinary(value, shared):
            continue

        def call(
            weight: Tensor | None, bias: Tensor | None, value: Tensor = value, shape: torch.Size = shared.shape
        ) -> Tensor:
            return value + bias.view(shape) if weight is None else value * weight  # type: ignore[union-attr]

        weight, bias = (shared, None) if product else (None, shared)
        return capture.record("scale", weight, bias, value, call, keep_input=product, axes=axes)
    return NotImplemented


def _is_shared(capture: Capture, shape: torch.Size, shared: Tensor) -> bool:
    """Whether rows of this shape share a parameter or made value.

    What is made from parameters may be other rows' part, such as an embedding of theirs, where there is a single row:
    so the probe decides by the shapes of several rows.
    """
    if id(shared) in capture.names:
        return True
    if capture.deciding:
        once = shared.dim() < len(shape) or shared.shape[0] == 1 < shape[0]
        if not once or not capture.name(shared):
            return False
        capture.shared.add(capture.number)
        return True
    return capture.number in capture.shared and bool(capture.name(shared))


def expanded(view: Callable[..., Tensor]) -> Callable[..., Any]:
    """A parameter or made value repeated for all rows, such as a class token."""

    def recognise(capture: Capture, input: Tensor, *sizes: Any, **named: Any) -> Any:
        if not input.requires_grad:
            return NotImplemented
        shape = view(input.detach(), *sizes, **named).shape
        axes = common_axes(shape, input.shape)
        if axes is None or not _is_shared(capture, shape, input) or not ordinary(input):
            return NotImplemented

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert bias is not None
            return view(bias, *sizes, **named)

        return capture.record("scale", None, input, input.new_zeros(()).expand(shape), call, axes=axes)

    return recognise
