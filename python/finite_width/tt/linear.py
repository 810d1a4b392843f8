"""TTLinear: a fully connected layer whose weight is a Tensor Train."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from . import decomposition, functional, ops, planner, precision, reference
from .modes import as_modes, bond_limits, check_modes, choose_modes, number_of_cores, train_size

Ranks = int | Sequence[int]


class TTCores(nn.Module):
    """What all Tensor-Train layers share: cores as parameters core_0, core_1, ..., their ranks and their start."""

    def _register_cores(self, shapes: Sequence[Sequence[int]], device: Any, dtype: Any) -> None:
        self._core_names = tuple(f"core_{k}" for k in range(len(shapes)))
        for name, shape in zip(self._core_names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)))

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module; but a core keeps its modes. Its ranks may change, in all cores one after another."""
        if name.startswith("core_") and isinstance(value, Tensor):
            before = self._parameters.get(name)
            if before is not None and value.shape[1:-1] != before.shape[1:-1]:
                modes = ", ".join(map(str, before.shape[1:-1]))
                raise ValueError(f"{name} must have shape [r, {modes}, r'], got {list(value.shape)}")
        super().__setattr__(name, value)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores in order."""
        own: Any = self._parameters  # read directly: getattr finds a parameter last, after half a microsecond
        return tuple([own[name] if name in own else getattr(self, name) for name in self._core_names])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the inner bonds."""
        return tuple(core.shape[0] for core in self.cores[1:])

    @property
    def core_parameters(self) -> int:
        """The number of parameters in the cores."""
        return sum(core.numel() for core in self.cores)

    @torch.no_grad()
    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Copy these values into the cores.

        Raises:
            ValueError: another number of cores, or shapes other than theirs; nothing is copied then.
        """
        own = self.cores
        if len(cores) != len(own):
            raise ValueError(f"cores must hold {len(own)} tensors, one for each core, got {len(cores)}")
        for k, (mine, value) in enumerate(zip(own, cores, strict=True)):
            _check.is_tensor(f"cores[{k}]", value)
            if value.shape != mine.shape:  # copy_ would broadcast a smaller one
                raise ValueError(
                    f"cores[{k}] must have the shape of core_{k} {list(mine.shape)}, got {list(value.shape)}"
                )
        for mine, value in zip(own, cores, strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def _start(self, variance: float) -> None:
        """Gaussian cores, scaled so that the entries of the full tensor have this mean square exactly.

        In expectation Var(W) = Π r_k Π σ_k², so σ = (variance / Π r_k)^(1/2d); but the mean square of one draw
        strays from that the more, the more cores there are, hence the rescaling.
        """
        cores = self.cores
        if cores[0].is_meta:  # no values to draw yet, nor to measure: `reset_parameters` comes again after `to_empty`
            return
        deviation = (variance / prod(self.ranks)) ** (0.5 / len(cores))
        for core in cores:
            core.normal_(0.0, deviation)
        mean_square = _mean_square(cores)
        if mean_square > 0:
            scale = (variance / mean_square) ** (0.5 / len(cores))
            for core in cores:
                core.mul_(scale)


def _mean_square(cores: Sequence[Tensor]) -> float:
    """‖W‖² / (number of entries), by contracting the train with itself, core by core, in float64."""
    gram = torch.ones(1, 1, dtype=torch.float64, device=cores[0].device)
    for core in cores:
        flat = core.double().reshape(core.shape[0], -1, core.shape[-1])
        gram = torch.einsum("ab,anc,bnd->cd", gram, flat, flat) / flat.shape[1]
    return float(gram)


def ranks_within(name: str, ranks: Ranks, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The inner ranks: a list as it is; one integer for all, but less where a bond cannot use so many."""
    if ranks is None:
        raise TypeError(f"{name} must be an int, or a list of one int for each bond, got None")
    asked = [rank for rank in decomposition.check_ranks(name, ranks, len(sizes) - 1) if rank is not None]
    if isinstance(ranks, Sequence):
        return tuple(asked)
    return tuple(min(limit, rank) for limit, rank in zip(bond_limits(sizes), asked, strict=True))


