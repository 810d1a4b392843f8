"""A trained dense network, compressed to Tensor Trains and fine-tuned: 784-625-10 on MNIST.

    python examples/tt_finetune.py            two epochs dense, compress at rank 16, two epochs of fine-tuning
    python examples/tt_finetune.py --quick    scikit-learn's digits

The TT-SVD throws most of the weight away (the report shows the relative error) and with it much of the accuracy; two
epochs of Adam bring it back with a twentieth of the parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from command import arguments, save_figures
from data import Data, digits, mnist


def accuracy(model: nn.Module, data: Data, device: str) -> float:
    with torch.no_grad():
        return 100 * float((model(data.x_test.to(device)).argmax(1).cpu() == data.y_test).float().mean())


def train(model: nn.Module, data: Data, epochs: int, generator: torch.Generator, device: str) -> list[float]:
    """Adam 1e-3, batches of 64, shuffled; the test accuracy after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # made after compress: the parameters are new ones
    accuracies = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.x_train), generator=generator).split(64):
            loss = F.cross_entropy(model(data.x_train[chosen].to(device)), data.y_train[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies.append(accuracy(model, data, device))
    return accuracies


def main() -> None:
    options = arguments(__doc__).parse_args()
    data = (digits() if options.quick else mnist(options.data)).flat()
    epochs, rank = (20, 8) if options.quick else (2, 16)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    inputs, hidden = data.x_train.shape[1], 256 if options.quick else 625
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)).to(options.device)
    dense_parameters = sum(p.numel() for p in model.parameters())
    dense = train(model, data, epochs, generator, options.device)
    print(f"dense: {dense_parameters} parameters, {dense[-1]:.2f} %")
    report = fw.tt.compress(model, max_rank=rank)
    print(report)
    compressed = accuracy(model, data, options.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"compressed: {parameters} parameters, {compressed:.2f} %")
    tuned = train(model, data, epochs, generator, options.device)
    print("fine-tuned: " + ", ".join(f"{a:.2f}" for a in tuned[-2:]) + f" % (dense {dense[-1]:.2f} %)")
    save_figures(
        options.out / "tt_finetune.json",
        {
            "data": data.name,
            "network": f"{inputs}-{hidden}-10, max_rank {rank}, Adam 1e-3, batch 64, {epochs} + {epochs} epochs",
            "seed": options.seed,
            "dense": {"parameters": dense_parameters, "accuracy": dense},
            "compressed": {
                "parameters": parameters,
                "accuracy": compressed,
                "relative_errors": {layer.name: layer.relative_error for layer in report.replaced},
            },
            "fine_tuned": {"parameters": parameters, "accuracy": tuned},
        },
    )
    picture(options.out / "tt_finetune.png", dense, compressed, tuned)
    print(f"figures and picture in {options.out}/")


def picture(path, dense: list[float], compressed: float, tuned: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    epochs = range(1, len(dense) + 1)
    axes.plot(epochs, dense, "o-", label="dense")
    axes.plot(range(len(dense), len(dense) + len(tuned) + 1), [compressed, *tuned], "s-", label="Tensor Trains")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Compressed after training, then fine-tuned")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
