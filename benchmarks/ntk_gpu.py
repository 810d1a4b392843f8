"""The empirical NTK on a GPU, in every precision: MLPs, the tutorial's CNN, ResNet-18, and the products underneath.

What torch computes runs in IEEE float32, unless its name says otherwise. `cases(tiny=True)` are the same cases in
sizes for a processor: tests/ntk/test_gpu_benchmarks.py runs them, so that no typo has to be found on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw
import harness
import ntk_peers
from finite_width.ntk import ops
from finite_width.ntk.precision import PRECISIONS
from harness import Case
from ntk_models import cnn, conv_flops, dense_flops, mlp
from resnet import resnet18

GIBIBYTE = 1 << 30
PLAIN, CONTRACTION = "structured, plain torch", "torch.func contraction"
OURS = {precision: f"finite-width, {precision}" for precision in PRECISIONS}
IEEE, SPLIT, BF16, SPLIT_BF16 = OURS.values()
PASSES = "backward passes alone, cuDNN"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu").to(harness.DEVICE)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """torch's products and convolutions on a GPU with TF32, or without."""
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def within(setting: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with setting():
            return call()

    return run


def in_every_precision(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    return {name: within(partial(fw.ntk.cuda_precision, precision), call) for precision, name in OURS.items()}


def in_ieee(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    return {name: within(partial(tf32, False), call) for name, call in calls.items()}


def kernel_case(
    name: str,
    widths: tuple[int, ...] | None,
    rows: int,
    compute: str,
    targets: dict[tuple[str, str], float],
    tile: int | None = None,
) -> Case:
    """An MLP of these widths, or the CNN, against plain torch and, with `tile`, torch.func in tiles of so many rows."""
    model = mlp(*widths) if widths else cnn()
    shape = (widths[0],) if widths else (3, 32, 32)
    x1, x2 = randn(rows, *shape), randn(rows + 1, *shape)[1:]
    wide = copy.deepcopy(model).double()
    peers = {CONTRACTION: lambda: ntk_peers.tiled_contraction(model, x1, x2, compute, tile or rows)} if tile else {}
    what = "-".join(map(str, widths)) if widths else "the tutorial's CNN"
    return Case(
        name=name,
        what=f"{what}, {rows} × {rows} rows, {compute}, float32",
        implementations={
            **in_every_precision(lambda: fw.ntk.empirical_ntk(model, x1, x2, compute=compute)),
            **in_ieee({PLAIN: lambda: ntk_peers.structured(model, x1, x2, compute)}),
        },
        baseline=PLAIN,
        peers=in_ieee(peers),
        exact=lambda: ntk_peers.structured(wide, x1.double(), x2.double(), compute),
        flops=dense_flops(widths, rows, rows, compute) if widths else conv_flops(rows, rows, compute),
        targets=targets,
        min_runs=5,
        limit=15.0,
        patience=1.0,
    )


def convolution_operations(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Multiply-adds of a row's convolutions, and of all but the first, whose input needs no cotangent."""
    counts: list[int] = []

    def count(module: nn.Conv2d, args: tuple[Tensor], result: Tensor) -> None:
        counts.append(result[0, 0].numel() * module.weight.numel())

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    return float(sum(counts)), float(sum(counts[1:]))


def resnet_case(name: str, rows: int, side: int, widths: tuple[int, ...], tiles: tuple[int, ...]) -> Case:
    """ResNet-18 in eval mode within 20 GiB, against torch.func in tiles and cuDNN's backward passes alone."""
    torch.manual_seed(0)
    model = resnet18(True, widths).eval()
    x1, x2 = randn(rows, 3, side, side), randn(rows + 1, 3, side, side)[1:]
    wide = copy.deepcopy(model).double()
    forward, backward = convolution_operations(model, x1)
    outputs, parameters = 10, sum(value.numel() for value in model.parameters())
    # Forward, cotangents and per-example gradients of both sides, and the products of Jacobians.
    flops = 4.0 * rows * (forward + outputs * (backward + forward)) + 2.0 * rows**2 * outputs**2 * parameters

    def exact() -> Tensor:
        with fw.reference_only():
            return fw.ntk.empirical_ntk(wide, x1.double(), x2.double(), compute="full")

    # Ten cotangents for each row, as that many rows; no gradients of parameters.
    frozen = copy.deepcopy(model).requires_grad_(False)
    repeated = x1.repeat(outputs, 1, 1, 1).requires_grad_()
    with tf32(False):
        result = frozen(repeated)
    unit = torch.eye(outputs, device=result.device).repeat_interleave(rows, 0)
    passes = {PASSES: lambda: torch.autograd.grad(result, repeated, unit, retain_graph=True)}
    # Half of cuDNN's rate on these passes, over all that the kernel needs.
    share = 2.0 * rows * outputs * forward / flops
    peers = {
        f"{CONTRACTION}, tiles of {tile}": partial(ntk_peers.tiled_contraction, model, x1, x2, "full", tile)
        for tile in tiles
    }
    ours = in_every_precision(lambda: fw.ntk.empirical_ntk(model, x1, x2, compute="full", memory_budget=20 * GIBIBYTE))
    return Case(
        name=name,
        what=f"ResNet-18 (eval), {rows} × {rows} images of 3×{side}×{side}, ten outputs, full, float32, 20 GiB",
        implementations={**ours, **in_ieee(passes)},
        baseline=IEEE,
        peers=in_ieee(peers),
        exact=exact,
        flops=flops,
        targets={
            **{(SPLIT, f"{CONTRACTION}, tiles of {tile}"): 1.5 for tile in tiles},
            (SPLIT, PASSES): share / 2,
        },
        min_runs=5,
        limit=15.0,
        patience=1.0,
        not_compared=(PASSES,),
    )


def _two_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as hi + lo, where hi has TF32's eleven significant bits."""
    high = (x.view(torch.int32) & -0x2000).view(torch.float32)
    return high, x - high


def _three_tf32_products(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    (high, low), (other_high, other_low) = _two_tf32(left), _two_tf32(right)
    for one, two in ((low, other_high), (high, other_low), (high, other_high)):
        out.addmm_(one, two.t())
    return out


def product_case(name: str, rows: int, depth: int) -> Case:
    """What a kernel tile is made of, out += j1 j2ᵀ: the kernel in every precision, and cuBLAS through torch."""
    j1, j2 = randn(rows, depth), randn(rows + 1, depth)[1:]
    out = torch.zeros(rows, rows, device=harness.DEVICE)

    def ours() -> Tensor:
        ops.jacobian_accumulate(out.zero_(), j1.unsqueeze(1), j2.unsqueeze(1), "trace")
        return out

    cublas = {
        "torch.mm, ieee": within(partial(tf32, False), lambda: out.zero_().addmm_(j1, j2.t())),
        "torch.mm, three of TF32 parts": within(partial(tf32, True), lambda: _three_tf32_products(out.zero_(), j1, j2)),
        "torch.mm, TF32": within(partial(tf32, True), lambda: out.zero_().addmm_(j1, j2.t())),
        "torch.mm, bf16": lambda: out.zero_().add_(j1.bfloat16() @ j2.bfloat16().t()),
    }
    return Case(
        name=name,
        what=f"out [{rows}, {rows}] += j1 j2ᵀ over {depth} values, float32",
        implementations={**in_every_precision(ours), **cublas},
        baseline="torch.mm, ieee",
        exact=lambda: j1.double() @ j2.double().t(),
        flops=2.0 * rows**2 * depth,
        targets={(SPLIT, "torch.mm, three of TF32 parts"): 1, (BF16, "torch.mm, bf16"): 1},
        min_runs=10,
        seconds=0.3,
        limit=3.0,
    )


def fused_case(name: str, rows: int, inputs: int, channels: int) -> Case:
    """A dense layer's part of a trace tile, out += (a1 a2ᵀ + 1) ∘ (d1 d2ᵀ): fused, and three steps of torch."""
    a1, a2 = randn(rows, inputs), randn(rows + 1, inputs)[1:]
    d1, d2 = randn(rows, channels), randn(rows + 2, channels)[2:]
    out = torch.zeros(rows, rows, device=harness.DEVICE)

    def ours() -> Tensor:
        ops.gram_accumulate(out.zero_(), a1, a2, d1.unsqueeze(1), d2.unsqueeze(1), 1.0, "trace")
        return out

    plain = {"torch.mm, ieee": lambda: out.zero_().addcmul_((a1 @ a2.t()).add_(1), d1 @ d2.t())}
    return Case(
        name=name,
        what=f"out [{rows}, {rows}] += (a1 a2ᵀ + 1) ∘ (d1 d2ᵀ) over {inputs} and {channels} values, float32",
        implementations={**in_every_precision(ours), **in_ieee(plain)},
        baseline="torch.mm, ieee",
        exact=lambda: (a1.double() @ a2.double().t() + 1) * (d1.double() @ d2.double().t()),
        flops=2.0 * rows**2 * (inputs + channels),
        min_runs=10,
        seconds=0.3,
        limit=3.0,
    )


def gradients_case(name: str, rows: int, channels: int, side: int, outputs: int) -> Case:
    """Per-example gradients of a 3×3 convolution: the kernel, the reference's taps, and an unfolded batched product."""
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    input, delta = randn(rows, channels, side, side), randn(rows, outputs, channels, side, side)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1, False)

    def in_float32() -> Tensor:
        with fw.reference_only():
            return ops.conv_gradients(input, delta, *geometry)

    plain = {
        "unfolded, torch.bmm": lambda: ntk_peers._conv_gradients(layer, input, delta),
        "plain-torch reference": in_float32,
    }
    return Case(
        name=name,
        what=f"{rows} rows, {outputs} outputs, {channels} channels, 3×3 on {side}×{side}, float32",
        implementations={
            **in_every_precision(lambda: ops.conv_gradients(input, delta, *geometry)),
            **in_ieee(plain),
        },
        baseline="unfolded, torch.bmm",
        exact=lambda: ntk_peers._conv_gradients(layer, input.double(), delta.double()),
        flops=2.0 * rows * outputs * channels**2 * 9 * side**2,
        targets={(SPLIT, "unfolded, torch.bmm"): 1},
        min_runs=10,
        seconds=0.3,
        limit=3.0,
    )


def cases(tiny: bool = False) -> dict[str, Callable[[], Case]]:
    """The cases by name; tiny ones run on a processor in a second or two each."""
    mlp_aims = {(SPLIT, PLAIN): 2, (SPLIT_BF16, PLAIN): 2, (BF16, PLAIN): 4, (IEEE, PLAIN): 1}
    tutorial = {(SPLIT, CONTRACTION): 5}
    found: dict[str, Callable[[], Case]] = {
        "GPU MLP trace": lambda: (
            kernel_case("GPU MLP trace", (33, 40, 40, 1), 70, "trace", mlp_aims)
            if tiny
            else kernel_case("GPU MLP trace", (3072, 4096, 4096, 1), 16384, "trace", mlp_aims)
        ),
        "GPU MLP full": lambda: kernel_case(
            "GPU MLP full",
            (20, 24, 24, 10) if tiny else (784, 1024, 1024, 10),
            24 if tiny else 1024,
            "full",
            {(SPLIT, CONTRACTION): 200},
            8 if tiny else 64,
        ),
        "GPU CNN full": lambda: kernel_case(
            "GPU CNN full", None, 4 if tiny else 512, "full", tutorial, 2 if tiny else 128
        ),
    }
    for rows, depth in ((20, 40), (9, 3000)) if tiny else ((4096, 4096), (5120, 9216), (320, 1 << 20), (32, 1 << 22)):
        name = f"GPU product {rows} {depth}"
        found[name] = partial(product_case, name, rows, depth)
    for rows, inputs, channels in ((20, 30, 40),) if tiny else ((4096, 3072, 4096), (1024, 784, 1024)):
        name = f"GPU fused {rows} {inputs} {channels}"
        found[name] = partial(fused_case, name, rows, inputs, channels)
    for rows, channels, side, outputs in ((2, 5, 6, 3),) if tiny else ((32, 64, 56, 10), (32, 512, 7, 10)):
        name = f"GPU gradients {channels} {side}"
        found[name] = partial(gradients_case, name, rows, channels, side, outputs)
    # Last, since torch.func may take its time over it.
    found["GPU ResNet-18 full"] = lambda: (
        resnet_case("GPU ResNet-18 full", 2, 32, (4, 8, 8, 16), (1, 2))
        if tiny
        else resnet_case("GPU ResNet-18 full", 32, 224, (64, 128, 256, 512), (8, 16))
    )
    return found
