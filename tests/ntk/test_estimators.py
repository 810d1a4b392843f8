"""The kernel estimators against the formulas, and their scikit-learn protocol."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import finite_width as fw
from finite_width.ntk.inputs import row_cuts

ESTIMATORS = [
    fw.ntk.NTKRegressor,
    fw.ntk.NNGPRegressor,
    fw.ntk.NTKClassifier,
    fw.ntk.NNGPClassifier,
    fw.ntk.NTKRidgeCV,
]
REGRESSORS = [fw.ntk.NTKRegressor, fw.ntk.NNGPRegressor, fw.ntk.NTKRidgeCV]
CLASSIFIERS = [fw.ntk.NTKClassifier, fw.ntk.NNGPClassifier]


def mlp(outputs=1, width=16, features=3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def points(rows=20, features=3, seed=0, dtype=torch.float64):
    return torch.randn(rows, features, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def jacobian(model, x):
    """[N, O, P] by autograd, one row and output at a time."""
    rows = []
    for row in x:
        outputs = model(row.unsqueeze(0)).flatten()
        each = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in outputs]
        rows.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each]))
    return torch.stack(rows)


def kernel(model, x1, x2):
    """Θ [N·O, M·O]."""
    return jacobian(model, x1).flatten(0, 1) @ jacobian(model, x2).flatten(0, 1).T


def test_regressor_is_the_formula():
    model, x, new = mlp(), points(), points(7, seed=1)
    y = x[:, 0].sin()
    expected = kernel(model, new, x) @ torch.linalg.solve(kernel(model, x, x) + 0.01 * eye(20), y)
    prediction = fw.ntk.NTKRegressor(model, ridge=0.01).fit(x, y).predict(new)
    assert prediction.shape == (7,)
    assert prediction.dtype == torch.float64
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-9)


def test_center_fits_the_rest_and_adds_the_model_back():
    model, x, new = mlp(), points(), points(7, seed=1)
    y = x[:, 0].sin()
    with torch.no_grad():
        f0, f0_new = model(x)[:, 0], model(new)[:, 0]
    weights = torch.linalg.solve(kernel(model, x, x) + 0.01 * eye(20), y - f0)
    prediction = fw.ntk.NTKRegressor(model, ridge=0.01, center=True).fit(x, y).predict(new)
    torch.testing.assert_close(prediction, f0_new + kernel(model, new, x) @ weights, rtol=1e-9, atol=1e-9)


def test_centred_prediction_is_the_trained_linearised_network():
    # With ρ → 0 the regressor is f₀ + J·(least-norm change of the parameters that fits y).
    model, x, new = mlp(width=32), points(10), points(4, seed=1)
    y = x[:, 0].sin()
    with torch.no_grad():
        f0, f0_new = model(x)[:, 0], model(new)[:, 0]
    change = torch.linalg.pinv(jacobian(model, x)[:, 0]) @ (y - f0)
    prediction = fw.ntk.NTKRegressor(model, ridge=1e-10, center=True).fit(x, y).predict(new)
    torch.testing.assert_close(prediction, f0_new + jacobian(model, new)[:, 0] @ change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", ["trace", "diagonal", "full"])
def test_several_outputs(compute):
    model, x, new = mlp(outputs=2), points(12), points(5, seed=1)
    y = torch.stack([x[:, 0].sin(), x[:, 1] ** 2], dim=1)
    K = kernel(model, x, x).reshape(12, 2, 12, 2)
    K_new = kernel(model, new, x).reshape(5, 2, 12, 2)
    small = 0.1 * eye(12)
    if compute == "full":
        weights = torch.linalg.solve(K.reshape(24, 24) + 0.1 * eye(24), y.flatten())
        expected = (K_new.reshape(10, 24) @ weights).reshape(5, 2)
    elif compute == "diagonal":
        columns = [K_new[:, a, :, a] @ torch.linalg.solve(K[:, a, :, a] + small, y[:, a]) for a in range(2)]
        expected = torch.stack(columns, dim=1)
    else:
        K, K_new = torch.einsum("nama->nm", K) / 2, torch.einsum("nama->nm", K_new) / 2
        expected = K_new @ torch.linalg.solve(K + small, y)
    regressor = fw.ntk.NTKRegressor(model, ridge=0.1, compute=compute).fit(x, y)
    torch.testing.assert_close(regressor.predict(new), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compute", ["trace", "diagonal", "full"])
def test_return_std_is_the_latent_posterior(compute):
    model, x, new = mlp(outputs=2), points(12), points(5, seed=1)
    y = torch.stack([x[:, 0].sin(), x[:, 1] ** 2], dim=1)
    every = torch.cat([x, new])
    joint = kernel(model, every, every).reshape(17, 2, 17, 2)
    if compute == "trace":
        joint = (torch.einsum("nama->nm", joint) / 2)[:, None, :, None] * eye(2)[None, :, None, :]
    elif compute == "diagonal":
        joint = joint * eye(2)[None, :, None, :]
    joint = joint.reshape(34, 34)
    K, K_new, K_both = joint[:24, :24], joint[24:, :24], joint[24:, 24:]
    posterior = K_both - K_new @ torch.linalg.solve(K + 0.1 * eye(24), K_new.T)
    mean, std = fw.ntk.NTKRegressor(model, ridge=0.1, compute=compute).fit(x, y).predict(new, return_std=True)
    assert std.shape == mean.shape
    torch.testing.assert_close(std, posterior.diagonal().sqrt().reshape(5, 2), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [8, 40])  # fewer and more rows than features: both sides of the system
@pytest.mark.parametrize("normalize", [False, True])
def test_nngp_regressor_is_ridge_regression_of_the_last_layer(rows, normalize):
    model, x, new = mlp(), points(rows), points(7, seed=1)
    y = torch.stack([x[:, 0].sin(), x[:, 1]], dim=1)
    with torch.no_grad():
        h, h_new = model[:2](x), model[:2](new)
    if normalize:
        h, h_new = h / 4, h_new / 4
    weights = torch.linalg.solve(h.T @ h + 0.1 * eye(16), h.T @ y)
    variance = (h_new @ h_new.T - h_new @ h.T @ torch.linalg.solve(h @ h.T + 0.1 * eye(rows), h @ h_new.T)).diag()
    regressor = fw.ntk.NNGPRegressor(model, ridge=0.1, normalize=normalize).fit(x, y)
    mean, std = regressor.predict(new, return_std=True)
    torch.testing.assert_close(mean, h_new @ weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, variance.sqrt()[:, None].expand(-1, 2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("compute", ["trace", "diagonal", "full"])
def test_ridge_cv_leaves_one_out(compute, center):
    model, x = mlp(outputs=2), points(10)
    y = torch.stack([x[:, 0].sin(), x[:, 1] ** 2], dim=1)
    ridges = [1e-2, 1.0, 50.0]
    search = fw.ntk.NTKRidgeCV(model, ridges=ridges, compute=compute, center=center).fit(x, y)
    errors = []
    for ridge in ridges:
        predictions = []
        for i in range(10):
            kept = torch.arange(10) != i
            regressor = fw.ntk.NTKRegressor(model, ridge=ridge, compute=compute, center=center)
            predictions.append(regressor.fit(x[kept], y[kept]).predict(x[i : i + 1]))
        errors.append((torch.cat(predictions) - y).square().mean())
        if ridge == search.ridge_:
            torch.testing.assert_close(search.loo_predictions_, torch.cat(predictions), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(search.loo_mse_, torch.stack(errors).numpy(), rtol=1e-7)
    assert search.ridge_ == ridges[int(np.argmin(search.loo_mse_))]
    assert search.best_score_ == -search.loo_mse_.min()
    plain = fw.ntk.NTKRegressor(model, ridge=search.ridge_, compute=compute, center=center).fit(x, y)
    new = points(5, seed=1)
    for ours, theirs in zip(search.predict(new, True), plain.predict(new, True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_ridge_cv_refuses_ridges_below_the_kernels_rounding():
    model, x = mlp(width=64, features=1, dtype=torch.float32), torch.linspace(-1, 1, 60).unsqueeze(1)
    y = (3 * x[:, 0]).sin()
    with pytest.warns(UserWarning, match=r"ridges 1e-06 are too small for this kernel.*loo_mse_ is inf"):
        search = fw.ntk.NTKRidgeCV(model).fit(x, y)
    assert search.loo_mse_[0] == np.inf
    assert np.isfinite(search.loo_mse_[1:]).all()
    assert search.ridge_ == 1e-4
    # The error is the kernel's own, rounding and all: what refitting in float64 on the rows that are kept gives.
    K, target = fw.ntk.empirical_ntk(model, x, compute="trace").double(), y.double()
    kept = torch.arange(60) != 7
    weights = torch.linalg.solve(K[kept][:, kept] + 1e-4 * eye(59), target[kept])
    assert float(search.loo_predictions_[7, 0]) == pytest.approx(float(K[7, kept] @ weights), abs=1e-6)
    with pytest.raises(ValueError, match="positive definite"):
        fw.ntk.NTKRegressor(model, ridge=1e-6).fit(x, y)
    with pytest.raises(ValueError, match=r"ridges: all of them \(1e-06, 1e-07\) are too small"):
        fw.ntk.NTKRidgeCV(model, ridges=[1e-6, 1e-7]).fit(x, y)


def test_ridge_cv_does_not_choose_an_error_that_is_not_a_number():
    x = points(20)
    with pytest.warns(UserWarning, match=r"ridges 1e-310 are too small"):
        search = fw.ntk.NTKRidgeCV(nn.Linear(3, 1).double(), ridges=[1.0, 1e-310, 0.1]).fit(x, x[:, 0].sin())
    assert search.ridge_ == [1.0, 0.1][int(np.argmin(search.loo_mse_[[0, 2]]))]
    assert search.loo_mse_[1] == np.inf


@pytest.mark.parametrize(("compute", "outputs"), [("trace", 1), ("trace", 3), ("full", 2)])
def test_conjugate_gradients_agree_with_cholesky(compute, outputs):
    model, x, new = mlp(outputs=outputs, width=64), points(60), points(7, seed=1)
    y = torch.stack([x[:, 0].sin(), x[:, 1] ** 2, x[:, 2]][:outputs], dim=1)
    results = []
    for solver in ("cholesky", "cg"):
        regressor = fw.ntk.NTKRegressor(model, ridge=0.01, compute=compute, solver=solver, tol=1e-10).fit(x, y)
        assert regressor.solver_ == solver
        results.append(regressor.predict(new, return_std=True))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_auto_takes_conjugate_gradients_where_the_kernel_does_not_fit():
    model, x = mlp(), points(200)
    regressor = fw.ntk.NTKRegressor(model, ridge=1.0, memory_budget=100_000).fit(x, x[:, 0])
    assert regressor.solver_ == "cg"
    assert regressor.residual_ <= 1e-6
    assert fw.ntk.NTKRegressor(model, ridge=1.0).fit(x, x[:, 0]).solver_ == "cholesky"


def test_two_classes_on_one_output_are_thresholded_at_one_half():
    model, x, new = mlp(), points(30), points(9, seed=1)
    y = (x[:, 0] > 0.3).long()
    values = kernel(model, new, x) @ torch.linalg.solve(kernel(model, x, x) + 0.1 * eye(30), y.double())
    classifier = fw.ntk.NTKClassifier(model, ridge=0.1).fit(x, y)
    assert torch.equal(classifier.predict(new), (values > 0.5).long())
    torch.testing.assert_close(classifier.decision_function(new), values - 0.5, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("estimator", CLASSIFIERS)
def test_classifiers_with_three_string_labels(estimator):
    x = points(60)
    y = np.array(["low", "middle", "top"])[np.digitize(x[:, 0].numpy(), [-0.4, 0.4])]
    classifier = estimator(mlp(outputs=3, width=64), ridge=1e-3).fit(x.numpy(), y)
    assert classifier.classes_.tolist() == ["low", "middle", "top"]
    assert classifier.score(x.numpy(), y) > 0.9
    scores = classifier.decision_function(x.numpy())
    assert scores.shape == (60, 3)
    assert np.array_equal(classifier.classes_[scores.argmax(1)], classifier.predict(x.numpy()))
    assert is_classifier(classifier)


@pytest.mark.parametrize("estimator", REGRESSORS)
def test_numpy_in_numpy_out_torch_in_torch_out(estimator):
    model, x = mlp(dtype=torch.float32), points(15, dtype=torch.float32)
    y = x[:, 0]
    regressor = estimator(model).fit(x, y)
    prediction = regressor.predict(x)
    assert isinstance(prediction, torch.Tensor)
    assert prediction.dtype == torch.float32
    # numpy's default is float64: arrays move to the model's dtype.
    other = estimator(model).fit(x.double().numpy(), y.double().numpy())
    arrays = other.predict(x.double().numpy(), return_std=True)
    assert all(isinstance(each, np.ndarray) and each.dtype == np.float32 for each in arrays)
    np.testing.assert_allclose(arrays[0], prediction.numpy(), rtol=1e-4, atol=1e-5)
    assert isinstance(regressor.predict(x.numpy()), np.ndarray)
    assert regressor.score(x, y) == pytest.approx(other.score(x.numpy(), y.numpy()), abs=1e-5)
    assert is_regressor(regressor)


@pytest.mark.parametrize("estimator", CLASSIFIERS)
def test_classifiers_give_labels_of_the_kind_of_x(estimator):
    model, x = mlp(dtype=torch.float32), points(15, dtype=torch.float32)
    y = x[:, 0] > 0
    classifier = estimator(model).fit(x, y)
    assert classifier.predict(x).dtype == torch.bool
    assert classifier.predict(x.numpy()).dtype == np.bool_
    assert classifier.decision_function(x.numpy()).dtype == np.float32


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clone_keeps_the_model_and_the_parameters(estimator):
    model = mlp()
    original = estimator(model)
    name = "ridges" if estimator is fw.ntk.NTKRidgeCV else "ridge"
    original.set_params(**{name: [0.5] if name == "ridges" else 0.5})
    original.fit(points(10), (points(10)[:, 0] > 0).double())
    copied = clone(original)
    assert copied.model is model
    assert copied.get_params().keys() == original.get_params().keys()
    assert copied.get_params()[name] == original.get_params()[name]
    assert not hasattr(copied, "model_")
    other = mlp(seed=1)
    assert copied.set_params(model=other).model is other
    with pytest.raises(ValueError, match="Invalid parameter"):
        copied.set_params(width=3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fit_leaves_the_model_alone_and_keeps_its_own(estimator):
    model, x = mlp(), points(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y = (x[:, 0] > 0).double()
    fitted = estimator(model).fit(x, y)
    prediction = fitted.predict(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fitted.predict(x), prediction)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_failed_fit_changes_nothing(estimator):
    x = points(10)
    y = (x[:, 0] > 0).double()
    fitted = estimator(mlp()).fit(x, y)
    prediction = fitted.predict(x)
    with pytest.raises(ValueError, match="y must"):
        fitted.fit(points(11), y)
    assert torch.equal(fitted.predict(x), prediction)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pickle(estimator):
    x = points(10)
    fitted = estimator(mlp()).fit(x, (x[:, 0] > 0).double())
    assert torch.equal(pickle.loads(pickle.dumps(fitted)).predict(x), fitted.predict(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_fitted(estimator):
    with pytest.raises(NotFittedError):
        estimator(mlp()).predict(points(3))


@pytest.mark.parametrize("estimator", [each for each in ESTIMATORS if each is not fw.ntk.NTKRidgeCV])
def test_grid_search(estimator):
    x = points(40).numpy()
    y = (x[:, 0] > 0).astype(float) if estimator in CLASSIFIERS else x[:, 0] ** 2
    search = GridSearchCV(estimator(mlp(width=64)), {"ridge": [1e-3, 1e3]}, cv=KFold(4)).fit(x, y)
    assert search.best_params_ == {"ridge": 1e-3}
    assert isinstance(search.predict(x), np.ndarray)


def test_grid_search_over_models_and_with_tensors():
    x = points(40)
    wide, narrow = mlp(width=64), mlp(width=1)
    search = GridSearchCV(fw.ntk.NTKRegressor(wide, ridge=1e-2), {"model": [wide, narrow]}, cv=KFold(4))
    search.fit(x, x[:, 0] * x[:, 1])
    assert search.best_params_["model"][0].out_features == 64
    assert isinstance(search.predict(x), torch.Tensor)


def test_pipeline_and_cross_validation():
    x = points(100).numpy()
    pipeline = make_pipeline(StandardScaler(), fw.ntk.NTKRidgeCV(mlp(width=64)))
    assert cross_val_score(pipeline, x, x[:, 0] ** 2, cv=4).mean() > 0.8


def test_tags():
    tags = fw.ntk.NTKRegressor(mlp()).__sklearn_tags__()
    assert tags.estimator_type == "regressor"
    assert tags.target_tags.multi_output
    assert tags.input_tags.three_d_array
    assert fw.ntk.NTKClassifier(mlp()).__sklearn_tags__().estimator_type == "classifier"


class TwoInputs(nn.Module):
    """A model of two inputs that returns a dict."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 8), nn.Linear(2, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, a, b):
        return {"value": self.out(torch.tanh(self.left(a) + self.right(b)))}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs_and_an_output_to_pick(kind):
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = points(12), points(12, features=2, seed=1)
    x = (a, b) if kind == "tuple" else {"a": a, "b": b}
    arrays = (a.numpy(), b.numpy()) if kind == "tuple" else {"a": a.numpy(), "b": b.numpy()}
    regressor = fw.ntk.NTKRegressor(model, ridge=1e-6, output=lambda result: result["value"]).fit(x, a[:, 0])
    assert regressor.score(x, a[:, 0]) > 0.99
    np.testing.assert_allclose(regressor.predict(arrays), regressor.predict(x).numpy(), rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, "ridge must be finite and at least 0, got -1"),
        ({"ridge": "large"}, TypeError, "ridge must be a number"),
        ({"ridge": "0.1"}, TypeError, "ridge must be a number, got str"),
        ({"jitter": -1}, ValueError, "jitter must be finite and at least 0, got -1"),
        ({"jitter": "a"}, TypeError, "jitter must be a number, got str"),
        ({"tol": -1}, ValueError, "tol must be positive and finite, got -1"),
        ({"compute": "sum"}, ValueError, "compute must be one of"),
        ({"solver": "lu"}, ValueError, "solver must be one of"),
        ({"model": "mlp"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"compute": "full"}, ValueError, "y must have one column per output"),
        ({"compute": "diagonal", "solver": "cg"}, ValueError, "y must have one column per output"),
        ({"center": True}, ValueError, "center=True y must have one column per output"),
    ],
)
def test_bad_parameters(change, error, message):
    regressor = fw.ntk.NTKRegressor(mlp(outputs=2)).set_params(**change)
    with pytest.raises(error, match=message):
        regressor.fit(points(5), points(5)[:, 0])


