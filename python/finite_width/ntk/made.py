"""Values that a model makes from parameters alone and all rows share, such as a slice of position embeddings.

Where such a value meets the rows in a recognised call, the call is recorded as if the value were a parameter, and cut
from what made it. The value's Jacobian is then pulled back to the parameters, once for each row and output; no forward
or backward of the model is repeated for that.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Nodes of a graph that are looked at before a value counts as computed from rows.
MOST_NODES = 1000


@dataclass(frozen=True)
class Choices:
    """What a capture does with recognised calls, by their numbers in the order of a forward.

    The probe decides, by shapes; every further capture follows, so that it does the same for any number of rows.
    """

    attached: frozenset[int] = frozenset()  # calls that are left to autograd
    shared: frozenset[int] | None = None  # sums and products with a made value; None: not decided yet
    gates: bool = True  # layers take the backward of the ReLU before them along


@dataclass
class Made:
    """A value made from parameters."""

    value: Tensor
    names: tuple[str, ...]  # of the parameters
    edge: GradientEdge = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.edge = GradientEdge(self.value.grad_fn, self.value.output_nr)  # type: ignore[arg-type]
        self.version = self.value._version

    @property
    def changed(self) -> bool:
        """Whether it was written in place since: then the edge may not know what it needs any more."""
        return self.value._version != self.version


def graph_nodes(root: Any) -> Iterator[Any]:
    """The nodes of autograd's graph that lead to a value, its own first, each once."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def parameters_behind(value: Tensor, names: Mapping[int, str], recorded: Container[Any]) -> tuple[str, ...]:
    """The parameters that made the value; none where anything else did.

    Args:
        names: by the ids of the parameters.
        recorded: nodes of the graph whose parameters are cut off.
    """
    found: set[str] = set()
    for count, node in enumerate(graph_nodes(value.grad_fn)):
        if node in recorded or count >= MOST_NODES:
            return ()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in names or leaf.is_complex():
                return ()
            found.add(names[id(leaf)])
    return tuple(name for name in names.values() if name in found)


def common_axes(value: torch.Size, shared: torch.Size) -> tuple[int, int] | None:
    """The axes [begin, end) of a value along which a smaller one lies that is broadcast along all others.

    None where they are not next to each other, or where the smaller one is as large.
    """
    padded = (*[1] * (len(value) - len(shared)), *shared)
    wide = [axis for axis, size in enumerate(padded) if size != 1]
    begin, end = (wide[0], wide[-1] + 1) if wide else (len(value), len(value))
    if len(padded) != len(value) or end - begin == len(value) or padded[begin:end] != tuple(value[begin:end]):
        return None
    return begin, end
