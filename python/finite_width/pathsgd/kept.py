"""What γ is computed from while it is kept for several steps (update_every > 1), and how that is saved and loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .convolution import ConvolutionMass
from .masses import Masses
from .network import Scaled


class KeptVectors(NamedTuple):
    """A chain's path vectors, and the deviations of its BatchNorms that they were made with."""

    forward: list[Tensor]
    backward: list[Tensor]
    sigma: dict[Any, Tensor]


Kept = KeptVectors | Masses


def saved(kept: Kept | None, module: nn.Module) -> dict[str, Any] | None:
    """Of plain tuples, lists and dicts, which torch.load reads with weights_only=True."""
    if kept is None:
        return None
    if isinstance(kept, Masses):
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        of = {
            names[parameter]: tuple(mass) if isinstance(mass, ConvolutionMass) else mass
            for parameter, mass in kept.of.items()
        }
        own = {names[parameter]: exponent for parameter, exponent in kept.own_exponents.items()}
        return {"masses": of, "exponent": kept.exponent, "own_exponents": own, "total": tuple(kept.total)}
    places = {each: name for name, each in module.named_modules()}
    sigma = {places[norm]: each for norm, each in kept.sigma.items()}
    return {"forward": kept.forward, "backward": kept.backward, "sigma": sigma}


def loaded(state: dict[str, Any] | None, module: nn.Module) -> Kept | None:
    """What `saved` was given, on the module's device."""
    if state is None:
        return None
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    if "masses" in state:
        of: dict[Tensor, Tensor | ConvolutionMass] = {
            parameters[name]: ConvolutionMass(*mass).to(device) if isinstance(mass, tuple) else mass.to(device).clone()
            for name, mass in state["masses"].items()
        }
        own = {parameters[name]: exponent for name, exponent in state["own_exponents"].items()}
        return Masses(of, state["exponent"], Scaled(*state["total"]), own)
    forward, backward = ([vector.to(device).clone() for vector in state[side]] for side in ("forward", "backward"))
    sigma = {module.get_submodule(name): each.to(device).clone() for name, each in state["sigma"].items()}
    return KeptVectors(forward, backward, sigma)
