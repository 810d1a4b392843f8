"""The operations that have paths, and the protocol by which other layers take part."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IDENTITY_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
ADAPTIVE_MAXIMA = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
SHAPE_MODULES = (nn.Flatten, nn.Unflatten)
POOLS = ("max_pool", "average_pool", "adaptive_average", "adaptive_max")  # as `module_kind` names them

IDENTITY_FUNCTIONS = (F.relu, torch.relu, F.relu_, torch.relu_, F.leaky_relu, F.dropout, F.dropout2d, torch.dropout)
SHAPE_FUNCTIONS = (
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.t,
    torch.squeeze,
    torch.unsqueeze,
    torch.movedim,
    operator.getitem,
    getattr,
    operator.mul,
    operator.floordiv,
    torch.unflatten,
)
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
CONVOLUTION_FUNCTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
POOL_FUNCTIONS = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
}
COPY_METHODS = ("contiguous", "clone", "detach")
IDENTITY_METHODS = ("relu", "relu_", *COPY_METHODS)
SIZE_METHODS = ("size", "dim")
VIEW_ATTRIBUTES = ("T", "mT")
SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
SHAPE_METHODS = (
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "t",
    "squeeze",
    "unsqueeze",
    *SIZE_METHODS,
    "movedim",
    "unflatten",
    "select",
    "narrow",
)

REASONS = {
    nn.LayerNorm: "its output depends on all units of a sample at once",
    nn.GroupNorm: "its output depends on all units of a group at once",
    nn.LSTM: "its gates multiply units by units",
    nn.GRU: "its gates multiply units by units",
    nn.MultiheadAttention: "attention multiplies units by units",
    nn.Embedding: "its input is an index; put it outside the model",
    nn.ReLU6: "it saturates: ReLU6(c x) is not c ReLU6(x)",
    nn.PReLU: "its slope is a parameter",
    nn.Softmax: "softmax is not positively homogeneous; put it into the loss",
    nn.LogSoftmax: "log-softmax is not positively homogeneous; put it into the loss",
}
HOMOGENEOUS = "paths need operations with f(c x) = c f(x) for c > 0, such as Linear, convolutions, ReLU and pooling"


def module_kind(module: nn.Module) -> str | None:
    """The name of Walk's method for a module."""
    kinds: list[tuple[tuple[type, ...], str]] = [
        (IDENTITY_MODULES, "identity"), ((nn.Linear,), "linear_module"), (CONVOLUTIONS, "convolution_module"),
        (BATCHNORMS, "batchnorm"), (MAX_POOLS, "max_pool"), (AVERAGE_POOLS, "average_pool"),
        (ADAPTIVE_AVERAGES, "adaptive_average"), (ADAPTIVE_MAXIMA, "adaptive_max"), (SHAPE_MODULES, "shape"),
        ((nn.RNN,), "rnn"),
    ]  # fmt: skip
    if takes_part(module):
        return "protocol"
    return next((name for types, name in kinds if isinstance(module, types)), None)


def pool_rank(module: nn.Module) -> int:
    """How many axes a pool's windows have: 1 for MaxPool1d."""
    families = (MAX_POOLS, AVERAGE_POOLS, ADAPTIVE_AVERAGES, ADAPTIVE_MAXIMA)
    return next(rank for kinds in families for rank, kind in enumerate(kinds, start=1) if isinstance(module, kind))


def check_pool(place: str, module: nn.Module) -> None:
    """Raise for a max pool that is dilated or returns indices."""
    if not isinstance(module, (*MAX_POOLS, *ADAPTIVE_MAXIMA)):
        return
    dilation = getattr(module, "dilation", 1)
    if any(each != 1 for each in (dilation if isinstance(dilation, Sequence) else (dilation,))):
        raise ValueError(f"{place}: a dilated max pool is not supported, got dilation={dilation}")
    if module.return_indices:
        raise ValueError(f"{place}: a max pool that returns its indices is not supported")


def edge_names(module: nn.Module) -> Sequence[str]:
    """The names of the parameters that a layer's edges are; through the protocol, where it takes part so."""
    if takes_part(module):
        return path_weights(module) or ()
    if isinstance(module, nn.RNN):
        return module._flat_weights_names
    return ("weight", "bias") if isinstance(module, (nn.Linear, *CONVOLUTIONS, *BATCHNORMS)) else ()


def path_weights(module: nn.Module) -> Sequence[str] | None:
    """The names of the parameters of a layer that takes part through the protocol `__path_weights__`, else None.

    A layer whose output is linear in its input and in each of these parameters (a Tensor-Train layer; a Bayesian layer
    in mean mode) has a method `__path_weights__(self)` that returns their names. Its |w|^p form is its own forward,
    run with |w|^p in place of each. In a mode without paths it raises ValueError.
    """
    method = getattr(module, "__path_weights__", None)
    if method is not None:
        return tuple(method())
    for kind, names in _REGISTERED.items():
        if isinstance(module, kind):
            return tuple(names(module))
    return None


_REGISTERED: dict[type[nn.Module], Callable[[nn.Module], Sequence[str]]] = {}


def register_layer(kind: type[nn.Module], names: Callable[[Any], Sequence[str]]) -> None:
    """Let layers of a class take part in paths: for classes that cannot have a method `__path_weights__`.

    Args:
        kind: a module class whose output is linear in its input and in each of the named parameters.
        names: module -> the names of the parameters that are edges; it raises ValueError where there are no paths.

    Raises:
        TypeError: a kind that is no module class.

    Example:
        >>> import torch, finite_width as fw
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        ...     def forward(self, x):
        ...         return x * self.scale
        >>> fw.pathsgd.register_layer(Scale, lambda layer: ["scale"])
        >>> float(fw.pathsgd.path_norm(Scale(), p=1, input_shape=(2,)))
        5.0
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {kind!r}")
    _REGISTERED[kind] = names


def takes_part(module: nn.Module) -> bool:
    """Whether a layer takes part through the protocol."""
    return hasattr(module, "__path_weights__") or isinstance(module, tuple(_REGISTERED))