def test_bad_data():
    regressor = fw.ntk.NTKRegressor(mlp())
    x, y = points(5), points(5)[:, 0]
    with pytest.raises(ValueError, match=r"y must have shape \[5\] or \[5, C\].*got \[4\]"):
        regressor.fit(x, y[:4])
    with pytest.raises(ValueError, match="NaN"):
        regressor.fit(x, y * float("nan"))
    with pytest.raises(ValueError, match="empty"):
        regressor.fit(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"\[2, 4\].*fitted with \[N, 3\]"):
        regressor.fit(x, y).predict(points(2, features=4))
    with pytest.raises(ValueError, match="x holds NaN or infinite entries"):
        regressor.fit(x, y).predict(x / 0)
    with pytest.raises(TypeError, match="must hold numbers"):
        regressor.fit(np.array([["a", "b", "c"]] * 5), y)
    classifier = fw.ntk.NTKClassifier(mlp())
    with pytest.raises(ValueError, match="at least two classes"):
        classifier.fit(x, torch.ones(5))
    with pytest.raises(ValueError, match="got real numbers"):
        classifier.fit(x, y)
    with pytest.raises(ValueError, match="diagonal"):
        fw.ntk.NTKRegressor(mlp(outputs=2), compute="diagonal", solver="cg").fit(x, x[:, :2])
    with pytest.raises(ValueError, match="ridges must be positive"):
        fw.ntk.NTKRidgeCV(mlp(), ridges=[0.0]).fit(x, y)
    with pytest.raises(ValueError, match="at least one ridge"):
        fw.ntk.NTKRidgeCV(mlp(), ridges=[]).fit(x, y)
    for ridges in (None, 1.0):
        with pytest.raises(TypeError, match=f"ridges must be a sequence of numbers, got {ridges}"):
            fw.ntk.NTKRidgeCV(mlp(), ridges=ridges).fit(x, y)
    with pytest.raises(ValueError, match="jitter must be finite and at least 0, got -1"):
        fw.ntk.NNGPRegressor(mlp(), jitter=-1).fit(x, y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_that_the_model_cannot_take(estimator):
    x = points(5)
    y = (x[:, 0] > 0).double()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="x holds NaN or infinite entries"):
            estimator(mlp()).fit(torch.cat([x[:4], torch.full((1, 3), bad, dtype=x.dtype)]), y)
    with pytest.raises(ValueError, match=r"model cannot take x with shape \[5, 2\]: mat1 and mat2"):
        estimator(mlp()).fit(x[:, :2], y)
    with pytest.raises(ValueError, match=r"model cannot take x with shape \[5, 3\].*integers stay integers"):
        estimator(mlp()).fit(x.long().numpy(), y.numpy())
    with pytest.raises(TypeError, match=r"x has dtype torch.float32, but the model's parameters have torch.float64"):
        estimator(mlp()).fit(x.float(), y)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in train mode.*call model.eval\(\)"):
        estimator(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()).fit(x, y)


