"""Runs a model and records where its parameters are used, so that nothing can be missed.

Under a TorchFunctionMode every call of a recognised operation (dense, convolution, norm, embedding) whose weight or
bias is a counting parameter runs with the parameter's detached self, and its input and the place of its output in
the autograd graph are recorded. The output's cotangent δ and the input then give the parameter's Jacobian. Whatever
use is not recognised keeps its edge to the parameter: afterwards, a parameter that the graph still reaches has a use
that was not recorded, and its whole Jacobian is computed by autograd instead (generic.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .recognise import RECOGNISED


@dataclass
class Use:
    """One recorded use of parameters."""

    kind: str  # "dense", "conv", "conv_transpose", "scale" or "embedding"
    weight: str | None  # the parameter's name, if it counts
    bias: str | None
    input: Tensor  # detached: the layer's input; the normalised input of a "scale"; the tokens of an "embedding"
    version: int  # of the input when it was recorded
    edge: GradientEdge  # where the output's cotangent arrives
    shape: torch.Size  # of the output
    options: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> tuple[Any, ...]:
        """What must agree between two row blocks for a plan made on one to hold for the other."""
        return self.kind, self.weight, self.bias, len(self.shape), self.shape[2:], self.options


class _Anchored(torch.autograd.Function):
    """Runs call() and gives its result a place in the graph, though nothing before it requires a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Callable[[], Tensor]) -> Tensor:
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Capture(TorchFunctionMode):
    """Records the uses of the given parameters while the model runs inside it."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters.items()}
        self.parameters = parameters
        self.uses: list[Use] = []
        self.anchor = torch.zeros((), requires_grad=True)
        # Transposed views of parameters: id -> (the view, kept alive; the parameter).
        self.transposed: dict[int, tuple[Tensor, Tensor]] = {}
        # Results of ReLUs: id -> (the result, kept alive; its version; the input; its version).
        self.rectified: dict[int, tuple[Tensor, int, Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recognise = RECOGNISED.get(func)
        if recognise is not None:
            if torch.is_grad_enabled() and _saved_tensors_hooks() is None:
                try:
                    result = recognise(self, *args, **kwargs)
                except TypeError:  # other arguments than the recogniser knows, such as out=
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
        elif (
            isinstance(func, FunctionType)
            and func.__module__ == "torch.nn.functional"
            and self._names_any(args, kwargs)
        ):
            with self:  # the body's own calls pass through this mode, too
                return _opened(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _names_any(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(id(value) in self.names for value in (*args, *kwargs.values()))

    def name(self, value: Any) -> str | None:
        return None if value is None else self.names.get(id(value))

    def record(
        self,
        kind: str,
        weight: Tensor | None,
        bias: Tensor | None,
        input: Tensor,
        call: Callable[[Tensor | None, Tensor | None], Tensor],
        shape: Callable[[Tensor], torch.Size] = lambda result: result.shape,
        **options: Any,
    ) -> Tensor:
        """Run call(weight, bias) with counting parameters detached, and record the use."""
        weight_name, bias_name = self.name(weight), self.name(bias)
        used_weight = weight.detach() if weight is not None and weight_name else weight
        used_bias = bias.detach() if bias is not None and bias_name else bias
        if kind == "dense" or any(
            value is not None and value.requires_grad for value in (input, used_weight, used_bias)
        ):
            result = call(used_weight, used_bias)
        else:
            result = _Anchored.apply(self.anchor, lambda: call(used_weight, used_bias))
        if weight_name or bias_name:
            self.uses.append(
                Use(
                    kind,
                    weight_name,
                    bias_name,
                    input.detach(),
                    input._version,
                    GradientEdge(result.grad_fn, result.output_nr),  # type: ignore[arg-type]
                    shape(result),
                    options,
                )
            )
        return result

    def unrecognised(self, result: Tensor) -> set[str]:
        """The parameters that the graph of the result still reaches."""
        reached: set[str] = set()
        if result.grad_fn is None:
            return {self.names[id(result)]} if id(result) in self.names else reached
        seen = {result.grad_fn}
        stack = [result.grad_fn]
        while stack:
            node = stack.pop()
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "model: it uses torch.utils.checkpoint with use_reentrant=True, which hides parameters from "
                    "torch.autograd.grad; pass use_reentrant=False"
                )
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.names:
                reached.add(self.names[id(variable)])
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        return reached


def _saved_tensors_hooks() -> Any:
    """Hooks such as a checkpoint's: inside it the forward runs again in the backward, without this mode."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


_OPENED: dict[FunctionType, FunctionType] = {}


def _opened(func: FunctionType) -> FunctionType:
    """The Python function without its own override check, which would call the mode again instead of the body."""
    if func not in _OPENED:
        unchecked = {
            name: (lambda *_: False)
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        }
        copy = FunctionType(func.__code__, {**func.__globals__, **unchecked}, func.__name__, func.__defaults__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = copy
    return _OPENED[func]
