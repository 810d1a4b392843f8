"""The empirical NTK of MLPs (A, B, C), a CNN (D, E) and larger networks, against torch and torch.func; GPU: ntk_gpu."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw
import harness
import ntk_gpu
import ntk_peers
from harness import Case
from ntk_models import cnn, conv_flops, dense_flops, encoder, mlp, residual

MEBIBYTE = 1 << 20


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


def larger(name: str, what: str, model: nn.Module, x1: Tensor, x2: Tensor, compute: str) -> Case:
    """A network that the structured form in plain torch does not take."""
    wide = copy.deepcopy(model).double()
    wide1, wide2 = (x.double() if x.is_floating_point() else x for x in (x1, x2))
    return Case(
        name=name,
        what=f"{what}, {len(x1)} × {len(x2)} rows, {compute}, float32",
        implementations={
            OURS: lambda: fw.ntk.empirical_ntk(model, x1, x2, compute=compute),
            CONTRACTION: lambda: ntk_peers.contraction(model, x1, x2, compute),
        },
        baseline=CONTRACTION,
        exact=lambda: ntk_peers.contraction(wide, wide1, wide2, compute),
        targets=against(1),
        limit=25.0,
    )


def transformer(name: str, rows: int, compute: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randint(100, (rows, 32), generator=generator) for _ in range(2))
    return larger(name, "Transformer, 2 layers of width 64, 32 tokens", encoder(), x1, x2, compute)


def resnet(name: str, rows: int, compute: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(rows, 3, 32, 32, generator=generator) for _ in range(2))
    return larger(name, "ResNet-18 of widths 16 to 128, 32×32 images", residual(), x1, x2, compute)


SMALL, WIDE = (3072, 256, 256, 1), (784, 1024, 1024, 10)
OURS, PLAIN = "finite-width", "structured, plain torch"


def against(contraction: float | None = None, plain: float | None = None) -> dict[tuple[str, str], float]:
    aims = {(OURS, CONTRACTION): contraction, (OURS, PLAIN): plain}
    return {pair: aim for pair, aim in aims.items() if aim is not None}


CPU_CASES: dict[str, Callable[[], Case]] = {
    "A": lambda: case("A", SMALL, 128, 128, "full", against(120, 1), (CONTRACTION,)),
    "B": lambda: case("B", SMALL, 512, 512, "full", against(200, 1), (CONTRACTION,)),
    "C full": lambda: case("C full", WIDE, 128, 128, "full", against(plain=1.7)),
    "C trace": lambda: case("C trace", WIDE, 128, 128, "trace", against(plain=2)),
    "D full": lambda: case("D full", None, 20, 5, "full", against(6, 1), (CONTRACTION, PRODUCTS)),
    "D trace": lambda: case("D trace", None, 20, 5, "trace", against(plain=1.5), (CONTRACTION,)),
    "E full": lambda: case("E full", None, 64, 64, "full", against(6, 1.7), (CONTRACTION,), 200 * MEBIBYTE),
    "E trace": lambda: case("E trace", None, 64, 64, "trace", against(plain=1.7), (CONTRACTION,)),
    "Transformer trace": lambda: transformer("Transformer trace", 16, "trace"),
    "ResNet-18 trace": lambda: resnet("ResNet-18 trace", 8, "trace"),
    "ResNet-18 full": lambda: resnet("ResNet-18 full", 8, "full"),
    "B x2=None": lambda: symmetric("B x2=None", SMALL, 512, "full"),
    "C full x2=None": lambda: symmetric("C full x2=None", WIDE, 128, "full"),
    "E full x2=None": lambda: symmetric("E full x2=None", None, 64, "full"),
}
CASES = CPU_CASES if harness.DEVICE == "cpu" else ntk_gpu.cases()
