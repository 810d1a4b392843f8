"""Prediction with many weight samples, and the metrics on top of it."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
from finite_width.bayes import BayesConv2d, BayesLinear

X = torch.linspace(-2, 2, 30).reshape(5, 6)


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        BayesLinear(6, 9, init_std=0.3, **options), nn.Tanh(), BayesLinear(9, 3, bias=False, init_std=0.3, **options)
    )


def predict(model: nn.Module, x: Tensor = X, **options: Any) -> fw.bayes.Prediction:
    torch.manual_seed(2)
    return fw.bayes.predict(model, x, **options)


def test_mean_std_and_shapes() -> None:
    prediction = predict(network(), samples=7)
    assert prediction.samples.shape == (7, 5, 3)
    torch.testing.assert_close(prediction.mean, prediction.samples.mean(0))
    torch.testing.assert_close(prediction.std, prediction.samples.std(0))
    assert float(prediction.std.min()) > 0
    assert not prediction.mean.requires_grad
    single = predict(network(), samples=1)
    assert float(single.std.abs().max()) == 0


@pytest.mark.parametrize("batch", [1, 5, 16, 17, 70])
def test_the_result_does_not_depend_on_the_chunk(batch: int) -> None:
    model, x = network(), torch.randn(batch, 6)
    whole = predict(model, x, samples=7)
    for chunk in (1, 2, 3, 7, 100):
        torch.testing.assert_close(
            predict(model, x, samples=7, chunk=chunk).samples, whole.samples, rtol=1e-5, atol=1e-5
        )


def test_every_sample_is_one_network_for_all_rows() -> None:
    """The same row at two places gets the same output in each sample, and samples differ."""
    x = torch.cat([X, X])
    samples = predict(network(), x, samples=6).samples
    torch.testing.assert_close(samples[:, :5], samples[:, 5:])
    assert float((samples[0] - samples[1]).abs().min()) > 0


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
def test_moments_against_training_forwards(estimator: str) -> None:
    model = network(estimator=estimator)
    n = 3000
    prediction = predict(model, samples=n)
    with torch.no_grad():
        forwards = torch.stack([model(X) for _ in range(n)])
    error = (prediction.std**2 + forwards.var(0)).sqrt() / math.sqrt(n)
    assert float(((prediction.mean - forwards.mean(0)) / error).abs().max()) < 5
    assert float((prediction.std / forwards.std(0) - 1).abs().max()) < 0.15


def test_convolutions_norms_and_a_shared_layer() -> None:
    shared = BayesLinear(4, 4, init_std=0.3)
    model = nn.Sequential(
        BayesConv2d(1, 4, 3, init_std=0.2), nn.BatchNorm2d(4), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        shared, nn.Tanh(), shared,
    )  # fmt: skip
    x = torch.randn(3, 1, 6, 6)
    model.train()
    whole = predict(model, x, samples=4)
    assert all(module.training for module in model.modules())
    parts = predict(model, x, samples=4, chunk=1)
    torch.testing.assert_close(whole.samples, parts.samples, rtol=1e-5, atol=1e-5)
    assert float(whole.std.min()) > 0


def test_sequences_with_the_batch_first() -> None:
    model = nn.Sequential(BayesLinear(6, 4, init_std=0.3), nn.Flatten(1))
    assert predict(model, torch.randn(3, 5, 6), samples=4).mean.shape == (3, 20)


class Mask(nn.Module):
    """An output more, minus infinity, as that of a class ruled out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], -math.inf)], 1)


def flat(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)  # type: ignore[no-any-return]


# What a model does with its variational layers and the batch.
MOVED: dict[str, Any] = {
    "time first": lambda layers, x: layers(x.movedim(0, 1)).movedim(1, 0),
    "time first, flattened": lambda layers, x: flat(layers, x.movedim(0, 1)).movedim(1, 0),
    "flipped": lambda layers, x: layers(x.flip(0)).flip(0),
    "siamese": lambda layers, x: layers(torch.cat([x, x + 1])).chunk(2)[0],
    "normalised over the batch": lambda layers, x: layers(x - layers(x).mean(0).mean(-1, keepdim=True)),
    "sums over the batch": lambda layers, x: layers(x).cumsum(0),
    "sums over the batch from the end": lambda layers, x: layers(x).flip(0).cumsum(0).flip(0),
}


