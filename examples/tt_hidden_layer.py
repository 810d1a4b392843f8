"""A hidden layer that is born as a Tensor Train: the MNIST network of Novikov et al. 2015, section 6.1.

    python examples/tt_hidden_layer.py            twenty epochs on MNIST, padded to 32 × 32, beside the dense network
    python examples/tt_hidden_layer.py --quick    scikit-learn's digits

The network is 1024 → 1024 → 10 with a ReLU; its first layer has modes (4, 8, 8, 4) on both sides and all ranks 8: 9,472
parameters in place of 1,049,600. Adam from 2e-3 down to 0 along a cosine, batches of 100.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import finite_width as fw
from command import arguments, save_figures
from data import Data, digits, mnist


def padded(data: Data) -> Data:
    """MNIST's 28 × 28 images with a black border of two pixels, each as one row."""
    return data._replace(x_train=F.pad(data.x_train, (2, 2, 2, 2)), x_test=F.pad(data.x_test, (2, 2, 2, 2))).flat()


def train(hidden: nn.Module, width: int, data: Data, epochs: int, seed: int, device: str) -> dict[str, Any]:
    """Train hidden → ReLU → 10 classes; the test accuracy after each epoch, parameters and seconds."""
    torch.manual_seed(seed)
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(width, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data.x_train) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    accuracies, started = [], time.perf_counter()
    for _ in tqdm(range(epochs), desc=type(hidden).__name__, unit="epoch"):
        for chosen in torch.randperm(len(data.x_train), generator=generator).split(100):
            loss = F.cross_entropy(model(data.x_train[chosen].to(device)), data.y_train[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = model(data.x_test.to(device)).argmax(1).cpu() == data.y_test
        accuracies.append(100 * float(right.float().mean()))
    return {
        "hidden_parameters": sum(parameter.numel() for parameter in hidden.parameters()),
        "accuracy": accuracies,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    if options.quick:
        data, modes, epochs = digits().flat(), (4, 4, 4), 40
    else:
        data, modes, epochs = padded(mnist(options.data)), (4, 8, 8, 4), 20
    width = data.x_train.shape[1]
    torch.manual_seed(options.seed)
    layers = {
        "tensor_train": fw.tt.TTLinear(width, width, rank=8, in_modes=modes, out_modes=modes),
        "dense": nn.Linear(width, width),
    }
    figures: dict[str, Any] = {"data": data.name, "network": f"{width}-{width}-10", "modes": modes, "rank": 8}
    figures |= {"seed": options.seed, "epochs": epochs}
    for name, layer in layers.items():
        figures[name] = train(layer, width, data, epochs, options.seed, options.device)
        found = figures[name]
        print(f"{name}: {found['hidden_parameters']:,} parameters, {found['accuracy'][-1]:.2f} %, {found['seconds']} s")
    figures["seconds"] = sum(figures[name]["seconds"] for name in layers)
    save_figures(options.out / "tt_hidden_layer.json", figures)
    draw(figures, options.out / "tt_hidden_layer.png")
    print(f"figures and picture in {options.out}/")


def draw(figures: dict[str, Any], path: Any) -> None:
    import style

    drawn, axes = style.figure(6, 3.8)
    for name, colour in (("dense", style.GREY), ("tensor_train", style.ORANGE)):
        label = f"{name.replace('_', ' ')}, {figures[name]['hidden_parameters']:,} parameters"
        axes.plot(range(1, figures["epochs"] + 1), figures[name]["accuracy"], "o-", ms=3, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=f"{figures['data']}: a hidden layer as a Tensor Train")
    axes.legend()
    style.save(drawn, path)


if __name__ == "__main__":
    main()
