"""compress: what it replaces, what it keeps, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import finite_width as fw
from finite_width.tt import compress as compress_module  # noqa: F401


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(200, 32)
        self.convolution = nn.Conv2d(16, 32, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.body = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
        self.again = self.body[0]
        self.tiny = nn.Linear(2, 2)


def snapshot(model):
    return [(name, id(module)) for name, module in model.named_modules()], copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    names, state = snapshot(model)
    assert names == before[0]
    for name, value in before[1].items():
        assert torch.equal(
            state[name],
            value,
        ) or (value.isnan().any() and state[name].isnan().any())


def test_replaces_and_reports():
    model = Network()
    weight = model.body[0].weight.detach().clone()
    model.body[2].weight.requires_grad_(False)
    report = fw.tt.compress(model, max_rank=4)
    assert isinstance(model.table, fw.tt.TTEmbedding)
    assert isinstance(model.convolution, fw.tt.TTConv2d)
    assert isinstance(model.body[0], fw.tt.TTLinear)
    assert model.again is model.body[0]
    assert isinstance(model.depthwise, nn.Conv2d)
    assert type(model.tiny) is nn.Linear
    assert not any(core.requires_grad for core in model.body[2].cores)
    assert model.body[2].bias.requires_grad
    rows = {row.name: row for row in report.layers}
    assert set(rows) == {"table", "convolution", "depthwise", "body.0, again", "body.2", "tiny"}
    first = rows["body.0, again"]
    error = float((model.body[0].to_dense().detach() - weight).norm() / weight.norm())
    assert first.relative_error == pytest.approx(error, rel=1e-5)
    assert first.parameters_before == 128 * 256 + 256
    assert first.parameters_after == sum(p.numel() for p in model.body[0].parameters())
    assert rows["depthwise"].kept == "depthwise, groups=16"
    assert "parameters" in rows["tiny"].kept
    before, after = sum(r.parameters_before for r in report.replaced), sum(r.parameters_after for r in report.replaced)
    assert report.ratio == pytest.approx(before / after)
    text = str(report)
    assert "relative error" in text
    assert "kept: depthwise, groups=16" in text


def test_ratio_holds_for_the_replaced_layers():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 100))
    report = fw.tt.compress(model, ratio=10)
    assert all(row.parameters_before / row.parameters_after >= 10 for row in report.replaced)
    assert 10 <= report.ratio < 14


def test_eps_bounds_every_layer():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(256, 3) @ torch.randn(3, 256))  # low rank, so that the train is smaller
    report = fw.tt.compress(model, eps=0.3)
    for row in report.replaced:
        assert row.relative_error <= 0.3


@pytest.mark.parametrize(
    "table, reason",
    [
        (nn.Embedding(200, 32, max_norm=1.0), "max_norm = 1.0"),
        (nn.Embedding(200, 32, sparse=True), "sparse=True"),
        (nn.Embedding(200, 32, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (nn.EmbeddingBag(200, 32, include_last_offset=True), "include_last_offset=True"),
        (nn.EmbeddingBag(200, 32, mode="max"), "mode='max'"),
    ],
)
def test_tables_unlike_a_train_are_kept(table, reason):
    model = nn.Sequential(table)
    report = fw.tt.compress(model, max_rank=2)
    assert model[0] is table
    assert reason in report.layers[0].kept
    with pytest.raises(ValueError, match=f"has {reason}"):
        fw.tt.TTEmbedding.from_embedding(table, max_rank=2)


def test_patterns():
    model = Network()
    fw.tt.compress(model, max_rank=2, include=["body.*"], exclude=["*.2"])
    assert isinstance(model.body[0], fw.tt.TTLinear)
    assert type(model.body[2]) is nn.Linear
    assert type(model.table) is nn.Embedding


def test_attention_keeps_its_own_projection():
    """nn.MultiheadAttention reads out_proj.weight itself; that layer is a subclass and stays."""
    model = nn.TransformerEncoderLayer(32, 2, 128, batch_first=True)
    fw.tt.compress(model, max_rank=2)
    assert isinstance(model.linear1, fw.tt.TTLinear)
    assert model(torch.randn(2, 5, 32)).shape == (2, 5, 32)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_encoders_infer(layers, grad):
    """torch's fused inference reads linear1.weight past the layer's forward: it is off where that layer is a train."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), layers).eval()
    model(torch.randn(2, 5, 32))
    fw.tt.compress(model, max_rank=2, exclude=["layers.0.*"] if layers == 2 else None)
    assert isinstance(model.layers[-1].linear1, fw.tt.TTLinear)
    x, mask = torch.randn(3, 5, 32), torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = True
    with torch.set_grad_enabled(grad):
        assert model(x).shape == (3, 5, 32)
        for each in (x, copy.deepcopy(x)):
            result = model(each, src_key_padding_mask=mask)
            alone = model(each[1:2, :3])
            torch.testing.assert_close(result[1:2, :3], alone)


