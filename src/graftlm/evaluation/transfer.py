"""Scores per language, each with an interval, and the paired gain of one system over another on the same items."""

from collections.abc import Sequence

import numpy as np

from graftlm.errors import DataError, SetupError
from graftlm.evaluation.metrics import METRICS, statistics
from graftlm.evaluation.result import Interval
from graftlm.measure.statistics import multiplicities


def score(
    task: str,
    labels: Sequence,
    predictions: Sequence,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    r"""Every metric of the task with its percentile bootstrap interval over items; the primary metric comes first.

    With :math:`w^{(b)} \sim \mathrm{Multinomial}(n, 1/n)` and a metric :math:`m(w)`, the interval is the
    :math:`(1 \mp \text{confidence})/2` quantiles of :math:`m(w^{(1)}), …, m(w^{(B)})`.

    Args:
        task: one of `graftlm.evaluation.metrics.TASKS`.
        labels: n gold labels, in the form `graftlm.evaluation.metrics.statistics` describes.
        predictions: n predictions.
        seed: of the resampling. Two calls with the same seed and n draw the same items, so parallel test sets are
            resampled alike in every language.
        resamples: B.
        confidence: of the interval.

    Returns:
        metric → `Interval`, as fractions (not percent). ``low`` and ``high`` are None for a single item and where
        fewer than half of the resamples define the metric; ``value`` is None where the metric is undefined on the test
        set itself.

    Raises:
        DataError, SetupError: as `graftlm.evaluation.metrics.statistics`.

    Source: Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), chapter 13. The interval covers the
    sampling of test items, not the seed of the training. It is too narrow for a few dozen items, and has no width where
    every item is right.

    >>> score("classification", ["a", "b"] * 50, ["a", "a", "b", "b"] * 25)["accuracy"].value
    0.5
    """
    made = statistics(task, labels, predictions)
    _check(resamples, confidence)
    n = len(labels)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in made}
    for w in multiplicities(n, resamples, seed):
        for name, statistic in made.items():
            drawn[name].append(statistic(w))
    whole = np.ones((1, n))
    return {
        name: _interval(statistic(whole)[0], np.concatenate(drawn[name]), n, confidence)
        for name, statistic in made.items()
    }


def paired_gain(
    task: str,
    labels: Sequence,
    predictions: Sequence,
    reference: Sequence,
    *,
    metric: str | None = None,
    ids: Sequence | None = None,
    reference_ids: Sequence | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """How much better `predictions` are than `reference` on the same items: positive is better, also for RMSE.

    Both are scored on the same resampled items, so what makes an item hard for both cancels:
    :math:`g(w) = m(w) - m_{ref}(w)`.

    Args:
        task, labels, predictions, seed, resamples, confidence: as in `score`.
        reference: n predictions of the reference for the same items in the same order.
        metric: one of the task's metrics; None is the primary one.
        ids: n item ids of `predictions`; `reference_ids` those of `reference`. Where both are given they must be
            equal, in order.

    Raises:
        DataError: ids that differ, and all that `score` raises.

    >>> gain = paired_gain("classification", ["a"] * 4, ["a", "a", "a", "b"], ["a", "b", "a", "b"])
    >>> gain.value, gain.low
    (0.25, 0.0)
    """
    if (ids is None) != (reference_ids is None):
        raise DataError(
            "ids must be given for both sides or for none", found="ids" if reference_ids is None else "reference_ids"
        )
    if ids is not None and reference_ids is not None:
        _check_ids(ids, reference_ids, len(labels))
    _check(resamples, confidence)
    ours, theirs = statistics(task, labels, predictions), statistics(task, labels, reference)
    metric = metric or next(iter(ours))
    if metric not in ours:
        raise SetupError("not a metric of this task", found=metric, allowed=tuple(ours))
    sign = 1 if METRICS[metric].higher_is_better else -1

    def gain(w: np.ndarray) -> np.ndarray:
        return sign * (ours[metric](w) - theirs[metric](w))

    n = len(labels)
    drawn = np.concatenate([gain(w) for w in multiplicities(n, resamples, seed)])
    return _interval(gain(np.ones((1, n)))[0], drawn, n, confidence)


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise SetupError("resamples must be at least 1", found=resamples)
    if not 0 < confidence < 1:
        raise SetupError("confidence must lie between 0 and 1", found=confidence)


def _check_ids(ids: Sequence, reference_ids: Sequence, n: int) -> None:
    ids, reference_ids = list(ids), list(reference_ids)
    if len(ids) != n or len(reference_ids) != n:
        raise DataError(
            "as many ids as items are needed", found=f"{n} items, {len(ids)} ids, {len(reference_ids)} reference ids"
        )
    for position, (one, other) in enumerate(zip(ids, reference_ids, strict=True)):
        if one != other:
            same = "the same ids in another order" if set(ids) == set(reference_ids) else "other ids"
            raise DataError(
                f"a paired gain needs the same items in the same order; these are {same}",
                found=f"{one!r} against {other!r} at position {position}",
                fix="score both systems on one file, or sort both by id",
            )


def _interval(value: float, drawn: np.ndarray, n: int, confidence: float) -> Interval:
    defined = drawn[~np.isnan(drawn)]
    if n < 2 or np.isnan(value) or 2 * len(defined) < len(drawn):
        return Interval(value=float(value), low=None, high=None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value=float(value), low=float(low), high=float(high))
