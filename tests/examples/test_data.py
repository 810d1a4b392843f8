"""The examples' data loader: what it returns, and what it says where files are missing or broken."""

import gzip
import os

import numpy as np
import pytest
import torch

from examples import data

needs_data = pytest.mark.skipif("FINITE_WIDTH_DATA" not in os.environ, reason="FINITE_WIDTH_DATA is not set")


def check(found: data.Data, train: list[int], test: list[int], classes: int) -> None:
    assert list(found.x_train.shape) == train
    assert list(found.x_test.shape) == test
    assert found.y_train.shape == (train[0],)
    assert found.y_test.shape == (test[0],)
    assert found.x_train.dtype == torch.float32
    assert found.y_train.dtype == torch.int64
    assert found.x_train.min() == 0
    assert found.x_train.max() == 1
    assert found.y_train.unique().tolist() == list(range(classes))


def test_digits():
    check(data.digits(), [899, 1, 8, 8], [898, 1, 8, 8], 10)


def test_digits_keeps_and_relabels_the_classes_asked_for():
    every, two = data.digits(), data.digits((8, 3), seed=1)
    check(two, [two.x_train.shape[0], 1, 8, 8], [two.x_test.shape[0], 1, 8, 8], 2)
    images = torch.cat([every.x_train, every.x_test])
    labels = torch.cat([every.y_train, every.y_test])
    for new, old in ((0, 8), (1, 3)):
        assert (two.y_train == new).sum() + (two.y_test == new).sum() == (labels == old).sum()
    first = two.x_train[two.y_train == 0][0]
    assert (images[labels == 8] == first).flatten(1).all(1).any()


def test_digits_is_the_same_for_one_seed_and_another_for_another():
    assert torch.equal(data.digits(seed=3).x_train, data.digits(seed=3).x_train)
    assert not torch.equal(data.digits(seed=3).x_train, data.digits(seed=4).x_train)


def test_scaled_and_flat():
    found = data.digits().scaled(0.5, 0.5).flat()
    assert found.x_train.shape == (899, 64)
    assert found.x_test.min() == -1
    assert found.x_test.max() == 1


@needs_data
def test_mnist():
    found = data.mnist()
    check(found, [60000, 1, 28, 28], [10000, 1, 28, 28], 10)
    assert abs(found.x_train.mean().item() - 0.1307) < 1e-4
    assert abs(found.x_train.std().item() - 0.3081) < 1e-4


@needs_data
def test_cifar2():
    found = data.cifar2()
    check(found, [10000, 3, 32, 32], [2000, 3, 32, 32], 2)
    assert found.y_train.sum() == 5000


def test_missing_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FINITE_WIDTH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="mnist"):
        data.mnist()
    with pytest.raises(FileNotFoundError, match="cifar10_airplane_automobile"):
        data.cifar2()
    assert data.mnist_or_digits().name == "digits"
    monkeypatch.setenv("FINITE_WIDTH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.mnist_or_digits()


def test_read_idx(tmp_path):
    file = tmp_path / "images.gz"
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes()))
    assert np.array_equal(data.read_idx(file), values)
    file.write_bytes(gzip.compress(header + values.tobytes()[:-1]))
    with pytest.raises(ValueError, match="download it again"):
        data.read_idx(file)
    file.write_bytes(gzip.compress(b"not idx"))
    with pytest.raises(ValueError, match="not an idx file"):
        data.read_idx(file)
