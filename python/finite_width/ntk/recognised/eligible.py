"""What recognisers ask of the tensors of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..contract import FLOATS

if TYPE_CHECKING:
    from ..capture import Capture


def ordinary(*values: Tensor | None) -> bool:
    """Whether all are plain float tensors of one dtype."""
    if forward_ad._current_level >= 0:  # inside forward mode: an edge of the graph is no cotangent
        return False
    dtype = None
    for value in values:
        if value is None:
            continue
        # Nor is it inside the model's own torch.func transforms, where tensors are wrapped.
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        if dtype is None:
            dtype = value.dtype
        elif value.dtype != dtype:
            return False
    return dtype in FLOATS


def counts(capture: Capture, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether weight or bias is a counting parameter, used on tensors whose cotangents can be recorded."""
    return bool(capture.name(weight) or capture.name(bias)) and ordinary(input, weight, bias)
