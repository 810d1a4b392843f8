"""Tensor-Train layers, forward and backward: against the dense layer, and all that plain torch and the peers do.

Every implementation gets the same x [B, N], the same gradient of the result and the same cores, and returns the
result and the gradients of x, the cores and the bias. "dense, best GEMM" is a dense layer on this machine's best
matrix product instead of torch's own, so that nobody takes a slow product of torch's for a gain of ours.

The cases "grid ..." hold the planner's choice against reconstruction and every unfused chain, rank by rank.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import finite_width as fw
import harness
from finite_width._gemm import gemm
from harness import Case


@dataclass(frozen=True)
class Shape:
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    rank: int

    @property
    def text(self) -> str:
        modes = f"{self.in_modes} → {self.out_modes}".replace(" ", "").replace("→", " → ")
        return f"{prod(self.in_modes)} → {prod(self.out_modes)}, modes {modes}, rank {self.rank}"


SHAPES = {
    "P": Shape((4, 8, 8, 4), (4, 8, 8, 4), 8),
    "R": Shape((8, 8, 8, 8), (8, 8, 8, 8), 16),
    "S": Shape((4, 7, 4, 7), (5, 5, 5, 5), 8),
    "U": Shape((8, 8, 8, 8), (4, 8, 8, 4), 8),
}


class Problem:
    """One batch, its cores and what every implementation does with them."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": harness.DEVICE, "dtype": dtype}
        self.shape, self.batch = shape, batch
        self.rows, self.columns = prod(shape.out_modes), prod(shape.in_modes)
        bonds = [1, *[shape.rank] * (len(shape.in_modes) - 1), 1]
        pairs = zip(shape.out_modes, shape.in_modes, strict=True)
        self.cores = [
            torch.randn(bonds[k], m, n, bonds[k + 1], **options).mul_(0.3).requires_grad_()
            for k, (m, n) in enumerate(pairs)
        ]
        self.bias = torch.randn(self.rows, **options).requires_grad_()
        self.x = torch.randn(batch, self.columns, **options).requires_grad_()
        self.grad = torch.randn(batch, self.rows, **options)
        self.linear = torch.nn.Linear(self.columns, self.rows, **options)

    def both_ways(self, forward: Callable[[], Tensor], inputs: Sequence[Tensor] | None = None) -> Callable[[], Any]:
        """The result and all gradients."""
        inputs = [self.x, *self.cores, self.bias] if inputs is None else inputs

        def call() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, inputs, self.grad))

        return call

    def dense_layer(self) -> Callable[[], Any]:
        parameters = [self.x, self.linear.weight, self.linear.bias]
        return self.both_ways(lambda: F.linear(self.x, self.linear.weight, self.linear.bias), parameters)

    def dense_best(self) -> Callable[[], Any]:
        parameters = [self.x, self.linear.weight, self.linear.bias]
        return self.both_ways(lambda: gemm(self.x, self.linear.weight.mT, self.linear.bias), parameters)

    def exact(self) -> Any:
        cores = [core.detach().double().requires_grad_() for core in self.cores]
        x, bias = (value.detach().double().requires_grad_() for value in (self.x, self.bias))
        y = F.linear(x, fw.tt.tt_to_dense(cores), bias)
        return (y.detach(), *torch.autograd.grad(y, [x, *cores, bias], self.grad.double()))


def merge(cores: Sequence[Tensor]) -> Tensor:
    """Consecutive cores as one, in plain torch."""
    merged = cores[0]
    for core in cores[1:]:
        left, m, n, _ = merged.shape
        _, p, q, right = core.shape
        merged = torch.tensordot(merged, core, 1).permute(0, 1, 3, 2, 4, 5).reshape(left, m * p, n * q, right)
    return merged


def chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor, left_first: bool) -> Tensor:
    """x meets one factor after another, each step one batched product in plain torch."""
    batch = x.shape[0]
    if left_first:
        state = x.reshape(batch, 1, 1, -1)
        for rank, m, n, after, factor in ((*f.shape, f) for f in factors):
            weight = factor.permute(1, 3, 0, 2).reshape(m * after, rank * n)
            state = (weight @ state.reshape(batch, state.shape[1], rank * n, -1)).reshape(
                batch, state.shape[1] * m, after, -1
            )
    else:
        state = x.reshape(batch, -1, 1, 1)
        for rank, m, n, after, factor in ((*f.shape, f) for f in reversed(factors)):
            weight = factor.reshape(rank * m, n * after)
            parts = state.reshape(batch, -1, n * after, state.shape[3])
            state = (weight @ parts).reshape(batch, -1, rank, m * parts.shape[3])
    return state.reshape(batch, -1) + bias


def halves_flat(x: Tensor, cores: Sequence[Tensor], bias: Tensor) -> Tensor:
    """The right half first, as one product of all rows of x; then the left half, row by row."""
    left, right = merge(cores[: len(cores) // 2])[0], merge(cores[len(cores) // 2 :])[..., 0]
    (m1, n1, rank), (_, m2, n2) = left.shape, right.shape
    middle = x.reshape(-1, n2) @ right.permute(2, 0, 1).reshape(n2, rank * m2)
    y = left.reshape(m1, n1 * rank) @ middle.reshape(x.shape[0], n1 * rank, m2)
    return y.reshape(x.shape[0], m1 * m2) + bias


def unfused(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Every order of cores or halves that one would write in plain torch, without reconstruction."""
    cores, x, bias = problem.cores, problem.x, problem.bias

    def pair() -> list[Tensor]:
        return [merge(cores[: len(cores) // 2]), merge(cores[len(cores) // 2 :])]

    return {
        "halves, left first": problem.both_ways(lambda: chain(x, pair(), bias, True)),
        "halves, right first": problem.both_ways(lambda: chain(x, pair(), bias, False)),
        "halves, one product": problem.both_ways(lambda: halves_flat(x, cores, bias)),
        "cores, from the left": problem.both_ways(lambda: chain(x, cores, bias, True)),
        "cores, from the right": problem.both_ways(lambda: chain(x, cores, bias, False)),
    }


def largest_intermediate(shape: Shape, batch: int, implementation: str) -> int:
    """Bytes of the largest intermediate that an unfused chain writes, float32."""
    m1, n1 = prod(shape.out_modes[:2]), prod(shape.in_modes[:2])
    m2, n2 = prod(shape.out_modes[2:]), prod(shape.in_modes[2:])
    if implementation.startswith("halves"):
        return 4 * batch * shape.rank * (m1 * n2 if "left" in implementation else n1 * m2)
    sizes, count = [], len(shape.in_modes)
    for k in range(1, count):
        done, left = (
            (shape.out_modes[:k], shape.in_modes[k:])
            if "left" in implementation
            else (
                shape.out_modes[k:],
                shape.in_modes[:k],
            )
        )
        sizes.append(4 * batch * shape.rank * prod(done) * prod(left))
    return max(sizes)


def one_call(problem: Problem, contract: Callable[..., Tensor]) -> Callable[[], Any]:
    """The whole product as one einsum of x and the cores."""
    count = len(problem.cores)
    letters = iter(string.ascii_letters)
    batch = next(letters)
    outs, ins, bonds = ([next(letters) for _ in range(n)] for n in (count, count, count + 1))
    terms = [f"{bonds[k]}{outs[k]}{ins[k]}{bonds[k + 1]}" for k in range(count)]
    equation = ",".join([batch + "".join(ins), *terms]) + "->" + batch + "".join(outs)

    def forward() -> Tensor:
        x = problem.x.reshape(problem.batch, *problem.shape.in_modes)
        return contract(equation, x, *problem.cores).reshape(problem.batch, -1) + problem.bias

    return problem.both_ways(forward)


def peers(problem: Problem) -> dict[str, Callable[[], Any] | str]:
    found: dict[str, Callable[[], Any] | str] = {}
    try:
        import opt_einsum
    except ImportError:
        found["opt_einsum"] = "not installed: pip install opt_einsum"
    else:
        contract = functools.cache(
            lambda equation, *shapes: opt_einsum.contract_expression(equation, *shapes, optimize="optimal")
        )
        found["opt_einsum"] = one_call(
            problem, lambda equation, *operands: contract(equation, *(tuple(o.shape) for o in operands))(*operands)
        )
    try:
        import tltorch
    except ImportError:
        found["tltorch"] = "not installed: pip install tensorly-torch"
    else:
        layer = tltorch.FactorizedLinear(
            problem.shape.in_modes,
            problem.shape.out_modes,
            bias=True,
            factorization="blocktt",
            rank=problem.shape.rank,
            implementation="factorized",
        )
        with torch.no_grad():
            for mine, core in zip(layer.weight.factors, problem.cores, strict=True):
                mine.copy_(core)
            layer.bias.copy_(problem.bias)
        inputs = [problem.x, *layer.weight.factors, layer.bias]
        found["tltorch"] = problem.both_ways(lambda: layer(problem.x), inputs)
    return found


def flops(shape: Shape, batch: int) -> float:
    """The fewest of forward and backward: each pass through the halves or the dense W, the better half first.

    Through the halves, a and b multiply-adds a row, the intermediate made twice: a + b forward; backward a + b for the
    gradient of x, 2a + 2b for those of the halves, b of them shared. The dense W takes M N a row, and M N r to build
    it, twice that for the halves' gradients from its own. Merging the cores is not counted.
    """
    m1, n1 = prod(shape.out_modes[:2]), prod(shape.in_modes[:2])
    m2, n2 = prod(shape.out_modes[2:]), prod(shape.in_modes[2:])
    dense, build = batch * m1 * m2 * n1 * n2, shape.rank * m1 * m2 * n1 * n2
    totals = []
    for first, second in ((m1 * n1 * n2, m1 * m2 * n2), (n1 * n2 * m2, n1 * m1 * m2)):
        a, b = batch * shape.rank * first, batch * shape.rank * second
        through_x, through_cores = dense + build, dense + 2 * build
        backward = min(3 * a + 2 * b, a + b + through_cores, 2 * a + 2 * b + through_x, through_x + through_cores)
        totals.append(min(a + b, dense + build) + backward)
    return 2.0 * min(totals)


def main_case(name: str, batch: int, targets: dict[tuple[str, str], float]) -> Case:
    shape = SHAPES[name]
    problem = Problem(shape, batch)
    chains = unfused(problem)
    implementations = {
        "finite-width": problem.both_ways(lambda: fw.tt.tt_linear(problem.x, problem.cores, problem.bias)),
        "nn.Linear": problem.dense_layer(),
        "dense, best GEMM": problem.dense_best(),
        "reconstruct + matmul": problem.both_ways(
            lambda: F.linear(problem.x, merge(problem.cores)[0, :, :, 0], problem.bias)
        ),
        "einsum, one call": one_call(problem, torch.einsum),
        **chains,
    }
    ours = "finite-width"
    aims = {(ours, against): ratio for (_, against), ratio in targets.items() if against != "unfused"}
    if (ours, "unfused") in targets:
        aims |= {(ours, each): targets[ours, "unfused"] for each in chains}
    exact = problem.exact
    case = Case(
        name=f"{name} B={batch}",
        what=f"{shape.text}, B={batch}, float32, forward+backward",
        implementations=implementations,
        peers=peers(problem),
        baseline="dense, best GEMM",
        exact=exact,
        flops=flops(shape, batch),
        bytes=4.0 * batch * (2 * problem.rows + 3 * problem.columns),
        targets=aims,
        not_compared=("nn.Linear", "dense, best GEMM"),
    )
    return case


def grid_case(name: str, rank: int, batch: int) -> Case:
    shape = Shape(SHAPES[name].in_modes, SHAPES[name].out_modes, rank)
    problem = Problem(shape, batch)
    limit = 1 << 30
    missing: dict[str, Callable[[], Any] | str] = {}
    chains = {}
    for each, call in unfused(problem).items():
        size = largest_intermediate(shape, batch, each)
        if size > limit:
            missing[each] = f"left out: it writes an intermediate of {size / 1e9:.1f} GB several times over"
        else:
            chains[each] = call
    implementations = {
        "finite-width": problem.both_ways(lambda: fw.tt.tt_linear(problem.x, problem.cores, problem.bias)),
        "reconstruct + matmul": problem.both_ways(
            lambda: F.linear(problem.x, merge(problem.cores)[0, :, :, 0], problem.bias)
        ),
        "dense, best GEMM": problem.dense_best(),
        **chains,
    }
    return Case(
        name=f"grid {name} r={rank} B={batch}",
        what=f"{shape.text}, B={batch}, float32, forward+backward",
        implementations=implementations,
        peers=missing,
        baseline="dense, best GEMM",
        not_compared=("dense, best GEMM",),
        exact=problem.exact,
        flops=flops(shape, batch),
        targets={("finite-width", each): 1 / 1.1 for each in ("reconstruct + matmul", *chains)},
        min_runs=3 if batch > 1000 else 10,
        seconds=0.2,
        limit=6.0,
        patience=1.0,
        memory=False,
    )


def two_products() -> Case:
    """The two-core network 784 × 50 × 10 at B=64: all overhead."""
    torch.manual_seed(0)
    layer = fw.tt.TTLinear(784, 10, rank=[50], in_modes=(784,), out_modes=(10,), layout="in_out", bias=False)
    first, second = (core.detach().clone().requires_grad_() for core in layer.cores)
    a, b = (core.detach()[0].clone().requires_grad_() for core in (first, second.transpose(0, 2)))
    b = second.detach()[:, :, 0].clone().requires_grad_()
    dense = torch.nn.Linear(784, 10, bias=False)
    x, grad = torch.rand(64, 784), torch.randn(64, 10)

    def train(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        def call() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, inputs, grad))

        return call

    def exact() -> Any:
        wide = [value.detach().double().requires_grad_() for value in (a, b)]
        y = x.double() @ wide[0] @ wide[1]
        da, db = torch.autograd.grad(y, wide, grad.double())
        return y.detach(), da[None], db[..., None]

    def plain() -> Tensor:
        return x @ a @ b

    reshaped = train(plain, [a, b])
    return Case(
        name="784x50x10 B=64",
        what="two cores [1, 784, 50], [50, 10, 1], B=64, float32, forward+backward, no gradient of x",
        implementations={
            "finite-width": train(lambda: layer(x), list(layer.cores)),
            "two products": lambda: (lambda y, da, db: (y, da[None], db[..., None]))(*reshaped()),
            "einsum, one call": train(lambda: torch.einsum("ni,oia,ajp->nj", x, first, second), [first, second]),
            "nn.Linear(784, 10)": train(lambda: dense(x), [dense.weight]),
        },
        baseline="two products",
        exact=exact,
        flops=2.0 * 64 * 50 * (2 * 784 + 3 * 10),
        targets={("finite-width", "two products"): 1.0},
        not_compared=("nn.Linear(784, 10)",),
        memory=False,
    )


def ours(problem: Problem, precision: str = "ieee") -> Callable[[], Any]:
    def forward() -> Tensor:
        with fw.tt.cuda_precision(precision):
            return fw.tt.tt_linear(problem.x, problem.cores, problem.bias)

    return problem.both_ways(forward)


def gpu_case(name: str, batch: int, dtype: torch.dtype, aim: float) -> Case:
    """On a GPU, against the best unfused chain (`aim` times as fast as each of them), the dense layer and W rebuilt."""
    shape, half = SHAPES[name], dtype == torch.bfloat16
    problem = Problem(shape, batch, dtype)
    chains = unfused(problem)
    mine = {OURS: ours(problem)} if half else {f"{OURS}, {each}": ours(problem, each) for each in PRECISIONS}
    text = "bfloat16" if half else "float32"
    return Case(
        name=f"{name} B={batch} {text}",
        what=f"{shape.text}, B={batch}, {text}, forward+backward",
        implementations={
            **mine,
            "nn.Linear": problem.dense_layer(),
            "reconstruct + matmul": problem.both_ways(
                lambda: F.linear(problem.x, merge(problem.cores)[0, :, :, 0], problem.bias)
            ),
            **chains,
        },
        baseline="nn.Linear",
        exact=problem.exact,
        flops=flops(shape, batch),
        half=half,
        bytes=float(problem.x.element_size()) * batch * (2 * problem.rows + 3 * problem.columns),
        targets={(OURS, each): aim for each in chains} if half else {},
        not_compared=("nn.Linear",),
        min_runs=10,
        seconds=1.0,
        limit=12.0,
    )


def gpu_memory(name: str, batch: int) -> harness.Run:
    """What forward and backward hold on a GPU beside y and the gradient of x: at most a tenth of a chain's."""

    def make() -> harness.Record:
        problem = Problem(SHAPES[name], batch, torch.bfloat16)
        results = 2 * batch * (problem.rows + problem.columns)  # y and the gradient of x, in bytes
        calls = {OURS: ours(problem), **unfused(problem)}
        held = {each: harness.peak_memory(call) - results for each, call in calls.items()}
        least = min(size for each, size in held.items() if each != OURS)
        figures = {f"MB beyond y and the gradient of x: {each}": round(size / 1e6, 1) for each, size in held.items()}
        return harness.Record(figures, {"at most a tenth of the best unfused chain's": 10 * held[OURS] <= least})

    return harness.Run(f"memory {name} B={batch} bfloat16", f"{SHAPES[name].text}, B={batch}, bfloat16", make)


OURS = "finite-width"
PRECISIONS = ("ieee", "split", "tf32")
MAIN: dict[str, tuple[str, int, dict[tuple[str, str], float]]] = {
    "P B=1024": (
        "P",
        1024,
        {(OURS, "nn.Linear"): 3.0, (OURS, "reconstruct + matmul"): 3.0, (OURS, "unfused"): 6.0},
    ),
    "P B=64": ("P", 64, {(OURS, "unfused"): 2.0}),
    "R B=64": ("R", 64, {(OURS, "nn.Linear"): 4.5}),
    "S B=1000": ("S", 1000, {(OURS, "nn.Linear"): 1.5}),
}
CPU_CASES: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(main_case, *options) for name, options in MAIN.items()},
    "784x50x10 B=64": two_products,
    **{
        f"grid {name} r={rank} B={batch}": functools.partial(grid_case, name, rank, batch)
        for name in SHAPES
        for rank in (4, 8, 16, 32, 64)
        for batch in (1, 64, 1024, 8192)
    },
}
GPU_CASES: dict[str, Callable[[], Any]] = {
    "P B=65536 bfloat16": functools.partial(gpu_case, "P", 65536, torch.bfloat16, 3.0),
    "R B=16384 bfloat16": functools.partial(gpu_case, "R", 16384, torch.bfloat16, 2.0),
    "S B=65536 bfloat16": functools.partial(gpu_case, "S", 65536, torch.bfloat16, 1.0),
    "P B=65536 float32": functools.partial(gpu_case, "P", 65536, torch.float32, 1.0),
    "memory P B=65536 bfloat16": functools.partial(gpu_memory, "P", 65536),
    "memory R B=16384 bfloat16": functools.partial(gpu_memory, "R", 16384),
}
CASES = CPU_CASES if harness.DEVICE == "cpu" else GPU_CASES