def test_an_infinite_mask_beside_the_rows_is_no_mistake():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x, mask):
            return self.layers(x * mask.softmax(1))

    inputs = (points(5), torch.zeros(5, 3, dtype=torch.float64).index_fill(1, torch.tensor([2]), -torch.inf))
    assert fw.ntk.NTKRegressor(Masked()).fit(inputs, points(5)[:, 0]).predict(inputs).shape == (5,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_that_writes_its_input_leaves_the_users_alone(estimator):
    model = nn.Sequential(nn.ReLU(inplace=True), *mlp())
    x, new = points(10), points(4, seed=1)
    options = {"center": True} if "center" in estimator(model).get_params() else {}
    fitted = estimator(model, **options).fit(x, (x[:, 0] > 0).double())
    prediction = fitted.predict(new)
    assert torch.equal(x, points(10))
    assert torch.equal(new, points(4, seed=1))
    assert torch.equal(getattr(fitted, "x_fit_", x), points(10))
    same = estimator(mlp(), **options).fit(x.relu(), (x[:, 0] > 0).double()).predict(new.relu())
    torch.testing.assert_close(prediction, same)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_and_inference_mode_around_the_calls_change_nothing(estimator):
    model, x = mlp(dtype=torch.float32), points(10, dtype=torch.float32)
    options = {"center": True} if "center" in estimator(model).get_params() else {}
    y = (x[:, 0] > 0).float()
    predict = "predict" if estimator in REGRESSORS else "decision_function"
    expected = getattr(estimator(model, **options).fit(x, y), predict)(x)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            assert torch.equal(getattr(estimator(model, **options).fit(x, y), predict)(x), expected)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", [fw.ntk.NTKRegressor, fw.ntk.NTKRidgeCV, fw.ntk.NTKClassifier])
def test_a_model_that_squeezes_its_output(estimator, center):
    class Squeezed(nn.Sequential):
        def forward(self, value):
            return super().forward(value).squeeze()

    x = points(12)
    y = (x[:, 0] > 0).double()
    prediction = estimator(Squeezed(*mlp()), center=center).fit(x, y).predict(x)
    torch.testing.assert_close(prediction, estimator(mlp(), center=center).fit(x, y).predict(x))
    with pytest.raises(ValueError, match="must have a batch axis"):
        fw.ntk.NTKRegressor(Squeezed(*mlp())).fit(x[:1], y[:1])


@pytest.mark.parametrize("estimator", REGRESSORS)
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.ones(5) + 1j, TypeError, "y must hold numbers.*complex128"),
        (["1.0"] * 5, TypeError, "y must hold numbers.*<U3"),
        (np.arange(5).astype("datetime64[D]"), TypeError, r"y must hold numbers.*datetime64\[D\]"),
        ([None] * 5, TypeError, "y must hold numbers.*object"),
        ([[1], [1, 2], [1], [1], [1]], ValueError, "y must be an array of numbers"),
        ([torch.ones(1).to_sparse()] * 5, TypeError, "y must be an array of numbers"),
        (torch.ones(5).to_sparse(), TypeError, "y must be a dense tensor"),
        (torch.ones(5, device="meta"), ValueError, "y is on the meta device"),
    ],
)
def test_targets_that_are_not_numbers(estimator, y, error, message):
    with pytest.raises(error, match=message):
        estimator(mlp()).fit(points(5), y)


