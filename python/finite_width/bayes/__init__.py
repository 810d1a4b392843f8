"""Variational Bayesian layers: sampled weights with a fused KL, conversion, prediction, calibration."""

from . import metrics as metrics
from .conv import BayesConv1d, BayesConv2d, BayesConv3d
from .convert import ConversionReport, ConvertedLayer, convert
from .linear import BayesLinear
from .mean import freeze_, mean_mode
from .metrics import brier, ece, mutual_information, nll, predictive_entropy
from .objective import kl, negative_elbo
from .predict import Prediction, predict
from .priors import GaussianPrior, MopedPrior, ScaleMixturePrior

__all__ = [
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesLinear",
    "ConversionReport",
    "ConvertedLayer",
    "GaussianPrior",
    "MopedPrior",
    "Prediction",
    "ScaleMixturePrior",
    "brier",
    "convert",
    "ece",
    "freeze_",
    "kl",
    "mean_mode",
    "metrics",
    "mutual_information",
    "negative_elbo",
    "nll",
    "predict",
    "predictive_entropy",
]
