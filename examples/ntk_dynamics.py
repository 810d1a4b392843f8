"""Gradient flow from the kernel alone, against networks that are really trained.

A wide network trained on squares in small steps behaves like its linearisation: its outputs at every time follow from
the kernel at initialisation (Lee et al. 2019). Here networks of growing width learn a function of one variable by
plain gradient descent; `fw.ntk.gradient_flow` predicts each one's outputs over time from its kernel at step 0. Left:
the trained network (lines) and the prediction (dots) at several times. Middle: how far they differ, against time, for
each width. Right: how far each kernel drifts while its network trains, and how well it is aligned with the targets.

    python examples/ntk_dynamics.py
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import command
import finite_width as fw

POINTS = 16


class Network(nn.Module):
    """1-width-width-1, tanh, in the NTK parametrisation: weights N(0, 1), divided by sqrt(inputs) in the forward.

    In it gradient descent with one learning rate is the same training at every width, so that widths compare.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [1, width, width, 1]
        self.weights = nn.ParameterList(
            torch.randn(n_out, n_in, generator=generator) for n_in, n_out in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.randn(n_out, generator=generator) for n_out in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(x, weight) * (1.5 / math.sqrt(weight.shape[1])) + 0.1 * bias
            x = torch.tanh(x) if layer < 2 else x
        return x


def problem(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training points and targets, and a grid of new points."""
    x = torch.linspace(-1, 1, POINTS, device=device).unsqueeze(1)
    return x, torch.sin(4 * x) + 0.5 * x, torch.linspace(-1.25, 1.25, 101, device=device).unsqueeze(1)


def train(width: int, times: list[int], rate: float, seed: int, device: str, bar: Any) -> dict[str, Any]:
    """One network: its outputs at the given steps, the flow's prediction of them, and its kernel's drift."""
    x, y, grid = problem(device)
    model = Network(width, seed).to(device)
    K, K_grid = fw.ntk.empirical_ntk(model, x, compute="trace"), fw.ntk.empirical_ntk(model, grid, x, compute="trace")
    with torch.no_grad():
        f0, f0_grid = model(x), model(grid)
    moments = rate * torch.tensor(times, dtype=torch.float64, device=device)
    predicted = fw.ntk.gradient_flow(K, y, K_grid, moments, f0_train=f0, f0_test=f0_grid, loss="sum").test
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trained, drifts, alignments = [], [], []
    for step in range(times[-1] + 1):
        if step in times:
            with torch.no_grad():
                trained.append(model(grid))
            now = fw.ntk.empirical_ntk(model, x, compute="trace")
            drifts.append(fw.ntk.drift(K, now))
            alignments.append(fw.ntk.target_alignment(now, y, center=True))
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()
        bar.update()
    outputs = torch.stack(trained)
    difference = (outputs - predicted).square().mean((1, 2)).sqrt() / y.square().mean().sqrt()
    return {
        "outputs": outputs,
        "predicted": predicted,
        "difference": difference.tolist(),
        "drift": drifts,
        "alignment": alignments,
        "largest eigenvalue": float(fw.ntk.spectrum(K)[0]),
        "effective dimension at ridge 0.1": fw.ntk.effective_dimension(K, 0.1),
    }


def draw(results: dict[int, dict[str, Any]], times: list[int], rate: float, path: Any) -> None:
    """The three panels."""
    import matplotlib.pyplot as plt

    import style

    widest = max(results)
    x, y, grid = (each.cpu() for each in problem("cpu"))
    drawn, (flows, differences, drifts) = style.figure(13.2, 4.0, 3)
    shown = [0, len(times) // 3, 2 * len(times) // 3, len(times) - 1]
    colours = plt.get_cmap("viridis")([0.05, 0.35, 0.6, 0.85])
    for colour, index in zip(colours, shown, strict=True):
        outputs, predicted = (results[widest][key][index, :, 0].cpu() for key in ("outputs", "predicted"))
        flows.plot(grid[:, 0], outputs, color=colour, label=f"t = {rate * times[index]:.3g}")
        flows.plot(grid[::5, 0], predicted[::5], "o", color=colour, markersize=4, markeredgecolor="white", mew=0.5)
    flows.plot(x[:, 0], y[:, 0], "x", color=style.RED, markersize=6, mew=1.6, label="targets")
    flows.set(xlabel="x", ylabel="output", title=f"Width {widest}: trained (lines), predicted (dots)")
    flows.legend(fontsize=8, loc="upper left", ncols=2)
    moments = [rate * max(step, 0.5) for step in times]
    blues = plt.get_cmap("Blues")(torch.linspace(0.35, 0.95, len(results)))
    for colour, (width, result) in zip(blues, results.items(), strict=True):
        differences.loglog(moments[1:], result["difference"][1:], color=colour, label=f"width {width}")
        drifts.semilogx(moments[1:], result["drift"][1:], color=colour, label=f"width {width}")
    differences.set(xlabel="time", ylabel="relative difference", title="Trained against predicted, over the grid")
    differences.legend(fontsize=8)
    drifts.set(xlabel="time", ylabel="‖K(t) − K(0)‖ / ‖K(0)‖", title="Drift of the kernel", yscale="log")
    style.save(drawn, path)


def main() -> None:
    options = command.arguments(__doc__).parse_args()
    widths, steps, rate = ([32, 128], 500, 0.004) if options.quick else ([64, 256, 1024], 4000, 0.002)
    count = 25
    times = sorted({0, *(round(steps ** (index / (count - 1))) for index in range(count))})
    started = time.perf_counter()
    with tqdm(total=len(widths) * (steps + 1), unit="step") as bar:
        results = {}
        for width in widths:
            bar.set_description(f"width {width}")
            results[width] = train(width, times, rate, options.seed, options.device, bar)
    out = options.out / "ntk_dynamics"
    draw(results, times, rate, out / "dynamics.png")
    figures = {
        "seed": options.seed,
        "learning rate": rate,
        "steps": times,
        "seconds": round(time.perf_counter() - started, 1),
        "widths": {
            width: {key: value for key, value in result.items() if key not in ("outputs", "predicted")}
            for width, result in results.items()
        },
    }
    command.save_figures(out / "figures.json", figures)
    for width, result in results.items():
        print(
            f"width {width:5}: largest relative difference {max(result['difference']):.4f}, "
            f"kernel drift {result['drift'][-1]:.4f}, "
            f"alignment {result['alignment'][0]:.3f} -> {result['alignment'][-1]:.3f}"
        )
    print(f"picture {out / 'dynamics.png'}, figures {out / 'figures.json'}")


if __name__ == "__main__":
    main()
