"""Convolutions and transposed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..layers import Convolved
from .eligible import counts
from .rectifiers import source_of

if TYPE_CHECKING:
    from ..capture import Capture


# Channels in and out of each group from which on a grouped convolution runs on this library's kernel: below, its
# register tiles would stay mostly empty.
LEAST_CHANNELS = 8


def _tuple(value: int | Sequence[int], size: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * size if len(values) == 1 else values


def _kernel_serves(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int) -> bool:
    """Whether a convolution runs on this library's kernel: on the CPU, with stride 1 and groups of some width."""
    if weight.requires_grad or (bias is not None and bias.requires_grad) or input.device.type != "cpu":
        return False
    wide = groups == 1 or min(weight.shape[1], weight.shape[0] // groups) >= LEAST_CHANNELS
    return wide and all(step == 1 for step in stride)


def conv(convolve: Callable[..., Tensor], spatial: int) -> Callable[..., Any]:
    def recognise(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not counts(capture, input, weight, bias) or input.dim() != spatial + 2:
            return NotImplemented
        kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, spatial), _tuple(dilation, spatial)
        if padding == "valid":
            padding = 0
        if padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            if any(size % 2 for size in total):  # more on the right than on the left
                sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
                input, padding = F.pad(input, sides), 0
            else:
                padding = [size // 2 for size in total]
        padding = _tuple(padding, spatial)
        geometry = (kernel, stride, padding, dilation, groups)

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert weight is not None
            if not _kernel_serves(input, weight, bias, stride, groups):
                return convolve(input, weight, bias, stride, padding, dilation, groups)
            source, gated = source_of(capture, input)
            result: Tensor = Convolved.apply(source, input.detach(), weight, bias, gated, padding, dilation, groups)
            return result

        return capture.record("conv", weight, bias, input, call, geometry=geometry)

    return recognise


def conv_transpose(convolve: Callable[..., Tensor], spatial: int) -> Callable[..., Any]:
    def recognise(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not counts(capture, input, weight, bias):
            return NotImplemented
        if input.dim() != spatial + 2 or any(_tuple(output_padding, spatial)):
            return NotImplemented
        stride, padding, dilation = (_tuple(value, spatial) for value in (stride, padding, dilation))
        geometry = (tuple(weight.shape[2:]), stride, padding, dilation, groups)

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return convolve(input, weight, bias, stride, padding, 0, groups, dilation)

        return capture.record("conv_transpose", weight, bias, input, call, geometry=geometry)

    return recognise
