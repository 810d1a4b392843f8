"""Notices that modules or parameters of a model were replaced, for which an optimizer knows only the earlier ones."""

from __future__ import annotations

from torch import nn


class Parts:
    """The modules and parameters that a model holds now.

    Args:
        model: whose parts these are, itself not among them.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self._modules = [
            (owner, key, part, f"{name}.{key}".lstrip("."))
            for name, owner in named
            for key, part in owner._modules.items()
        ]
        self._parameters = [
            (owner, key, part, f"{name}.{key}".lstrip("."))
            for name, owner in named
            for key, part in owner._parameters.items()
        ]

    def check(self) -> None:
        """Raise where one of them was replaced or removed; no parameter's values are read."""
        for owner, key, module, name in self._modules:
            if owner._modules.get(key) is not module:
                raise _replaced(name, "module")
        for owner, key, parameter, name in self._parameters:
            if owner._parameters.get(key) is not parameter:
                raise _replaced(name, "parameter")


def _replaced(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name}: this {what} was replaced or removed after the PathSGD was made, which knows the earlier one; make a "
        "new PathSGD for the model as it is (values are changed in place, as load_state_dict does)"
    )
