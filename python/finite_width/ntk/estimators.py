"""What all kernel estimators share: scikit-learn's protocol, the ridge systems, predictions in blocks, labels."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn

from .. import _check
from .contract import refuse_training_modules
from .inputs import (
    copy_model,
    from_user,
    model_kind,
    numbers,
    refuse_nan,
    row_blocks,
    row_count,
    targets_from_user,
    tensors_of,
    to_user,
)

# Entries of a block of the kernel between new and training points: bounds the memory of a prediction.
_BLOCK_ENTRIES = 1 << 25


class KernelEstimator(BaseEstimator):
    """Fit, predict and the protocol; a subclass says what its kernel is and how its system is solved.

    A fitted estimator holds a copy of the model: training the original afterwards changes no prediction.
    """

    model: nn.Module
    model_: nn.Module

    @abstractmethod
    def _check_parameters(self) -> None:
        """Raise on a parameter of the constructor that cannot be used (scikit-learn checks in `fit`)."""

    @abstractmethod
    def _output_count(self, x: Any) -> int:
        """The model's outputs per row; 1 where the kernel has none."""

    @abstractmethod
    def _fit_targets(self, x: Any, y: Tensor) -> None:
        """Fit float64 targets [N, C]."""

    @abstractmethod
    def _predict_block(self, x: Any, return_std: bool) -> tuple[Tensor, Tensor | None]:
        """The float64 mean [M, C] at new points, and its standard deviation [M, C] or [M, 1]."""

    @abstractmethod
    def _fitted_entries(self) -> int:
        """Entries per new point of what a prediction holds; raises NotFittedError before `fit`."""

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A fit that fails or is interrupted leaves the estimator as it was."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    def _begin(self, x: Any) -> Any:
        """Check the parameters, copy the model, and take x in as tensors."""
        _check.is_module("model", self.model)
        refuse_training_modules(self.model)
        self._check_parameters()
        x, _ = from_user(x, self.model)
        row_count(x)
        refuse_nan(x)
        with torch.inference_mode(False):  # the copy has to be differentiable
            self.model_ = copy_model(self.model)
        first = tensors_of(x)[0]
        if isinstance(x, Tensor) and first.dim() == 2:
            self.n_features_in_ = first.shape[1]
        elif hasattr(self, "n_features_in_"):
            del self.n_features_in_
        return x

    def _predict_all(self, x: Any, return_std: bool) -> tuple[Tensor, Tensor | None, bool]:
        rows = max(16, _BLOCK_ENTRIES // max(self._fitted_entries(), 1))
        x, as_torch = from_user(x, self.model_)
        row_count(x)
        refuse_nan(x)
        first = tensors_of(x)[0]
        features = getattr(self, "n_features_in_", None)
        if features is not None and (first.dim() != 2 or first.shape[1] != features):
            raise ValueError(
                f"x has shape {list(first.shape)}, but {type(self).__name__} was fitted with [N, {features}]"
            )
        blocks = [self._predict_block(block, return_std) for block in row_blocks(x, rows)]
        mean = torch.cat([each for each, _ in blocks])
        std = torch.cat([each for _, each in blocks if each is not None]) if return_std else None
        return mean, std, as_torch

    def __sklearn_clone__(self) -> Self:
        # scikit-learn would copy the model; a clone keeps this very one, so that nothing is duplicated, and a model
        # that cannot be copied before its first use still works. Fitting never changes it.
        parameters = self.get_params(deep=False)
        return type(self)(
            **{
                name: value if isinstance(value, nn.Module) or callable(value) else clone(value, safe=False)
                for name, value in parameters.items()
            }
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True  # any shape the model takes: images, sequences
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.no_validation = True  # the model decides what it accepts
        return tags


class RegressorProtocol(RegressorMixin, KernelEstimator):
    """fit, predict and score for real targets."""

    def fit(self, x: Any, y: Any) -> Self:
        """Fit the kernel ridge regression.

        Args:
            x: a tensor [N, ...] or a tuple or dict of tensors, on the model's device; or numpy arrays, which move
                to the model's device and dtype.
            y: [N] or [N, C], tensor or array.

        Returns:
            self.

        Raises:
            ValueError: shapes that do not fit, NaN or infinite entries, parameters out of range, a model in train
                mode with batch norm or dropout, a system that is not positive definite.
            TypeError: a model that is not a module, parameters or targets that are not real numbers, another dtype
                than the model's.
        """
        with self._all_or_nothing():
            x = self._begin(x)
            targets, self._flat = targets_from_user(y, row_count(x), model_kind(self.model_))
            self._fit_targets(x, targets)
        return self

    def predict(self, x: Any, return_std: bool = False) -> Any:
        """The posterior mean at new points, and its standard deviation where asked.

        `return_std` is the latent posterior of the Gaussian process whose kernel is this one and whose noise variance
        is the ridge: sqrt(k(x, x) − k(x, X)(K + ρI)⁻¹k(X, x)), without the noise. It is **not** the spread of trained
        networks (an ensemble's spread follows another formula, with the NNGP kernel in it).

        Args:
            x: new points, of the same structure as in `fit`.
            return_std: also return the standard deviation.

        Returns:
            [M] or [M, C] like y in `fit`, in the model's dtype; a tensor for tensors, a numpy array for arrays. With
            `return_std`, a pair of those.

        Raises:
            ValueError: shapes that do not fit, NaN or infinite entries.
            TypeError: another dtype than the model's.
            NotFittedError: before `fit`.
        """
        mean, std, as_torch = self._predict_all(x, return_std)
        _, dtype = model_kind(self.model_)
        values = [mean] if std is None else [mean, std.expand_as(mean)]
        values = [value[:, 0] if self._flat else value for value in values]
        results = [to_user(value.to(dtype), as_torch) for value in values]
        return tuple(results) if return_std else results[0]

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R² of `predict(x)` (averaged over the columns of y)."""
        return float(r2_score(_numpy(y), _numpy(self.predict(x)), sample_weight=sample_weight))


class ClassifierProtocol(ClassifierMixin, KernelEstimator):
    """fit, predict, decision_function and score for labels, by least squares on targets 0 and 1.

    Two classes on a model with one output: one column of targets 0/1 and the threshold 0.5. Else one-hot targets and
    the largest column.
    """

    classes_: np.ndarray

    def fit(self, x: Any, y: Any) -> Self:
        """Fit one least-squares column per class (one for two classes on a model with one output).

        Args:
            x: as for the regressors: tensors, or numpy arrays.
            y: [N] labels of any kind numpy can sort: integers, strings, booleans.

        Returns:
            self; `classes_` holds the sorted labels.

        Raises:
            ValueError: labels that are not [N], fewer than two classes; the others as for the regressors.
            TypeError: as for the regressors.
        """
        with self._all_or_nothing():
            x = self._begin(x)
            self._fit_targets(x, self._targets_of(x, _numpy(y)))
        return self

    def _targets_of(self, x: Any, labels: np.ndarray) -> Tensor:
        """float64 targets [N, 1] or [N, classes] of the labels; sets `classes_`."""
        rows = row_count(x)
        if labels.shape != (rows,):
            raise ValueError(f"y must be labels of shape [{rows}], as x has {rows} rows, got {list(labels.shape)}")
        if labels.dtype.kind == "f" and not np.array_equal(labels, np.round(labels)):
            raise ValueError("y must be labels, got real numbers (Unknown label type: continuous)")
        try:
            self.classes_, index = np.unique(labels, return_inverse=True)
        except TypeError as error:  # None beside strings, numbers beside strings
            raise TypeError(f"y must be labels of one kind, which can be sorted: {error}") from error
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y must hold at least two classes, got {count}: {self.classes_.tolist()}")
        positions = torch.from_numpy(index).to(model_kind(self.model_)[0])
        if count == 2 and self._output_count(x) == 1:
            return positions.double().unsqueeze(1)
        return nn.functional.one_hot(positions, count).double()

    def decision_function(self, x: Any) -> Any:
        """The fitted columns: [M], positive for the second class, where there are two; else [M, classes]."""
        mean, _, as_torch = self._predict_all(x, False)
        _, dtype = model_kind(self.model_)
        if mean.shape[1] == 1:
            mean = mean[:, 0] - 0.5
        elif mean.shape[1] == 2:
            mean = mean[:, 1] - mean[:, 0]
        return to_user(mean.to(dtype), as_torch)

    def predict(self, x: Any) -> Any:
        """The labels [M]; a tensor for tensors (where the labels are numbers), a numpy array for arrays."""
        mean, _, as_torch = self._predict_all(x, False)
        index = (mean[:, 0] > 0.5).long() if mean.shape[1] == 1 else mean.argmax(1)
        labels = self.classes_[index.cpu().numpy()]
        as_torch = as_torch and labels.dtype.kind in "iufb"
        return torch.from_numpy(numbers("y", labels)).to(mean.device) if as_torch else labels

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy of `predict(x)`."""
        return float(accuracy_score(_numpy(y), _numpy(self.predict(x)), sample_weight=sample_weight))


def _numpy(value: Any) -> np.ndarray:
    """y as an array; numpy has no bfloat16."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    _check.is_dense("y", value)
    _check.has_values("y", value)
    value = value.detach().resolve_conj().resolve_neg().cpu()
    known = not value.is_floating_point() or value.dtype in (torch.float16, torch.float32, torch.float64)
    return (value if known else value.float()).numpy()
