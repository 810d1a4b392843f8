"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""

from .diagnostics import drift, effective_dimension, spectrum, target_alignment
from .dynamics import Flow, gradient_flow
from .empirical import empirical_ntk, explain, per_parameter_ntk
from .explanation import Explanation, ExplanationRow
from .linearize import Linearized, linearize
from .nngp import nngp_kernel
from .nngp_estimators import NNGPClassifier, NNGPRegressor
from .operator import NTKOperator
from .regression import NTKClassifier, NTKRegressor
from .ridge_cv import NTKRidgeCV
from .solve import Solution, solve

__all__ = [
    "Explanation",
    "ExplanationRow",
    "Flow",
    "Linearized",
    "NNGPClassifier",
    "NNGPRegressor",
    "NTKClassifier",
    "NTKOperator",
    "NTKRegressor",
    "NTKRidgeCV",
    "Solution",
    "drift",
    "effective_dimension",
    "empirical_ntk",
    "explain",
    "gradient_flow",
    "linearize",
    "nngp_kernel",
    "per_parameter_ntk",
    "solve",
    "spectrum",
    "target_alignment",
]
