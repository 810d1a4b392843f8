"""Variational convolutions: a sampled kernel and torch's own convolution."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from . import ops, reference
from .layers import SIGN_IN, SIGN_OUT, BayesLayer, draw_seed, perturb, signs, with_means


class _BayesConv(BayesLayer):
    dims: ClassVar[int]
    plain: ClassVar[Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        *,
        bias: bool = True,
        prior: Any = None,
        estimator: str = "weight",
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.positive_int("in_channels", in_channels)
        _check.positive_int("out_channels", out_channels)
        kernel_size = _check.ints("kernel_size", kernel_size, self.dims)
        stride = _check.ints("stride", stride, self.dims)
        dilation = _check.ints("dilation", dilation, self.dims)
        if not isinstance(padding, str):
            padding = _check.ints("padding", padding, self.dims, least=0)
        # torch's layer checks the geometry and works out the padding; on the meta device it holds no memory.
        geometry = self.plain(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        super().__init__(tuple(geometry.weight.shape), bias, prior, estimator, init_std, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = geometry.kernel_size, geometry.stride, geometry.padding
        self.dilation, self.groups, self.padding_mode = geometry.dilation, groups, padding_mode
        self._outer_padding = geometry._reversed_padding_repeated_twice

    def _conv(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._outer_padding, mode=self.padding_mode), 0
        result: Tensor = conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in_channels, ...] or [in_channels, ...] -> [batch, out_channels, ...]."""
        _check.is_tensor("x", x)
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != self.in_channels:
            sizes = ", ".join("DHW"[-self.dims :])
            raise ValueError(f"x must have shape [batch, {self.in_channels}, {sizes}], got {list(x.shape)}")
        if self._mean_mode:
            return self._conv(x, self.weight_mu, self.bias_mu)
        if self._predictions and (prediction := self._prediction()) is not None:
            return self._predict(x, prediction)
        self._check_dtypes(x)
        seed = draw_seed(x.device)
        if self.estimator == "weight":
            return self._conv(x, *self._sampled(seed))
        if self.estimator == "flipout":
            weight, bias = self._perturbation(seed)
            ones = (1,) * self.dims
            flipped = x * signs(x.new_empty(*x.shape[: -self.dims], *ones), seed, SIGN_IN)
            change = self._conv(flipped, weight, bias)
            flip = signs(change.new_empty(*change.shape[: -self.dims], *ones), seed, SIGN_OUT)
            return self._conv(x, self.weight_mu, self.bias_mu) + change * flip
        mean = self._conv(x, self.weight_mu, self.bias_mu).to(self.weight_mu.dtype)
        with torch.autocast(x.device.type, enabled=False):  # float16 holds no variance under 6e-8
            wide = x.to(self.weight_mu.dtype)
            bias = None if self.bias_rho is None else reference.sigma(self.bias_rho) ** 2
            variance = self._conv(wide * wide, self.weight_std() ** 2, bias)
        return perturb(mean, variance, seed)

    def _predict(self, x: Tensor, draw: Any) -> Tensor:
        if draw.rehearsal:
            return draw.stand_in(self, x, self._conv(x, self.weight_mu, self.bias_mu), -self.dims - 1)
        self._check_dtypes(x)
        seed, first, count = draw.of(self, x)
        outputs = []
        for index, part in enumerate(x.chunk(count)):
            sampled: list[Tensor | None] = [
                mu + reference.sigma(rho) * ops.noise(mu, seed, first + index, stream)
                for stream, (mu, rho, _) in enumerate(self.distributions())
            ]
            outputs.append(self._conv(part, *[*sampled, None][:2]))
        return torch.cat(outputs)

    def mean_layer(self) -> Any:
        """torch's own layer of the mean network, with copies of μ."""
        layer = self.plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias_mu is not None,
            self.padding_mode,
            device=self.weight_mu.device,
            dtype=self.weight_mu.dtype,
        )
        return with_means(layer, self)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias_mu is not None}, {super().extra_repr()}"
        )


class BayesConv1d(_BayesConv):
    """A 1-D convolution with a Gaussian over each weight: W ~ N(μ, σ²), σ = softplus(ρ).

    It takes x [batch, in_channels, W], or without the batch axis, to [batch, out_channels, W'].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in nn.Conv1d.
        bias, prior, estimator, device, dtype: as in `BayesLinear`.
        init_std: σ at the start; default 0.1 over the square root of an output's inputs.

    Raises:
        ValueError: sizes < 1, a negative padding, channels that groups do not divide, and as `BayesLinear`.
        TypeError: sizes that are no ints, and as `BayesLinear`.

    Source: as `BayesLinear`.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.BayesConv1d(2, 3, kernel_size=3, padding=1)(torch.ones(5, 2, 8)).shape
        torch.Size([5, 3, 8])
    """

    dims, plain = 1, nn.Conv1d


class BayesConv2d(_BayesConv):
    """A 2-D convolution with a Gaussian over each weight: W ~ N(μ, σ²), σ = softplus(ρ).

    It takes x [batch, in_channels, H, W], or without the batch axis, to [batch, out_channels, H', W'].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in nn.Conv2d.
        bias, prior, estimator, device, dtype: as in `BayesLinear`.
        init_std: σ at the start; default 0.1 over the square root of an output's inputs.

    Raises:
        ValueError: sizes < 1, a negative padding, channels that groups do not divide, and as `BayesLinear`.
        TypeError: sizes that are no ints, and as `BayesLinear`.

    Source: as `BayesLinear`.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.BayesConv2d(2, 3, kernel_size=3)(torch.ones(5, 2, 8, 8)).shape
        torch.Size([5, 3, 6, 6])
    """

    dims, plain = 2, nn.Conv2d


class BayesConv3d(_BayesConv):
    """A 3-D convolution with a Gaussian over each weight: W ~ N(μ, σ²), σ = softplus(ρ).

    It takes x [batch, in_channels, D, H, W], or without the batch axis, to [batch, out_channels, D', H', W'].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in nn.Conv3d.
        bias, prior, estimator, device, dtype: as in `BayesLinear`.
        init_std: σ at the start; default 0.1 over the square root of an output's inputs.

    Raises:
        ValueError: sizes < 1, a negative padding, channels that groups do not divide, and as `BayesLinear`.
        TypeError: sizes that are no ints, and as `BayesLinear`.

    Source: as `BayesLinear`.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.BayesConv3d(1, 2, kernel_size=2)(torch.ones(1, 1, 4, 4, 4)).shape
        torch.Size([1, 2, 3, 3, 3])
    """

    dims, plain = 3, nn.Conv3d
