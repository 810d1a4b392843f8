"""The networks of the NTK's benchmarks, and the least operations that the kernels of MLPs and the CNN need."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from resnet import resnet18


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn() -> nn.Sequential:
    """The CNN of PyTorch's NTK tutorial: three 3×3 convolutions of 32 channels on 32×32 images, ten outputs."""
    torch.manual_seed(0)
    convolutions: list[nn.Module] = []
    for channels in (3, 32, 32):
        convolutions += [nn.Conv2d(channels, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 26 * 26, 10)).eval()


class Encoder(nn.Module):
    """Tokens [n, length] to ten outputs: two Transformer layers, the mean over positions, a dense layer."""

    def __init__(self, vocabulary: int = 100, length: int = 32, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens) + self.positions).mean(1))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def residual() -> nn.Module:
    """ResNet-18 with a quarter of the channels, on 32×32 images."""
    torch.manual_seed(0)
    return resnet18(widths=(16, 32, 64, 128)).eval()


def dense_flops(widths: tuple[int, ...], rows: int, columns: int, compute: str) -> float:
    """The least operations for an MLP: forward, backward for all outputs, and the products of Jacobians."""
    layers, outputs = list(pairwise(widths)), widths[-1]
    products = outputs**2 if compute == "full" else outputs
    forward = sum(a * b for a, b in layers)
    backward = outputs * sum(a * b for a, b in layers[1:])
    kernel = sum(a for a, _ in layers) + products * sum(b for _, b in layers)
    return 2.0 * ((rows + columns) * (forward + backward) + rows * columns * kernel)


def conv_flops(rows: int, columns: int, compute: str) -> float:
    """The same for the CNN, with per-example gradients, its convolutions counted as sums over taps."""
    layers = [(3, 30), (32, 28), (32, 26)]  # channels in and positions per side out of each convolution
    last, outputs = 32 * 26 * 26, 10
    products = outputs**2 if compute == "full" else outputs
    taps = [9 * channels * 32 for channels, _ in layers]
    forward = sum(size * side**2 for size, (_, side) in zip(taps, layers, strict=True)) + last * outputs
    backward = outputs * (
        sum(size * side**2 for size, (_, side) in zip(taps[1:], layers[1:], strict=True)) + last * outputs
    )
    gradients = outputs * sum(size * side**2 for size, (_, side) in zip(taps, layers, strict=True))
    kernel = last + outputs * products + products * sum(size + 32 for size in taps)
    return 2.0 * ((rows + columns) * (forward + backward + gradients) + rows * columns * kernel)
