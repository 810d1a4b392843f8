"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""

from .nngp import nngp_kernel
from .nngp_estimators import NNGPClassifier, NNGPRegressor
from .solve import Solution, solve

__all__ = [
    "NNGPClassifier",
    "NNGPRegressor",
    "Solution",
    "nngp_kernel",
    "solve",
]
