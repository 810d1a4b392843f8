"""A network of two Tensor-Train cores on MNIST: 784 × 50 × 10, nothing else, not even a bias or a nonlinearity.

    python examples/tt_mnist.py            five seeds, two epochs each: accuracy after each epoch
    python examples/tt_mnist.py --quick    two seeds on scikit-learn's digits

The network is `einsum("ni,ia,aj->nj", x, G1, G2)`: one TTLinear of layout "in_out". Its cores start uniform on [0, 1),
so that the first loss is about 100; Adam brings it down within the first epoch. The order of the images matters: they
are shuffled in every epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import finite_width as fw
from command import arguments, save_figures
from data import Data, digits, mnist


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.randperm(len(data.x_train), generator=generator).split(size):
        yield data.x_train[chosen], data.y_train[chosen]


def train(data: Data, seed: int, epochs: int, device: str) -> tuple[list[float], list[float]]:
    """(test accuracy after each epoch, loss of every batch)."""
    torch.manual_seed(seed)
    inputs, classes = data.x_train.shape[1], int(data.y_train.max()) + 1
    network = fw.tt.TTLinear(
        *(inputs, classes), rank=[50], in_modes=(inputs,), out_modes=(classes,), layout="in_out", bias=False
    ).to(device)
    for core in network.parameters():
        torch.nn.init.uniform_(core)
    optimizer = torch.optim.Adam(network.parameters())
    generator = torch.Generator().manual_seed(seed)
    accuracies, losses = [], []
    for _ in range(epochs):
        for x, y in batches(data, 64, generator):
            loss = F.cross_entropy(network(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            right = network(data.x_test.to(device)).argmax(1).cpu() == data.y_test
        accuracies.append(100 * float(right.float().mean()))
    return accuracies, losses


def main() -> None:
    options = arguments(__doc__).parse_args()
    data = (digits() if options.quick else mnist(options.data)).flat()
    seeds = range(options.seed, options.seed + (2 if options.quick else 5))
    epochs = 20 if options.quick else 2
    runs = []
    for seed in seeds:
        accuracies, losses = train(data, seed, epochs, options.device)
        runs.append((accuracies, losses))
        print(
            f"seed {seed}: first loss {losses[0]:.0f}; test accuracy " + ", ".join(f"{a:.2f}" for a in accuracies[-2:])
        )
    figures = {
        "data": data.name,
        "network": "784 x 50 x 10, U[0, 1) start, Adam, batch 64, shuffled" if not options.quick else "quick",
        "seeds": list(seeds),
        "first_batch_loss": [losses[0] for _, losses in runs],
        "accuracy": [accuracies for accuracies, _ in runs],
        "mean": [statistics.mean(each) for each in zip(*(accuracies for accuracies, _ in runs), strict=True)],
        "deviation": [statistics.stdev(each) for each in zip(*(accuracies for accuracies, _ in runs), strict=True)],
    }
    for epoch, (mean, deviation) in enumerate(zip(figures["mean"], figures["deviation"], strict=True), start=1):
        if epoch in (1, 2, epochs):
            print(f"epoch {epoch}: {mean:.2f} ± {deviation:.2f} %")
    save_figures(options.out / "tt_mnist.json", figures)
    picture(options.out / "tt_mnist.png", [losses for _, losses in runs])
    print(f"figures and picture in {options.out}/")


def picture(path, losses: list[list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for seed, curve in enumerate(losses):
        axes.semilogy(curve, lw=0.6, alpha=0.7, label=f"run {seed}")
    axes.set_xlabel("batch of 64")
    axes.set_ylabel("cross entropy")
    axes.set_title("Two Tensor-Train cores, 784 × 50 × 10")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
