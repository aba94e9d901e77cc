"""regret@k against all subsets tried by hand, NDCG against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from graftlm import DataError
from graftlm.measure.ranking import ndcg, regret_at_k

SCORES, OUTCOMES = np.array([0.1, 0.9, 0.5, 0.3]), np.array([0.8, 0.6, 0.7, 0.75])


@pytest.mark.parametrize(("k", "tried"), [(1, 0.6), (2, 0.7), (3, 0.75), (4, 0.8)])
def test_regret_is_the_share_that_is_lost(k, tried):
    assert regret_at_k(SCORES, OUTCOMES, k) == pytest.approx(100 * (0.8 - tried) / 0.8)


def test_the_best_may_be_no_transfer():
    assert regret_at_k(SCORES, OUTCOMES, 4, without_transfer=0.9) == pytest.approx(100 * 0.1 / 0.9)
    assert regret_at_k(SCORES, OUTCOMES, 4, without_transfer=0.2) == 0


def test_equal_scores_stay_in_order():
    assert regret_at_k(np.zeros(3), np.array([0.5, 1.0, 0.7]), 1) == 50


def test_ndcg_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for count in (2, 5, 40):
        scores, outcomes = rng.normal(size=count), rng.uniform(0.3, 0.9, size=count)
        expected = ndcg_score([(2 ** (100 * outcomes) - 1) / 2**60], [scores])  # which takes no numbers beyond 2⁶³
        assert ndcg(scores, outcomes) == pytest.approx(expected, rel=1e-12)


def test_the_best_order_has_ndcg_one_and_the_worst_the_least():
    assert ndcg(OUTCOMES, OUTCOMES) == 1
    rng = np.random.default_rng(1)
    others = [ndcg(rng.permutation(4).astype(float), OUTCOMES) for _ in range(20)]
    assert ndcg(-OUTCOMES, OUTCOMES) <= min(others) < 1


@pytest.mark.parametrize(
    ("scores", "outcomes", "k"),
    [
        ([], [], 1),
        ([1.0], [1.0, 2.0], 1),
        ([np.nan], [1.0], 1),
        ([1.0], [np.inf], 1),
        ([1.0], [1.0], 2),
        ([1.0], [0.0], 1),
    ],
)
def test_what_has_no_regret_is_an_error(scores, outcomes, k):
    with pytest.raises(DataError):
        regret_at_k(np.array(scores), np.array(outcomes), k)


@pytest.mark.parametrize("outcomes", [[-0.1, 0.5], [0.0, 0.0], [0.5, 90.0]])
def test_outcomes_of_ndcg_are_shares(outcomes):
    with pytest.raises(DataError, match="between 0 and 1"):
        ndcg(np.ones(2), np.array(outcomes))
