"""Dense layers: products of rows with a parameter or its transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._gemm import gemm
from ..layers import Dense
from .eligible import ordinary
from .rectifiers import source_of

if TYPE_CHECKING:
    from ..capture import Capture


def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    flipped = False
    if id(weight) in capture.transposed:  # F.linear(x, W.T)
        weight, flipped = capture.transposed[id(weight)][1], True
    return _dense(capture, input, weight, bias, flipped)


def matmul(capture: Capture, input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if id(other) in capture.transposed:  # x @ W.T
        return _dense(capture, input, capture.transposed[id(other)][1], None, False)
    return _dense(capture, input, other, None, True) if other.dim() == 2 and capture.name(other) else NotImplemented


def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1 or mat1.dim() != 2:
        return NotImplemented
    if id(mat2) in capture.transposed:
        return _dense(capture, mat1, capture.transposed[id(mat2)][1], input, False)
    return _dense(capture, mat1, mat2, input, True)


def _dense(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Any:
    """input [..., I] times weight [C, I] (or [I, C] where flipped), plus bias, on the better matrix product."""
    if input.dim() < 2 or weight.dim() != 2 or not ordinary(input, weight, bias):
        return NotImplemented
    matrix = weight if flipped else weight.t()
    if input.shape[-1] != matrix.shape[0] or (bias is not None and bias.shape != matrix.shape[1:]):
        return NotImplemented
    lead = input.shape[:-1]
    shape = torch.Size((*lead, matrix.shape[1]))

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        matrix = weight if flipped else weight.t()
        if matrix.requires_grad or (bias is not None and bias.requires_grad):
            return gemm(_rows(input), matrix, bias)
        source, gated = source_of(capture, input)
        result: Tensor = Dense.apply(_rows(source), _rows(input.detach()), matrix, bias, gated, capture.anchor)
        return result

    result = capture.record("dense", weight, bias, input, call, lambda _: shape, flipped=flipped)
    return result if input.dim() == 2 else result.view(shape)


def _rows(input: Tensor) -> Tensor:
    return input if input.dim() == 2 else input.reshape(-1, input.shape[-1])


def transpose(view: Callable[..., Tensor]) -> Callable[..., Any]:
    def recognise(capture: Capture, input: Tensor, *axes: Any, **named: Any) -> Any:
        result = view(input, *axes, **named)
        turned = not axes and not named
        turned = turned or {axis % 2 for axis in (*axes, *named.values()) if isinstance(axis, int)} == {0, 1}
        if id(input) in capture.names and input.dim() == 2 and turned:
            capture.transposed[id(result)] = (result, input)
        return result

    return recognise


def reversed_axes(value: Tensor) -> range:
    return range(value.dim() - 1, -1, -1)
