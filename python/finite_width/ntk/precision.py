"""How the CUDA kernels multiply float32 values, and torch's own products kept in float32 beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import _check

# The place of a name is what the ops take.
PRECISIONS = ("ieee", "split", "bf16")
_chosen = 0  # of the process, as torch's own settings; torch.compile cannot trace a ContextVar


@contextmanager
def cuda_precision(precision: str) -> Iterator[None]:
    """How float32 kernels are multiplied on a GPU inside the block; results stay float32.

    The setting is the process's, as torch's own are, and concerns the products of Jacobians in CUDA kernels alone: the
    CPU, float64 tensors and the plain-torch references ignore it. torch's own settings for float32 products
    (`torch.set_float32_matmul_precision`, TF32 in cuDNN) do not reach the kernel functions of this wing: in every
    mode, a model on a GPU runs in IEEE float32 there, and torch's settings come back afterwards.

    Args:
        precision: "ieee", multiply-adds in float32, which is the default outside of any block; "split", three products
            of TF32 parts on tensor cores, made for a relative error of at most 1e-5 (in Frobenius norm, against
            float64); "bf16", operands rounded to bfloat16, for one between 1e-3 and 1e-2. No GPU has run them yet.

    Raises:
        ValueError: another precision.

    Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32
    theoretical peak performance" (2022), for sums outside of the tensor cores.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Linear(3, 2)
        >>> with fw.ntk.cuda_precision("split"):
        ...     kernel = fw.ntk.empirical_ntk(model, torch.randn(5, 3), compute="trace")
        >>> kernel.dtype
        torch.float32
    """
    _check.one_of("precision", precision, PRECISIONS)
    global _chosen
    before = _chosen
    try:
        _chosen = PRECISIONS.index(precision)
        yield
    finally:
        _chosen = before


def chosen() -> int:
    """What the ops take: the place of the precision in PRECISIONS."""
    return _chosen


@contextmanager
def ieee_products(on_gpu: bool) -> Iterator[None]:
    """torch's own float32 products and convolutions on a GPU without TF32, whatever the user allows elsewhere."""
    cudnn: Any = torch.backends.cudnn  # its attributes are unknown to type checkers
    settings = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn] if on_gpu else []
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
