"""The NTK wing's ops in plain torch: the definitions, the fallback and the test oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# What the ops' argument `compute` may be, in the order of the names in ops.COMPUTE.
FULL, DIAGONAL, TRACE = range(3)


def _add_pairs(out: Tensor, inner: Tensor, left: Tensor, right: Tensor, compute: int) -> None:
    """out += inner [N, M] (a factor, 1 where empty) times the products of left [N, O, K] and right [M, O, K]."""
    if compute == FULL:
        out += inner[:, :, None, None] * torch.einsum("nak,mbk->nmab", left, right)
    elif compute == DIAGONAL:
        out += inner[:, :, None] * torch.einsum("nak,mak->nma", left, right)
    else:
        out += inner * torch.einsum("nak,mak->nm", left, right)


def gram_accumulate(
    out: Tensor, a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, bias: float, compute: int, precision: int
) -> None:
    """out[n, m, a, b] += (a1[n] · a2[m] + bias) (d1[n, a] · d2[m, b]). The precision concerns CUDA kernels alone."""
    _add_pairs(out, a1 @ a2.mT + bias, d1, d2, compute)


def jacobian_accumulate(out: Tensor, j1: Tensor, j2: Tensor, compute: int, precision: int) -> None:
    """out[n, m, a, b] += j1[n, a] · j2[m, b]."""
    _add_pairs(out, out.new_ones(()).expand(j1.shape[0], j2.shape[0]), j1, j2, compute)


def ghost_accumulate(
    out: Tensor, a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, bias: float, compute: int, precision: int
) -> None:
    """out[n, m, a, b] += Σ_{t, s} (a1[n, t] · a2[m, s] + bias) (d1[n, a, t] · d2[m, b, s])."""
    inner = torch.einsum("nti,msi->nmts", a1, a2) + bias
    if compute == FULL:
        out += torch.einsum("nmts,nmabts->nmab", inner, torch.einsum("natc,mbsc->nmabts", d1, d2))
    elif compute == DIAGONAL:
        out += torch.einsum("nmts,nmats->nma", inner, torch.einsum("natc,masc->nmats", d1, d2))
    else:
        out += torch.einsum("nmts,nmats->nm", inner, torch.einsum("natc,masc->nmats", d1, d2))


def position_gradients(a: Tensor, d: Tensor, precision: int) -> Tensor:
    """Σ_t d[n, o, t, c] a[n, t, i], flattened to [N, O, C I]."""
    return torch.einsum("notc,nti->noci", d, a).flatten(2)


def conv_gradients(
    input: Tensor,
    delta: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    precision: int,
) -> Tensor:
    """Per-example weight gradients of a convolution: one product of cotangent and shifted input per kernel tap."""
    spatial = range(len(kernel_size))
    padded = F.pad(input, [side for pad in reversed(padding) for side in (pad, pad)])
    rows, outputs, channels_out = delta.shape[:3]
    positions = delta.shape[3:]
    channels = input.shape[1] // groups
    cotangent = delta.reshape(rows, outputs, groups, channels_out // groups, math.prod(positions))
    taps = []
    for tap in itertools.product(*map(range, kernel_size)):
        window = padded
        for axis in spatial:
            first = tap[axis] * dilation[axis]
            last = first + (positions[axis] - 1) * stride[axis] + 1
            window = window.narrow(axis + 2, first, last - first) if positions[axis] else window.narrow(axis + 2, 0, 0)
            window = window[(slice(None),) * (axis + 2) + (slice(None, None, stride[axis]),)]
        taps.append(
            torch.einsum("nogcs,ngis->nogci", cotangent, window.reshape(rows, groups, channels, math.prod(positions)))
        )
    gradients = torch.stack(taps, -1) if taps else cotangent.new_zeros(rows, outputs, groups, 0, channels, 0)
    gradients = gradients.reshape(rows, outputs, channels_out, channels * math.prod(kernel_size))
    if bias:
        gradients = torch.cat([gradients, delta.flatten(3).sum(3, keepdim=True)], 3)
    return gradients.flatten(2)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    local: bool,
) -> Tensor:
    """torch's convolution with stride 1 and any padding, and 0 where the gate [n mod its rows] is not positive."""
    taps = weight.shape[2:]
    padded = F.pad(input, [side for pad in reversed(padding) for side in (pad, pad)])
    sizes = [size - d * (k - 1) for size, k, d in zip(padded.shape[2:], taps, dilation, strict=True)]
    if min(sizes) <= 0 or len(input) == 0:  # torch refuses a kernel that is larger than its input
        return input.new_zeros(len(input), len(weight), *(max(0, size) for size in sizes))
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(taps)]
    result: Tensor = call(padded, weight, bias, 1, 0, list(dilation), groups).contiguous()
    if gate is None:
        return result
    return result.unflatten(0, (-1, len(gate))).masked_fill(gate <= 0, 0).flatten(0, 1)


def gated_product(a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """a b, and 0 where the gate [m mod its rows] is not positive."""
    product = a @ b
    return product.unflatten(0, (-1, len(gate))).masked_fill(gate <= 0, 0).flatten(0, 1) if len(a) else product
