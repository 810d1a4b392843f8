"""How the CUDA kernels multiply float32 values, and torch's own products kept in float32 beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _check, _library

# The place of a name is what the ops take.
PRECISIONS = ("ieee", "split", "bf16", "split-bf16")
IEEE, SPLIT = range(2)
_chosen = 0  # of the process, as torch's own settings; torch.compile cannot trace a ContextVar


def cuda_precision(precision: str) -> AbstractContextManager[None]:
    """How float32 kernels are multiplied on a GPU inside the block; results stay float32.

    The setting is the process's, as torch's own are, and concerns what CUDA kernels multiply alone: the CPU, float64
    tensors and the plain-torch references ignore it. torch's own settings for float32 products
    (`torch.set_float32_matmul_precision`, TF32 in cuDNN) do not reach the kernel functions of this wing, and come
    back afterwards.

    Args:
        precision: how products of Jacobians are multiplied. "ieee", multiply-adds in float32, which is the default
            outside of any block; "split", three products of TF32 parts on tensor cores, of float32's accuracy;
            "split-bf16", three products of bfloat16 parts, for a relative error of some 3e-6 in long sums (in
            Frobenius norm, against float64; at worst 2.3e-5 of the sums of absolute values); "bf16", operands
            rounded to bfloat16, for one between 1e-3 and 1e-2. In all but "ieee", per-example gradients and, for
            models of one output, dense layers are multiplied as in "split": where a unit crosses a ReLU's corner by
            rounding, the kernel jumps, so the model itself needs float32's accuracy. Convolutions are cuDNN's, in
            float32. No GPU has run any of this yet.

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
    return _in_force(PRECISIONS.index(precision))


@contextmanager
def _in_force(place: int) -> Iterator[None]:
    global _chosen
    before = _chosen
    try:
        _chosen = place
        yield
    finally:
        _chosen = before


def chosen() -> int:
    """What the ops take: the place of the precision in PRECISIONS."""
    return _chosen


def splits_dense_layers(like: Tensor) -> bool:
    """Whether the model's own dense layers on such tensors go to the CUDA kernels, as "split" multiplies."""
    return (
        _chosen != IEEE
        and like.is_cuda
        and like.dtype == torch.float32
        and _library.has_kernel("ntk_jacobian_accumulate", like.device)
    )


@contextmanager
def ieee_products(on_gpu: bool) -> Iterator[None]:
    """torch's own float32 products and convolutions on a GPU without TF32, whatever the user allows elsewhere.

    torch has newer switches (`fp32_precision`) and older ones (`set_float32_matmul_precision`, `allow_tf32`), and
    raises where something reads an older one that contradicts the newer: so inside the block both say the same.
    """
    if not on_gpu:
        yield
        return
    cudnn: Any = torch.backends.cudnn  # its attributes are unknown to type checkers
    mkldnn: Any = torch.backends.mkldnn
    settings = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    matmul = _older(torch.get_float32_matmul_precision)
    convolutions = _older(lambda: cudnn.allow_tf32)
    try:
        _set_older("highest" if matmul else None, False if convolutions else None)
        for setting in settings[:3]:
            setting.fp32_precision = "ieee"
        yield
    finally:
        _set_older(matmul, convolutions)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _older(read: Callable[[], Any]) -> Any:
    """What an older switch says; None where the user's newer ones contradict it, so that nobody can read it."""
    with warnings.catch_warnings():  # torch advises the newer ones
        warnings.simplefilter("ignore")
        try:
            return read()
        except RuntimeError:
            return None


def _set_older(matmul: str | None, convolutions: bool | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
