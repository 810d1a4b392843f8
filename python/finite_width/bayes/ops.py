"""The variational ops as torch functions: autograd, torch.func, torch.compile; argument checks."""

from .kl_ops import kl, kl_sum, kl_sum_unchecked
from .linear_ops import linear, linear_samples, linear_unchecked
from .local_ops import local, local_unchecked
from .sampling_ops import NARROW, noise, sample, sample_unchecked

__all__ = [
    "NARROW",
    "kl",
    "kl_sum",
    "kl_sum_unchecked",
    "linear",
    "linear_samples",
    "linear_unchecked",
    "local",
    "local_unchecked",
    "noise",
    "sample",
    "sample_unchecked",
]
