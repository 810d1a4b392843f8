"""The plainest training loop four times: by hand, with autograd, with nn.Module and torch.optim, then with PathSGD.

A two-layer ReLU network fits a noisy sine. The first three loops compute the same steps, so their curves coincide; in
the last one a single line changes, and the curve is another. Started from a rescaled copy of the same network, plain
SGD takes another course (dashed) and PathSGD the same one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import matplotlib
import torch
from torch import Tensor, nn

import finite_width as fw
from command import arguments, save_figures

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, lr: float, steps: int) -> list[float]:
    """Forward and backward pass written out."""
    w1, b1, w2, b2 = (parameter.detach().clone() for parameter in model.parameters())
    losses = []
    for _ in range(steps):
        hidden = x @ w1.T + b1
        active = hidden.clamp_min(0)
        error = active @ w2.T + b2 - y
        losses.append(float(error.square().mean()))
        d_out = 2 * error / error.numel()
        d_hidden = (d_out @ w2) * (hidden > 0)
        w2 -= lr * d_out.T @ active
        b2 -= lr * d_out.sum(0)
        w1 -= lr * d_hidden.T @ x
        b1 -= lr * d_hidden.sum(0)
    return losses


def with_autograd(model: nn.Sequential, x: Tensor, y: Tensor, lr: float, steps: int) -> list[float]:
    """The forward pass alone; autograd has the gradients."""
    w1, b1, w2, b2 = parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    losses = []
    for _ in range(steps):
        loss = (torch.relu(x @ w1.T + b1) @ w2.T + b2 - y).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
        losses.append(loss.item())
    return losses


def with_optimizer(
    model: nn.Sequential, x: Tensor, y: Tensor, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> list[float]:
    """nn.Module and an optimizer."""
    optimizer = make(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    options = arguments(__doc__).parse_args()
    steps = 200 if options.quick else 2000
    lr, path_lr = 0.02, 0.002
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.rand(64, 1, generator=generator, dtype=torch.float64) * 6 - 3
    y = torch.sin(2 * x) + 0.1 * torch.randn(64, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(options.seed)
    start = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    rescaled = copy.deepcopy(start)
    fw.pathsgd.rescale_(rescaled, seed=options.seed)
    x, y = x.to(options.device), y.to(options.device)
    start, rescaled = start.to(options.device), rescaled.to(options.device)

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr)

    def path_sgd(model: nn.Module) -> torch.optim.Optimizer:
        return fw.pathsgd.PathSGD(model, path_lr)

    curves = {
        "by hand": by_hand(start, x, y, lr, steps),
        "autograd": with_autograd(start, x, y, lr, steps),
        "nn.Module and torch.optim.SGD": with_optimizer(copy.deepcopy(start), x, y, sgd, steps),
        "PathSGD": with_optimizer(copy.deepcopy(start), x, y, path_sgd, steps),
        "SGD, rescaled start": with_optimizer(copy.deepcopy(rescaled), x, y, sgd, steps),
        "PathSGD, rescaled start": with_optimizer(copy.deepcopy(rescaled), x, y, path_sgd, steps),
    }
    first_three = torch.tensor([curves[name] for name in list(curves)[:3]], dtype=torch.float64)
    spread = float((first_three - first_three[0]).abs().max())
    pair = torch.tensor([curves["PathSGD"], curves["PathSGD, rescaled start"]], dtype=torch.float64)
    gap = float((pair[0] - pair[1]).abs().max())
    for name, losses in curves.items():
        print(f"{name:31s} loss {losses[0]:.4f} -> {losses[-1]:.5f}")
    print(f"largest difference of the first three curves: {spread:.1e}; of PathSGD's two: {gap:.1e}")

    figure, axis = plt.subplots(figsize=(7.5, 4.5))
    styles = [("tab:gray", "-", 7), ("tab:cyan", "-", 4), ("tab:blue", "-", 1.5), ("tab:red", "-", 3)]
    styles += [("tab:blue", "--", 1.5), ("black", "--", 1)]
    for (name, losses), (colour, style, width) in zip(curves.items(), styles, strict=True):
        axis.plot(losses, label=name, color=colour, linestyle=style, linewidth=width)
    axis.set(xlabel="step", ylabel="mean squared error", yscale="log", title="One network, four loops")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "path_sgd_loop.png", dpi=110)
    figures = {"seed": options.seed, "steps": steps, "lr": lr, "path_lr": path_lr, "spread": spread, "gap": gap}
    thin = {name: losses[:: max(1, steps // 100)] + losses[-1:] for name, losses in curves.items()}
    save_figures(options.out / "path_sgd_loop.json", {**figures, "curves": thin})


if __name__ == "__main__":
    main()
