"""Matrix product on the better GEMM of this machine; shared by the wings."""

from .ops import gemm, gemm_below_autograd

__all__ = ["gemm", "gemm_below_autograd"]
