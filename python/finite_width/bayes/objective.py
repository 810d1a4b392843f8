"""The training objective: the KL of a whole model, and the negative ELBO at the right scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from . import ops
from .layers import BayesLayer


def layers_of(model: Any) -> dict[str, BayesLayer]:
    """Name -> layer of the model's variational layers, each once; ValueError where there are none."""
    _check.is_module("model", model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, BayesLayer)}
    if not found:
        raise ValueError("model has no variational layer: build it with fw.bayes.BayesLinear, or fw.bayes.convert it")
    return found


def check_no_nan(layers: dict[str, BayesLayer]) -> None:
    """Raise ValueError naming the first parameter that holds a NaN."""
    for layer_name, layer in layers.items():
        for name, value in layer.named_parameters(layer_name, recurse=False):
            if value.numel() and bool(torch.isnan(value.amax())):  # the largest is NaN where any is
                raise ValueError(f"{name} has NaN: the training diverged, or it was set so; lower the learning rate")


def kl(model: nn.Module) -> Tensor:
    """KL(q || p) of all variational weights in the model, summed (not averaged).

    KL = Σ log(σp/σ) + (σ² + (μ - μp)²) / (2σp²) - ½

    Exact for a Gaussian prior; for another prior, log q(W) - log p(W) at one sample W (that of the last forward,
    where it still holds). A function of the parameters as they are now: it takes the value that the last forward
    computed on its way only while the parameters and the grad mode are unchanged and its graph is unused. It then
    shares that forward's graph: run backward once on the whole loss, or with retain_graph=True.

    torch does not record what is written into a parameter past autograd, through `.data` or a numpy view, such as
    `p.data.add_(1)`: between a forward and kl() such a write is not seen, and the value is that of before. Write under
    `torch.no_grad()` instead.

    Args:
        model: a module with at least one variational layer; a layer used twice, or a tensor that two layers share, is
            counted once.

    Returns:
        A scalar with gradient, in the parameters' dtype.

    Raises:
        ValueError: no variational layer; a parameter with NaN, named.
        TypeError: not a module.

    Source: Blundell et al., "Weight uncertainty in neural networks", ICML 2015.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(fw.bayes.BayesLinear(3, 4), torch.nn.Tanh(), fw.bayes.BayesLinear(4, 1))
        >>> loss = torch.nn.functional.mse_loss(model(torch.ones(8, 3)), torch.zeros(8, 1))
        >>> fw.bayes.negative_elbo(loss, fw.bayes.kl(model), num_data=800, reduction="mean").backward()
    """
    layers = layers_of(model)
    parts: list[Tensor] = []
    # What has to be computed, in one call for all tensors of a dtype and device.
    missing: dict[Any, list[tuple[Tensor, Tensor, Tensor | None, float | None]]] = {}
    # Tensors that two layers share are one random variable. The tensors stay alive here: an id must not come twice.
    counted: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for layer in layers.values():
        distributions = layer.distributions()
        own = [k for k, (mu, rho, _) in enumerate(distributions) if (id(mu), id(rho)) not in counted]
        counted.update({(id(mu), id(rho)): (mu, rho) for mu, rho, _ in distributions})
        if not own:
            continue
        if layer.prior_std is None:
            parts.append(layer.sampled_kl(own))
            continue
        ready = layer.ready_kl() if len(own) == len(distributions) else None
        if ready is not None:
            parts.append(ready)
            continue
        key = (layer.weight_mu.dtype, layer.weight_mu.device)
        missing.setdefault(key, []).extend((*distributions[k], layer.prior_std) for k in own)
    parts += [ops.kl_sum_unchecked(*zip(*rows, strict=True)) for rows in missing.values()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    # Elsewhere than on the CPU, looking at the value would wait for the device.
    if not traced and total.device.type == "cpu" and math.isnan(total.item()):
        check_no_nan(layers)
    return total


def negative_elbo(nll: Tensor, kl: Tensor, *, num_data: int, reduction: str, batch_size: int | None = None) -> Tensor:
    """The negative evidence lower bound of a mini-batch, at the scale of the loss that it gets.

    reduction="sum":  nll + (batch_size / num_data) kl      (nll summed over the batch)
    reduction="mean": nll + kl / num_data                   (nll averaged over the batch: batch_size times less)

    There is no default: torch's losses are means, while the literature writes sums.

    Args:
        nll: scalar, the negative log-likelihood of the batch.
        kl: scalar, `kl(model)`.
        num_data: examples in the whole training set.
        reduction: how `nll` was made: "sum" or "mean".
        batch_size: examples in the batch; needed for "sum", checked for "mean" where given.

    Returns:
        A scalar.

    Raises:
        ValueError: an unknown reduction, num_data < batch_size, batch_size missing for "sum", a nll that is no scalar.

    Source: Blundell et al. 2015, eq. 8.

    Example:
        >>> import torch, finite_width as fw
        >>> float(fw.bayes.negative_elbo(torch.tensor(2.0), torch.tensor(50.0), num_data=100, reduction="mean"))
        2.5
    """
    for name, value in (("nll", nll), ("kl", kl)):
        _check.is_tensor(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got shape {list(value.shape)}; sum or average it first")
    _check.one_of("reduction", reduction, ("sum", "mean"))
    _check.positive_int("num_data", num_data)
    if batch_size is not None:
        _check.positive_int("batch_size", batch_size)
        if num_data < batch_size:
            raise ValueError(f"num_data is the size of the whole training set: {num_data} < batch_size {batch_size}")
    if reduction == "mean":
        return nll + kl / num_data
    if batch_size is None:
        raise ValueError('batch_size must be given with reduction="sum": the KL counts batch_size / num_data of it')
    return nll + kl * (batch_size / num_data)
