"""A DCGAN on 28 x 28 images whose two dense layers are Tensor-Train layers, beside the same network with dense ones.

The generator is 100 -> 1024 -> 6400 (dense or Tensor-Train), then transposed convolutions with batch norm
(Radford, Metz, Chintala 2016). Nearly all of its parameters are in the two dense layers. Images: EMNIST letters
through torchvision where it is installed and can download them, else MNIST from the data folder, else scikit-learn's
digits enlarged to 28 x 28; the run says which. A quick run never downloads.

Writes dcgan_mnist.png (samples of both), dcgan_mnist.gif (a grid of samples per epoch) and dcgan_mnist.json
(parameters, median step time, losses).

    python examples/dcgan_mnist.py --quick
    FINITE_WIDTH_DATA=/path/to/data python examples/dcgan_mnist.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor, nn
from tqdm import tqdm

import finite_width as fw
from command import arguments, save_figures
from data import has_mnist, mnist, mnist_or_digits

LATENT, HIDDEN, CHANNELS, SIDE = 100, 1024, 64, 10  # 6400 = 64 channels of 10 x 10


def images(choice: str, folder: Path | None, *, quick: bool) -> tuple[str, Tensor]:
    """The name of the dataset and its images [N, 1, 28, 28] in [-1, 1]."""
    if choice == "emnist" or (choice == "auto" and not quick):
        try:
            return "EMNIST letters", emnist()
        except (ImportError, OSError, RuntimeError) as error:
            if choice == "emnist":
                raise
            print(f"EMNIST is not at hand ({type(error).__name__}: {error})")
    found = mnist(folder) if choice == "mnist" or has_mnist(folder) else mnist_or_digits(folder)
    x = found.x_train
    if x.shape[-1] != 28:
        x = F.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False).clamp(0, 1)
    return found.name, 2 * x - 1


def emnist() -> Tensor:
    """The training letters, through torchvision; they are stored transposed."""
    from torchvision.datasets import EMNIST

    found = EMNIST(Path.home() / ".cache" / "finite-width", split="letters", train=True, download=True)
    return found.data.mT.unsqueeze(1).float() / 127.5 - 1


def generator(kind: str, ranks: tuple[int, int]) -> nn.Sequential:
    """[B, 100] -> [B, 1, 28, 28]; `kind` is "dense" or "tt"."""

    def layer(inputs: int, outputs: int, rank: int) -> nn.Module:
        return nn.Linear(inputs, outputs) if kind == "dense" else fw.tt.TTLinear(inputs, outputs, rank=rank)

    units = CHANNELS * SIDE * SIDE
    return nn.Sequential(
        layer(LATENT, HIDDEN, ranks[0]),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        layer(HIDDEN, units, ranks[1]),
        nn.BatchNorm1d(units),
        nn.ReLU(),
        nn.Unflatten(1, (CHANNELS, SIDE, SIDE)),
        nn.ConvTranspose2d(CHANNELS, 32, 5),  # 14 x 14
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # 28 x 28
        nn.Tanh(),
    )


def discriminator() -> nn.Sequential:
    """[B, 1, 28, 28] -> [B, 1], the log-odds of being real."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 1),
    )
    return model


