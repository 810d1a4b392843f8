"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""

from .diagnostics import drift, effective_dimension, spectrum, target_alignment
from .dynamics import Flow, gradient_flow
from .empirical import empirical_ntk, explain, per_parameter_ntk
from .explanation import Explanation, ExplanationRow
from .linearize import Linearized, linearize
from .loss_gram import loss_gram
from .nngp import nngp_kernel
from .nngp_estimators import NNGPClassifier, NNGPRegressor
from .operator import NTKOperator
from .precision import cuda_precision
from .regression import NTKClassifier, NTKRegressor
from .ridge_cv import NTKRidgeCV
from .sketch import sketch
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
    "cuda_precision",
    "drift",
    "effective_dimension",
    "empirical_ntk",
    "explain",
    "gradient_flow",
    "linearize",
    "loss_gram",
    "nngp_kernel",
    "per_parameter_ntk",
    "sketch",
    "solve",
    "spectrum",
    "target_alignment",
]
