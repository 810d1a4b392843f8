"""TTConv2d: a two-dimensional convolution whose kernel is a Tensor Train."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from . import decomposition, functional, reference
from .linear import Ranks, TTCores, check_trained, exact, find_modes, largest_rank, ranks_within


class TTConv2d(TTCores):
    """Convolution with the kernel K[m, n, h, w] = F[h, w] G_1[m_1, n_1] ··· G_d[m_d, n_d], never built.

    The spatial core F [1, kh, kw, r_0] is a bank of r_0 filters that all channels share; the channel cores
    [r_{k-1}, m_k, n_k, r_k] are one Tensor-Train product (`tt_linear`) at every position of the result. With groups,
    the group stands before m_1 in G_1 [r_0, groups m_1, n_1, r_1], the other cores are shared, and there is a product
    for each group.

    Args:
        in_channels, out_channels: N and M of all groups together.
        kernel_size, stride, padding, dilation, groups, padding_mode: as in nn.Conv2d.
        rank: one integer for all inner bonds, lowered where a bond cannot use so many; or a list, one for each:
            r_0 between filters and channels, then r_1, ...
        in_modes, out_modes: factors of one group's channels; balanced ones if left out, padded where there are none.
        bias: whether to add a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: modes that do not multiply to a group's channels, channels that groups do not divide, a rank, a
            kernel_size, a stride or a dilation of 0, a negative padding.
        TypeError: a size or a rank that is no int.

    Source: Garipov et al., "Ultimate tensorization: compressing convolutional and FC layers alike", 2016.

    Example:
        >>> import torch, finite_width as fw
        >>> layer = fw.tt.TTConv2d(16, 32, 3, padding=1, rank=4)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        rank: Ranks = 8,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check.positive_int("in_channels", in_channels)
        _check.positive_int("out_channels", out_channels)
        _check.one_of("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        _check.positive_int("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"groups must divide {name} = {channels}, got {groups}")
        self.in_channels, self.out_channels, self.padding_mode = in_channels, out_channels, padding_mode
        self.groups = groups
        self.kernel_size = _check.ints("kernel_size", kernel_size, 2)
        self.stride, self.dilation = _check.ints("stride", stride, 2), _check.ints("dilation", dilation, 2)
        if isinstance(padding, str):
            _check.one_of("padding", padding, ("valid", "same"))
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f'padding="same" needs a stride of 1, got {stride}')
            # What "same" adds in total is (k - 1) dilation; where that is odd, the right and the bottom get more.
            total = [
                d * (k - 1) if padding == "same" else 0 for k, d in zip(self.kernel_size, self.dilation, strict=True)
            ]
            self.padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            self.padding = tuple((p, p) for p in _check.ints("padding", padding, 2, least=0))
        self._in, self._out = in_channels // groups, out_channels // groups  # of one group
        self.in_modes, self.out_modes = find_modes(self._in, self._out, in_modes, out_modes, "matrix")
        self.padded_in, self.padded_out = prod(self.in_modes), prod(self.out_modes)
        pairs = _group_pairs(groups, self.out_modes, self.in_modes)
        sizes = (prod(self.kernel_size), *(m * n for m, n in pairs))
        bonds = (*ranks_within("rank", rank, sizes), 1)
        shapes: list[tuple[int, ...]] = [(1, *self.kernel_size, bonds[0])]
        shapes += [(bonds[k], m, n, bonds[k + 1]) for k, (m, n) in enumerate(pairs)]
        self._register_cores(shapes, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self, variance: float | None = None) -> None:
        """Draw new values: K of the given mean square (default nn.Conv2d's, 1 / (3 fan_in)), bias as nn.Conv2d."""
        fan_in = self._in * prod(self.kernel_size)
        if variance is None:
            variance = 1 / (3 * fan_in)
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance}")
        self._start(variance)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / sqrt(fan_in), 1 / sqrt(fan_in))

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        eps: float | None = None,
        max_rank: int | Sequence[int] | None = None,
        target_params: int | None = None,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
    ) -> TTConv2d:
        """The Tensor Train of a trained convolution's kernel (TT-SVD in float64), with its bias and geometry.

        Args:
            conv: left as it is.
            eps, max_rank, target_params, in_modes, out_modes: as in `TTLinear.from_linear`.

        Raises:
            ValueError: none of eps, max_rank and target_params, NaN weights.
            TypeError: not an nn.Conv2d; otherwise as `TTLinear.from_linear`.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        decomposition.one_given(eps=eps, max_rank=max_rank, target_params=target_params)
        check_trained("conv", conv.weight)
        weight, bias, groups = conv.weight.detach(), conv.bias, conv.groups
        wide_in, wide_out = conv.in_channels // groups, conv.out_channels // groups
        modes_in, modes_out = find_modes(wide_in, wide_out, in_modes, out_modes, "matrix")
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        middles = [kernel, *_group_pairs(groups, modes_out, modes_in)]
        sizes = [a * b for a, b in middles]
        if target_params is not None:
            _check.positive_int("target_params", target_params)
            room = target_params - (0 if bias is None else bias.numel())
            max_rank = largest_rank(tuple(sizes), room, max_rank, f"target_params = {target_params}")
        padded = F.pad(
            weight.double().unflatten(0, (groups, wide_out)),
            (0, 0, 0, 0, 0, prod(modes_in) - wide_in, 0, prod(modes_out) - wide_out),
        )
        d = len(modes_in)
        pairs = padded.reshape(groups, *modes_out, *modes_in, *kernel).permute(
            2 * d + 1, 2 * d + 2, 0, *(axis for k in range(1, d + 1) for axis in (k, d + k))
        )
        cores = decomposition.tt_svd(pairs.reshape(sizes), eps=eps, max_rank=max_rank)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            kernel,
            stride=(conv.stride[0], conv.stride[1]),
            padding=conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=groups,
            rank=[core.shape[0] for core in cores[1:]],
            in_modes=exact(modes_in, wide_in),
            out_modes=exact(modes_out, wide_out),
            bias=bias is not None,
            padding_mode=conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.set_cores([c.reshape(c.shape[0], *pair, c.shape[2]) for c, pair in zip(cores, middles, strict=True)])
        if bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> [B, out_channels, H', W']; or both without B."""
        _check.is_tensor("x", x)
        if x.dim() == 3 and x.shape[0] == self.in_channels:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape [B, {self.in_channels}, H, W] or [{self.in_channels}, H, W], got {list(x.shape)}"
            )
        filters, *channels = self.cores
        (top, bottom), (left, right) = self.padding
        padding = (top, left)
        if self.padding_mode != "zeros" or top != bottom or left != right:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
        # Every filter on every channel: [B, N, r_0, H', W'].
        bank = filters.permute(3, 0, 1, 2)
        images = x.reshape(-1, 1, *x.shape[2:])
        filtered = F.conv2d(images, bank, None, self.stride, padding, self.dilation)
        filtered = filtered.reshape(x.shape[0], self.in_channels, *filtered.shape[1:])
        rows = filtered.permute(0, 3, 4, 2, 1).unflatten(-1, (self.groups, self._in))  # [B, H', W', r_0, groups, N]
        if self.padded_in != self._in:
            rows = F.pad(rows, (0, self.padded_in - self._in))
        biases = [None] * self.groups if self.bias is None else self.bias.chunk(self.groups)
        parts = [
            self._group_product(part.flatten(3), first, channels[1:], bias)
            for part, first, bias in zip(rows.unbind(-2), self._first_cores(), biases, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).permute(0, 3, 1, 2)

    def _first_cores(self) -> list[Tensor]:
        """G_1 of each group, [1, m_1, (r_0 n_1), r_1]: the filters join the first input mode."""
        core = self.cores[1]
        rank, _, n, rank_right = core.shape
        m = self.out_modes[0]
        return [c.transpose(0, 1).reshape(1, m, rank * n, rank_right) for c in core.split(m, 1)]

    def _group_product(self, rows: Tensor, first: Tensor, rest: list[Tensor], bias: Tensor | None) -> Tensor:
        """[B, H', W', (r_0 N)] -> [B, H', W', M] of one group."""
        if self.padded_out == self._out:
            return functional.tt_linear(rows, [first, *rest], bias)
        y = functional.tt_linear(rows, [first, *rest])[..., : self._out]
        return y if bias is None else y + bias.to(y.dtype)

    @reference.without_autocast
    def to_dense(self) -> Tensor:
        """K [out_channels, in_channels / groups, kh, kw]; differentiable."""
        filters, _, *rest = self.cores
        kernels = []
        for first in self._first_cores():
            dense = decomposition.tt_to_dense([first, *rest]).reshape(self.padded_out, -1, self.padded_in)
            kernels.append(torch.einsum("mrn,hwr->mnhw", dense, filters[0])[: self._out, : self._in])
        return torch.cat(kernels)

    @property
    def compression_ratio(self) -> float:
        """Parameters of the dense convolution over those of this one, bias included in both."""
        extra = 0 if self.bias is None else self.out_channels
        dense = self._in * self.out_channels * prod(self.kernel_size)
        return (dense + extra) / (self.core_parameters + extra)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, in_modes={self.in_modes}, out_modes={self.out_modes}, ranks={self.ranks}"
        )
        if self.groups != 1:
            text += f", groups={self.groups}"
        each = "" if self.groups == 1 else " in each group"
        if self.padded_in != self._in:
            text += f", channels of x padded with zeros to {self.padded_in}{each}"
        if self.padded_out != self._out:
            text += f", channels beyond {self._out} of {self.padded_out} dropped{each}"
        return text


def _group_pairs(groups: int, out_modes: Sequence[int], in_modes: Sequence[int]) -> list[tuple[int, int]]:
    """(m_k, n_k) of each channel core; the first holds all groups."""
    pairs = list(zip(out_modes, in_modes, strict=True))
    return [(groups * pairs[0][0], pairs[0][1]), *pairs[1:]]
