"""Finite-width networks in PyTorch: exact NTK, Tensor-Train layers, Path-SGD and variational Bayesian layers."""

from . import _gemm as _gemm
from . import bayes, ntk, pathsgd, tt
from ._library import VERSION as __version__
from ._library import build_info, empty_cache, has_kernels, reference_only

__all__ = ["__version__", "bayes", "build_info", "empty_cache", "has_kernels", "ntk", "pathsgd", "reference_only", "tt"]