@pytest.mark.parametrize("way", MOVED)
@pytest.mark.parametrize("batch", [2, 5, 20])
@pytest.mark.parametrize("sigma", [0.3, 1e-6])
def test_samples_keep_their_own_weights_in_any_model(way: str, batch: int, sigma: float) -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(BayesLinear(6, 6, init_std=sigma), nn.LayerNorm(6), BayesLinear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return MOVED[way](self.layers, x)  # type: ignore[no-any-return]

    model, x = Moves(), torch.randn(batch, 4, 6)
    right = predict(model, x, samples=6, chunk=1)
    for chunk in (None, 4):
        torch.testing.assert_close(predict(model, x, samples=6, chunk=chunk).samples, right.samples, rtol=0, atol=0)


def test_a_moved_axis_of_images() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BayesConv2d(2, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([x, x + 1])).flatten(1).chunk(2)[1]  # type: ignore[no-any-return]

    x = torch.randn(3, 2, 5, 5)
    model = Moves()
    torch.testing.assert_close(
        predict(model, x, samples=4).samples, predict(model, x, samples=4, chunk=1).samples, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "model", [network(), nn.Sequential(network(), nn.Hardtanh()), nn.Sequential(network(), Mask())]
)
def test_ordinary_models_stack_their_samples(model: nn.Module) -> None:
    passes: list[int] = []
    model[0].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    predict(model, samples=7)
    assert passes == [10, 5, 5, 35]  # a rehearsal of two samples, then all


def test_threads_predict_with_one_model() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return x

    model = nn.Sequential(BayesLinear(6, 8, init_std=1.0), Slow(), BayesLinear(8, 3, init_std=1.0))
    right = fw.bayes.predict(model, X, samples=400).std.mean()
    found: dict[int, Any] = {}

    def run(place: int) -> None:
        time.sleep(0.02 * place)
        found[place] = fw.bayes.predict(model, X, samples=400 + place).std.mean()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.stack([found[k] for k in range(3)]), right.repeat(3), rtol=0.2, atol=0)
    assert all(module.training for module in model.modules())


def test_links() -> None:
    model = network()
    plain = predict(model, samples=9).samples
    torch.testing.assert_close(predict(model, samples=9, link="softmax").mean, torch.softmax(plain, -1).mean(0))
    torch.testing.assert_close(predict(model, samples=9, link="sigmoid").mean, torch.sigmoid(plain).mean(0))
    torch.testing.assert_close(predict(model, samples=9, link=torch.exp).mean, plain.exp().mean(0))
    torch.testing.assert_close(predict(model, samples=9, link=lambda y: y[:, 0]).mean, plain[..., 0].mean(0))
    for link in (lambda y: y.sum(0), lambda y: y.sum(), lambda y: [y]):
        with pytest.raises(ValueError, match=r"link must return one tensor \[45, \.\.\.\]"):
            predict(model, samples=9, link=link)


def test_an_empty_batch() -> None:
    assert predict(network(), X[:0], samples=4).samples.shape == (4, 0, 3)
    convolution = nn.Sequential(BayesConv2d(1, 4, 3), nn.Flatten(), BayesLinear(16, 2))
    assert predict(convolution, torch.ones(0, 1, 4, 4), samples=4).mean.shape == (0, 2)


@pytest.mark.parametrize("first", [BayesLinear, nn.Linear])
def test_autocast(first: Any) -> None:
    model = nn.Sequential(first(6, 9), nn.Tanh(), BayesLinear(9, 3, init_std=0.3))
    right = predict(model, samples=5).samples
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(model, samples=5).samples
        assert found.dtype == model(X).dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), right, rtol=0.05, atol=0.05)
    model.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert predict(model, X.double(), samples=5).samples.dtype == model(X.double()).dtype == torch.float64


