"""How time grows: every wing against what it replaces, over the number of rows, the batch and the width.

The cases of one curve have names that differ in one number ("NTK N=64", "NTK N=128", ...): docs/generate.py draws every
such family as curves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

import bayes
import finite_width as fw
import harness
import ntk
import pathsgd
import tt
from harness import Case

OURS = "finite-width"
# The Jacobians that torch.func's contraction holds, both batches together, in float32.
JACOBIAN_LIMIT = 3 << 30


def _ntk(variable: str, rows: int, width: int) -> Case:
    """Trace kernels of a 784-width-width-10 network."""
    widths = (784, width, width, 10)
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    fits = 2 * rows * widths[-1] * parameters * 4 <= JACOBIAN_LIMIT
    case = ntk.case("", widths, rows, rows, "trace", {}, (ntk.CONTRACTION,) if fits else ())
    return _short(case, f"NTK {variable}={rows if variable == 'N' else width}")


def _tensor_train(batch: int) -> Case:
    shape = tt.SHAPES["P"]
    problem = tt.Problem(shape, batch)
    return _short(
        Case(
            name=f"TTLinear B={batch}",
            what=f"{shape.text}, B={batch}, float32, forward+backward",
            implementations={
                OURS: problem.both_ways(lambda: fw.tt.tt_linear(problem.x, problem.cores, problem.bias)),
                "nn.Linear": problem.dense_layer(),
                "dense, best GEMM": problem.dense_best(),
                **tt.unfused(problem),
            },
            baseline="nn.Linear",
            flops=tt.flops(shape, batch),
        )
    )


def _path_sgd(width: int) -> Case:
    sizes = (784, width, width, 10)
    models = [pathsgd.with_gradients(pathsgd.mlp(sizes)) for _ in range(4)]
    weights = sum(parameter.numel() for parameter in models[0].parameters())
    return _short(
        Case(
            name=f"PathSGD width={width}",
            what=f"784-{width}-{width}-10, optimizer step, {weights / 1e6:.2f} M float32 parameters",
            implementations={
                OURS: fw.pathsgd.PathSGD(models[0], pathsgd.LR).step,
                "SGD(fused)": torch.optim.SGD(models[1].parameters(), pathsgd.LR, fused=True).step,
                "Adam(fused)": torch.optim.Adam(models[2].parameters(), pathsgd.LR, fused=True).step,
                "Path-SGD, plain torch": pathsgd.plain_torch_step(models[3], pathsgd.LR),
            },
            baseline="SGD(fused)",
            bytes=12.0 * weights,
        )
    )


def _bayes(variable: str, size: int, batch: int) -> Case:
    torch.manual_seed(0)
    x = torch.randn(batch, size, device=harness.DEVICE, requires_grad=True)
    linear = nn.Linear(size, size, device=harness.DEVICE)
    layer = fw.bayes.BayesLinear(size, size, device=harness.DEVICE)
    return _short(
        Case(
            name=f"BayesLinear {variable}={batch if variable == 'B' else size}",
            what=f"{size}→{size} with bias, batch {batch}, float32, forward + KL + backward",
            implementations={
                OURS: bayes.step(layer, x, lambda: (layer(x), fw.bayes.kl(layer))),
                "nn.Linear": bayes.step(linear, x, lambda: (linear(x), None)),
                "as usually written": bayes.plain_step(bayes.Usual(size), x),
                "closed KL, plain torch": bayes.plain_step(bayes.Closed(size), x),
            },
            baseline="nn.Linear",
            flops=6.0 * batch * size * size,
            bytes=24.0 * size * size,
        )
    )


def _short(case: Case, name: str | None = None) -> Case:
    """One point of a curve: fewer runs, no run for memory, no aims."""
    case.name, case.targets, case.memory = name or case.name, {}, False
    case.min_runs, case.seconds, case.limit = 5, 0.4, 8.0
    return case


CASES: dict[str, Callable[[], Case]] = {
    **{f"NTK N={rows}": partial(_ntk, "N", rows, 256) for rows in (16, 32, 64, 128, 256, 512, 1024, 2048)},
    **{f"NTK width={width}": partial(_ntk, "width", 64, width) for width in (64, 128, 256, 512, 1024, 2048)},
    **{f"TTLinear B={batch}": partial(_tensor_train, batch) for batch in (1, 4, 16, 64, 256, 1024, 4096)},
    **{f"PathSGD width={width}": partial(_path_sgd, width) for width in (125, 250, 500, 1000, 2000, 4000)},
    **{f"BayesLinear B={batch}": partial(_bayes, "B", 1024, batch) for batch in (1, 8, 32, 128, 512, 2048)},
    **{f"BayesLinear width={size}": partial(_bayes, "width", size, 128) for size in (128, 256, 512, 1024, 2048, 4096)},
}
