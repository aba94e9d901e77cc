"""LogME: how well a linear model on given features explains given labels, without training one."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from graftlm.errors import DataError, SetupError
from graftlm.measure.mapped import MappedEvidence

TASKS = ("classification", "regression")


def logme(features: Any, labels: Any, *, task: str = "classification", precision: str = "float64") -> float:
    r"""The maximised log evidence a row of Bayesian linear regression, averaged over label columns; higher is better.

    .. math:: \frac1C \sum_{j=1}^{C} \max_{\alpha, \beta}\ \frac1n \log N\big(y_j;\ 0,\ I/\beta + FF^\top/\alpha\big)

    Without centring and without an intercept. Scores of one target are comparable with each other, not with those of
    another target. In nats.

    Args:
        features: F, n × d: an array, a nested list or a tensor on the CPU.
        labels: classification: n integers, one column of zeros and ones for each class that occurs (numbers that do not
            occur are no classes). Regression: n numbers, or n × C.
        task: ``classification`` or ``regression``.
        precision: ``float64``: within 1e-8 of the exact maximum. ``float32``: the O(d³) work in single precision,
            1.2 to 2 times as fast; within 1e-4, and where rounding could cost more, float64 is taken.

    Raises:
        DataError: features or labels of another shape, empty, infinite, NaN or not numeric; labels with one class, or
            a column of numbers that is constant.
        SetupError: an unknown task or precision.

    Source: You, Liu, Wang, Long, *LogME*, ICML 2021, arXiv 2102.11005, equations 2 and 3; the evidence as in Bishop,
    *Pattern Recognition and Machine Learning*, section 3.5.

    Differs from the paper in: (1) the normalising term. :math:`\tfrac12\log|\alpha I + \beta F^\top F|` also holds the
    d − k directions that the features do not reach, which turn :math:`\tfrac d2 \log\alpha` into
    :math:`\tfrac k2 \log\alpha`; released code keeps d/2 and is wrong for n < d. (2) β is eliminated and
    t = α/β searched globally, where a fixed point from α = β = 1 stops at the peak that it meets, or before it. (3)
    α/β stays above 1e-12 of the largest eigenvalue of :math:`FF^\top`: where features reproduce a column exactly
    though they span fewer directions than there are rows, its evidence is unbounded.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(60) % 3
        >>> noise = rng.normal(size=(60, 100))
        >>> helpful = noise + 3 * np.eye(3, 100)[labels]
        >>> logme(helpful, labels) > logme(noise, labels)
        True
    """
    array = checked_features(features)
    return MappedEvidence(array, targets_of(labels, task, len(array)), precision).identity().score


def checked_features(features: Any) -> Float[np.ndarray, "n d"]:
    """Features as float64; a DataError where they are none."""
    try:
        array = np.asarray(features)
    except ValueError:
        raise DataError("features are rows of one length", found="rows of different lengths") from None
    if array.dtype.kind not in "fiub":
        raise DataError("features are numbers", found=f"dtype {array.dtype}")
    if array.ndim != 2 or not array.size:
        raise DataError("features are a table of rows × dimensions", found=f"shape {array.shape}", allowed="(n, d)")
    array = array.astype(np.float64)
    if not (finite := np.isfinite(array).all(axis=1)).all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"features of {(~finite).sum()} rows are NaN or infinite", found=f"first in row {row}")
    return array


def targets_of(labels: Any, task: str, rows: int) -> Float[np.ndarray, "n targets"]:
    """Label columns: indicators of the classes that occur, or numbers; a DataError where labels are neither."""
    if task not in TASKS:
        raise SetupError("unknown task", found=repr(task), allowed=TASKS)
    array = np.asarray(labels)
    if array.dtype.kind not in "fiub":
        raise DataError(
            "labels are numbers",
            found=f"{array.dtype.name}: {array.ravel()[:1].tolist()}",
            fix="data.class_encode_column('label'), or numpy.unique(labels, return_inverse=True)[1]",
        )
    if len(array.shape) not in ((1,) if task == "classification" else (1, 2)) or len(array) != rows:
        allowed = f"({rows},)" + (f" or ({rows}, columns)" if task == "regression" else "")
        raise DataError("there is one label for each row of features", found=f"shape {array.shape}", allowed=allowed)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(rows, -1)).all(axis=1))[0])
        raise DataError("a label is missing (NaN) or infinite", found=f"row {row}")
    return _indicators(array) if task == "classification" else _numbers(array)


def _indicators(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
        raise DataError(
            "class labels are whole numbers", found=labels[labels != np.round(labels)][0], fix="task='regression'"
        )
    classes, column = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError("there is one class only, so that there is nothing to tell apart", found=classes.tolist())
    return np.eye(len(classes))[column]


def _numbers(labels: np.ndarray) -> np.ndarray:
    targets = labels.astype(np.float64).reshape(len(labels), -1)
    if targets.shape[1] == 0 or (np.ptp(targets, axis=0) == 0).any():
        raise DataError(
            "a column of labels is constant, so that there is nothing to predict", found=targets[:1].tolist()
        )
    return targets
