"""Results of the CUDA kernels at odd sizes, saved to a file: `values.py FILE`; test_cuda_on_host.py compares them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from finite_width.bayes import ops as bayes
from finite_width.ntk import cuda_precision
from finite_width.ntk.ops import conv_gradients, gram_accumulate, jacobian_accumulate, position_gradients
from finite_width.pathsgd.ops import path_step, path_sweep, path_update
from finite_width.tt.ops import tt_linear_backward

SEED = torch.tensor(-987654321987654321)


def bayes_values(randn: Callable[..., Any]) -> dict[str, Any]:
    """Noise, W, its gradients, and the KL, with sizes on both sides of a group (64), a block (4096) and a quad (4)."""
    values: dict[str, Any] = {}
    for count in (1, 63, 65, 4096, 4097, 9001):
        mu, rho, mean, grad = randn(count), 3 * randn(count), randn(count), randn(count)
        key = f"bayes {count}"
        values[f"{key} noise"] = bayes.noise(mu, SEED, 3, 1)
        values[f"{key} weight"], values[f"{key} kl"] = bayes.sample(mu, rho, SEED, mean, 0.7)
        values[f"{key} centred"] = bayes.sample(mu, rho, SEED, None, None, 1, True)[0]
        backward = torch.ops.finite_width.bayes_sample_backward
        values[f"{key} gradients"] = backward(grad, torch.tensor(0.3), mu, rho, SEED, mean, 0.7, 0, False)
        values[f"{key} gradients of kl"] = backward(None, torch.tensor(0.3), mu, rho, None, None, 0.7, 0, False)
    for batch, wide, out in ((3, 70, 5), (17, 33, 40)):
        pairs = [randn(out, wide), randn(out, wide), randn(out), randn(out)]
        x, grad = randn(batch, wide), randn(batch, out)
        # Products are summed in another order than the CPU's.
        values[f"order samples {batch}"] = bayes.linear_samples(x[None], *pairs, SEED, 2, 3)
        y, kl, deviation = torch.ops.finite_width.bayes_local(x, *pairs, SEED, None, None, 0.7)
        backward = torch.ops.finite_width.bayes_local_backward
        values[f"order local {batch}"] = [y, kl, deviation]
        values[f"order local gradients {batch}"] = backward(
            grad, torch.tensor(0.3), x, *pairs, SEED, None, None, 0.7, deviation, True
        )
    unaligned = randn(4 * 1024 + 1)[1:], randn(4 * 1024 + 1)[1:]
    values["bayes unaligned weight"] = bayes.sample(*unaligned, SEED, None, 1.0)[0]
    return values


def path_values(randn: Callable[..., Any]) -> dict[str, Any]:
    """Sweeps of layers around a forward block (6 rows), a column tile (128) and a chunk of rows (32)."""
    values: dict[str, Any] = {}
    for rows, cols in ((1, 1), (6, 128), (33, 130), (10, 1027), (300, 12)):
        for forward in (True, False):
            for p, momentum in ((2.0, True), (3.0, False), (float("inf"), True)):
                into, out = (cols, rows) if forward else (rows, cols)
                vectors = [randn(n + 1).double().abs() for n in (into, into, out, out)]
                arguments = [
                    randn(rows, cols), randn(rows, cols), randn(rows, cols) if momentum else None,
                    randn(rows), randn(rows), randn(rows) if momentum else None,
                    *vectors, torch.zeros(2, dtype=torch.float64), forward, p, (0.1, 0.9, 1.0, 0.99, -1.0),
                    (0.1, 0.9, 0.0, 1.0, 1.0),
                ]  # fmt: skip
                path_sweep(*arguments)
                values[f"path {rows} {cols} {forward} {p} {momentum}"] = [
                    each for each in arguments if isinstance(each, torch.Tensor)
                ]
    for sizes in ((7, 5), (1030, 130, 6, 3)):
        shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
        lists = [[randn(*shape) for shape in shapes] for _ in range(3)]
        rows = [[randn(shape[0]) for shape in shapes] for _ in range(3)]
        vectors = torch.zeros(2 * sum(size + 1 for size in sizes) + 4 * len(shapes), dtype=torch.float64)
        vectors[: sizes[0]] = 1
        last = 2 * sum(size + 1 for size in sizes) - sizes[-1] - 1
        vectors[last : last + sizes[-1]] = 1
        state = torch.zeros(4, dtype=torch.float64)
        for step in range(3):
            rates = (0.1, 0.9, 1.0, 0.99, -1.0) * 2 * len(shapes)
            path_step(*lists, *rows, vectors, state, 2.0, rates, rebuild=0 if step else 2)
        values[f"path steps {sizes}"] = [*lists[0], *lists[2], *rows[0], *rows[2], vectors, state]
    for count in (1, 1023, 1024, 1025):
        w, g, m, mass = randn(count), randn(count), randn(count), randn(count).double().abs()
        path_update(w, g, m, mass, 3.0, 2.0, (0.1, 0.9, 1.0, 0.99, -1.0))
        values[f"path update {count}"] = [w, m]
    return values


def ntk_values(randn: Callable[..., Any]) -> dict[str, Any]:
    """Kernel tiles around a square of 128, of two batches and of one, in every precision."""
    values: dict[str, Any] = {}
    for precision in ("ieee", "split", "bf16", "split-bf16"):
        for compute, outputs in (("full", 2), ("diagonal", 2), ("trace", 3)):
            a, b, d, e = randn(70, 37), randn(30, 37), randn(70, outputs, 65), randn(30, outputs, 65)
            shape = {"full": [outputs, outputs], "diagonal": [outputs], "trace": []}[compute]
            for name, right in (("two", (b, e)), ("one", (a, d))):
                out = torch.zeros(70, len(right[0]), *shape)
                with cuda_precision(precision):
                    gram_accumulate(out, a, right[0], d, right[1], 1.0, compute)
                values[f"ntk {precision} {compute} {name}"] = out
    long = randn(9, 2, 2100)
    for precision in ("ieee", "split"):
        with cuda_precision(precision):
            jacobian_accumulate(out := torch.zeros(9, 9, 2, 2), long, long, "full")
            values[f"ntk {precision} in parts"] = out
            geometry = ([3, 3], [2, 1], [1, 1], [1, 1], 1, True)
            values[f"ntk {precision} convolution"] = conv_gradients(
                randn(2, 15, 9, 7), randn(2, 3, 45, 5, 7), *geometry
            )
            values[f"ntk {precision} positions"] = position_gradients(randn(2, 33, 20), randn(2, 3, 33, 10))
    return values


def tt_values(randn: Callable[..., Any]) -> dict[str, Any]:
    """Products and gradients of odd modes, around a square (16), a tile (32, 64) and a slot of rows (64)."""
    values: dict[str, Any] = {}
    shapes = {
        "odd": ([(1, 5, 7, 3), (3, 3, 1, 4), (4, 7, 4, 2), (2, 2, 3, 1)], 9),
        "long": ([(1, 2, 3, 2), (2, 3, 2, 1)], 70),
        "large": ([(1, 33, 6, 2), (2, 5, 65, 1)], 9),
    }
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32, "split": torch.float32}
    kinds["float64"] = torch.float64
    for name, (cores, rows) in shapes.items():
        for kind, dtype in kinds.items():
            # Both orders in odd modes; else one for each kind, in turn.
            for left_first in (0, 1) if name == "odd" else (list(kinds).index(kind) % 2,):
                train = [randn(*shape).to(dtype) for shape in cores]
                m, n = prod(shape[1] for shape in cores), prod(shape[2] for shape in cores)
                x, grad, bias = randn(rows, n).to(dtype), randn(rows, m).to(dtype), randn(m).to(dtype)
                plan = [len(cores) // 2, left_first, 0, 0, 0, 0, int(kind == "split")]
                key = f"tt {name} {kind} {left_first}"
                if dtype == torch.float16 and not os.environ.get("FINITE_WIDTH_CUDA_ON_HOST"):
                    continue  # widened before it comes to the CPU's op
                values[key] = torch.ops.finite_width.tt_linear(x, train, bias, plan)
                values[f"{key} gradients"] = tt_linear_backward(grad, x, train, plan, [1, 1, 1])
    return values


def main() -> None:
    if library := os.environ.get("FINITE_WIDTH_CUDA_ON_HOST"):
        torch.ops.load_library(library)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {**bayes_values(randn), **path_values(randn), **ntk_values(randn), **tt_values(randn)}
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
