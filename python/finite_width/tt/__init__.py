"""Tensor-Train layers: fused products forward and backward, TT-SVD of trained layers, compression of whole models."""

from .decomposition import tt_matrix_svd, tt_round, tt_svd, tt_to_dense
from .functional import tt_linear
from .linear import TTLinear

__all__ = ["TTLinear", "tt_linear", "tt_matrix_svd", "tt_round", "tt_svd", "tt_to_dense"]
