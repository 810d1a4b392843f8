"""The mean network: W = μ for the time of a block, or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .. import _replace
from .._interrupts import kept_grad_mode
from .layers import BayesLayer
from .objective import check_no_nan, layers_of


@contextlib.contextmanager
def mean_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes with its mean weights: no noise, gradients to μ alone.

    A copy made inside the block (copy.deepcopy, pickle, torch.save, `fw.ntk.linearize`) is in mean mode for good: copy
    outside of it what is to have noise.

    Args:
        model: a module with at least one variational layer.

    Raises:
        ValueError: no variational layer.
        TypeError: not a module.

    Example:
        >>> import torch, finite_width as fw
        >>> model = fw.bayes.BayesLinear(3, 2)
        >>> with fw.bayes.mean_mode(model):
        ...     bool((model(torch.ones(3)) == model(torch.ones(3))).all())
        True
    """
    # Past the layers' own __setattr__, in whose Python a Ctrl-C could come.
    attributes = [vars(layer) for layer in layers_of(model).values()]
    for own in attributes:
        own["_mean_mode"] += 1
    try:
        yield model
    finally:
        for own in attributes:
            own["_mean_mode"] -= 1


def freeze_(model: nn.Module) -> Any:
    """Replace every variational layer by torch's own layer of the mean network, in place.

    Args:
        model: a module with at least one variational layer. It holds plain nn.Linear and nn.Conv layers afterwards,
            which share the weights and biases whose μ the variational ones shared.

    Returns:
        The model; where the model itself is a variational layer, the plain layer.

    Raises:
        ValueError: no variational layer; a parameter with NaN or a layer with hooks, which would be lost, named. The
            model is then as it was.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.freeze_(torch.nn.Sequential(fw.bayes.BayesLinear(3, 2)))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    layers = layers_of(model)
    check_no_nan(layers)
    for name, layer in layers.items():
        if _replace.has_hooks(layer):
            raise ValueError(f"{name or 'model'} has hooks, which the plain layer would lose: remove them first")
    with kept_grad_mode():
        plain: dict[nn.Module, nn.Module] = {layer: layer.mean_layer() for layer in layers.values()}
    shared: dict[nn.Parameter, nn.Parameter] = {}  # what layers have in common, they have in common afterwards
    for variational, new in plain.items():
        for name in ("weight", "bias"):
            mu = variational._parameters.get(f"{name}_mu")
            if mu is not None:
                setattr(new, name, shared.setdefault(mu, getattr(new, name)))
    if isinstance(model, BayesLayer):
        return plain[model]
    places = model.named_modules(remove_duplicate=False)
    _replace.swap(model, {name: plain[module] for name, module in places if module in plain})
    return model
