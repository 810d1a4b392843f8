"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""

from .empirical import empirical_ntk, explain, per_parameter_ntk
from .explanation import Explanation, ExplanationRow
from .nngp import nngp_kernel
from .nngp_estimators import NNGPClassifier, NNGPRegressor
from .operator import NTKOperator
from .solve import Solution, solve

__all__ = [
    "Explanation",
    "ExplanationRow",
    "NNGPClassifier",
    "NNGPRegressor",
    "NTKOperator",
    "Solution",
    "empirical_ntk",
    "explain",
    "nngp_kernel",
    "per_parameter_ntk",
    "solve",
]
