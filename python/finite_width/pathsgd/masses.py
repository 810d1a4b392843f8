"""∂Φ/∂|w|^p of every parameter, γ^(p/2), from one forward and one backward pass of the |w|^p network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._interrupts import closed_transforms
from .convolution import ConvolutionMass, PathConvolution, window_of
from .network import Edges, PathSum, Scaled, larger, powered, two_to
from .structure import Structure, attribute, is_weight

_APART = 1000  # binary exponents between activations that are joined


class Masses(NamedTuple):
    """∂Φ/∂|w|^p of every parameter, each up to 2^exponent, and Φ.

    Biases that join an activation of a large exponent have one of their own: paths from there on may be fewer than all
    by more than float64 holds.
    """

    of: dict[Tensor, Tensor | ConvolutionMass]
    exponent: int | Tensor
    total: Scaled
    own_exponents: dict[Tensor, int | Tensor]

    def exponent_of(self, param: Tensor) -> int | Tensor:
        """That of one parameter's mass."""
        return self.own_exponents.get(param, self.exponent)

    def dense(self) -> dict[Tensor, Tensor]:
        """The masses, each of its parameter's shape."""
        return {
            param: mass.dense(param) if isinstance(mass, ConvolutionMass) else mass for param, mass in self.of.items()
        }


class _Masses(PathSum):
    """Sums paths with leaves whose gradients are ∂Φ/∂|w|^p; with `fused`, convolutions leave ConvolutionMasses."""

    def __init__(
        self, structure: Structure, p: float, sigma: dict[Any, Tensor] | None, fused: bool, on_device: bool
    ) -> None:
        super().__init__(structure, p, self.leaf, sigma, on_device=on_device)
        self.fused = fused
        self.leaves: dict[Tensor, Tensor] = {}
        self.entries: list[tuple[Tensor, int | Tensor, Tensor]] = []  # bias, exponent, its leaf there
        self.convolutions: dict[Tensor, list[ConvolutionMass]] = {}
        device = next(structure.module.parameters()).device
        self.anchor = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)

    def leaf(self, param: Tensor) -> Tensor:
        """|w|^p, which takes the gradient; a buffer, which no step changes, needs none."""
        if not isinstance(param, nn.Parameter):
            return powered(param.detach(), self.p)
        if param not in self.leaves:
            self.leaves[param] = powered(param.detach(), self.p).detach().requires_grad_()
        return self.leaves[param]

    def entering(self, bias: Tensor | Edges, exponent: int | Tensor) -> Tensor:
        """|b|^p with a leaf of its own at each exponent, so that its gradient is as large as the activation's."""
        if not isinstance(bias, nn.Parameter) or (not isinstance(exponent, Tensor) and exponent == 0):
            return super().entering(bias, exponent)
        edge = Scaled(powered(bias.detach(), self.p)).to_exponent(exponent).detach().clone().requires_grad_()
        self.entries.append((bias, exponent, edge))
        return edge

    def aligned(self, x: Scaled, exponent: int | Tensor) -> Tensor:
        """As in the base; raises where the paths of x would be lost beside others, with their γ."""
        apart = 0 if isinstance(exponent, Tensor) or isinstance(x.exponent, Tensor) else exponent - x.exponent
        if apart > _APART and x.value.requires_grad and bool((x.value > 0).any()):  # parameters stand before x
            raise ValueError(
                f"model joins activations whose path sums at p = {self.p:g} are 2^{apart} apart; beyond 2^{_APART} "
                "γ of the smaller one leaves float64's range: use a smaller p, smaller weights or fewer layers"
            )
        return super().aligned(x, exponent)

    def convolution(
        self, x: Scaled, weight: Tensor | Edges, bias: Tensor | Edges | None, function: Any, settings: dict[str, Any]
    ) -> Scaled:
        self._finite("a convolution")
        fused = self.fused and isinstance(weight, nn.Parameter)
        window = window_of(x.value, weight, settings) if fused and isinstance(weight, Tensor) else None
        if window is None or isinstance(weight, Edges):
            return super().convolution(x, weight, bias, function, settings)
        found = self.convolutions.setdefault(weight, []).append

        def apply(value: Tensor, edge: Tensor | None) -> Tensor:
            result: Tensor = PathConvolution.apply(value, self.anchor, weight.detach(), self.p, window, found)  # type: ignore[no-untyped-call]
            return result if edge is None else result + edge.view(-1, *[1] * (value.dim() - 2))

        return self._affine(x, bias, apply)