class TTLinear(TTCores):
    """y = x Wᵀ + bias, with W [out_features, in_features] a Tensor Train (`tt_linear`).

    A size without balanced factors is padded: x with zeros, and the rows beyond out_features are dropped;
    `repr` says so.

    Args:
        in_features: N.
        out_features: M.
        rank: one integer for all inner bonds, lowered where a bond cannot use so many; or a list, one for each.
        in_modes: factors of N; balanced ones of about 8 if left out.
        out_modes: factors of M.
        layout: "matrix" (cores [r, m_k, n_k, r'], as many input as output modes) or "in_out" (cores [r, n_k, r'] of
            the input, then [r, m_k, r'] of the output).
        bias: whether to add a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: modes that do not multiply to the size, a rank of 0.
        TypeError: a size or a rank that is no int.

    Source: Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015.

    Example:
        >>> import torch, finite_width as fw
        >>> layer = fw.tt.TTLinear(1024, 1024, rank=8)
        >>> layer(torch.randn(2, 1024)).shape, round(layer.compression_ratio)
        (torch.Size([2, 1024]), 256)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: Ranks = 8,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        layout: str = "matrix",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check.positive_int("in_features", in_features)
        _check.positive_int("out_features", out_features)
        _check.one_of("layout", layout, functional.LAYOUTS)
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        self.in_modes, self.out_modes = find_modes(in_features, out_features, in_modes, out_modes, layout)
        self.padded_in, self.padded_out = prod(self.in_modes), prod(self.out_modes)
        if layout == "matrix":
            sizes = tuple(m * n for m, n in zip(self.out_modes, self.in_modes, strict=True))
            middles: list[tuple[int, ...]] = list(zip(self.out_modes, self.in_modes, strict=True))
        else:
            sizes = (*self.in_modes, *self.out_modes)
            middles = [(size,) for size in sizes]
        bonds = (1, *ranks_within("rank", rank, sizes), 1)
        self._register_cores([(bonds[k], *middle, bonds[k + 1]) for k, middle in enumerate(middles)], device, dtype)
        in_cores = 0 if layout == "matrix" else len(self.in_modes)
        shapes = functional.four_axis_shapes(self.cores, in_cores)
        self._signature = functional.Signature(shapes, in_cores, self.padded_out, self.padded_in)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self, variance: float | None = None) -> None:
        """Draw new values: W of the given mean square (default 1 / (3 in_features), nn.Linear's), bias as nn.Linear."""
        if variance is None:
            variance = 1 / (3 * self.in_features)
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance}")
        self._start(variance)
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def __path_weights__(self) -> tuple[str, ...]:
        """What carries paths (`fw.pathsgd`): the layer is linear in each core and in its bias."""
        return self._core_names if self.bias is None else (*self._core_names, "bias")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        eps: float | None = None,
        max_rank: int | Sequence[int] | None = None,
        target_params: int | None = None,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
    ) -> TTLinear:
        """The Tensor Train of a trained layer's weight (TT-SVD in float64), with the layer's bias.

        Args:
            linear: an nn.Linear; left as it is.
            eps: relative error of the weight.
            max_rank: limit of all ranks, or one for each bond.
            target_params: limit of the number of parameters, bias included: the largest uniform rank under it.
            in_modes, out_modes: as in the constructor.

        Raises:
            ValueError: none of eps, max_rank and target_params; NaN weights, or none (meta device); a target below
                rank 1.
            TypeError: not an nn.Linear, complex weights; an eps that is no number, a max_rank or target_params that is
                no int.

        Example:
            >>> import torch, finite_width as fw
            >>> layer = fw.tt.TTLinear.from_linear(torch.nn.Linear(64, 64), max_rank=4)
            >>> layer.ranks
            (4,)
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        decomposition.one_given(eps=eps, max_rank=max_rank, target_params=target_params)
        check_trained("linear", linear.weight)
        weight, bias = linear.weight.detach(), linear.bias
        modes = find_modes(linear.in_features, linear.out_features, in_modes, out_modes, "matrix")
        if target_params is not None:
            _check.positive_int("target_params", target_params)
            extra = 0 if bias is None else bias.numel()
            sizes = tuple(m * n for m, n in zip(modes[1], modes[0], strict=True))
            max_rank = largest_rank(sizes, target_params - extra, max_rank, f"target_params = {target_params}")
        padded = F.pad(
            weight.double(), (0, prod(modes[0]) - linear.in_features, 0, prod(modes[1]) - linear.out_features)
        )
        cores = decomposition.tt_matrix_svd(padded, modes[1], modes[0], eps=eps, max_rank=max_rank)
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank=[core.shape[0] for core in cores[1:]],
            in_modes=exact(modes[0], linear.in_features),
            out_modes=exact(modes[1], linear.out_features),
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.set_cores(cores)
        if bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        _check.is_tensor("x", x)
        if x.dim() < 1 or x.size(-1) != self.in_features:
            raise ValueError(f"x must have a last dimension of in_features = {self.in_features}, got {list(x.shape)}")
        if self.padded_in != self.in_features:
            x = F.pad(x, (0, self.padded_in - self.in_features))
        # The cores fit together and to x already: all that is left to check is the dtype and the device.
        if self.padded_out == self.out_features:
            return functional.apply_checked(x, self.cores, self.bias, self._signature)
        y = functional.apply_checked(x, self.cores, None, self._signature)[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self) -> Tensor:
        """W [out_features, in_features]; differentiable."""
        weight = reference.merge(reference.as_matrix(self.cores, self._signature.in_cores))[0, :, :, 0]
        return weight[: self.out_features, : self.in_features]

    @property
    def compression_ratio(self) -> float:
        """Parameters of the dense layer over those of this one, bias included in both."""
        extra = 0 if self.bias is None else self.out_features
        return (self.in_features * self.out_features + extra) / (self.core_parameters + extra)

    def explain(self, batch: int) -> str:
        """How a batch of this many rows is computed: order, FLOPs, bytes, forward and backward.

        Example:
            >>> import finite_width as fw
            >>> print(fw.tt.TTLinear(1024, 1024, rank=8).explain(64).splitlines()[0])
            batch 64: cores merged as 2+2; fused halves, the left factor first
        """
        _check.positive_int("batch", batch)
        first = self.cores[0]
        chosen = precision.chosen() if first.is_cuda and ops.has_cuda_kernels() else None
        return str(planner.plan(self._signature.shapes, batch, first.dtype, chosen))

    def extra_repr(self) -> str:
        text = (
            f"{self.in_features}, {self.out_features}, in_modes={self.in_modes}, out_modes={self.out_modes}, "
            f"ranks={self.ranks}, layout={self.layout!r}, bias={self.bias is not None}"
        )
        if self.padded_in != self.in_features:
            text += f", x padded with zeros to {self.padded_in}"
        if self.padded_out != self.out_features:
            text += f", rows beyond {self.out_features} of {self.padded_out} dropped"
        return text


def check_trained(name: str, weight: Tensor) -> None:
    """Raise unless the weight of the layer that the argument is holds real values."""
    if weight.is_meta:
        raise ValueError(f"{name} must have a weight with values, but it is on the meta device: load them first")
    if weight.is_complex():
        raise TypeError(f"{name} must have a real weight, got {str(weight.dtype).removeprefix('torch.')}")


def exact(modes: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """The modes, or None where they are padded and the layer finds them again itself."""
    return modes if prod(modes) == size else None


def find_modes(
    in_features: int,
    out_features: int,
    in_modes: Sequence[int] | None,
    out_modes: Sequence[int] | None,
    layout: str,
    names: tuple[str, str] = ("in_features", "out_features"),
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input modes, output modes): those given, checked; balanced ones for those left out."""
    given_in = given_out = None
    if in_modes is not None:
        name = "in_modes" if names[0] == "in_features" else "dim_modes"
        given_in = as_modes(name, in_modes)
        check_modes(name, given_in, in_features, names[0])
    if out_modes is not None:
        name = "out_modes" if names[1] == "out_features" else "num_modes"
        given_out = as_modes(name, out_modes)
        check_modes(name, given_out, out_features, names[1])
    if given_in is None:
        count = number_of_cores(in_features, out_features) if given_out is None else len(given_out)
        given_in = choose_modes(in_features, count)
    if given_out is None:
        given_out = choose_modes(out_features, len(given_in))
    if layout == "matrix" and len(given_in) != len(given_out):
        raise ValueError(f'layout "matrix" needs as many in_modes as out_modes, got {given_in} and {given_out}')
    return given_in, given_out


def largest_rank(
    sizes: tuple[int, ...], parameters: int, max_rank: int | Sequence[int] | None, asked: str
) -> list[int]:
    """The ranks, uniform but for their limits, with the most parameters not above the given number.

    Args:
        sizes: the number of values that each core holds for one pair of ranks: m_k n_k.
        asked: what the user asked for, for the error message.
    """
    limits = bond_limits(sizes)
    if max_rank is not None:
        wanted = decomposition.check_ranks("max_rank", max_rank, len(limits))
        limits = tuple(min(a, b) for a, b in zip(limits, wanted, strict=True) if b is not None)
    best: list[int] | None = None
    low, high = 1, max(limits, default=1)
    while low <= high:
        rank = (low + high) // 2
        ranks = [min(rank, limit) for limit in limits]
        if train_size(sizes, ranks) <= parameters:
            best, low = ranks, rank + 1
        else:
            high = rank - 1
    if best is None:
        least = train_size(sizes, [1] * len(limits))
        raise ValueError(f"{asked} leaves {parameters} parameters for the cores, but rank 1 already takes {least}")
    return best
