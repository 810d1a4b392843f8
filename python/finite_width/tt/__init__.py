"""Tensor-Train layers: fused products forward and backward, TT-SVD of trained layers, compression of whole models."""

from .compress import CompressedLayer, CompressionReport, compress
from .conv import TTConv2d
from .decomposition import tt_matrix_svd, tt_round, tt_svd, tt_to_dense
from .embedding import TTEmbedding
from .functional import tt_linear
from .linear import TTLinear
from .precision import cuda_precision

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "TTConv2d",
    "TTEmbedding",
    "TTLinear",
    "compress",
    "cuda_precision",
    "tt_linear",
    "tt_matrix_svd",
    "tt_round",
    "tt_svd",
    "tt_to_dense",
]
