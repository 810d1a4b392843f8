"""convert, mean_mode and freeze_: what they replace and report, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
from finite_width.bayes import BayesConv2d, BayesLinear, GaussianPrior, MopedPrior


class Mixed(nn.Module):
    """Everything that the report has to have an opinion on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        h, _ = self.lstm(h)
        h, _ = self.attention(h, h, h)
        result: Tensor = self.head(h.mean(1))
        return result


X = torch.linspace(-1, 1, 2 * 25).reshape(2, 1, 5, 5)


def snapshot(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    return [(n, id(m)) for n, m in model.named_modules()], {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: Any) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    for key in state:
        torch.testing.assert_close(state[key], before[1][key], rtol=0, atol=0, equal_nan=True)


def test_report_and_result() -> None:
    model = Mixed().eval()
    weights = copy.deepcopy(model.state_dict())
    report = fw.bayes.convert(model, init="moped")
    assert report.converted == ["conv", "head.0", "head.2"]
    assert report.left_alone == ["norm", "lstm", "attention"]
    text = str(report)
    for part in ("conv", "BatchNorm2d", "recurrent layers are not converted", "attention is not converted", "[5, 6]"):
        assert part in text
    assert type(model.conv) is BayesConv2d
    assert type(model.norm) is nn.BatchNorm2d
    assert not model.conv.training
    torch.testing.assert_close(model.head[0].weight_mu, weights["head.0.weight"])
    torch.testing.assert_close(model.head[0].weight_prior_mean, weights["head.0.weight"])
    size = weights["head.0.weight"].abs()
    size = size.clamp_min(1e-3 * float(size.square().mean().sqrt()))  # so that zeros can move
    # ρ is rounded to float32, and so are softplus and its inverse: a few units in the last place of σ.
    torch.testing.assert_close(F.softplus(model.head[0].weight_rho), 0.1 * size, rtol=2e-6, atol=0)
    assert model(X).shape == (2, 2)
    (model(X).sum() + fw.bayes.kl(model)).backward()


def test_moped_keeps_the_function() -> None:
    model = Mixed().eval()
    right = model(X)
    fw.bayes.convert(model, init="moped", prior=MopedPrior(std=0.5, delta=0.2))
    with fw.bayes.mean_mode(model):
        torch.testing.assert_close(model(X), right)
    assert not torch.allclose(model(X), right)
    fw.bayes.freeze_(model)
    assert type(model.conv) is nn.Conv2d
    torch.testing.assert_close(model(X), right)


def test_default_init_draws_fresh_means() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    old = model[0].weight.detach().clone()
    fw.bayes.convert(model, prior=GaussianPrior(0.3), estimator="flipout")
    assert not torch.allclose(model[0].weight_mu, old)
    assert model[0].prior == GaussianPrior(0.3)
    assert model[0].estimator == "flipout"


def test_include_and_exclude() -> None:
    model = Mixed()
    report = fw.bayes.convert(model, include=["head.*"], exclude=["head.2"])
    assert report.converted == ["head.0"]
    assert {layer.name: layer.reason for layer in report.layers}["head.2"] == "excluded"
    assert {layer.name: layer.reason for layer in report.layers}["conv"] == "not included"
    again = fw.bayes.convert(model, include=["head.2"])
    assert again.converted == ["head.2"]


def test_strict_concerns_what_is_included() -> None:
    everything = ["lstm", "attention*"]
    assert fw.bayes.convert(Mixed(), strict=True, exclude=everything).converted == ["conv", "head.0", "head.2"]
    assert fw.bayes.convert(Mixed(), strict=True, include=["head.*"]).converted == ["head.0", "head.2"]


def test_any_name_of_a_shared_layer_excludes_it() -> None:
    model = Mixed()
    model.again = model.head[0]
    assert fw.bayes.convert(model, exclude=["again"]).converted == ["conv", "head.2"]


def test_hooks_are_not_lost() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen: list[Any] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    report = fw.bayes.convert(model)
    assert report.converted == ["1"]
    assert "it has hooks" in report.layers[0].reason
    model(torch.ones(2, 3))
    assert seen == [1]
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1 has hooks"):
        fw.bayes.freeze_(model)


def test_a_lazy_layer() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 \(LazyLinear\) has no weights yet"):
        fw.bayes.convert(model)
    assert fw.bayes.convert(model, exclude=["0"]).converted == ["1"]


@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoders_infer(grad: bool) -> None:
    """torch's fused inference reads linear1.weight past the layer's forward: it is off where that layer has none."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = True
    with torch.no_grad():
        right = model(x, src_key_padding_mask=mask)
    fw.bayes.convert(model, init="moped")
    assert fw.bayes.predict(model, x, samples=3).mean.shape == x.shape
    with torch.set_grad_enabled(grad), fw.bayes.mean_mode(model):
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[1:, :3], right[1:, :3], rtol=1e-4, atol=1e-5)
    fw.bayes.freeze_(model)
    torch.testing.assert_close(model(x, src_key_padding_mask=mask)[1:, :3], right[1:, :3], rtol=1e-4, atol=1e-5)


def test_freeze_keeps_what_is_tied() -> None:
    model = nn.Sequential(BayesLinear(3, 3), BayesLinear(3, 3), BayesLinear(3, 3))
    model[1].weight_mu, model[1].weight_rho = model[0].weight_mu, model[0].weight_rho
    fw.bayes.freeze_(model)
    assert model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias
    assert model[2].weight is not model[1].weight


def test_dtype_requires_grad_and_sharing() -> None:
    layer = nn.Linear(3, 3).double()
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    fw.bayes.convert(model, init="moped")
    assert model[0] is model[2]
    assert model[0].weight_mu.dtype == torch.float64
    assert not model[0].weight_rho.requires_grad
    assert model[0].bias_rho.requires_grad
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert fw.bayes.convert(tied).left_alone == ["0", "1"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"init": "trained"}, ValueError, "init must be one of 'default', 'moped', got 'trained'"),
        ({"estimator": "exact"}, ValueError, "estimator must be one of"),
        ({"prior": "gaussian"}, TypeError, "prior must be a GaussianPrior"),
        ({"strict": True}, ValueError, r"lstm \(LSTM\): recurrent layers are not converted"),
        ({"strict": True, "exclude": ["lstm"]}, ValueError, r"attention \(MultiheadAttention\): attention is not"),
        ({"include": ["lstm"]}, ValueError, "model has no layer to convert"),
        ({"include": ["nothing"]}, ValueError, "include has the pattern 'nothing', which no module with weights has"),
        ({"exclude": ["head"]}, ValueError, "exclude has the pattern 'head', which no module with weights has"),
        ({"include": "head.0"}, TypeError, r"include must be a list of patterns, got the string 'head\.0'"),
    ],
)
def test_bad_input_leaves_the_model_alone(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Mixed()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fw.bayes.convert(model, **options)
    assert_unchanged(model, before)


def test_nothing_to_convert_and_bare_layers() -> None:
    with pytest.raises(ValueError, match="model has no layer to convert: it holds no weights"):
        fw.bayes.convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="model is itself a Linear"):
        fw.bayes.convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fw.bayes.convert([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_nan_and_interruption_leave_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed()
    with torch.no_grad():
        model.head[2].weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.2\.weight holds NaN"):
        fw.bayes.convert(model, init="moped")
    assert_unchanged(model, before)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BayesLinear, "reset_parameters", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fw.bayes.convert(model)
    assert_unchanged(model, before)


def test_freeze_of_nan_and_of_a_bare_layer() -> None:
    layer = BayesLinear(3, 2)
    frozen = fw.bayes.freeze_(layer)
    assert type(frozen) is nn.Linear
    torch.testing.assert_close(frozen.weight, layer.weight_mu)
    assert frozen.weight.data_ptr() != layer.weight_mu.data_ptr()
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight_rho[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight_rho has NaN"):
        fw.bayes.freeze_(model)
    assert model[0] is layer
    with pytest.raises(ValueError, match="model has no variational layer"):
        fw.bayes.freeze_(nn.Linear(2, 2))


def test_a_shared_bias_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    report = fw.bayes.convert(model)
    assert report.left_alone == ["0", "1"]
    assert "its bias is shared with another module" in str(report)
    assert model[1].bias is model[0].bias


def test_convert_inside_of_a_device_block() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.device("meta"):
        fw.bayes.convert(model, init="moped")
    assert model[0].weight_mu.device.type == "cpu"
