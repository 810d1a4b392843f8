"""The posterior predictive: many networks at once, each with its own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .layers import BayesLayer, draw_seed
from .objective import check_no_nan, layers_of

# Rows (samples times batch) that go through the model at once, where `chunk` is left out.
_ROWS = 8192


@dataclass(frozen=True)
class Prediction:
    """What `predict` returns: link(f(x; W_s)) for samples W_s of the weights, and its mean and spread over them.

    Attributes:
        mean: [batch, ...].
        std: [batch, ...], unbiased; 0 for one sample.
        samples: [samples, batch, ...].
    """

    mean: Tensor
    std: Tensor
    samples: Tensor


class _Draw:
    """One prediction under way: which samples each layer is to use. A layer's seed is the same in every chunk."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first = 0
        self.count = 1
        self.seeds: dict[int, Tensor] = {}

    def of(self, layer: BayesLayer, x: Tensor) -> tuple[Tensor, int, int]:
        """(seed, first sample, number of samples stacked along the first axis of x)."""
        rows, whole = x.shape[0] if x.dim() > 0 else 0, self.count * self.batch
        if self.count > 1 and (rows % whole or rows == 0 if whole else rows):
            raise ValueError(
                f"a layer got an input of shape {list(x.shape)}, whose first axis is not the batch of "
                f"{self.batch} examples times {self.count} samples; use chunk=1, which makes one pass per sample"
            )
        key = id(layer)
        if key not in self.seeds:
            self.seeds[key] = draw_seed(layer.weight_mu.device)
        return self.seeds[key], self.first, self.count


def _link(link: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    if link is None:
        return lambda y: y
    if callable(link):
        return link
    _check.one_of("link", link, ("softmax", "sigmoid"))
    return (lambda y: torch.softmax(y, -1)) if link == "softmax" else torch.sigmoid


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Tensor,
    *,
    samples: int = 32,
    link: str | Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> Prediction:
    """The posterior predictive at x: `samples` networks, each with one draw of all its weights.

    mean = 1/S Σ_s link(f(x; W_s)),   W_s ~ q

    The samples of a chunk go through the model as one batch of samples times rows, each variational layer giving
    each sample its own weights; so the model must keep the batch as its first axis (or use chunk=1). The model
    runs in evaluation mode, without gradient, and is left as it was.

    Args:
        model: a module with at least one variational layer; estimators do not matter here, weights are sampled.
        x: [batch, ...].
        samples: S >= 1.
        link: applied to each output before averaging: None, "softmax" (over the last axis: averages probabilities),
            "sigmoid", or a function of a tensor [samples times batch, ...] that keeps its first axis.
        chunk: samples per pass; default: as many as keep samples × batch under 8192 rows. The result does not
            depend on it beyond rounding.

    Returns:
        Prediction with mean and std [batch, ...] of what link returns (std over samples, unbiased; 0 for one sample)
        and samples [samples, batch, ...], without gradient.

    Raises:
        ValueError: samples or chunk < 1, an unknown link, no variational layer, a parameter with NaN (named), a model
            that moves its batch axis with chunk > 1, a link that does not keep the first axis.
        TypeError: not a module, x that is no tensor.

    Source: Blundell et al., "Weight uncertainty in neural networks", ICML 2015.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(fw.bayes.BayesLinear(3, 4), torch.nn.Tanh(), fw.bayes.BayesLinear(4, 2))
        >>> fw.bayes.predict(model, torch.ones(5, 3), samples=8, link="softmax").mean.shape
        torch.Size([5, 2])
    """
    layers = layers_of(model)
    _check.is_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [batch, ...], got a scalar")
    _check.positive_int("samples", samples)
    if chunk is not None:
        _check.positive_int("chunk", chunk)
    transform = _link(link)
    check_no_nan(layers)
    chunk = chunk or max(1, _ROWS // max(len(x), 1))
    modes = {module: module.training for module in model.modules()}
    draw = _Draw(len(x))
    outputs: list[Tensor] = []
    try:
        model.eval()
        for layer in layers.values():
            layer._prediction = draw
        for draw.first in range(0, samples, chunk):
            draw.count = min(chunk, samples - draw.first)
            outputs.append(_pass(model, x, draw.count, transform))
    finally:
        for layer in layers.values():
            layer._prediction = None
        for module, mode in modes.items():
            module.training = mode
    stacked = torch.cat(outputs)
    std = stacked.std(0) if samples > 1 and len(x) else torch.zeros_like(stacked[0])
    return Prediction(stacked.mean(0), std, stacked)


def _pass(model: nn.Module, x: Tensor, count: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs [count, batch, ...] of `count` samples."""
    inputs = x if count == 1 else x.expand(count, *x.shape).reshape(-1, *x.shape[1:])
    y: Any = model(inputs)
    if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != count * len(x):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model must return one tensor [batch, ...] for a batch of {count * len(x)}, got {got}")
    linked: Any = transform(y)
    if not isinstance(linked, Tensor) or linked.dim() == 0 or linked.shape[0] != len(y):
        got = list(linked.shape) if isinstance(linked, Tensor) else type(linked).__name__
        raise ValueError(f"link must return one tensor [{len(y)}, ...] for one of shape {list(y.shape)}, got {got}")
    return linked.reshape(count, len(x), *linked.shape[1:])