@pytest.mark.parametrize("estimator", REGRESSORS)
def test_any_kind_of_real_numbers(estimator):
    x = points(10).numpy()
    y = x[:, 0] > 0
    expected = estimator(mlp()).fit(x, y.astype(float)).predict(x)
    for kind in (">f8", np.longdouble):
        found = estimator(mlp()).fit(x.astype(kind), y.astype(kind)).predict(x.astype(kind))
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(estimator(mlp()).fit(x, y).predict(x), expected)
    tensors = torch.from_numpy(x)
    fitted = estimator(mlp()).fit(tensors, torch.from_numpy(y).bfloat16())
    assert fitted.score(tensors, torch.from_numpy(y).bfloat16()) == fitted.score(tensors, torch.from_numpy(y))


@pytest.mark.parametrize("estimator", CLASSIFIERS)
def test_labels_of_unusual_kinds(estimator):
    x = points(10)
    y = (x[:, 0] > 0).bfloat16()
    assert estimator(mlp()).fit(x, y).predict(x).dtype == torch.float32
    for kind in (">f8", np.longdouble):
        assert estimator(mlp()).fit(x, y.float().numpy().astype(kind)).predict(x).dtype == torch.float64
    for labels in ([None, "a"] * 5, [1, "a", None, 2, "b"] * 2):
        with pytest.raises(TypeError, match="y must be labels of one kind, which can be sorted"):
            estimator(mlp()).fit(x, np.array(labels, dtype=object))
    with pytest.raises(TypeError, match="y must be a dense tensor"):
        estimator(mlp()).fit(x, y.float().to_sparse())