def test_the_model_is_left_as_it_was() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(BayesLinear(6, 3), nn.Dropout(), Fails())
    with pytest.raises(KeyboardInterrupt):
        fw.bayes.predict(model, X)
    assert all(module.training for module in model.modules())
    assert not model[0]._predictions
    model[:2](X).sum().backward()


def test_bad_input() -> None:
    model = network()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"samples": 2.0}, TypeError, "samples must be an int"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"link": "probit"}, ValueError, "link must be one of 'softmax', 'sigmoid', got 'probit'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            fw.bayes.predict(model, X, **options)
    with pytest.raises(ValueError, match="model has no variational layer"):
        fw.bayes.predict(nn.Linear(6, 3), X)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        fw.bayes.predict(model, [1.0])  # type: ignore[arg-type]
    with torch.no_grad():
        model[2].weight_mu[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight_mu has NaN"):
        fw.bayes.predict(model, X)


def test_ece_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65]])
    labels = torch.tensor([0, 1, 1, 1])
    # 10 bins: two at 0.9 (accuracy 0.5), two in [0.6, 0.7) (accuracy 1, confidence 0.625).
    assert fw.bayes.ece(p, labels, bins=10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.375, abs=1e-6)
    sure = torch.eye(3)
    assert fw.bayes.ece(sure, torch.arange(3)) == 0.0
    assert fw.bayes.ece(sure, torch.tensor([1, 2, 0])) == 1.0


def test_ece_of_calibrated_predictions_goes_to_zero() -> None:
    logits = 2 * torch.randn(100_000, 4)
    p = torch.softmax(logits, -1)
    labels = torch.multinomial(p, 1)[:, 0]
    assert fw.bayes.ece(p, labels) < 0.01
    assert fw.bayes.ece(torch.softmax(3 * logits, -1), labels) > 0.1


def test_scores_against_torch() -> None:
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    p = torch.softmax(logits, -1)
    assert fw.bayes.nll(p, labels) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert fw.bayes.brier(p, labels) == pytest.approx(((p - F.one_hot(labels, 4)) ** 2).sum(1).mean().item(), rel=1e-5)
    right = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(fw.bayes.predictive_entropy(p), right)
    torch.testing.assert_close(fw.bayes.mutual_information(p.expand(3, -1, -1)), torch.zeros(50), atol=1e-6, rtol=0)
    assert math.isfinite(fw.bayes.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))


def test_metrics_bad_input() -> None:
    p = torch.full((3, 2), 0.5)
    for function in (fw.bayes.ece, fw.bayes.nll, fw.bayes.brier):
        with pytest.raises(ValueError, match=r"rows that sum to 1.*got entries from 0\.5 and sums from 1\.5 to 1\.5"):
            function(torch.tensor([[0.5, 1.0]]), torch.zeros(1).long())
        with pytest.raises(ValueError, match=r"labels must have shape \[3\]"):
            function(p, torch.zeros(2).long())
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got values from 2 to 2"):
            function(p, torch.full((3,), 2))
        with pytest.raises(TypeError, match="labels must be integers, got float32"):
            function(p, torch.zeros(3))
    with pytest.raises(ValueError, match=r"samples must have shape"):
        fw.bayes.mutual_information(p)
    with pytest.raises(ValueError, match=r"samples must hold one sample at least"):
        fw.bayes.mutual_information(p.expand(0, 3, 2))
    for function in (fw.bayes.nll, fw.bayes.brier):
        with pytest.raises(ValueError, match="probabilities must have one row at least"):
            function(p[:0], torch.zeros(0).long())


def test_a_table_without_rows_and_classes() -> None:
    with pytest.raises(ValueError, match="probabilities must have one class at least"):
        fw.bayes.ece(torch.ones(0, 0), torch.ones(0, dtype=torch.int64))
