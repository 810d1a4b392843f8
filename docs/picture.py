"""Draws docs/assets/four_wings.png: one small real computation of each wing.

python docs/picture.py
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import finite_width as fw  # noqa: E402
import style  # noqa: E402
from style import plt  # noqa: E402


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 64] in [-1, 1] and their labels, sorted by label."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))[:count]
    order = order[torch.tensor(labels)[order].argsort(stable=True)]
    return torch.tensor(images, dtype=torch.float32)[order] / 8 - 1, torch.tensor(labels)[order]


def kernel(axis: Any) -> None:
    x, labels = digits(300)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    gram = fw.ntk.empirical_ntk(model, x, compute="trace")
    scale = gram.diagonal().sqrt()
    axis.imshow(gram / scale[:, None] / scale[None], cmap="magma", interpolation="nearest")
    middle = [float((labels == digit).nonzero().double().mean()) for digit in range(10)]
    axis.set_xticks(middle, range(10))
    axis.set_yticks(middle, range(10))
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.set_title("fw.ntk: an exact tangent kernel")
    axis.set_xlabel("digits by class, cosine of the gradients")


def tensor_train(axis: Any) -> None:
    modes, ranks = (4, 8, 8, 4), [1, 2, 4, 8, 16, 32, 64]
    places = torch.linspace(0, 1, 1024, dtype=torch.float64)
    matrices = {
        "√|x − y|": (style.ORANGE, (places[:, None] - places).abs().sqrt()),
        "Gaussian": (style.GREY, torch.randn(1024, 1024, dtype=torch.float64)),
    }
    for name, (colour, matrix) in matrices.items():
        errors = []
        for rank in ranks:
            close = fw.tt.tt_to_dense(fw.tt.tt_matrix_svd(matrix, modes, modes, max_rank=rank))
            errors.append(float((close - matrix).norm() / matrix.norm()))
        axis.loglog(ranks, errors, "o-", color=colour, label=name)
    axis.set_xticks(ranks, ranks)
    axis.minorticks_off()
    axis.set(xlabel="rank", ylabel="relative error", ylim=(1e-8, 3))
    axis.set_title("fw.tt: two matrices, 1024 × 1024")
    axis.legend()


def path_sgd(axis: Any) -> None:
    x, labels = digits(512)
    start = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    moved = copy.deepcopy(start)
    fw.pathsgd.rescale_(moved, seed=0)
    steppers = {
        "SGD": (style.GREY, lambda m: torch.optim.SGD(m.parameters(), lr=0.05)),
        "Path-SGD": (style.GREEN, lambda m: fw.pathsgd.PathSGD(m, lr=1e-3)),
    }
    for name, (colour, make) in steppers.items():
        for kind, line, model in (("", "-", start), (", rescaled start", "--", moved)):
            network = copy.deepcopy(model)
            optimizer = make(network)
            losses = []
            for _ in range(150):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(x), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            width = 4 if name == "Path-SGD" and not kind else 1.8
            alpha = 0.4 if width == 4 else 1.0
            axis.semilogy(losses, line, color=colour, lw=width, alpha=alpha, label=name + kind)
    axis.set(xlabel="step", ylabel="training loss", ylim=(3e-3, 30))
    axis.set_title("fw.pathsgd: blind to rescaling")
    axis.legend(fontsize=8)


def bayes(axis: Any) -> None:
    x = torch.cat([torch.linspace(-2.4, -0.6, 30), torch.linspace(0.9, 2.4, 30)])[:, None]
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
    model = nn.Sequential(fw.bayes.BayesLinear(1, 128), nn.Tanh(), fw.bayes.BayesLinear(128, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        nll = (model(x) - y).square().sum() / (2 * 0.1**2)
        loss = fw.bayes.negative_elbo(nll, fw.bayes.kl(model), num_data=60, batch_size=60, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    where = torch.linspace(-4, 4, 200)[:, None]
    prediction = fw.bayes.predict(model, where, samples=400)
    mean, deviation = prediction.mean[:, 0], prediction.std[:, 0]
    for width, alpha in ((2, 0.18), (1, 0.3)):
        low, high = mean - width * deviation, mean + width * deviation
        axis.fill_between(where[:, 0], low, high, color=style.BLUE, alpha=alpha, lw=0)
    axis.plot(where, mean, color=style.BLUE, label="predictive mean, 1 and 2 deviations")
    axis.plot(x, y, ".", color=style.RED, ms=5, label="data")
    axis.set(xlabel="x", ylim=(-3, 3))
    axis.set_title("fw.bayes: what it does not know")
    axis.legend(fontsize=8, loc="lower left")


def main() -> None:
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 4, figsize=(17, 4))
    for axis, draw in zip(axes, (kernel, tensor_train, path_sgd, bayes), strict=True):
        draw(axis)
    figure.savefig(ROOT / "docs" / "assets" / "four_wings.png", dpi=90)


if __name__ == "__main__":
    main()
