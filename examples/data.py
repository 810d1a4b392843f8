"""Data for the examples: MNIST and two-class CIFAR-10 from the folder FINITE_WIDTH_DATA, scikit-learn's digits without.

The folder holds mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz (the four original files) and
cifar10_airplane_automobile.npz (uint8 arrays x_train [10000, 32, 32, 3], y_train [10000], x_test, y_test).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Data(NamedTuple):
    """One dataset: images as float32 [N, C, H, W] in [0, 1], labels as int64 [N]."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def scaled(self, mean: float, deviation: float) -> Data:
        """The same data with pixels (x - mean) / deviation; 0.5, 0.5 gives [-1, 1]."""
        return self._replace(
            x_train=(self.x_train - mean) / deviation,
            x_test=(self.x_test - mean) / deviation,
        )

    def flat(self) -> Data:
        """The same data with every image as one row [N, C·H·W]."""
        return self._replace(x_train=self.x_train.flatten(1), x_test=self.x_test.flatten(1))


def folder(path: str | os.PathLike[str] | None = None) -> Path | None:
    """The data folder: `path`, else the environment variable FINITE_WIDTH_DATA, else None.

    Raises:
        FileNotFoundError: a folder was named that does not exist.
    """
    name = path or os.environ.get("FINITE_WIDTH_DATA")
    if not name:
        return None
    found = Path(name)
    if not found.is_dir():
        source = "the path given" if path else "FINITE_WIDTH_DATA"
        raise FileNotFoundError(f"{source} names {found}, which is not a folder")
    return found


def has_mnist(path: str | os.PathLike[str] | None = None) -> bool:
    """Whether the data folder holds MNIST."""
    base = folder(path)
    return base is not None and (base / "mnist" / "train-images-idx3-ubyte.gz").exists()


def has_cifar2(path: str | os.PathLike[str] | None = None) -> bool:
    """Whether the data folder holds two-class CIFAR-10."""
    base = folder(path)
    return base is not None and (base / "cifar10_airplane_automobile.npz").exists()


def read_idx(file: Path) -> np.ndarray:
    """The uint8 array of one gzipped idx file: two zero bytes, type 8, the number of axes, big-endian sizes, bytes."""
    with gzip.open(file, "rb") as stream:
        content = stream.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an idx file of bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != int(shape.prod()):
        raise ValueError(f"{file} should hold {shape.tolist()} bytes, but holds {values.size}: download it again")
    return values.reshape(shape.tolist())


def mnist(path: str | os.PathLike[str] | None = None) -> Data:
    """MNIST: 60,000 training and 10,000 test images [1, 28, 28] (mean 0.1307, deviation 0.3081).

    Raises:
        FileNotFoundError: no data folder with mnist/ in it; the message says how to give one.
    """
    if not has_mnist(path):
        raise FileNotFoundError("set FINITE_WIDTH_DATA to a folder with mnist/train-images-idx3-ubyte.gz and the rest")
    base = folder(path)
    assert base is not None
    arrays = []
    for part in ("train", "t10k"):
        images = read_idx(base / "mnist" / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(base / "mnist" / f"{part}-labels-idx1-ubyte.gz")
        arrays += [torch.tensor(images).unsqueeze(1).float() / 255, torch.tensor(labels).long()]
    return Data("MNIST", *arrays)


def cifar2(path: str | os.PathLike[str] | None = None) -> Data:
    """Two-class CIFAR-10, airplane (0) and automobile (1): 10,000 training and 2,000 test images [3, 32, 32].

    Raises:
        FileNotFoundError: no data folder with cifar10_airplane_automobile.npz in it; the message says how to give one.
    """
    if not has_cifar2(path):
        raise FileNotFoundError("set FINITE_WIDTH_DATA to a folder with cifar10_airplane_automobile.npz")
    base = folder(path)
    assert base is not None
    with np.load(base / "cifar10_airplane_automobile.npz") as stored:
        arrays = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    images = [torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float() / 255 for name in ("x_train", "x_test")]
    labels = [torch.from_numpy(arrays[name]).long() for name in ("y_train", "y_test")]
    return Data("CIFAR-10 airplane/automobile", images[0], labels[0], images[1], labels[1])


def digits(classes: Sequence[int] | None = None, *, test: float = 0.5, seed: int = 0) -> Data:
    """scikit-learn's bundled digits: 1,797 images [1, 8, 8]; needs no file.

    Args:
        classes: the digits to keep, relabelled 0, 1, ... in this order; None keeps all ten.
        test: the part of the images that goes to the test set.
        seed: of the shuffle.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    name = "digits"
    if classes is not None:
        kept = torch.isin(y, torch.tensor(list(classes)))
        x, y = x[kept], y[kept]
        y = torch.stack([y == each for each in classes], dim=1).int().argmax(1)
        name += " " + "/".join(map(str, classes))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    split = len(x) - round(test * len(x))
    return Data(name, x[:split], y[:split], x[split:], y[split:])


def mnist_or_digits(path: str | os.PathLike[str] | None = None) -> Data:
    """MNIST where the data folder holds it, else scikit-learn's digits; `.name` says which."""
    return mnist(path) if has_mnist(path) else digits()
