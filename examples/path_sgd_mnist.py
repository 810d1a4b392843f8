"""Path-SGD against SGD, AdaGrad and Adam on MNIST, from a balanced start and from an unbalanced one.

The experiment of Neyshabur, Salakhutdinov and Srebro (2015), section 5, smaller: a 784-1000-1000-10 network, batches of
100, no momentum, weights N(0, 1/fan-in). The unbalanced start is the same function: a quarter of the hidden units have
their incoming weights multiplied by 10 c and their outgoing ones divided by it, with c lognormal. Step sizes are powers
of ten, chosen by the held-out error after the first epochs. Each finished run is a file, so an interrupted study
continues where it stood. --quick: scikit-learn's digits and a small network.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import finite_width as fw
from command import arguments, save_figures
from data import Data, digits, mnist

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STARTS = ("balanced", "unbalanced")
GRIDS: dict[str, tuple[float, ...]] = {
    "SGD": (1e-3, 1e-2, 1e-1, 1.0),
    "AdaGrad": (1e-3, 1e-2, 1e-1),
    "Adam": (1e-4, 1e-3, 1e-2),
    "Path-SGD": (1e-4, 1e-3, 1e-2, 1e-1),
}
COLOURS = {"SGD": "tab:blue", "AdaGrad": "tab:orange", "Adam": "tab:green", "Path-SGD": "tab:red"}


def network(sizes: list[int], start: str, seed: int) -> nn.Sequential:
    """A ReLU network with weights N(0, 1/fan-in) and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, inputs**-0.5, generator=generator)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if start == "unbalanced":
        units = sum(sizes[1:-1])
        factors = torch.ones(units, dtype=torch.float64)
        chosen = torch.randperm(units, generator=generator)[: units // 4]
        factors[chosen] = 10 * torch.randn(len(chosen), generator=generator, dtype=torch.float64).exp()
        fw.pathsgd.rescale_(model, factors=factors)
    return model


def optimizer_of(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer that goes by a name."""
    if name == "Path-SGD":
        return fw.pathsgd.PathSGD(model, lr)
    kinds: dict[str, Any] = {"SGD": torch.optim.SGD, "AdaGrad": torch.optim.Adagrad, "Adam": torch.optim.Adam}
    return kinds[name](model.parameters(), lr=lr)  # type: ignore[no-any-return]


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(mean cross-entropy, error in %)."""
    outputs = torch.cat([model(part) for part in x.split(1000)])
    return float(F.cross_entropy(outputs, y)), 100 * float((outputs.argmax(1) != y).float().mean())


def train(name: str, start: str, lr: float, seed: int, epochs: int, data: Data, hidden: int, device: str) -> Any:
    """Train, and return loss and errors before the first and after each epoch.

    Training loss and error are of the first 10,000 training images.
    """
    sizes = [data.x_train.shape[1], hidden, hidden, 10]
    model = network(sizes, start, seed).to(device)
    optimizer = optimizer_of(name, model, lr)
    x, y = data.x_train.to(device), data.y_train.to(device)
    x_test, y_test = data.x_test.to(device), data.y_test.to(device)
    order = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {"train_loss": [], "train_error": [], "test_error": []}
    for epoch in range(epochs + 1):
        if epoch:
            for batch in torch.randperm(len(x), generator=order).split(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch.to(device)]), y[batch.to(device)]).backward()
                optimizer.step()
        loss, error = evaluate(model, x[:10000], y[:10000])
        curves["train_loss"].append(loss)
        curves["train_error"].append(error)
        curves["test_error"].append(evaluate(model, x_test, y_test)[1])
        if loss != loss:
            break  # diverged: the remaining epochs would be NaN too
    return {"optimizer": name, "start": start, "lr": lr, "seed": seed, "epochs": epochs, **curves}