def masses(
    structure: Structure,
    p: float,
    sigma: dict[Any, Tensor] | None = None,
    shared: str = "kappa1",
    fused: bool = False,
    on_device: bool = False,
) -> Masses:
    """(γ^(p/2) of every parameter, from one forward and one backward pass of the |w|^p network.

    shared="kappa" adds κ2 = |w|^p ∂²Φ/∂(|w|^p)² for weights that a path passes more than once. With `fused`,
    convolutions go through the wing's own ops, and a weight of one convolution alone has a ConvolutionMass. With
    `on_device`, exponents are tensors and nothing is read on the host.
    """
    with torch.inference_mode(False), torch.enable_grad():
        network = _Masses(structure, p, sigma, fused, on_device)
        total = network.total()
        leaves = network.leaves
        if not total.value.requires_grad:
            raise ValueError("model has no parameter between its input and its output, hence no paths")
        entered = [leaf for _, _, leaf in network.entries]
        found = torch.autograd.grad(total.value, [*leaves.values(), *entered, network.anchor], allow_unused=True)
    gradients: dict[Tensor, Tensor] = {}
    for param, gradient in zip(leaves, found, strict=False):
        if gradient is not None:  # else: read, but by nothing that the output depends on
            gradients[param] = gradient
    own_exponents: dict[Tensor, int | Tensor] = {}
    for (param, exponent, _), gradient in zip(network.entries, found[len(leaves) :], strict=False):
        if gradient is None:
            continue
        entry, present = Scaled(gradient, total.exponent - exponent), gradients.get(param)
        if present is not None:
            before = Scaled(present, own_exponents.get(param, total.exponent))
            common = larger(entry.exponent, before.exponent)
            entry = Scaled(entry.to_exponent(common) + before.to_exponent(common), common)
        gradients[param], own_exponents[param] = entry
    fused_masses: dict[Tensor, ConvolutionMass] = {}
    for param, parts in network.convolutions.items():
        if len(parts) == 1 and param not in gradients:
            fused_masses[param] = parts[0]
            continue
        for part in parts:
            mass = part.dense(param)
            gradients[param] = gradients[param] + mass if param in gradients else mass
    if shared == "kappa":
        for param in gradients:
            if _recurs(structure, param):
                second = _second_derivative(structure, p, param, sigma, total.exponent)
                here = Scaled(powered(param.detach(), p) * second, total.exponent)
                gradients[param] = gradients[param] + here.to_exponent(own_exponents.get(param, total.exponent))
    total = Scaled(total.value.detach(), total.exponent)
    return Masses(gradients | fused_masses, total.exponent, total, own_exponents)


def _recurs(structure: Structure, param: Tensor) -> bool:
    """Whether a path can pass the parameter more than once: recurrent weights, and layers that are called twice."""
    for module in structure.module.modules():
        if isinstance(module, nn.RNN) and any(param is p for n, p in module.named_parameters() if "weight_hh" in n):
            return True
    calls = 0
    for node in structure.graph.nodes:
        if node.op == "call_module":
            module = structure.module.get_submodule(str(node.target))
            calls += any(param is each for each in module.parameters())
        elif node.op == "get_attr" and attribute(structure.module, str(node.target)) is param:
            calls += _uses(node)
    return calls > 1


def _uses(node: fx.Node) -> int:
    """How many operations take a parameter or its views."""
    return sum(_uses(user) if is_weight(user) else 1 for user in node.users)


def _second_derivative(
    structure: Structure,
    p: float,
    param: Tensor,
    sigma: dict[Any, Tensor] | None,
    exponent: int | Tensor,
    chunk: int = 64,
) -> Tensor:
    """∂²Φ/∂(|w|^p)² for every element, up to 2^exponent: one Hessian-vector product per element, in chunks."""
    point = powered(param.detach(), p)

    def slope(edge: Tensor) -> Tensor:
        def value(edge: Tensor) -> Tensor:
            def power(other: Tensor) -> Tensor:
                return edge if other is param else powered(other.detach(), p)

            total = PathSum(structure, p, power, sigma, rescale=False).total()
            return total.value * two_to(-exponent)

        gradient: Tensor = torch.func.grad(value)(edge)
        return gradient

    def diagonal(index: Tensor) -> Tensor:
        tangent = F.one_hot(index, point.numel()).to(point.dtype).view_as(point)
        curvature: Tensor = torch.func.jvp(slope, (point,), (tangent,))[1]
        return (curvature * tangent).sum()

    indices = torch.arange(point.numel(), device=point.device)
    with closed_transforms():
        return torch.cat([torch.func.vmap(diagonal)(part) for part in indices.split(chunk)]).view_as(point)
