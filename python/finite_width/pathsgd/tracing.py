"""The torch.fx graph of a module's forward, followed with symbols for activations; the module stays as it was."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace

from .._interrupts import closed_transforms, ends_its_contexts, left_as_it_was, replaced
from .batches import is_own_hook
from .operations import REASONS, takes_part


class Tracer(fx.Tracer):
    """Follows every module but torch's layers and those that take part by the protocol."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if takes_part(m) or isinstance(m, tuple(REASONS)):
            return True
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


@ends_its_contexts
def graph_of(root: nn.Module, name: str) -> fx.Graph:
    """The graph of `root`'s forward.

    Args:
        root: a module that is no leaf.
        name: the model's class, for messages.

    Raises:
        ValueError: a forward that symbols cannot follow, or that draws random numbers.
    """
    before = torch.get_rng_state(), random.getstate()
    with left_as_it_was(root), _unpatched_modules(), closed_transforms():
        try:
            graph = Tracer().trace(root)
        except Exception as error:  # whatever the user's forward raises when run on symbols
            if not isinstance(replaced(error), Exception):
                raise replaced(error) from None
            raise ValueError(
                f"model: torch.fx cannot follow the forward of {name} ({error}); paths need a forward "
                "without control flow that depends on the input"
            ) from error
        finally:
            drawn = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
            torch.set_rng_state(before[0])
            random.setstate(before[1])
    if drawn:
        raise ValueError(
            f"model: the forward of {name} draws random numbers outside of its layers, so that its structure may be "
            "another one at each call (layers left out at random); call eval() on it if it then draws none"
        )
    return graph


@contextlib.contextmanager
def _unpatched_modules() -> Iterator[None]:
    """Takes back what torch.fx writes into nn.Module for as long as it traces, also after a Ctrl-C on its way out."""
    before = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
    patcher = _symbolic_trace.CURRENT_PATCHER
    # Whether it traces: from torch 2.14 on it has a function take that back, in whose beginning a Ctrl-C can come.
    flags: Any = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)
    tracing = getattr(flags, "flag", False)
    try:
        yield
    finally:
        if flags is not None:
            flags.flag = tracing
        left = _symbolic_trace.CURRENT_PATCHER
        if left is not None and left is not patcher:  # torch.compile would apply its patches again
            left.revert_all_patches()
            _symbolic_trace.CURRENT_PATCHER = patcher
        for name, method in before.items():
            if getattr(nn.Module, name) is not method:
                setattr(nn.Module, name, method)


def check_layers(root: nn.Module, graph: fx.Graph, model: nn.Module) -> None:
    """Raise for what a graph of layers would pass over: hooks and forwards of single instances, noise.

    Args:
        root: what was traced.
        graph: of its forward.
        model: the user's module, which is `root` or a layer inside it.
    """
    called = {
        str(node.target): root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    }
    name_of_model = "" if model is root else "0"
    for name, module in ({name_of_model: model} | called).items():
        place = name or "model"
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        hook = next((each for each in hooks if not is_own_hook(each)), None)
        if hook is not None:
            called_hook = getattr(hook, "__qualname__", type(hook).__name__)
            raise ValueError(
                f"{place}: it has a forward hook, {called_hook}, which may change what it computes and has no paths; "
                "remove it, or add it afterwards"
            )
        if "forward" in vars(module) and not _is_of_its_class(module):
            raise ValueError(
                f"{place}: its forward was replaced on the instance, and has no paths; make it a class of its own"
            )
        if isinstance(module, nn.AlphaDropout) and module.training and module.p > 0:
            raise ValueError(
                f"{place}: AlphaDropout in training mode has no paths: it adds a constant, so that f(c x) is not "
                "c f(x); call eval() on it, or use Dropout"
            )


def _is_of_its_class(module: nn.Module) -> bool:
    """Whether a forward on the instance is the class's own in a wrapper (autocast, as accelerate sets it)."""
    inner = inspect.unwrap(module.forward)
    return getattr(inner, "__func__", inner) is type(module).forward


def check_values(model: nn.Module) -> None:
    """Raise for parameters that have no real values: lazy, complex, on the meta device."""
    for name, each in model.named_parameters():
        if nn.parameter.is_lazy(each):
            raise ValueError(f"{name} is not initialised yet: run the model once on an input")
        if each.is_complex():
            raise TypeError(f"{name} must be real, got {each.dtype}: paths are defined for real weights")
        if each.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; use to_empty() and load them first")
