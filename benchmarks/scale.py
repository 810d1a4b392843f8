"""Loss gradients of a small GPT against vmap(grad), and sketches of an MLP's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import finite_width as fw
from harness import Case
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


def _sketch(kind: str) -> Case:
    torch.manual_seed(0)
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    model, x = nn.Sequential(*layers), torch.randn(512, 784)
    return Case(
        name=f"sketch {kind}",
        what=f"512 rows, 784-1024-1024-10, ten outputs, dim 1024, {kind}",
        implementations={"finite-width": lambda: fw.ntk.sketch(model, x, 1024, kind=kind)},
        baseline="finite-width",
    )


CASES: dict[str, Callable[[], Case]] = {
    "GPT N=64 T=16": lambda: _gpt(64, 16, 64, 2),
    "GPT N=64 T=64": lambda: _gpt(64, 64, 128, 2),
    "sketch countsketch": lambda: _sketch("countsketch"),
    "sketch gaussian": lambda: _sketch("gaussian"),
    "sketch srht": lambda: _sketch("srht"),
}
