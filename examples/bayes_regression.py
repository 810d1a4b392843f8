"""Variational regression on 50 points of a sine, with a tanh network of five hidden units: predictive mean, bands of
one and two standard deviations, and sampled functions.

    python examples/bayes_regression.py [--quick]                 (about 20 seconds)

y = 0.5 sin(2πx/3) + noise of variance 0.01, x on both sides of a gap; prior variance 10 for every weight. Trained with
Adam (learning rate 0.01) on the negative ELBO over all 50 points at once. The band is wide in the gap between the
points; far out the tanh units saturate, so every sampled function is flat there and the band stays narrow.

Writes out/bayes_regression.png and out/bayes_regression.json.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import finite_width as fw
from command import arguments, save_figures

POINTS, HIDDEN, NOISE_VARIANCE, PRIOR_VARIANCE = 50, 5, 0.01, 10.0


def truth(x: Tensor) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * x / 3)


def make_data() -> tuple[Tensor, Tensor]:
    """Half of the points in [-2.5, -0.5], half in [1, 2.5]."""
    x = torch.cat([torch.empty(POINTS // 2, 1).uniform_(-2.5, -0.5), torch.empty(POINTS // 2, 1).uniform_(1.0, 2.5)])
    return x, truth(x) + math.sqrt(NOISE_VARIANCE) * torch.randn_like(x)


def network() -> nn.Sequential:
    prior = fw.bayes.GaussianPrior(std=math.sqrt(PRIOR_VARIANCE))
    return nn.Sequential(
        fw.bayes.BayesLinear(1, HIDDEN, prior=prior), nn.Tanh(), fw.bayes.BayesLinear(HIDDEN, 1, prior=prior)
    )


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """The negative ELBO at every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in tqdm(range(steps), desc="negative ELBO"):
        residual = y - model(x)
        nll = (residual.square() / (2 * NOISE_VARIANCE)).sum() + len(x) / 2 * math.log(2 * math.pi * NOISE_VARIANCE)
        loss = fw.bayes.negative_elbo(nll, fw.bayes.kl(model), num_data=len(x), reduction="sum", batch_size=len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def draw(path: Any, x: Tensor, y: Tensor, grid: Tensor, prediction: fw.bayes.Prediction, history: list[float]) -> None:
    import style

    fig, (left, right) = style.figure(12, 4.5, 2, width_ratios=[3, 1])
    at, mean, std = grid[:, 0], prediction.mean[:, 0], prediction.std[:, 0]
    for width, shade in ((2, 0.15), (1, 0.3)):
        low, high = mean - width * std, mean + width * std
        left.fill_between(at, low, high, color=style.BLUE, alpha=shade, linewidth=0, label=f"± {width} std")
    for index, sample in enumerate(prediction.samples[:8, :, 0]):
        left.plot(
            at, sample, color=style.BLUE, linewidth=0.6, alpha=0.7, label="sampled functions" if index == 0 else None
        )
    left.plot(at, mean, color=style.BLUE, linewidth=2, label="predictive mean")
    left.plot(at, truth(at), color="black", linestyle="--", linewidth=1, label="0.5 sin(2πx/3)")
    left.scatter(x, y, s=12, color=style.RED, zorder=3, label=f"{len(x)} points")
    left.set(
        xlabel="x", ylabel="y", ylim=(-1.3, 1.6), title="Posterior predictive of a tanh network with five hidden units"
    )
    left.legend(loc="upper center", ncols=3, fontsize=8)
    values = torch.tensor(history)
    right.plot(values, linewidth=0.5, alpha=0.4)
    right.plot(range(99, len(values)), values.unfold(0, 100, 1).median(1).values, color="black", label="median of 100")
    right.set(xlabel="step", title="negative ELBO", yscale="symlog")
    right.legend()
    style.save(fig, path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20000)
    options = parser.parse_args()
    steps = 3000 if options.quick else options.steps
    torch.manual_seed(options.seed)
    x, y = make_data()
    model = network()
    history = train(model, x, y, steps)
    grid = torch.linspace(-5, 5, 400).unsqueeze(1)
    prediction = fw.bayes.predict(model, grid, samples=500)

    inside = ((grid > -2.5) & (grid < -0.5)) | ((grid > 1.0) & (grid < 2.5))
    outside = grid.abs() > 4
    std = prediction.std
    figures = {
        "seed": options.seed,
        "steps": steps,
        "final_negative_elbo": sum(history[-200:]) / len(history[-200:]),
        "rmse_to_truth_on_the_data": (prediction.mean - truth(grid))[inside].square().mean().sqrt().item(),
        "std_on_the_data": std[inside].mean().item(),
        "std_in_the_gap": std[(grid > -0.3) & (grid < 0.8)].mean().item(),
        "std_beyond_4": std[outside].mean().item(),
        "all_finite": all(map(math.isfinite, history)),
    }
    print(figures)
    save_figures(options.out / "bayes_regression.json", figures)
    draw(options.out / "bayes_regression.png", x, y, grid, prediction, history)
    print(f"written: {options.out / 'bayes_regression.json'}, {options.out / 'bayes_regression.png'}")


if __name__ == "__main__":
    main()
