"""compress: the layers of a trained model replaced by Tensor Trains, in place, all or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _check, _replace
from .._interrupts import kept_grad_mode
from . import decomposition
from .conv import TTConv2d
from .decomposition import one_given
from .embedding import TTEmbedding, unlike_a_train
from .linear import TTLinear

REPLACEABLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one layer.

    Attributes:
        name: the layer's name in the model; several, joined by ", ", for a layer that stands in several places.
        shape: of the dense weight.
        in_modes, out_modes, ranks: of the train; empty where the layer was kept.
        parameters_before, parameters_after: biases included.
        relative_error: ‖W − TT‖ / ‖W‖ (Frobenius).
        kept: why the layer was left dense, or "".
    """

    name: str
    shape: tuple[int, ...]
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    relative_error: float
    kept: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """A row for every layer that could be replaced; `str()` is a table."""

    layers: tuple[CompressedLayer, ...]

    @property
    def replaced(self) -> tuple[CompressedLayer, ...]:
        """The layers that are trains now."""
        return tuple(layer for layer in self.layers if not layer.kept)

    @property
    def ratio(self) -> float:
        """Parameters before over parameters after, of the replaced layers; 1 where there is none."""
        after = sum(layer.parameters_after for layer in self.replaced)
        return sum(layer.parameters_before for layer in self.replaced) / after if after else 1.0

    def __str__(self) -> str:
        head = ("layer", "shape", "modes", "ranks", "parameters", "relative error")
        table = [head]
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            if layer.kept:
                table.append((layer.name, shape, f"kept: {layer.kept}", "", str(layer.parameters_before), ""))
                continue
            modes = f"{'·'.join(map(str, layer.out_modes))} × {'·'.join(map(str, layer.in_modes))}"
            counts = f"{layer.parameters_before} → {layer.parameters_after}"
            ranks = ",".join(map(str, layer.ranks))
            table.append((layer.name, shape, modes, ranks, counts, f"{layer.relative_error:.4f}"))
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, f"ratio of parameters over the replaced layers: {self.ratio:.1f}"])


def compress(
    model: nn.Module,
    *,
    eps: float | None = None,
    max_rank: int | None = None,
    ratio: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> CompressionReport:
    """Replace a trained model's linear, convolution and embedding layers by their Tensor Trains, in place.

    Every train is computed first; then all layers are replaced. If anything fails, or is interrupted, the model is as
    it was. A layer whose train would not be smaller stays dense, and so do subclasses of the layers, depthwise
    convolutions, and embeddings that no train can stand for (`TTEmbedding.from_embedding` names them): the report says
    so. The new layers hold new parameters: make the optimizer after. torch's fused inference of Transformer encoders,
    which reads dense weights, is switched off in encoders with a replaced layer.

    Args:
        model: changed in place.
        eps: relative error of each layer's weight.
        max_rank: limit of all ranks.
        ratio: parameters before over parameters after, at least, of each replaced layer; alone or with the others.
        include: patterns of names, such as "encoder.*", of the layers to replace; None: all.
        exclude: patterns of names of layers to leave.

    Returns:
        A report; print it for a table of name, shape, modes, ranks, parameters and relative error.

    Raises:
        ValueError: none of eps, max_rank and ratio; a ratio that a layer cannot reach; a pattern that no layer has;
            weights with NaN, or without values (meta device); a weight that two layers share, or that is made from
            other parameters; hooks on a layer, which would be lost.
        TypeError: not a module, eps or ratio that is no number, patterns that are no list, complex weights.

    Source: Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33(5), 2011; for layers Novikov et al.,
    "Tensorizing Neural Networks", NeurIPS 2015, and Garipov et al., "Ultimate tensorization: compressing convolutional
    and FC layers alike", 2016.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
        >>> report = fw.tt.compress(model, max_rank=4, exclude=["2"])
        >>> type(model[0]).__name__, report.layers[0].parameters_after
        ('TTLinear', 1024)
    """
    _check.is_module("model", model)
    one_given(eps=eps, max_rank=max_rank, ratio=ratio)
    if ratio is not None:
        _check.number("ratio", ratio)
        if not ratio > 1:
            raise ValueError(f"ratio is parameters before over after and must be above 1, got {ratio}")
    if type(model) in REPLACEABLE:
        raise ValueError("model is itself the layer and cannot be replaced in place; use from_linear and the like")
    places = _places(model, include, exclude)
    _check_sharing(model, places)
    replacements: dict[nn.Module, nn.Module] = {}
    rows = []
    for layer, names in places.items():
        with kept_grad_mode():
            new, row = _train_of(layer, ", ".join(names), eps, max_rank, ratio)
        rows.append(row)
        if new is not None:
            replacements[layer] = new
    _replace.swap(model, {name: new for layer, new in replacements.items() for name in places[layer]})
    return CompressionReport(tuple(rows))


def _places(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[nn.Module, list[str]]:
    """Layer -> its names in the model."""
    layers = [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, REPLACEABLE) and layer is not model
    ]
    names = [name for name, _ in layers]
    _replace.check_patterns(include, exclude, names, "linear, convolution or embedding layer")
    found: dict[nn.Module, list[str]] = {}
    for name, layer in layers:
        if (include is None or _replace.has_pattern(name, include)) and not _replace.has_pattern(name, exclude):
            found.setdefault(layer, []).append(name)
    return found


def _check_sharing(model: nn.Module, places: dict[nn.Module, list[str]]) -> None:
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    for layer, names in places.items():
        if type(layer) not in REPLACEABLE:  # kept as it is
            continue
        if _replace.has_hooks(layer):
            raise ValueError(
                f"{names[0]} has hooks, which its replacement would lose: remove them, or name it in exclude"
            )
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"{names[0]} has a weight that is made from other parameters: make it permanent (as "
                "torch.nn.utils.prune.remove does), or name it in exclude"
            )
        sharing = owners[weight]
        if len(sharing) > 1:
            raise ValueError(
                f"{' and '.join(name for _, name in sharing)} share one weight; replacing {names[0]} would part them: "
                "name them in exclude"
            )


