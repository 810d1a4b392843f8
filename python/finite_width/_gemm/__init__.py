"""Matrix product on the better GEMM of this machine; shared by the wings."""

from .ops import gemm

__all__ = ["gemm"]
