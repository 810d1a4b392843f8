"""PathSGD inside other people's training loops: Accelerate's and Lightning's, where they are installed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import finite_width as fw
from pathsgd.networks import mlp

SETTINGS = {"lr": 1e-2, "momentum": 0.9}


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 6, generator=generator), torch.arange(32) % 2)


def start():
    torch.manual_seed(0)
    model = mlp(6, 11, 9, 2)
    return model, copy.deepcopy(model)


def train_plainly(model, accumulate=1):
    optimizer = fw.pathsgd.PathSGD(model, **SETTINGS)
    for index, (x, y) in enumerate(DataLoader(data(), 8)):
        (F.cross_entropy(model(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def assert_same(model, other) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, other = start()
    train_plainly(other, accumulate)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = fw.pathsgd.PathSGD(model, **SETTINGS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), 8))
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            assert not optimizer.step_was_skipped
            optimizer.zero_grad()
    assert_same(model, other)
    accelerator.save_state(str(tmp_path))
    before = copy.deepcopy(optimizer.state_dict()["path"]["steps"])
    accelerator.load_state(str(tmp_path))
    assert optimizer.state_dict()["path"]["steps"] == before == 4 // accumulate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate, tmp_path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    model, other = start()
    train_plainly(other, accumulate)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return fw.pathsgd.PathSGD(self.net, **SETTINGS)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data(), 8))
    assert_same(model, other)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)["optimizer_states"][0]
    assert saved["path"]["steps"] == 4 // accumulate


def test_a_closure_that_the_loop_hands_to_step() -> None:
    """What Lightning's loop does: forward, zero_grad and backward inside the closure, under step()."""
    model, other = start()
    train_plainly(other)
    optimizer = fw.pathsgd.PathSGD(model, **SETTINGS)
    for x, y in DataLoader(data(), 8):

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            return loss

        assert torch.isfinite(optimizer.step(closure))
    assert_same(model, other)


def test_a_skipped_step_changes_nothing() -> None:
    """What AcceleratedOptimizer does with a GradScaler: it wraps `step` to see whether the scaler left it out."""
    model, _ = start()
    optimizer = fw.pathsgd.PathSGD(model, **SETTINGS)
    called, original = [], optimizer.step

    def patched(*args, **kwargs):
        called.append(True)
        return original(*args, **kwargs)

    optimizer.step = patched
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(torch.ones(2, 6)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not called
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 6)).sum()).backward()
    scaler.step(optimizer)
    assert called
    assert not torch.equal(model[0].weight, before["0.weight"])