def _train_of(
    layer: nn.Module, name: str, eps: float | None, max_rank: int | None, ratio: float | None
) -> tuple[nn.Module | None, CompressedLayer]:
    """(the train, or None where the layer is kept; its row of the report)."""
    if type(layer) not in REPLACEABLE:
        return None, _kept_subclass(layer, name)
    weight: Any = layer.weight
    before = sum(parameter.numel() for parameter in layer.parameters())
    shape = tuple(weight.shape)
    kept = "" if weight.is_meta else _reason_to_keep(layer)
    new: Any = None
    if not kept:
        options: dict[str, Any] = {"eps": eps, "max_rank": max_rank}
        if ratio is not None:
            options["target_params"] = max(1, int(before / ratio))
        try:
            if isinstance(layer, nn.Linear):
                new = TTLinear.from_linear(layer, **options)
            elif isinstance(layer, nn.Conv2d):
                new = TTConv2d.from_conv(layer, **options)
            elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
                new = TTEmbedding.from_embedding(layer, **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}; the model is unchanged") from error
        after = sum(parameter.numel() for parameter in new.parameters())
        if after >= before:
            kept = f"its train would have {after} parameters"
    if kept:
        return None, CompressedLayer(name, shape, (), (), (), before, before, 0.0, kept)
    for core in new.cores:
        core.requires_grad_(weight.requires_grad)
    if getattr(layer, "bias", None) is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)  # type: ignore[union-attr]
    with torch.no_grad():
        relative = decomposition.relative_distance(new.to_dense(), weight)
    in_modes, out_modes = (
        (new.dim_modes, new.num_modes) if isinstance(new, TTEmbedding) else (new.in_modes, new.out_modes)
    )
    return new, CompressedLayer(name, shape, in_modes, out_modes, new.ranks, before, after, relative)


def _kept_subclass(layer: nn.Module, name: str) -> CompressedLayer:
    """Its row; a subclass may compute something else, and may have no weight yet (a lazy layer)."""
    base = next(kind for kind in REPLACEABLE if isinstance(layer, kind))
    sizes = [() if is_lazy(value) else tuple(value.shape) for value in layer.parameters()]
    weight = layer._parameters.get("weight")
    shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    count = sum(prod(size) for size in sizes if size)
    kept = f"{type(layer).__name__}, a subclass of {base.__name__}"
    return CompressedLayer(name, shape, (), (), (), count, count, 0.0, kept)


def _reason_to_keep(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
        return f"depthwise, groups={layer.groups}"
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return unlike_a_train(layer)
    return ""