def test_an_interrupted_swap_restores_the_fused_inference():
    class Interrupted(nn.TransformerEncoderLayer):
        def modules(self):  # what the swap asks after it has switched off the first encoder layer's
            assert model[0].activation_relu_or_gelu == 0
            raise KeyboardInterrupt

    model = nn.Sequential(*(kind(32, 2, 128, batch_first=True) for kind in (nn.TransformerEncoderLayer, Interrupted)))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        fw.tt.compress(model, max_rank=2)
    assert_unchanged(model, before)
    assert model[0].activation_relu_or_gelu == 1


def nan_in_the_last_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


def tied():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    return model


def pruned():
    model = nn.Sequential(nn.Linear(64, 64))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def made_from_other_parameters():
    model = nn.Sequential(nn.Linear(64, 64))
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight * 2
    return model


def hooked():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_forward_hook(lambda *_: None)
    return model


BAD = [
    (nan_in_the_last_layer, {"max_rank": 2}, ValueError, "^1: weight holds NaN.*the model is unchanged"),
    (tied, {"max_rank": 2}, ValueError, "share one weight"),
    (hooked, {"max_rank": 2}, ValueError, "0 has hooks"),
    (pruned, {"max_rank": 2}, ValueError, "0 has hooks"),
    (made_from_other_parameters, {"max_rank": 2}, ValueError, "0 has a weight that is made from other parameters"),
    (Network, {"ratio": "a"}, TypeError, "ratio must be a number, got str"),
    (Network, {"eps": "a"}, TypeError, "eps must be a number, got str"),
    (Network, {}, ValueError, "give eps"),
    (Network, {"max_rank": 0}, ValueError, "max_rank must be at least 1"),
    (Network, {"ratio": 0.5}, ValueError, "must be above 1, got 0.5"),
    (Network, {"ratio": 1e6}, ValueError, "target_params = 1 leaves"),
    (Network, {"max_rank": 2, "include": ["nothing"]}, ValueError, "include has the pattern 'nothing'"),
    (Network, {"max_rank": 2, "exclude": "body"}, TypeError, "exclude must be a list of patterns"),
    (lambda: nn.Linear(64, 64), {"max_rank": 2}, ValueError, "model is itself the layer"),
]


@pytest.mark.parametrize("make, options, error, message", BAD)
def test_failures_change_nothing(make, options, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fw.tt.compress(model, **options)
    assert_unchanged(model, before)


def test_interruption_during_the_swap_changes_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    before = snapshot(model)
    get, calls = nn.Module.get_submodule, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:  # the second layer, when the first is in its place
            assert isinstance(model[0], fw.tt.TTLinear)
            raise KeyboardInterrupt
        return get(self, target)

    monkeypatch.setattr(nn.Module, "get_submodule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fw.tt.compress(model, max_rank=2)
    assert_unchanged(model, before)


def test_the_compressed_model_trains():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    fw.tt.compress(model, max_rank=4)
    x, target = torch.randn(50, 64), torch.randn(50, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_reported_error_under_autocast():
    model = nn.Sequential(nn.Linear(64, 64))
    right = fw.tt.compress(copy.deepcopy(model), max_rank=4).layers[0]
    with torch.autocast("cpu"):
        found = fw.tt.compress(model, max_rank=4).layers[0]
    assert found == right


def test_subclasses_are_named_and_kept():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(64, 64), nn.Linear(64, 64), nn.LazyLinear(3))
    report = fw.tt.compress(model, max_rank=2)
    assert [(layer.name, layer.shape, layer.kept) for layer in report.layers] == [
        ("0", (64, 64), "Own, a subclass of Linear"),
        ("1", (64, 64), ""),
        ("2", (), "LazyLinear, a subclass of Linear"),
    ]
    assert type(model[0]) is Own
    assert "a subclass of Linear" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": 5}, "exclude must be a list of patterns, got 5"),
        ({"include": [1]}, "include must hold patterns of names"),
    ],
)
def test_patterns_that_are_none(options, message):
    with pytest.raises(TypeError, match=message):
        fw.tt.compress(nn.Sequential(nn.Linear(64, 64)), max_rank=2, **options)
    with pytest.raises(ValueError, match=r"0: embedding must have a weight with values.*the model is unchanged"):
        fw.tt.compress(nn.Sequential(nn.Embedding(64, 64, device="meta", padding_idx=0)), max_rank=2)
