"""Embeddings, and those that are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contract import FLOATS

if TYPE_CHECKING:
    from ..capture import Capture


def embedding(
    capture: Capture,
    weight: Tensor,
    input: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not capture.name(weight) or weight.dtype not in FLOATS:
        return NotImplemented
    if scale_grad_by_freq:
        raise _depends_on_others_error()

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.embedding(weight, input)

    return capture.record("embedding", weight, None, input, call, padding_idx=padding_idx, size=weight.shape[0])


def embedding_bag(
    capture: Capture,
    weight: Tensor,
    input: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    *others: Any,
    **named: Any,
) -> Any:
    if scale_grad_by_freq:
        raise _depends_on_others_error()
    return NotImplemented


def _depends_on_others_error() -> ValueError:
    return ValueError("model: an embedding has scale_grad_by_freq=True, so its gradient depends on the other rows")


def renormed(capture: Capture, *args: Any, **named: Any) -> Any:
    raise ValueError("model: an embedding has max_norm, which rewrites its weight in every forward")
