"""The posterior predictive: many networks at once, each with its own weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._interrupts import ends_its_contexts, grad_mode
from . import ops
from .layers import BayesLayer, draw_seed
from .objective import check_no_nan, layers_of

# Rows (samples times batch) that go through the model at once, where `chunk` is left out.
_ROWS = 8192
# Rows of the batch, at most, that a rehearsal takes.
_REHEARSED = 8


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


class _NotStacked(Exception):
    """A layer got an input whose first axis cannot be the samples times the batch."""


class Draw:
    """One prediction under way: which samples each layer is to use. A layer's seed is the same in every chunk."""

    def __init__(self) -> None:
        self.batch = 0
        self.first = 0
        self.count = 1
        self.rehearsal = False  # stand-in samples: see `_stacks`
        self.seeds: dict[int, Tensor] = {}

    def of(self, layer: BayesLayer, x: Tensor) -> tuple[Tensor, int, int]:
        """(seed, first sample, number of samples stacked along the first axis of x)."""
        rows, whole = x.shape[0] if x.dim() > 0 else 0, self.count * self.batch
        if self.count > 1 and (rows % whole or rows == 0 if whole else rows):
            raise _NotStacked
        key = id(layer)
        if key not in self.seeds:
            self.seeds[key] = draw_seed(layer.weight_mu.device)
        return self.seeds[key], self.first, self.count

    def stand_in(self, layer: BayesLayer, x: Tensor, y: Tensor, channel: int) -> Tensor:
        """The layer's mean output y with each channel scaled and shifted, differently for each sample.

        Args:
            channel: the axis of y with the layer's outputs, counted from the end.
        """
        seed, first, count = self.of(layer, x)
        like = layer.weight_mu.new_empty(2, y.shape[channel])
        noise = torch.stack([ops.noise(like, seed, first + s) for s in range(count)]).to(y.dtype)
        # [count, outputs] against y [count, rows, ..., outputs, ...]
        scale, shift = (
            part.reshape(count, *[1] * (y.dim() + channel), -1, *[1] * (-channel - 1)) for part in noise.unbind(1)
        )
        return (y.unflatten(0, (count, -1)) * (1 + 0.5 * scale) + 0.1 * shift).flatten(0, 1)


def _link(link: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    if link is None:
        return lambda y: y
    if callable(link):
        return link
    _check.one_of("link", link, ("softmax", "sigmoid"))
    return (lambda y: torch.softmax(y, -1)) if link == "softmax" else torch.sigmoid


@ends_its_contexts
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
    each sample its own weights. That is right for a model that treats the rows of its batch alike, each on its own,
    and keeps the batch as the first axis. A rehearsal on a few rows, with stand-ins for the samples, finds out; for
    another model every sample gets a pass of its own, as with chunk=1: right, but slower. The model runs in evaluation
    mode, without gradient, and is left as it was.

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
            whose output has no batch, a link that does not keep the first axis.
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
    draw = Draw()
    with grad_mode(False), _evaluation(model), _drawing(list(layers.values()), draw):
        if min(chunk, samples) > 1 and not _stacks(model, x, draw):
            chunk = 1
        try:
            stacked = _samples(model, x, draw, samples, chunk, transform)
        except _NotStacked:
            stacked = _samples(model, x, draw, samples, 1, transform)
    std = stacked.std(0) if samples > 1 and len(x) else torch.zeros_like(stacked[0])
    return Prediction(stacked.mean(0), std, stacked)


@dataclass
class _Mode:
    """Whether a module was training before the predictions that now use it, each one a token."""

    training: bool
    users: set[object] = field(default_factory=set)


# Several threads may predict with one model at a time: its modes are back as they were after the last of them.
_modes: dict[nn.Module, _Mode] = {}
_modes_lock = threading.Lock()


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time of the block."""
    token, modules = object(), list(model.modules())
    try:
        with _modes_lock:
            for module in modules:
                _modes.setdefault(module, _Mode(module.training)).users.add(token)
            model.eval()
        yield
    finally:
        with _modes_lock:
            for module in modules:
                mode = _modes.get(module)
                if mode is not None and not mode.users - {token}:
                    module.training = mode.training
                    del _modes[module]
                elif mode is not None:
                    mode.users.discard(token)


@contextlib.contextmanager
def _drawing(layers: list[BayesLayer], draw: Draw) -> Iterator[None]:
    """Forwards of these layers in this thread use the draw."""
    thread = threading.get_ident()
    before = [layer._predictions.get(thread) for layer in layers]
    try:
        for layer in layers:
            layer._predictions[thread] = draw
        yield
    finally:
        for layer, outer in zip(layers, before, strict=True):
            if outer is None:
                layer._predictions.pop(thread, None)
            else:
                layer._predictions[thread] = outer


def _samples(
    model: nn.Module, x: Tensor, draw: Draw, samples: int, chunk: int, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    """What link returns for each sample [samples, batch, ...]."""
    outputs: list[Tensor] = []
    for first in range(0, samples, chunk):
        count = min(chunk, samples - first)
        y = _pass(model, x, draw, first, count)
        linked: Any = transform(y)
        if not isinstance(linked, Tensor) or linked.dim() == 0 or linked.shape[0] != len(y):
            got = list(linked.shape) if isinstance(linked, Tensor) else type(linked).__name__
            raise ValueError(f"link must return one tensor [{len(y)}, ...] for one of shape {list(y.shape)}, got {got}")
        outputs.append(linked.reshape(count, len(x), *linked.shape[1:]))
    return torch.cat(outputs)


def _pass(model: nn.Module, x: Tensor, draw: Draw, first: int, count: int) -> Tensor:
    """The model's output [count * batch, ...] for the samples from `first` on."""
    draw.batch, draw.first, draw.count = len(x), first, count
    inputs = x if count == 1 else x.expand(count, *x.shape).reshape(-1, *x.shape[1:])
    y: Any = model(inputs)
    if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != count * len(x):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model must return one tensor [batch, ...] for a batch of {count * len(x)}, got {got}")
    return y


def _stacks(model: nn.Module, x: Tensor, draw: Draw) -> bool:
    """Whether two samples that go through the model as one batch come out as each does alone.

    The rehearsal's samples are stand-ins: the mean network with the outputs of each variational layer disturbed. They
    cost no noise of the weights' size, and differ by far more than rounding, however small σ is.
    """
    if not len(x):
        return True
    rows = x[:_REHEARSED]
    draw.rehearsal = True
    try:
        both = _pass(model, rows, draw, 0, 2).unflatten(0, (2, -1))
        alone = torch.stack([_pass(model, rows, draw, sample, 1) for sample in range(2)])
    except Exception:  # whatever the model finds wrong with stacked rows; what is wrong with it alone will be seen
        return False
    finally:
        draw.rehearsal = False
    if not (both.is_floating_point() or both.is_complex()):
        both, alone = both.double(), alone.double()
    error = torch.where(both == alone, 0.0, (both - alone).abs()).max()  # infinite where both are: equal
    apart = (alone[0] - alone[1]).abs().nan_to_num(0.0, 0.0).max()
    # Where weights are mixed up, the error is about as large as the samples differ; where rows meet, maybe less.
    return bool(error < max(1e-3, 16 * torch.finfo(both.dtype).eps) * apart)
