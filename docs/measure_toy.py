"""The toy regression in many seeds: how many runs meet a number that is not finite. Writes docs/results/bayes_toy.json.

    python docs/measure_toy.py [--seeds 256] [--steps 500]        (minutes on one core)

50 points of y = 0.5 sin(2πx/3) + noise of variance 0.01, a tanh network of five units, prior variance 10, all points in
every step. The documented recipe is Adam with a learning rate of 1e-2; SGD without clipping, which is known to diverge
here, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw

FILE = Path(__file__).resolve().parent / "results" / "bayes_toy.json"
POINTS, NOISE_VARIANCE, PRIOR_VARIANCE = 50, 0.01, 10.0
RECIPES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam, learning rate 1e-2": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "SGD, learning rate 1e-4": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    "SGD, learning rate 1e-3": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}
DOCUMENTED = "Adam, learning rate 1e-2"


def truth(x: Tensor) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * x / 3)


def toy_run(seed: int, steps: int, recipe: str = DOCUMENTED) -> tuple[list[float], nn.Module, Tensor]:
    """The loss at every step, ending with the first that is not finite; the model; the points x."""
    torch.manual_seed(seed)
    x = 6 * torch.rand(POINTS, 1) - 3
    y = truth(x) + math.sqrt(NOISE_VARIANCE) * torch.randn(POINTS, 1)
    prior = fw.bayes.GaussianPrior(math.sqrt(PRIOR_VARIANCE))
    model = nn.Sequential(fw.bayes.BayesLinear(1, 5, prior=prior), nn.Tanh(), fw.bayes.BayesLinear(5, 1, prior=prior))
    optimizer = RECIPES[recipe](model.parameters())
    history: list[float] = []
    for _ in range(steps):
        nll = ((y - model(x)).square() / (2 * NOISE_VARIANCE)).sum()
        try:
            kl = fw.bayes.kl(model)
        except ValueError:  # a parameter is NaN
            history.append(math.nan)
            break
        loss = fw.bayes.negative_elbo(nll, kl, num_data=POINTS, reduction="sum", batch_size=POINTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if not math.isfinite(history[-1]):
            break
    return history, model, x


def is_finite(history: list[float], model: nn.Module) -> bool:
    """Losses, and the last step's gradients and parameters: what is not finite in an earlier step stays so in these."""
    values = [value for p in model.parameters() for value in (p, p.grad) if value is not None]
    return all(map(math.isfinite, history)) and all(bool(torch.isfinite(value).all()) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "command": f"python docs/measure_toy.py --seeds {options.seeds} --steps {options.steps}",
        "seeds": [0, options.seeds - 1],
        "steps": options.steps,
        "documented": DOCUMENTED,
        "recipes": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        started, diverged = time.process_time(), []
        for seed in range(options.seeds):
            history, model, _ = toy_run(seed, options.steps, recipe)
            if not is_finite(history, model):
                diverged.append({"seed": seed, "step": len(history)})
            if seed % 16 == 15:
                print(f"{recipe}: {seed + 1} seeds, {len(diverged)} not finite", flush=True)
        seconds = round(time.process_time() - started, 1)
        figures["recipes"][recipe] = {"not_finite": diverged, "processor seconds": seconds}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
