"""The empirical NTK of MLPs (A, B, C) and a small CNN (D, E), against plain torch and torch.func; larger on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw
import harness
import ntk_peers
from harness import Case

MEBIBYTE = 1 << 20


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn() -> nn.Sequential:
    """The CNN of PyTorch's NTK tutorial: three 3×3 convolutions of 32 channels on 32×32 images, ten outputs."""
    torch.manual_seed(0)
    convolutions: list[nn.Module] = []
    for channels in (3, 32, 32):
        convolutions += [nn.Conv2d(channels, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 26 * 26, 10)).eval()


def dense_flops(widths: tuple[int, ...], rows: int, columns: int, compute: str) -> float:
    """The least operations for an MLP: forward, backward for all outputs, and the products of Jacobians."""
    layers, outputs = list(pairwise(widths)), widths[-1]
    products = outputs**2 if compute == "full" else outputs
    forward = sum(a * b for a, b in layers)
    backward = outputs * sum(a * b for a, b in layers[1:])
    kernel = sum(a for a, _ in layers) + products * sum(b for _, b in layers)
    return 2.0 * ((rows + columns) * (forward + backward) + rows * columns * kernel)


def conv_flops(rows: int, columns: int, compute: str) -> float:
    """The same for the CNN, with per-example gradients."""
    layers = [(3, 30), (32, 28), (32, 26)]  # channels in and positions per side out of each convolution
    last, outputs = 32 * 26 * 26, 10
    products = outputs**2 if compute == "full" else outputs
    taps = [9 * channels * 32 for channels, _ in layers]
    forward = sum(size * side**2 for size, (_, side) in zip(taps, layers, strict=True)) + last * outputs
    backward = outputs * (
        sum(size * side**2 for size, (_, side) in zip(taps[1:], layers[1:], strict=True)) + last * outputs
    )
    gradients = outputs * sum(size * side**2 for size, (_, side) in zip(taps, layers, strict=True))
    kernel = last + outputs * products + products * sum(size + 32 for size in taps)
    return 2.0 * ((rows + columns) * (forward + backward + gradients) + rows * columns * kernel)


def _calls(model: nn.Module, x1: Tensor, x2: Tensor, compute: str) -> tuple[dict[str, Any], Callable[[], Tensor]]:
    calls = {
        "finite-width": lambda: fw.ntk.empirical_ntk(model, x1, x2, compute=compute),
        "structured, plain torch": lambda: ntk_peers.structured(model, x1, x2, compute),
    }
    wide = copy.deepcopy(model).double()
    return calls, lambda: ntk_peers.structured(wide, x1.double(), x2.double(), compute)


def _peers(model: nn.Module, x1: Tensor, x2: Tensor, compute: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    every = {
        "torch.func contraction": lambda: ntk_peers.contraction(model, x1, x2, compute),
        "torch.func NTK-vector products": lambda: ntk_peers.vector_products(model, x1, x2, compute),
    }
    too_large = "left out: its Jacobians or pairwise products do not fit 13 GiB, or it takes minutes"
    return {name: call if name in wanted else too_large for name, call in every.items()}


CONTRACTION, PRODUCTS = "torch.func contraction", "torch.func NTK-vector products"


def case(
    name: str,
    widths: tuple[int, ...] | None,
    rows: int,
    columns: int,
    compute: str,
    targets: dict[tuple[str, str], float],
    peers: tuple[str, ...] = (),
    budget: int | None = None,
) -> Case:
    """One comparison on x1 ≠ x2: an MLP of these widths, or the CNN."""
    model = mlp(*widths) if widths else cnn()
    generator = torch.Generator().manual_seed(1)
    shape = (widths[0],) if widths else (3, 32, 32)
    x1, x2 = (torch.randn(count, *shape, generator=generator) for count in (rows, columns))
    calls, exact = _calls(model, x1, x2, compute)
    if budget is not None:
        calls[f"finite-width, memory_budget {budget // MEBIBYTE} MiB"] = lambda: fw.ntk.empirical_ntk(
            model, x1, x2, compute=compute, memory_budget=budget
        )
    flops = dense_flops(widths, rows, columns, compute) if widths else conv_flops(rows, columns, compute)
    what = "-".join(map(str, widths)) if widths else "the tutorial's CNN"
    return Case(
        name=name,
        what=f"{what}, {rows} × {columns} rows, {compute}, float32",
        implementations=calls,
        baseline="structured, plain torch",
        peers=_peers(model, x1, x2, compute, peers),
        exact=exact,
        flops=flops,
        targets=targets,
        limit=25.0,
    )


def symmetric(name: str, widths: tuple[int, ...] | None, rows: int, compute: str) -> Case:
    """x2=None against the same batch passed twice."""
    model = mlp(*widths) if widths else cnn()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *((widths[0],) if widths else (3, 32, 32)), generator=generator)
    same = x.clone()
    wide = copy.deepcopy(model).double()
    twice = "finite-width, two equal batches"
    return Case(
        name=name,
        what=f"{'-'.join(map(str, widths)) if widths else 'CNN'}, {rows} rows, {compute}, x2=None, float32",
        implementations={
            "finite-width, x2=None": lambda: fw.ntk.empirical_ntk(model, x, compute=compute),
            twice: lambda: fw.ntk.empirical_ntk(model, x, same, compute=compute),
        },
        baseline=twice,
        exact=lambda: ntk_peers.structured(wide, x.double(), x.double(), compute),
        targets={("finite-width, x2=None", twice): 1 / 0.6},
    )


