"""A network linearised in its parameters, as a module that can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from .. import _check
from .contract import functional_call
from .inputs import copy_model


class Linearized(nn.Module):
    """The module that `linearize` returns: f(x; θ₀) + J(x; θ₀)(θ − θ₀), with the inputs and outputs of the model f.

    Args:
        model: any `nn.Module`; it is copied.

    Attributes:
        trained: a copy of the model that holds θ, the only trainable parameters here.
        origin: a copy of the model that holds θ₀, frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = copy_model(model)
        self.origin = copy_model(model).requires_grad_(False)
        # Those of now: a parameter that is frozen later keeps what it has learned.
        self._moving = [name for name, value in model.named_parameters() if value.requires_grad]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first-order model's outputs, of the same structure as the model's own."""
        start = {name: value.detach() for name, value in self.origin.named_parameters()}
        trained = dict(self.trained.named_parameters())
        moved = {name: trained[name] - start[name] for name in self._moving}
        fixed = {name: value for name, value in start.items() if name not in moved}

        def outputs(values: dict[str, Tensor]) -> Any:
            return functional_call(self.origin, {**fixed, **values}, args, kwargs)

        at, change, *_ = jvp(outputs, ({name: start[name] for name in moved},), (moved,))
        return torch.utils._pytree.tree_map(torch.add, at, change)


def linearize(model: nn.Module) -> Linearized:
    """The model linearised in its parameters at their present values: f(x; θ₀) + J(x; θ₀)(θ − θ₀).

    Its kernel is the model's own and never changes; trained on squares in small steps it follows `gradient_flow`.

    Args:
        model: any `nn.Module` that torch.func can differentiate forward; it is copied. Only parameters with
            `requires_grad` become trainable; what one has learned stays when it is frozen later.

    Returns:
        A module with the model's inputs and outputs, whose parameters start at θ₀.

    Raises:
        TypeError: not a module.
        ValueError: no trainable parameter; a model that torch cannot copy.

    Source:
        Lee et al., "Wide neural networks of any depth evolve as linear models under gradient descent", NeurIPS 2019,
        equation 5.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> linear = fw.ntk.linearize(model)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(linear(x), model(x))
        True
    """
    _check.is_module("model", model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model {type(model).__name__} has no trainable parameter")
    return Linearized(model)
