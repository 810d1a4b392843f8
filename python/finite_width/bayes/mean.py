"""The mean network: W = μ for the time of a block, or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .layers import BayesLayer
from .objective import check_no_nan, layers_of


@contextlib.contextmanager
def mean_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes with its mean weights: no noise, gradients to μ alone.

    Raises:
        ValueError: no variational layer.

    Example:
        >>> import torch, finite_width as fw
        >>> model = fw.bayes.BayesLinear(3, 2)
        >>> with fw.bayes.mean_mode(model):
        ...     bool((model(torch.ones(3)) == model(torch.ones(3))).all())
        True
    """
    layers = layers_of(model).values()
    for layer in layers:
        layer._mean_mode += 1
    try:
        yield model
    finally:
        for layer in layers:
            layer._mean_mode -= 1


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put the replacements in place of the modules wherever they hang; all or, on an interruption, none."""
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in replacements
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = replacements[child]
    except BaseException:
        for parent, name, child in places:
            parent._modules[name] = child
        raise


def freeze_(model: nn.Module) -> Any:
    """Replace every variational layer by torch's own layer of the mean network, in place.

    Args:
        model: a module with at least one variational layer. It holds plain nn.Linear and nn.Conv layers afterwards.

    Returns:
        The model; where the model itself is a variational layer, the plain layer.

    Raises:
        ValueError: no variational layer; a parameter with NaN, named. The model is then as it was.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.freeze_(torch.nn.Sequential(fw.bayes.BayesLinear(3, 2)))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    layers = layers_of(model)
    check_no_nan(layers)
    plain: dict[nn.Module, nn.Module] = {layer: layer.mean_layer() for layer in layers.values()}
    if isinstance(model, BayesLayer):
        return plain[model]
    swap(model, plain)
    return model