SMALL, WIDE = (3072, 256, 256, 1), (784, 1024, 1024, 10)
OURS, PLAIN = "finite-width", "structured, plain torch"


def against(contraction: float | None = None, plain: float | None = None) -> dict[tuple[str, str], float]:
    aims = {(OURS, CONTRACTION): contraction, (OURS, PLAIN): plain}
    return {pair: aim for pair, aim in aims.items() if aim is not None}


def on_gpu(
    name: str,
    widths: tuple[int, ...] | None,
    rows: int,
    compute: str,
    targets: dict[tuple[str, str], float],
    tile: int | None = None,
) -> Case:
    """One comparison in every precision, against plain torch in IEEE float32 and, with `tile`, torch.func in tiles."""
    model = mlp(*widths) if widths else cnn()
    generator = torch.Generator().manual_seed(1)
    shape = (widths[0],) if widths else (3, 32, 32)
    x1, x2 = (torch.randn(rows, *shape, generator=generator, device="cpu").to(harness.DEVICE) for _ in range(2))
    calls, exact = _calls(model, x1, x2, compute)

    def in_precision(precision: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with fw.ntk.cuda_precision(precision):
                return calls[OURS]()

        return call

    what = "-".join(map(str, widths)) if widths else "the tutorial's CNN"
    return Case(
        name=name,
        what=f"{what}, {rows} × {rows} rows, {compute}, float32",
        implementations={
            **{f"{OURS}, {precision}": in_precision(precision) for precision in ("ieee", "split", "bf16")},
            PLAIN: calls[PLAIN],
        },
        baseline=PLAIN,
        peers={CONTRACTION: lambda: ntk_peers.tiled_contraction(model, x1, x2, compute, tile)} if tile else {},
        exact=exact,
        flops=dense_flops(widths, rows, rows, compute) if widths else conv_flops(rows, rows, compute),
        targets=targets,
        min_runs=5,
        limit=20.0,
    )


SPLIT, BF16, IEEE = (f"{OURS}, {precision}" for precision in ("split", "bf16", "ieee"))
LARGE = (3072, 4096, 4096, 1)
GPU_CASES: dict[str, Callable[[], Case]] = {
    "GPU MLP trace": lambda: on_gpu(
        "GPU MLP trace", LARGE, 16384, "trace", {(SPLIT, PLAIN): 2, (BF16, PLAIN): 4, (IEEE, PLAIN): 1}
    ),
    "GPU MLP full": lambda: on_gpu("GPU MLP full", WIDE, 1024, "full", {(SPLIT, CONTRACTION): 200}, 64),
    "GPU CNN full": lambda: on_gpu("GPU CNN full", None, 512, "full", {(SPLIT, CONTRACTION): 5}, 128),
}

CPU_CASES: dict[str, Callable[[], Case]] = {
    "A": lambda: case("A", SMALL, 128, 128, "full", against(120, 1), (CONTRACTION,)),
    "B": lambda: case("B", SMALL, 512, 512, "full", against(200, 1), (CONTRACTION,)),
    "C full": lambda: case("C full", WIDE, 128, 128, "full", against(plain=1.7)),
    "C trace": lambda: case("C trace", WIDE, 128, 128, "trace", against(plain=2)),
    "D full": lambda: case("D full", None, 20, 5, "full", against(6, 1), (CONTRACTION, PRODUCTS)),
    "D trace": lambda: case("D trace", None, 20, 5, "trace", against(plain=1.5), (CONTRACTION,)),
    "E full": lambda: case("E full", None, 64, 64, "full", against(6, 1.7), (CONTRACTION,), 200 * MEBIBYTE),
    "E trace": lambda: case("E trace", None, 64, 64, "trace", against(plain=1.7), (CONTRACTION,)),
    "B x2=None": lambda: symmetric("B x2=None", SMALL, 512, "full"),
    "C full x2=None": lambda: symmetric("C full x2=None", WIDE, 128, "full"),
    "E full x2=None": lambda: symmetric("E full x2=None", None, 64, "full"),
}
CASES = CPU_CASES if harness.DEVICE == "cpu" else GPU_CASES
