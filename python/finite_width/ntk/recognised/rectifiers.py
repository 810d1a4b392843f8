"""ReLUs, whose backward the layer behind takes along where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .eligible import ordinary

if TYPE_CHECKING:
    from ..capture import Capture


def relu(capture: Capture, input: Tensor, inplace: bool = False) -> Any:
    if inplace or not input.requires_grad or not ordinary(input):
        return NotImplemented
    result = torch.relu(input)
    capture.rectified[id(result)] = (result, result._version, input, input._version)
    return result


def reshaped(call: Callable[..., Tensor]) -> Callable[..., Any]:
    """A ReLU's result in another shape is what the ReLU makes of its input in that shape."""

    def recognise(capture: Capture, input: Tensor, *sizes: Any, **options: Any) -> Any:
        source, rectified = source_of(capture, input, taken=False)
        if not rectified:
            return NotImplemented
        result = call(input, *sizes, **options)
        if result.requires_grad:  # not where the bits are seen as another type's, or the same one's
            source = source.reshape(result.shape)  # which may have strides of its own, that no view fits
            capture.rectified[id(result)] = (result, result._version, source, source._version)
        return result

    return recognise


def source_of(capture: Capture, value: Tensor, taken: bool = True) -> tuple[Tensor, bool]:
    """What a layer's backward gives its gradient to: the value, or what a ReLU made it from, and which of the two.

    The latter where neither was written in place since. With `taken`, a layer does take the ReLU's backward along.
    """
    result, version, input, input_version = capture.rectified.get(id(value), (None, 0, value, 0))
    if not capture.gates or result is not value or (value._version, input._version) != (version, input_version):
        return value, False
    capture.gated = capture.gated or taken
    return input, True