def stored(path: Path, compute: Any) -> Any:
    """The result in a file, computed and written where the file is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(compute()))
        partial.rename(path)
    return json.loads(path.read_text())


def chosen_rates(folder: Path, data: Data, hidden: int, epochs: int, device: str, bar: Any) -> dict[str, float]:
    """The step size of each optimizer and start with the least held-out error (then the least loss).

    Trained on the first 15,000 training images, held out are the next 5,000.
    """
    used = min(len(data.x_train), 20000)
    train_part, held = slice(0, used * 3 // 4), slice(used * 3 // 4, used)
    search = data._replace(
        x_train=data.x_train[train_part],
        y_train=data.y_train[train_part],
        x_test=data.x_train[held],
        y_test=data.y_train[held],
    )
    rates = {}
    for name, grid in GRIDS.items():
        for start in STARTS:
            results = []
            for lr in grid:
                bar.set_description(f"grid {name} {start} {lr:g}")
                path = folder / f"grid_{name}_{start}_{lr:g}.json"
                results.append(
                    stored(path, lambda n=name, s=start, r=lr: train(n, s, r, 0, epochs, search, hidden, device))
                )
                bar.update()
            best = min(results, key=lambda run: (run["test_error"][-1], run["train_loss"][-1]))
            rates[f"{name} {start}"] = best["lr"]
    return rates


def draw(runs: list[Any], title: str, path: Path) -> None:
    """Loss, training error and test error over epochs; the band spans the seeds."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    kinds = (("train_loss", "training loss"), ("train_error", "training error, %"), ("test_error", "test error, %"))
    for row, start in zip(axes, STARTS, strict=True):
        for axis, (kind, label) in zip(row, kinds, strict=True):
            for name in GRIDS:
                curves = [run[kind] for run in runs if run["optimizer"] == name and run["start"] == start]
                if not curves:
                    continue
                length = min(map(len, curves))
                values = torch.tensor([curve[:length] for curve in curves], dtype=torch.float64).clamp_min(1e-7)
                epochs = range(length)
                axis.plot(epochs, values.mean(0), label=name, color=COLOURS[name])
                axis.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.2, linewidth=0)
            axis.set_yscale("log")
            axis.set_title(f"{label}, {start}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    axes[0, 0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=None, help="default 20 (quick: 3)")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds, from --seed on; default 3 (quick: 1)")
    parser.add_argument("--hidden", type=int, default=None, help="units per hidden layer; default 1000 (quick: 100)")
    options = parser.parse_args()
    quick = options.quick
    epochs = options.epochs or (3 if quick else 20)
    count = options.seeds or (1 if quick else 3)
    hidden = options.hidden or (100 if quick else 1000)
    data = digits() if quick else mnist(options.data)
    data = data.flat()
    folder = options.out / ("path_sgd_mnist_quick" if quick else "path_sgd_mnist")

    seeds = range(options.seed, options.seed + count)
    grid_size = sum(map(len, GRIDS.values())) * len(STARTS)
    with tqdm(total=grid_size + len(GRIDS) * len(STARTS) * count) as bar:
        rates = chosen_rates(folder, data, hidden, 2 if quick else 1, options.device, bar)
        runs = []
        for seed in seeds:
            for name in GRIDS:
                for start in STARTS:
                    lr = rates[f"{name} {start}"]
                    bar.set_description(f"{name} {start} {lr:g} seed {seed}")
                    path = folder / f"run_{name}_{start}_{lr:g}_{hidden}_{epochs}_{seed}.json"
                    runs.append(
                        stored(path, lambda n=name, s=start, r=lr, k=seed: train(
                            n, s, r, k, epochs, data, hidden, options.device))
                    )  # fmt: skip
                    bar.update()

    def last(name: str, start: str, kind: str) -> float:
        values = [run[kind][-1] for run in runs if run["optimizer"] == name and run["start"] == start]
        return sum(values) / len(values)

    print(f"{data.name}, {hidden} hidden units twice, {epochs} epochs, {count} seed(s): train loss / test error")
    for name in GRIDS:
        cells = [f"{s}: {last(name, s, 'train_loss'):.4f} / {last(name, s, 'test_error'):.2f} %" for s in STARTS]
        print(f"  {name:9s}", "   ".join(cells))
    figures = {
        "data": data.name,
        "hidden": hidden,
        "epochs": epochs,
        "seeds": list(seeds),
        "rates": rates,
        "runs": runs,
    }
    save_figures(options.out / f"{folder.name}.json", figures)
    draw(runs, f"{data.name}, {data.x_train.shape[1]}-{hidden}-{hidden}-10", options.out / f"{folder.name}.png")


if __name__ == "__main__":
    main()
