"""Replacing layers of a model in place: which ones by name, and the swap, all or none."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Patterns = Sequence[str] | None

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_patterns(include: Patterns, exclude: Patterns, names: Collection[str], layers: str) -> None:
    """Raise unless both are None or lists of patterns, each of which one of the names at least has.

    Args:
        include, exclude: as the user gave them.
        names: of the layers that could be replaced.
        layers: what the names are of, for the error message.
    """
    for argument, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
        if patterns is not None and not isinstance(patterns, Iterable):
            raise TypeError(f"{argument} must be a list of patterns, got {patterns!r}")
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} must hold patterns of names, such as 'encoder.*', got {pattern!r}")
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument} has the pattern {pattern!r}, which no {layers} has")


def has_pattern(name: str, patterns: Patterns) -> bool:
    """Whether the name has one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def has_hooks(layer: nn.Module) -> bool:
    """Whether something hangs on the layer that its replacement would lose."""
    return any(getattr(layer, kind) for kind in _HOOKS)


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put new layers in the place of those with the given names; if that fails or is interrupted, put the old back."""
    before: list[tuple[dict[str, Any], str, Any]] = []

    def put(table: dict[str, Any], key: str, value: Any) -> None:
        before.append((table, key, table[key]))
        table[key] = value

    weightless = set()
    try:
        for name, new in replacements.items():
            parent, _, own = name.rpartition(".")
            put(model.get_submodule(parent)._modules, own, new)
            if not hasattr(new, "weight"):
                weightless.add(new)
        # torch's fused inference of a Transformer reads the weights of its linear layers, past their forward: a layer
        # without one has to be called, which these attributes see to.
        for module in model.modules():
            for kind, attribute in (
                (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
                (nn.TransformerEncoder, "use_nested_tensor"),
            ):
                if isinstance(module, kind) and vars(module).get(attribute) and weightless & set(module.modules()):
                    put(vars(module), attribute, 0)
    except BaseException:
        for table, key, value in reversed(before):
            table[key] = value
        raise
