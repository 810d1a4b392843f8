"""How good and how calibrated probabilistic predictions are."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check

_TINY = 1e-12


def _check_probabilities(probabilities: Tensor, labels: Tensor | None = None) -> None:
    _check.is_tensor("probabilities", probabilities)
    _check.is_float("probabilities", probabilities)
    _check.has_dim("probabilities", probabilities, 2, "[N, classes]")
    if not probabilities.shape[1]:
        raise ValueError(f"probabilities must have one class at least, got shape {list(probabilities.shape)}")
    sums = probabilities.sum(-1)
    if bool((probabilities < 0).any()) or not bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all()):
        raise ValueError(
            f'probabilities must be >= 0 with rows that sum to 1; use predict(..., link="softmax"); got entries from '
            f"{float(probabilities.min()):.4g} and sums from {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
    if labels is not None:
        _check.is_tensor("labels", labels)
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
        if labels.shape != probabilities.shape[:1]:
            raise ValueError(f"labels must have shape [{len(probabilities)}], got {list(labels.shape)}")
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < probabilities.shape[1]):
            raise ValueError(
                f"labels must lie in [0, {probabilities.shape[1]}), got values from {int(labels.min())} to "
                f"{int(labels.max())}"
            )


def _check_rows(probabilities: Tensor) -> None:
    if not len(probabilities):
        raise ValueError("probabilities must have one row at least: the mean over none is not defined")


def ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: Σ_bins |bin|/N |accuracy - confidence|, bins of equal width in the confidence.

    Args:
        probabilities: [N, classes], rows sum to 1.
        labels: [N], integers.
        bins: how many.

    Returns:
        A number in [0, 1]; 0 is calibrated.

    Raises:
        ValueError, TypeError: what is no table of probabilities, labels that do not fit.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3.

    Example:
        >>> import torch, finite_width as fw
        >>> round(fw.bayes.ece(torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1])), 3)
        0.3
    """
    _check_probabilities(probabilities, labels)
    _check.positive_int("bins", bins)
    confidence, choice = probabilities.double().max(-1)
    gap = (choice == labels).double() - confidence
    index = (confidence * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, index, gap)
    return float(sums.abs().sum() / max(len(labels), 1))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood per example: -1/N Σ log p(label), with p floored at 1e-12.

    Args:
        probabilities: [N, classes], rows sum to 1.
        labels: [N], integers.

    Raises:
        ValueError, TypeError: as `ece`, and no row.

    Example:
        >>> import torch, finite_width as fw
        >>> round(fw.bayes.metrics.nll(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    _check_probabilities(probabilities, labels)
    _check_rows(probabilities)
    chosen = probabilities.double().gather(1, labels.long().unsqueeze(1))
    return float(-chosen.clamp_min(_TINY).log().mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: 1/N Σ_n Σ_c (p_nc - [label_n = c])², in [0, 2].

    Args:
        probabilities: [N, classes], rows sum to 1.
        labels: [N], integers.

    Raises:
        ValueError, TypeError: as `ece`, and no row.

    Source: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.brier(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    _check_probabilities(probabilities, labels)
    _check_rows(probabilities)
    target = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return float((probabilities.double() - target).square().sum(-1).mean())


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """H[p] = -Σ_c p_c log p_c of each averaged prediction, in nats: the whole uncertainty.

    Args:
        probabilities: [N, classes], such as `predict(..., link="softmax").mean`.

    Returns:
        [N].

    Raises:
        ValueError, TypeError: what is no table of probabilities.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.predictive_entropy(torch.tensor([[1.0, 0.0]]))
        tensor([0.])
    """
    _check_probabilities(probabilities)
    return _entropy(probabilities).abs()


def mutual_information(samples: Tensor) -> Tensor:
    """I = H[mean_s p_s] - mean_s H[p_s], in nats: the part of the uncertainty that comes from the weights.

    Args:
        samples: [samples, N, classes] of probabilities, such as `predict(..., link="softmax").samples`.

    Returns:
        [N], >= 0.

    Raises:
        ValueError, TypeError: what is no table of probabilities, no sample.

    Source: Houlsby et al., "Bayesian active learning for classification and preference learning", 2011.

    Example:
        >>> import torch, finite_width as fw
        >>> fw.bayes.mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931])
    """
    _check.is_tensor("samples", samples)
    _check.has_dim("samples", samples, 3, "[samples, N, classes]")
    if not len(samples):
        raise ValueError(f"samples must hold one sample at least, got shape {list(samples.shape)}")
    _check_probabilities(samples.flatten(0, 1))
    return (_entropy(samples.mean(0)) - _entropy(samples).mean(0)).clamp_min(0)