def initialise(model: nn.Module) -> None:
    """The DCGAN's initialisation of convolutions and batch norms; dense layers keep their own."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1.0, 0.02)


def train(kind: str, x: Tensor, options: Any) -> dict[str, Any]:
    """Train one pair of networks; parameters, step times, losses per epoch, sample grids per epoch."""
    torch.manual_seed(options.seed)
    make, judge = generator(kind, (options.rank, 2 * options.rank)), discriminator()
    for model in (make, judge):
        initialise(model)
        model.to(options.device)
    rates = {"lr": options.lr, "betas": (0.5, 0.999)}
    step_make, step_judge = torch.optim.Adam(make.parameters(), **rates), torch.optim.Adam(judge.parameters(), **rates)
    fixed = torch.randn(36, LATENT, device=options.device)
    size = options.batch_size
    times, losses, grids = [], [], [sample(make, fixed)]
    bar = tqdm(total=options.epochs * (len(x) // size), desc=kind, unit="step", leave=False)
    for _ in range(options.epochs):
        total = torch.zeros(2)
        order = torch.randperm(len(x))
        for begin in range(0, len(x) - size + 1, size):
            real = x[order[begin : begin + size]].to(options.device)
            started = time.perf_counter()
            fake = make(torch.randn(size, LATENT, device=options.device))
            # The discriminator: log-odds up on real images (towards 0.9, one-sided smoothing), down on fakes.
            step_judge.zero_grad()
            on_real, on_fake = judge(real), judge(fake.detach())
            loss = F.binary_cross_entropy_with_logits(on_real, torch.full_like(on_real, 0.9))
            loss = loss + F.binary_cross_entropy_with_logits(on_fake, torch.zeros_like(on_fake))
            loss.backward()
            step_judge.step()
            # The generator: its fakes should pass.
            step_make.zero_grad()
            on_fake = judge(fake)
            deceit = F.binary_cross_entropy_with_logits(on_fake, torch.ones_like(on_fake))
            deceit.backward()
            step_make.step()
            times.append(time.perf_counter() - started)
            total += torch.tensor([loss.item(), deceit.item()])
            bar.update()
        losses.append((total / (len(x) // size)).tolist())
        grids.append(sample(make, fixed))
        bar.set_postfix(discriminator=f"{losses[-1][0]:.2f}", generator=f"{losses[-1][1]:.2f}")
    bar.close()
    dense = [module for module in make if isinstance(module, (nn.Linear, fw.tt.TTLinear))]
    return {
        "parameters": sum(p.numel() for p in make.parameters()),
        "parameters of the two layers": sum(p.numel() for module in dense for p in module.parameters()),
        "median step in ms": 1e3 * sorted(times)[len(times) // 2],
        "median of the two layers in ms": 1e3 * time_of_layers(dense, size, options.device),
        "losses per epoch (discriminator, generator)": losses,
        "layers": [repr(module) for module in dense],
        "grids": torch.stack(grids),
    }


def time_of_layers(layers: list[nn.Module], size: int, device: str) -> float:
    """Median seconds of forward and backward of the two layers alone."""
    first = torch.randn(size, LATENT, device=device)
    second = torch.randn(size, HIDDEN, device=device, requires_grad=True)
    times = []
    for _ in range(25):
        started = time.perf_counter()
        for layer, x in zip(layers, (first, second), strict=True):
            layer(x).sum().backward()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def sample(model: nn.Module, z: Tensor) -> Tensor:
    """A grid of 6 x 6 samples [6·28, 6·28] in [0, 1], with the statistics of the batch."""
    out = model(z).cpu().reshape(6, 6, 28, 28)
    return (out.permute(0, 2, 1, 3).reshape(168, 168) + 1) / 2


def draw(results: dict[str, dict[str, Any]], x: Tensor, name: str, path: Path) -> None:
    """One picture: real images and the last samples of both; and the same as an animation over the epochs."""
    real = ((x[:36].reshape(6, 6, 28, 28).permute(0, 2, 1, 3).reshape(168, 168)) + 1) / 2
    titles = {"dense": "dense layers", "tt": "Tensor-Train layers"}

    def panels(epoch: int) -> list[tuple[str, str, Tensor]]:
        rows = [("real images", name, real)]
        for kind, result in results.items():
            count, step = result["parameters of the two layers"], result["median of the two layers in ms"]
            rows.append((titles[kind], f"{count:,} parameters, {step:.1f} ms a step", result["grids"][epoch]))
        return rows

    epochs = len(results["dense"]["grids"]) - 1
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.5))
    shown = []
    for axis, (title, below, grid) in zip(axes, panels(epochs), strict=True):
        shown.append(axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest"))
        axis.set_title(title, fontsize=13, loc="center")
        axis.grid(visible=False)
        axis.set_xlabel(below, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    label = figure.suptitle(f"DCGAN after {epochs} epochs", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"))

    def frame(epoch: int) -> list[Any]:
        label.set_text(f"epoch {epoch}")
        for image, (_, _, grid) in zip(shown[1:], panels(epoch)[1:], strict=True):
            image.set_data(grid)
        return [label, *shown]

    order = [*range(epochs + 1), *[epochs] * 3]  # the last one stays a little
    FuncAnimation(figure, frame, frames=order).save(path.with_suffix(".gif"), writer=PillowWriter(fps=2), dpi=70)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dataset", choices=["auto", "emnist", "mnist"], default="auto")
    parser.add_argument("--rank", type=int, default=8, help="of the first layer; the second has twice as much")
    parser.add_argument("--epochs", type=int, help="default: 5, quick 10 short ones")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, help="of Adam; default 2e-4, quick 1e-3")
    options = parser.parse_args()
    options.epochs = options.epochs or (10 if options.quick else 5)
    options.lr = options.lr or (1e-3 if options.quick else 2e-4)
    torch.manual_seed(options.seed)
    name, x = images(options.dataset, options.data, quick=options.quick)
    x = x[torch.randperm(len(x))][: 1536 if options.quick else None]
    print(f"DCGAN on {name}: {len(x):,} images, {options.epochs} epochs, batch {options.batch_size}")
    results = {kind: train(kind, x, options) for kind in ("dense", "tt")}
    draw(results, x, name, options.out / "dcgan_mnist")
    for result in results.values():
        del result["grids"]
    for kind, result in results.items():
        print(
            f"{kind:6} {result['parameters of the two layers']:>9,} parameters in the two layers "
            f"({result['parameters']:,} in all), {result['median of the two layers in ms']:6.2f} ms forward and "
            f"backward, {result['median step in ms']:6.1f} ms a whole step"
        )
    dense, tt = results["dense"], results["tt"]
    figures = {
        "example": "dcgan_mnist",
        "dataset": name,
        "images": len(x),
        "epochs": options.epochs,
        "seed": options.seed,
        "quick": options.quick,
        "fewer parameters in the two layers": dense["parameters of the two layers"]
        / tt["parameters of the two layers"],
        "two layers, time of dense over tt": dense["median of the two layers in ms"]
        / tt["median of the two layers in ms"],
        **results,
    }
    save_figures(options.out / "dcgan_mnist.json", figures)
    print(f"pictures and figures: {options.out / 'dcgan_mnist'}.png, .gif, .json")


if __name__ == "__main__":
    main()
