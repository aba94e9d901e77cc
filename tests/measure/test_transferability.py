"""LEEP and NCE against their definitions, written as loops."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from graftlm import DataError
from graftlm.measure.transferability import cosine, jaccard, leep, nce

RNG = np.random.default_rng(0)
LABELS = RNG.integers(3, size=40)
PROBABILITIES = RNG.dirichlet(np.ones(4), size=40)


def test_leep_is_its_definition():
    total = 0.0
    for i in range(40):
        expected = 0.0
        for z in range(4):
            joint = sum(PROBABILITIES[j, z] for j in range(40) if LABELS[j] == LABELS[i])
            expected += joint / sum(PROBABILITIES[:, z]) * PROBABILITIES[i, z]
        total += math.log(expected)
    assert leep(PROBABILITIES, LABELS) == pytest.approx(total / 40, abs=1e-12)


def test_nce_is_joint_minus_marginal_entropy():
    source = PROBABILITIES.argmax(axis=1)
    joint = [np.mean((source == z) & (y == LABELS)) for z in range(4) for y in range(3)]
    expected = -(entropy(joint) - entropy(np.bincount(source) / 40))
    assert nce(source, LABELS) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_source_scores_zero_and_a_silent_one_the_entropy():
    assert nce(LABELS + 5, LABELS) == 0 and leep(np.eye(3)[LABELS], LABELS) == 0
    silent = -entropy(np.bincount(LABELS) / 40)
    assert nce(np.zeros(40, int), LABELS) == pytest.approx(silent)
    assert leep(np.full((40, 2), 0.5), LABELS) == pytest.approx(silent)


def test_classes_of_the_source_that_never_occur():
    with_empty = np.column_stack([PROBABILITIES, np.zeros(40)])
    assert leep(with_empty, LABELS) == pytest.approx(leep(PROBABILITIES, LABELS), abs=1e-12)


def test_vectors_and_sets():
    assert cosine(np.zeros(2), np.ones(2)) == 0 and cosine(np.ones(3), -2 * np.ones(3)) == pytest.approx(-1)
    assert jaccard(set(), set()) == 0 and jaccard({1}, {1}) == 1


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(DataError, match="one class"):
        leep(PROBABILITIES, np.zeros(40, int))
    with pytest.raises(DataError, match="one class"):
        nce(LABELS, np.zeros(40, int))
    with pytest.raises(DataError, match="probabilities"):
        leep(3 * PROBABILITIES, LABELS)
    with pytest.raises(DataError, match="probabilities"):
        leep(PROBABILITIES[:0], LABELS[:0])
