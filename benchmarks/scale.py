"""Beyond one machine: streamed kernels, ridge systems on them, sketches, and loss gradients against vmap(grad)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import finite_width as fw
import scale_runs
from harness import Case, Record, Run
from small_gpt import SmallGPT, next_token_loss


def _by_vmap(model: nn.Module, tokens: Tensor) -> Tensor:
    """The Gram matrix of the gradients by torch.func."""
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return next_token_loss(torch.func.functional_call(model, values, (row[None],)), row[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, tokens)
    flat = torch.cat([value.flatten(1) for value in gradients.values()], 1)
    return flat @ flat.T


def _gpt(rows: int, length: int, width: int, depth: int) -> Case:
    torch.manual_seed(0)
    model, tokens = SmallGPT(256, length, width, 4, depth), torch.randint(256, (rows, length))
    double = SmallGPT(256, length, width, 4, depth).double()
    double.load_state_dict(model.state_dict())
    return Case(
        name=f"GPT N={rows} T={length}",
        what=f"loss_gram of a GPT with tied embedding: {depth} blocks of width {width}, {rows} rows of {length} tokens",
        implementations={
            "finite-width": lambda: fw.ntk.loss_gram(model, next_token_loss, tokens, tokens),
            "vmap(grad)": lambda: _by_vmap(model, tokens),
        },
        baseline="vmap(grad)",
        exact=lambda: _by_vmap(double, tokens),
    )


def _run(name: str, what: str, make: Callable[..., Record], *arguments: str | int) -> tuple[str, Callable[[], Run]]:
    return name, lambda: Run(name, what, lambda: make(*arguments))


_MNIST = "MNIST, 784-1024-1024-10, trace"
_IMAGES = "MNIST images, 784-1024-1024-10"
_KINDS = ("countsketch", "gaussian", "srht")

CASES: dict[str, Callable[[], Case | Run]] = dict(
    [
        _run("stream N=20000", f"{_MNIST}, streamed to Zarr without a stop", scale_runs.stream, 20000, 700),
        _run("kills N=20000", f"{_MNIST}, killed ten times by SIGKILL and resumed", scale_runs.kills, 20000, 700, 10),
        _run("ranks N=4096", f"{_MNIST}, shared by gloo processes of one thread", scale_runs.ranks, 4096, 700),
        _run("solve N=4000", f"{_MNIST}, conjugate gradients on the stored tiles", scale_runs.solve, 4000),
        _run("digits N=10000", f"{_MNIST} / 10, ridge regression of all ten digits", scale_runs.digits, 10000),
        *(
            _run(f"sketch error {kind}", f"{kind} of 64 {_IMAGES}", scale_runs.sketch_error, kind, 64, 4)
            for kind in _KINDS
        ),
        *(
            _run(f"sketch cost {kind}", f"{kind} of {_IMAGES}, dim 1024", scale_runs.sketch_cost, kind, 128, 1024)
            for kind in _KINDS
        ),
    ]
) | {
    "GPT N=64 T=16": lambda: _gpt(64, 16, 64, 2),
    "GPT N=64 T=64": lambda: _gpt(64, 64, 128, 2),
}
