"""Scores of a source task that need no training: from a source classifier's outputs, or from texts alone."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
from jaxtyping import Float, Int

from graftlm.errors import DataError


def leep(probabilities: Float[np.ndarray, "n source"], labels: Int[np.ndarray, " n"]) -> float:
    r"""Log expected empirical prediction: how well a source classifier's outputs tell the target's labels.

    .. math:: \frac1n \sum_i \log \sum_z \hat P(y_i \mid z)\, \theta_{iz}, \qquad
              \hat P(y \mid z) = \frac{\sum_{i: y_i = y} \theta_{iz}}{\sum_i \theta_{iz}}

    At most 0; higher is better.

    Args:
        probabilities: θ, the source classifier's softmax on the target's rows.
        labels: y, the target's classes.

    Raises:
        DataError: no row, one class, or rows that are no probabilities.

    Source: Nguyen, Hassner, Seeger, Archambeau, *LEEP*, ICML 2020, arXiv 2002.12462, equations 1 and 2.

    >>> leep(np.eye(2)[[0, 1, 0]], np.array([7, 3, 7]))
    0.0
    """
    if not len(probabilities) or (probabilities < 0).any() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise DataError("LEEP takes rows of probabilities that sum to 1", found=f"shape {probabilities.shape}")
    classes, column = _classes(labels)
    joint = np.eye(len(classes))[column].T @ probabilities
    seen = joint.sum(axis=0)
    conditional = np.divide(joint, seen, out=np.zeros_like(joint), where=seen > 0)
    expected = (conditional[column] * probabilities).sum(axis=1)
    return float(np.log(expected).mean()) + 0.0


def nce(source: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    r"""Negative conditional entropy of the target's labels given those that the source classifier assigns.

    .. math:: -H(Y \mid Z) = \sum_z P(z) \sum_y P(y \mid z) \log P(y \mid z)

    At most 0; higher is better; in nats.

    Args:
        source: z, the source classifier's predicted class on each of the target's rows.
        labels: y, the target's classes.

    Raises:
        DataError: no row, or one class.

    Source: Tran, Nguyen, Hassner, *Transferability and Hardness of Supervised Classification Tasks*, ICCV 2019,
    arXiv 1908.08142, equation 3.

    >>> round(nce(np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1])), 6)
    -0.693147
    """
    classes, column = _classes(labels)
    groups, group = np.unique(source, return_inverse=True)
    joint = np.zeros((len(groups), len(classes)))
    np.add.at(joint, (group, column), 1 / len(labels))
    conditional = joint / joint.sum(axis=1, keepdims=True)
    return float((joint * np.log(conditional, out=np.zeros_like(joint), where=joint > 0)).sum()) + 0.0


def cosine(first: Float[np.ndarray, " d"], second: Float[np.ndarray, " d"]) -> float:
    """The cosine of the angle between two vectors; 0 where one of them is zero.

    >>> round(cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 4)
    0.7071
    """
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else 0.0


def jaccard(first: Set[int], second: Set[int]) -> float:
    r"""The share of two vocabularies that is common to both: :math:`|A \cap B| / |A \cup B|`.

    >>> jaccard({1, 2, 3}, {2, 3, 4})
    0.5
    """
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def _classes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    classes, column = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError("there is one class only, so that there is nothing to tell apart", found=classes.tolist())
    return classes, column
