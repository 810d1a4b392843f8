"""What the variational layers share: parameters, noise, estimators, the fused KL."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check, _library
from . import ops, reference
from .last import Last, optimizer_steps
from .priors import GaussianPrior, MopedPrior, check_prior

ESTIMATORS = ("weight", "flipout", "local")
NAMES = ("weight_mu", "weight_rho", "bias_mu", "bias_rho")
_NAMES = frozenset(NAMES)
# Counter words of the noise: which tensor of a layer it is for.
WEIGHT, BIAS, OUTPUT, SIGN_IN, SIGN_OUT = range(5)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh Philox key, from torch's default generator, with the rank folded in where processes train together."""
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # An odd constant, so that equal seeds on two ranks give unequal keys; int64 wraps around.
        offset = torch.distributed.get_rank() * 0x9E3779B97F4A7C15 % 2**64
        seed = seed + (offset - 2**64 if offset >= 2**63 else offset)
    return seed


def inverse_softplus(sigma: Tensor) -> Tensor:
    """ρ with softplus(ρ) = σ, for σ > 0."""
    return sigma + torch.log(-torch.expm1(-sigma))


@_library.constant_while_tracing
def _this_thread() -> int:
    return threading.get_ident()


class BayesLayer(nn.Module):
    """What every variational layer has: `weight_mu`, `weight_rho`, `bias_mu`, `bias_rho`, a prior and an estimator."""

    weight_mu: nn.Parameter
    weight_rho: nn.Parameter
    bias_mu: nn.Parameter | None
    bias_rho: nn.Parameter | None
    weight_prior_mean: Tensor | None
    bias_prior_mean: Tensor | None

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        prior: Any,
        estimator: str,
        init_std: float | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check.one_of("estimator", estimator, ESTIMATORS)
        if init_std is not None:
            _check.positive("init_std", init_std)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64 (for bfloat16 compute, use autocast), got {dtype}")
        self.prior, self.estimator = GaussianPrior() if prior is None else prior, estimator
        self.fan_in = math.prod(weight_shape[1:])
        self.init_std = init_std or 0.1 / math.sqrt(max(self.fan_in, 1))
        options = {"device": device, "dtype": dtype}
        self.weight_mu = nn.Parameter(torch.empty(weight_shape, **options))
        self.weight_rho = nn.Parameter(torch.empty(weight_shape, **options))
        for name in ("bias_mu", "bias_rho"):
            self.register_parameter(name, nn.Parameter(torch.empty(weight_shape[0], **options)) if bias else None)
        self.register_buffer("weight_prior_mean", None)
        self.register_buffer("bias_prior_mean", None)
        self._last = Last()
        self._mean_mode = 0
        self._predictions: dict[int, Any] = {}  # thread -> the prediction under way there
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh means as torch's own layers draw them, σ = init_std everywhere, and the prior's mean."""
        bound = 1 / math.sqrt(self.fan_in) if self.fan_in else 0.0
        rho = float(inverse_softplus(torch.tensor(self.init_std, dtype=torch.float64, device="cpu")))
        with torch.no_grad():
            for mu, each in ((self.weight_mu, self.weight_rho), (self.bias_mu, self.bias_rho)):
                if mu is not None and each is not None:
                    mu.uniform_(-bound, bound)
                    each.fill_(rho)
        self._reset_prior_mean()

    def set_posterior(self, weight: Tensor, bias: Tensor | None, delta: float) -> None:
        """Mean = the given weights, σ = delta |weight|; the prior's mean follows where the prior asks for it.

        σ has a floor of a thousandth of delta times the tensor's root mean square, so that zeros can move.
        """
        with torch.no_grad():
            for value, mu, rho in (
                (weight, self.weight_mu, self.weight_rho),
                (bias, self.bias_mu, self.bias_rho),
            ):
                if value is None or mu is None or rho is None:
                    continue
                mu.copy_(value)
                size = value.abs().to(torch.float64)
                floor = max(1e-3 * float(size.square().mean().sqrt()), 1e-12) if value.numel() else 1.0
                rho.copy_(inverse_softplus(delta * size.clamp_min(floor)))
        self._reset_prior_mean()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module; but a new prior is checked, and brings its mean; and a new estimator is checked.

        A MopedPrior takes the present means, or keeps those of another MopedPrior.
        """
        if name == "estimator":
            _check.one_of("estimator", value, ESTIMATORS)
        if name != "prior":
            super().__setattr__(name, value)
            return
        check_prior(value)
        before = getattr(self, "prior", None)
        super().__setattr__(name, value)
        if before is not None and not (isinstance(before, MopedPrior) and isinstance(value, MopedPrior)):
            self._reset_prior_mean()

    def _reset_prior_mean(self) -> None:
        for name in ("weight", "bias"):
            mu = getattr(self, f"{name}_mu")
            mean = None
            if mu is not None and isinstance(self.prior, MopedPrior):
                mean = mu.detach().clone()
            elif mu is not None and isinstance(self.prior, GaussianPrior) and self.prior.mean != 0:
                mean = torch.full_like(mu.detach(), float(self.prior.mean))
            setattr(self, f"{name}_prior_mean", mean)

    @property
    def prior_std(self) -> float | None:
        """σp of a Gaussian prior; None for one whose KL is estimated."""
        return float(self.prior.std) if isinstance(self.prior, GaussianPrior | MopedPrior) else None

    def distributions(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(μ, ρ, prior mean) of the weight, and of the bias where there is one."""
        weight_mu, weight_rho, bias_mu, bias_rho = self.four_parameters()
        result: list[tuple[Tensor, Tensor, Tensor | None]] = [
            (weight_mu, weight_rho, self._buffers["weight_prior_mean"])
        ]
        if bias_mu is not None:
            result.append((bias_mu, bias_rho, self._buffers["bias_prior_mean"]))
        return result

    def four_parameters(self) -> list[Any]:
        """As NAMES has them."""
        own = self._parameters  # read directly: getattr finds a parameter last
        # One that is made by a parametrisation, and those of a replica, are plain attributes.
        return [own[name] if name in own else getattr(self, name) for name in NAMES]

    def weight_std(self) -> Tensor:
        """σ = softplus(ρ) of the weight."""
        return reference.sigma(self.weight_rho)

    def _prediction(self) -> Any:
        """The prediction under way in this thread, or None."""
        return self._predictions.get(_this_thread())

    # The KL that a forward computed on the way.

    def _owns_parameters(self) -> bool:
        """Whether `_state` sees all of them: not where one is made by a parametrisation, or the layer is a replica."""
        return self._parameters.keys() >= _NAMES

    def _keep(self, result: Any, nodes: list[Tensor]) -> None:
        """Remember what forward made for kl(), where it can be used later."""
        if torch.compiler.is_compiling():
            return
        in_backward = torch._C._current_graph_task_id() != -1  # a checkpoint's second forward
        if not self._owns_parameters():
            return  # nor clear: replicas share it with the layer
        state = None  # tensors of a transform have none
        if not (in_backward or torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled()):
            state = self._state()
        if state is None:
            self._last.clear()
        else:
            self._last.put(result, nodes, state)

    def _forget(self) -> None:
        """Let kl() compute all anew."""
        if not torch.compiler.is_compiling() and self._owns_parameters():
            self._last.clear()

    def _state(self) -> list[Any] | None:
        """What must not have changed for the last forward's KL to be that of now; None where that cannot be told."""
        state: list[Any] = [self.prior, int(torch.is_grad_enabled()), optimizer_steps()]
        # The dicts themselves: nn.Module's attribute look-up would cost as much as the rest.
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            state.append(tensor)
            if tensor is not None:
                if tensor.is_inference():  # no version tells when it changes
                    return None
                state += (tensor._version, tensor.data_ptr(), int(tensor.requires_grad))
        return state

    def _kept(self) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch.is_inference_mode_enabled()
            or not self._owns_parameters()
        ):
            return None
        state = self._state()
        return None if state is None else self._last.get(state)

    def ready_kl(self) -> Tensor | None:
        """KL(q || p) of this layer's weights now, where the last forward computed it on its way; else None."""
        result: Tensor | None = self._kept()
        return result

    def sampled_kl(self, streams: Sequence[int]) -> Tensor:
        """Σ log q(W) - log p(W) at the weights of the last forward, or at fresh ones; log q from ε itself.

        For a prior without closed form.

        Args:
            streams: of which distributions.
        """
        seed, weights = self._kept() or (draw_seed(self.weight_mu.device), None)
        total = self.weight_mu.new_zeros(())
        distributions = self.distributions()
        for stream in streams:
            mu, rho, _ = distributions[stream]
            normal = ops.noise(mu, seed, 0, stream)
            weight = (
                weights[stream] if weights else ops.sample_unchecked(mu, rho, seed, None, None, stream, False, None)[0]
            )
            log_q = -0.5 * normal * normal - reference.log_sigma(rho) - 0.5 * math.log(2 * math.pi)
            difference = log_q.sum(dtype=torch.float64) - self.prior.log_prob(weight).sum(dtype=torch.float64)
            total = total + difference.to(mu.dtype)
        return total

    def _sampled(self, seed: Tensor) -> list[Tensor | None]:
        """One sample of weight and bias; keeps the KL, or what it can be estimated from."""
        dtype = None if self.prior_std is None else self._product_dtype()  # an estimate needs W as it was drawn
        pairs = [
            ops.sample_unchecked(mu, rho, seed, mean, self.prior_std, stream, False, dtype)
            for stream, (mu, rho, mean) in enumerate(self.distributions())
        ]
        weights = [weight for weight, _ in pairs]
        if self.prior_std is None:
            self._keep((seed, weights), weights)
        else:
            self._keep(torch.stack([kl for _, kl in pairs]).sum(), weights)
        return [*weights, None][:2]

    def _perturbation(self, seed: Tensor) -> list[Tensor | None]:
        """σ ε of weight and bias, for flipout; keeps the KL."""
        pairs = [
            ops.sample_unchecked(mu, rho, seed, mean, self.prior_std, stream, True, self._product_dtype())
            for stream, (mu, rho, mean) in enumerate(self.distributions())
        ]
        if self.prior_std is not None:
            self._keep(torch.stack([kl for _, kl in pairs]).sum(), [weight for weight, _ in pairs])
        else:
            self._forget()  # an estimate needs one W, and this forward has none
        return [*(weight for weight, _ in pairs), None][:2]

    def _check_dtypes(self, x: Tensor) -> None:
        """Raise TypeError unless x and the weights can meet; autocast sees to that itself."""
        mu = self.weight_mu
        if x.dtype == mu.dtype and mu.dtype in (torch.float32, torch.float64):
            return
        if mu.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"weight_mu must be float32 or float64 (for bfloat16 compute, use autocast), got {mu.dtype}"
            )
        if not torch.is_autocast_enabled(x.device.type):
            _check.like("x", x, "weight_mu", mu)

    def _product_dtype(self) -> torch.dtype | None:
        """What autocast's products take W in: it is written so at once; None for the dtype of μ."""
        kind = self.weight_mu.device.type
        if self.weight_mu.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return None
        dtype = torch.get_autocast_dtype(kind)
        return dtype if dtype in ops.NARROW else None

    def __path_weights__(self) -> tuple[str, ...]:
        """What carries paths (`fw.pathsgd`): the means, in mean mode."""
        if not self._mean_mode:
            raise ValueError("a variational layer has paths in mean mode alone; use `with fw.bayes.mean_mode(model):`")
        return ("weight_mu",) if self.bias_mu is None else ("weight_mu", "bias_mu")

    def mean_layer(self) -> nn.Module:
        """torch's own layer of the mean network, with copies of μ."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"prior={self.prior}, estimator={self.estimator!r}"


def signs(like: Tensor, seed: Tensor, stream: int) -> Tensor:
    """±1 with equal odds, of the shape of `like`."""
    noise = ops.noise(torch.empty_like(like, dtype=torch.float32), seed, 0, stream)
    return torch.where(noise < 0, -1.0, 1.0).to(like.dtype)


def perturb(mean: Tensor, variance: Tensor, seed: Tensor) -> Tensor:
    """mean + √variance ε: local reparametrisation. A variance of 0 stays 0, with gradient 0."""
    still = variance <= reference.LEAST_VARIANCE  # not where it is NaN
    deviation = torch.where(still, 0.0, torch.sqrt(torch.where(still, 1.0, variance)))
    noise = ops.noise(mean.detach().contiguous(), seed, 0, OUTPUT)
    return mean + deviation * noise


def with_means(layer: Any, source: BayesLayer) -> Any:
    """The layer with the means of `source`, its mode and its requires_grad."""
    with torch.no_grad():
        layer.weight.copy_(source.weight_mu)
        layer.weight.requires_grad_(source.weight_mu.requires_grad)
        if source.bias_mu is not None:
            layer.bias.copy_(source.bias_mu)
            layer.bias.requires_grad_(source.bias_mu.requires_grad)
    return layer.train(source.training)
