"""ReLUs, whose backward the layer behind takes along where it can."""

from __future__ import annotations

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


def source_of(capture: Capture, value: Tensor) -> tuple[Tensor, bool]:
    """What a layer's backward gives its gradient to: the value, or what a ReLU made it from, and which of the two.

    The latter where neither was written in place since.
    """
    result, version, input, input_version = capture.rectified.get(id(value), (None, 0, value, 0))
    if not capture.gates or result is not value or (value._version, input._version) != (version, input_version):
        return value, False
    capture.gated = True
    return input, True