@pytest.mark.parametrize(
    ("estimator", "change", "error", "message"),
    [
        (fw.ntk.NTKRegressor, {"memory_budget": "1GB"}, TypeError, "memory_budget must be an int, got str"),
        (fw.ntk.NTKRidgeCV, {"memory_budget": -1}, ValueError, "memory_budget must be at least 1"),
        (fw.ntk.NTKRegressor, {"method": "foo", "solver": "cg"}, ValueError, "method must be one of .*got 'foo'"),
        (fw.ntk.NTKRidgeCV, {"method": "foo"}, ValueError, "method must be one of"),
        (fw.ntk.NTKRegressor, {"compute": np.array(["trace", "full"])}, ValueError, "compute must be one of"),
        (fw.ntk.NTKRegressor, {"center": "no"}, TypeError, "center must be True or False, got 'no'"),
        (fw.ntk.NNGPRegressor, {"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
        (fw.ntk.NNGPClassifier, {"check": None}, TypeError, "check must be True or False, got None"),
    ],
)
def test_parameters_are_named(estimator, change, error, message):
    with pytest.raises(error, match=message):
        estimator(mlp()).set_params(**change).fit(points(5), (points(5)[:, 0] > 0).double())


def test_the_training_points_are_kept_as_they_were():
    for solver in ("cholesky", "cg"):
        x, new = points(20), points(4, seed=1)
        regressor = fw.ntk.NTKRegressor(mlp(), ridge=0.1, solver=solver).fit(x, x[:, 0])
        expected = regressor.predict(new, return_std=True)
        x.zero_()
        for found, before in zip(regressor.predict(new, return_std=True), expected, strict=True):
            assert torch.equal(found, before)


@pytest.mark.parametrize("rows", [8, 40])
def test_the_ridge_of_the_fit_is_kept(rows):
    x, new = points(rows), points(4, seed=1)
    cg = fw.ntk.NTKRegressor(mlp(), ridge=0.1, solver="cg")
    for regressor in (fw.ntk.NNGPRegressor(mlp(), ridge=0.1), cg):
        regressor.fit(x, x[:, 0])
        expected = regressor.predict(new, return_std=True)[1]
        assert torch.equal(regressor.set_params(ridge=100.0).predict(new, return_std=True)[1], expected)
        assert regressor.ridge_ == 0.1


@pytest.mark.parametrize(("compute", "entries"), [("trace", 12), ("diagonal", 36), ("full", 108)])
def test_blocks_of_predictions_are_as_large_as_what_they_hold(compute, entries):
    model, x = mlp(outputs=3), points(12)
    assert fw.ntk.NTKRegressor(model, ridge=0.1, compute=compute).fit(x, x)._fitted_entries() == entries


def test_conjugate_gradients_give_the_operator_few_columns_at_once(monkeypatch):
    widest = []
    product = fw.ntk.NTKOperator.__matmul__

    def noted(self, vector):
        widest.append(vector.shape[1])
        return product(self, vector)

    monkeypatch.setattr(fw.ntk.NTKOperator, "__matmul__", noted)
    model, x = mlp(outputs=20), points(12)
    y = torch.randn(12, 5, dtype=torch.float64)
    found = fw.ntk.NTKRegressor(model, ridge=1.0, solver="cg", tol=1e-10).fit(x, y)
    assert max(widest) <= 16
    expected = fw.ntk.NTKRegressor(model, ridge=1.0).fit(x, y).dual_coef_
    torch.testing.assert_close(found.dual_coef_, expected, rtol=1e-7, atol=1e-7)


def test_models_that_cannot_be_copied_or_are_lazy_yet():
    model, x = mlp(), points(5)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    model(x)
    with pytest.raises(ValueError, match=r"model cannot be copied: .*parametrizations\.weight_norm"):
        fw.ntk.NTKRegressor(model).fit(x, x[:, 0])
    with pytest.raises(ValueError, match="model cannot be copied"):
        fw.ntk.linearize(model)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"parameter '0.weight' of a lazy module has no shape yet"):
        fw.ntk.NNGPRegressor(lazy).fit(x, x[:, 0])


def test_no_block_of_one_row_is_left_over():
    assert list(row_cuts(5, 2)) == [(0, 2), (2, 5)]
    assert list(row_cuts(4, 2)) == [(0, 2), (2, 4)]
    assert list(row_cuts(1, 2)) == [(0, 1)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_that_mix_are_refused(estimator):
    class Mixing(nn.Sequential):
        def forward(self, value):
            return super().forward(value - value.mean(0))

    x = points(8)
    y = (x[:, 0] > 0).double()
    with pytest.raises(ValueError, match="rows"):
        estimator(Mixing(*mlp())).fit(x, y)
    estimator(Mixing(*mlp()), check=False).fit(x, y)


def test_a_system_that_is_not_positive_definite_names_the_way_out():
    x = points(4).repeat(2, 1).float()
    model = mlp(dtype=torch.float32)
    with pytest.raises(ValueError, match="Raise ridge"):
        fw.ntk.NTKRegressor(model, ridge=0).fit(x, x[:, 0])
    regressor = fw.ntk.NTKRegressor(model, ridge=0, jitter=1e-5).fit(x, x[:, 0])
    assert regressor.jitter_ > 0
    assert regressor.score(x, x[:, 0]) > 0.99
