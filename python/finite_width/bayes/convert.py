"""Turns the layers of an ordinary model into variational ones, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .. import _check, _replace
from .._interrupts import kept_grad_mode
from .conv import BayesConv1d, BayesConv2d, BayesConv3d
from .layers import ESTIMATORS, BayesLayer
from .linear import BayesLinear
from .priors import GaussianPrior, MopedPrior, check_prior

_CONVOLUTIONS: dict[type, Any] = {nn.Conv1d: BayesConv1d, nn.Conv2d: BayesConv2d, nn.Conv3d: BayesConv3d}
# Kept as they are without a word: their few parameters are customarily not random.
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
)


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one module with weights.

    Attributes:
        name: its name in the model.
        module: its class before.
        shape: of its weight, or "-" where it has none.
        result: "converted" or "kept".
        reason: why it was kept, or "".
    """

    name: str
    module: str
    shape: str
    result: str
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; prints as a table.

    Attributes:
        layers: one for every module that holds weights, in the model's order.
    """

    layers: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the layers that are variational now."""
        return [layer.name for layer in self.layers if layer.result == "converted"]

    @property
    def left_alone(self) -> list[str]:
        """Names of the modules with weights that are as they were."""
        return [layer.name for layer in self.layers if layer.result == "kept"]

    def __str__(self) -> str:
        table = [("name", "module", "weight", "result", "why"), *((*vars(layer).values(),) for layer in self.layers)]
        widths = [max(len(str(line[column])) for line in table) for column in range(5)]
        lines = [
            "  ".join(str(text).ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join(lines)


def _modules_with_weights(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Module -> its names; several where it stands in several places."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(p is not None for p in module._parameters.values()) or parametrize.is_parametrized(module):
            names.setdefault(module, []).append(name)
    return names


def _users(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> how many modules hold it."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _using_their_own_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with their names, but for variational ones and those whose weights an attention uses itself."""
    inside_attention: list[str] = []  # prefixes of names
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside_attention) or isinstance(module, BayesLayer):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.append(f"{name}.")
        yield name, module


def _reason_to_keep(module: nn.Module, users: dict[int, int]) -> str | None:
    """Why a module with weights is left alone; None where it can be converted."""
    kind = type(module)
    if kind is not nn.Linear and kind not in _CONVOLUTIONS:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return "recurrent layers are not converted"
        if isinstance(module, nn.MultiheadAttention):
            return "attention is not converted"
        if isinstance(module, _NORMS):
            return "normalisation stays deterministic"
        return f"{kind.__name__} is not converted"
    if parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is parametrised; remove that first"
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None and users[id(parameter)] > 1:
            return f"its {name} is shared with another module"
    if _replace.has_hooks(module):
        return "it has hooks, which its replacement would lose; remove them first"
    if module.weight.dtype not in (torch.float32, torch.float64):
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not float32 or float64"
    if module.weight.is_meta:
        return "its weight holds no data (meta device)"
    return None


def _variational(module: Any, prior: Any, init: str, estimator: str) -> BayesLayer:
    common = {
        "bias": module.bias is not None,
        "prior": prior,
        "estimator": estimator,
        "device": module.weight.device,
        "dtype": module.weight.dtype,
    }
    layer: BayesLayer
    if type(module) is nn.Linear:
        layer = BayesLinear(module.in_features, module.out_features, **common)
    else:
        layer = _CONVOLUTIONS[type(module)](
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
            **common,
        )
    if init == "moped":
        delta = prior.delta if isinstance(prior, MopedPrior) else MopedPrior.delta
        layer.set_posterior(module.weight, module.bias, delta)
    for name in ("weight", "bias"):
        old = getattr(module, name)
        for part in ("mu", "rho"):
            if old is not None:
                getattr(layer, f"{name}_{part}").requires_grad_(old.requires_grad)
    return layer.train(module.training)


def convert(
    model: nn.Module,
    *,
    prior: Any = None,
    init: str = "default",
    estimator: str = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = False,
) -> ConversionReport:
    """Make the nn.Linear and nn.Conv1d/2d/3d layers of a model variational, in place.

    torch's fused inference of Transformer encoders, which reads plain weights, is switched off in encoders with a
    variational layer.

    Args:
        model: the module; its children are replaced. Make its optimizer afterwards: the parameters are new.
        prior: for all layers; default GaussianPrior(std=1), and MopedPrior() with init="moped".
        init: "default": fresh means; "moped": the means are the present (trained) weights, σ = 0.1 |w| (or the
            prior's delta).
        estimator: "weight", "flipout" or "local".
        include, exclude: names of modules, with * and ? as wildcards; only included ones are converted, excluded
            ones never.
        strict: raise where an included module with weights has no variational form (LSTM, GRU, attention, ...) or
            cannot be replaced (hooks, a shared weight, ...), instead of naming it in the report.

    Returns:
        A `ConversionReport`: one `ConvertedLayer` for every module that holds weights; prints as a table.

    Raises:
        ValueError: nothing to convert, an unknown init or estimator, a weight with NaN, a lazy layer without weights
            yet, a pattern that no module with weights has, strict with a module that cannot be converted. The model is
            then as it was.
        TypeError: something that is not a prior, patterns that are no list.

    Source: init="moped": Krishnan et al., AAAI 2020.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> print(fw.bayes.convert(model, init="moped"))
        name  module  weight  result     why
        0     Linear  [4, 3]  converted
        2     Linear  [1, 4]  converted
    """
    _check.is_module("model", model)
    _check.one_of("init", init, ("default", "moped"))
    _check.one_of("estimator", estimator, ESTIMATORS)
    if prior is None:
        prior = MopedPrior() if init == "moped" else GaussianPrior()
    check_prior(prior)
    if type(model) is nn.Linear or type(model) in _CONVOLUTIONS:
        raise ValueError(
            f"model is itself a {type(model).__name__}: wrap it in nn.Sequential, so that it can be replaced"
        )
    names = _modules_with_weights(model)
    _replace.check_patterns(include, exclude, [name for each in names.values() for name in each], "module with weights")
    users = _users(model)
    layers: list[ConvertedLayer] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in _using_their_own_weights(model):
        if module not in names:
            continue
        weight = module._parameters.get("weight")
        lazy = any(p is not None and is_lazy(p) for p in module._parameters.values())
        included = include is None or any(_replace.has_pattern(each, include) for each in names[module])
        excluded = any(_replace.has_pattern(each, exclude) for each in names[module])
        if lazy and included and not excluded:
            raise ValueError(f"{name} ({type(module).__name__}) has no weights yet: run the model once, or exclude it")
        reason = "excluded" if excluded else _reason_to_keep(module, users)
        if reason and strict and included and not excluded and not isinstance(module, _NORMS):
            raise ValueError(f"{name} ({type(module).__name__}): {reason}; exclude it, or leave strict out")
        if reason is None and not included:
            reason = "not included"
        shape = "-" if weight is None or lazy else str(list(weight.shape))
        result = "kept" if reason else "converted"
        layers.append(ConvertedLayer(name, type(module).__name__, shape, result, reason or ""))
        if reason is None:
            if init == "moped":
                for parameter_name, value in module.named_parameters(name, recurse=False):
                    _check.is_finite(parameter_name, value, "train the model again first")
            with kept_grad_mode():
                replacements[module] = _variational(module, prior, init, estimator)
    if not replacements:
        kept = ", ".join(f"{layer.name} ({layer.reason})" for layer in layers) or "it holds no weights"
        raise ValueError(f"model has no layer to convert: {kept}")
    _replace.swap(model, {name: new for module, new in replacements.items() for name in names[module]})
    return ConversionReport(tuple(layers))
