"""Norms, as a normalised input times a weight plus a bias, and PReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import norms
from .eligible import counts, ordinary

if TYPE_CHECKING:
    from ..capture import Capture


def _scaled(capture: Capture, normal: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, int]) -> Any:
    """normal * weight + bias, where the weight lies on the axes [axes[0], axes[1]) of the normalised input."""

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return norms.scaled(normal, weight, bias, axes[1])

    return capture.record("scale", weight, bias, normal, call, axes=axes)


def rms_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if not counts(capture, input, weight, None):
        return NotImplemented
    normal = torch.rms_norm(input, normalized_shape, None, eps)
    return _scaled(capture, normal, weight, None, (input.dim() - len(normalized_shape), input.dim()))


def layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if not counts(capture, input, weight, bias):
        return NotImplemented
    normal = torch.layer_norm(input, normalized_shape, None, None, eps, cudnn_enable)
    return _scaled(capture, normal, weight, bias, (input.dim() - len(normalized_shape), input.dim()))


def group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if not counts(capture, input, weight, bias):
        return NotImplemented
    normal = torch.group_norm(input, num_groups, None, None, eps, cudnn_enabled)
    return _scaled(capture, normal, weight, bias, (1, 2))


def batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not counts(capture, input, weight, bias):
        return norms.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    statistics = norms.running(input, running_mean, running_var, training, eps)
    if statistics is None or not ordinary(input, running_mean, running_var):
        return NotImplemented
    mean, rate = statistics

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return norms.by_running(input, mean, rate, weight, bias)

    return capture.record("scale", weight, bias, (input - mean) * rate, call, axes=(1, 2))


def instance_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return batch_norm(capture, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if not counts(capture, input, weight, bias):
        return norms.instance_norm(input, None, None, weight, bias, True, momentum, eps)
    normal = norms.by_instance(input, eps)
    return NotImplemented if normal is None else _scaled(capture, normal, weight, bias, (1, 2))


def prelu(capture: Capture, input: Tensor, weight: Tensor) -> Any:
    if not counts(capture, input, weight, None) or (weight.numel() > 1 and input.dim() < 2):
        return NotImplemented
    axes = (1, 2) if weight.numel() > 1 else (input.dim(), input.dim())

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.prelu(input, weight)

    return capture.record("scale", weight, None, input.clamp(max=0), call, axes=axes)
