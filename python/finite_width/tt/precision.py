"""How the Tensor-Train kernels multiply float32 values on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .. import _check

# The place of a name is what a plan's seventh entry holds (`reference.Plan`).
PRECISIONS = ("ieee", "split", "tf32")
_chosen = "ieee"  # of the process, as torch's own settings; torch.compile cannot trace a ContextVar


def cuda_precision(precision: str) -> AbstractContextManager[None]:
    """How float32 is multiplied by the Tensor-Train kernels on a GPU inside the block; results stay float32.

    The setting is the process's and concerns the fused kernels alone, forward and backward, as they are called: a
    backward pass takes what was in force in its forward pass. The CPU and the other dtypes ignore it; where the planner
    takes the dense W, or where no CUDA kernel is registered, torch's own products run with torch's own settings.

    Args:
        precision: "ieee", multiply-adds in float32, which is the default outside of any block; "split", three products
            of TF32 parts on tensor cores, with the accuracy of float32; "tf32", one product of values rounded to TF32,
            for a relative error about 1e-3. No GPU has run them yet.

    Raises:
        ValueError: another precision.

    Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32
    theoretical peak performance" (2022), for sums outside of the tensor cores.

    Example:
        >>> import torch, finite_width as fw
        >>> layer = fw.tt.TTLinear(64, 64, rank=4)
        >>> with fw.tt.cuda_precision("split"):
        ...     y = layer(torch.randn(2, 64))
        >>> y.dtype
        torch.float32
    """
    _check.one_of("precision", precision, PRECISIONS)
    return _in_force(precision)


@contextmanager
def _in_force(precision: str) -> Iterator[None]:
    global _chosen
    before = _chosen
    try:
        _chosen = precision
        yield
    finally:
        _chosen = before


def chosen() -> str:
    """The precision in force."""
    return _chosen
