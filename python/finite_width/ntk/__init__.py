"""The exact empirical NTK of any module, the conjugate kernel, and prediction with both."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .diagnostics import drift, effective_dimension, spectrum, target_alignment
from .dynamics import Flow, gradient_flow
from .empirical import empirical_ntk, explain, per_parameter_ntk
from .explanation import Explanation, ExplanationRow
from .linearize import Linearized, linearize
from .loss_gram import loss_gram
from .nngp import nngp_kernel
from .operator import NTKOperator
from .precision import cuda_precision
from .sketch import sketch
from .solve import Solution, solve

if TYPE_CHECKING:
    from .nngp_estimators import NNGPClassifier, NNGPRegressor
    from .regression import NTKClassifier, NTKRegressor
    from .ridge_cv import NTKRidgeCV

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

# Where the estimators live. They stand on scikit-learn, which would take half of the time of an import.
_ESTIMATORS = {
    "NNGPClassifier": "nngp_estimators",
    "NNGPRegressor": "nngp_estimators",
    "NTKClassifier": "regression",
    "NTKRegressor": "regression",
    "NTKRidgeCV": "ridge_cv",
}


def __getattr__(name: str) -> Any:
    """An estimator, imported at its first use."""
    if name not in _ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f".{_ESTIMATORS[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
