"""LogME against the dense Gaussian density, maximised numerically, and its fast forms against the slow one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from graftlm import DataError, SetupError, logme
from graftlm.measure.evidence import by_svd
from graftlm.measure.logme import targets_of
from graftlm.measure.mapped import MappedEvidence


def density(features, column, log_alpha, log_beta) -> float:
    """log N(y; 0, I/β + FFᵀ/α) / n, the covariance written out."""
    rows = len(features)
    covariance = np.exp(-log_beta) * np.eye(rows) + np.exp(-log_alpha) * (features @ features.T)
    _, determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (determinant + column @ np.linalg.solve(covariance, column)) / rows


def brute_force(features, column) -> float:
    """The highest density that Nelder-Mead finds from many starts."""

    def loss(point):
        return -density(features, column, *point) if np.abs(point).max() < 30 else 1e9

    starts = [(a, b) for a in (-3, 1, 5, 9, 20) for b in (-1, 1.5, 5)]
    options = {"xatol": 1e-7, "fatol": 1e-13, "maxiter": 2000}
    starts = sorted(starts, key=loss)[:4]
    return max(-minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)


def problem(rows, width, *, rank=None, classes=2, signal=1.0, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=rows - classes)])
    features = rng.normal(size=(rows, rank or width)) + signal * rng.normal(size=(classes, rank or width))[labels]
    if rank:
        features = features @ rng.normal(size=(rank, width))
    return features + mean * rng.normal(size=width), labels


def test_the_density_is_that_of_scipy():
    features, labels = problem(6, 3)
    covariance = np.eye(6) / np.exp(0.5) + features @ features.T / np.exp(0.3)
    assert density(features, labels, 0.3, 0.5) == pytest.approx(
        multivariate_normal(np.zeros(6), covariance).logpdf(labels) / 6
    )


SHAPES = [(20, 5), (20, 20), (12, 40), (25, 24), (24, 25), (30, 1)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("signal", [0.0, 0.4, 1.0])
def test_the_evidence_is_the_highest_density(rows, width, signal):
    features, labels = problem(rows, width, signal=signal, seed=rows + width)
    expected = np.mean([brute_force(features, column) for column in targets_of(labels, "classification", rows).T])
    assert logme(features, labels) == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(("rows", "width", "rank"), [(20, 8, 1), (12, 30, 1), (20, 15, 6), (15, 40, 7)])
def test_features_without_full_rank(rows, width, rank):
    features, labels = problem(rows, width, rank=rank, signal=0.7, seed=rank)
    expected = np.mean([brute_force(features, column) for column in targets_of(labels, "classification", rows).T])
    assert logme(features, labels) == pytest.approx(expected, abs=2e-7)


def test_regression_with_several_columns():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(18, 30))
    numbers = features[:, :2] @ rng.normal(size=(2, 2)) * 5 + rng.normal(size=(18, 2))
    expected = np.mean([brute_force(features, column) for column in numbers.T])
    assert logme(features, numbers, task="regression") == pytest.approx(expected, abs=2e-7)
    assert logme(features, numbers[:, 0], task="regression") == pytest.approx(
        logme(features, numbers[:, :1], task="regression"), abs=1e-12
    )


def test_the_density_at_the_maximum_is_the_score():
    """For shapes too large for a search: α and β as found, put into the density."""
    for rows, width in [(60, 200), (200, 60)]:
        features, labels = problem(rows, width, classes=3, signal=0.3, mean=2.0)
        targets = targets_of(labels, "classification", rows)
        found = by_svd(features, targets)
        for column, t, score in zip(targets.T, found.ratios, found.columns, strict=True):
            inverse = np.linalg.inv(np.eye(rows) + features @ features.T / t)
            beta = rows / (column @ inverse @ column)
            assert density(features, column, np.log(t * beta), np.log(beta)) == pytest.approx(score, abs=1e-9)
            nearby = [
                density(features, column, np.log(t * beta) + a, np.log(beta) + b)
                for a in (-0.05, 0.05)
                for b in (-0.05, 0.05)
            ]
            assert max(nearby) < score


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 60),
    width=st.integers(1, 80),
    classes=st.integers(2, 4),
    signal=st.sampled_from([0.0, 0.3, 2.0]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    constant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_fast_form_gives_what_singular_values_give(rows, width, classes, signal, mean, constant, seed):
    features, labels = problem(rows, width, classes=classes, signal=signal, mean=mean, seed=seed)
    if constant:
        features[:, 0] = 3.0
    slow = by_svd(features, targets_of(labels, "classification", rows)).score
    assert logme(features, labels) == pytest.approx(slow, abs=1e-8)


@pytest.mark.parametrize(("rows", "width", "seed"), [(34, 33, 0), (9, 8, 496), (5, 3, 358)])
def test_a_mean_much_larger_than_the_spread_costs_no_digits(rows, width, seed):
    """What the right-hand sides have of the mean is kept apart; without that, these are 1e-8 to 3e-6 off."""
    features, labels = problem(rows, width, signal=2.0, mean=100.0, seed=seed)
    slow = by_svd(features, targets_of(labels, "classification", rows)).score
    assert logme(features, labels) == pytest.approx(slow, abs=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(40, 20), (20, 40)])
def test_orthogonal_maps_and_order_of_rows_change_nothing(rows, width):
    features, labels = problem(rows, width, classes=3, mean=1.0)
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    order = rng.permutation(rows)
    expected = logme(features, labels)
    assert logme(features @ turn, labels) == pytest.approx(expected, abs=1e-9)
    assert logme(features[order], labels[order]) == pytest.approx(expected, abs=1e-9)
    assert logme(1000 * features, labels) == pytest.approx(expected, abs=1e-9), "α takes up the scale"


def test_fewer_rows_than_dimensions_are_ranked_by_their_signal():
    """Where released code ranks upside down: 100 rows of 384 dimensions, two classes drawn apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    noise, direction = rng.normal(size=(100, 384)), rng.normal(size=384) / np.sqrt(384)
    apart = [0, 2, 4, 8, 16]
    scores = [logme(noise + distance * np.outer(labels, direction), labels) for distance in apart]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)


def test_classes_are_those_that_occur():
    features, labels = problem(30, 10, classes=3)
    assert logme(features, labels * 7 - 3) == logme(features, labels)
    assert logme(features, labels.astype(float)) == logme(features, labels)
    assert logme(features, labels == 1) == logme(features, (labels == 1).astype(int))


def test_imbalanced_classes():
    features, labels = problem(40, 10, classes=2)
    labels = np.zeros(40, int)
    labels[7] = 1
    expected = np.mean([brute_force(features, column) for column in np.eye(2)[labels].T])
    assert logme(features, labels) == pytest.approx(expected, abs=2e-7)


def test_features_that_say_nothing_and_features_that_say_all():
    labels = np.arange(20) % 2
    silent = -0.5 * (np.log(2 * np.pi * 0.5) + 1)  # y² is ½ on average, whatever the features
    assert logme(np.zeros((20, 3)), labels) == pytest.approx(silent)
    perfect = logme(np.eye(2)[labels], labels)
    assert np.isfinite(perfect) and perfect > 5, "evidence grows without bound as the noise vanishes, down to the floor"


@pytest.mark.parametrize(("rows", "width"), [(300, 96), (80, 96), (1000, 64)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_float32_is_within_its_stated_error(rows, width, mean):
    features, labels = problem(rows, width, classes=5, signal=0.3, mean=mean)
    assert logme(features, labels, precision="float32") == pytest.approx(logme(features, labels), abs=1e-4)


def test_float32_that_would_lose_its_digits_is_not_used():
    features, _ = problem(60, 20, signal=0.0)
    numbers = features @ np.ones(20) + 1e-9 * np.random.default_rng(0).normal(size=60)
    exact = logme(features, numbers, task="regression")
    assert logme(features, numbers, task="regression", precision="float32") == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(50, 30), (30, 50), (30, 30), (9, 2), (2, 9), (9, 1)])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_maps_are_scored_as_mapped_features_are(rows, width, precision):
    features, labels = problem(rows, width, signal=1.0, mean=3.0)
    targets = targets_of(labels, "classification", rows)
    rng = np.random.default_rng(5)
    many = MappedEvidence(features, targets, precision)
    near = 1e-8 if precision == "float64" else 1e-4
    for _ in range(3):
        weight, bias = rng.normal(size=(width, width)) / np.sqrt(width), rng.normal(size=width)
        assert many.linear(weight, bias).score == pytest.approx(
            by_svd(features @ weight.T + bias, targets).score, abs=near
        )
        up, down = rng.normal(size=(2, width, 3)) / np.sqrt(width)
        plain = features @ down @ up.T + bias
        assert many.low_rank(up, down, bias, identity=False).score == pytest.approx(
            by_svd(plain, targets).score, abs=1e-8
        )
        moved = by_svd(features + plain, targets).score
        assert many.low_rank(up, down, bias, identity=True).score == pytest.approx(moved, abs=1e-8)


def test_the_fast_forms_are_the_ones_that_ran():
    features, labels = problem(50, 30, signal=1.0, mean=3.0)
    many = MappedEvidence(features, targets_of(labels, "classification", 50), "float32")
    many.linear(np.eye(30), np.zeros(30))
    many.low_rank(np.ones((30, 1)), np.ones((30, 1)), np.zeros(30), identity=True)
    assert many.fallbacks == 0


FEATURES, LABELS = np.random.default_rng(0).normal(size=(6, 3)), [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("features", "labels", "task", "message"),
    [
        (FEATURES, [1] * 6, "classification", "one class only"),
        (FEATURES, [2.0] * 6, "regression", "constant"),
        (FEATURES, [0, 1, 0, 1, 0, np.nan], "regression", "missing"),
        (FEATURES, [0, 1, 0, 1, 0, np.nan], "classification", "missing"),
        (FEATURES, [0, 1, 0, 1, 0, 0.5], "classification", "whole numbers"),
        (FEATURES, list("ababab"), "classification", "numbers"),
        (FEATURES, [None, 1, 0, 1, 0, 1], "classification", "numbers"),
        (FEATURES, LABELS[:5], "classification", "one label for each row"),
        (FEATURES, np.eye(6, dtype=int), "classification", "one label for each row"),
        (FEATURES * [1, np.inf, 1], LABELS, "classification", "NaN or infinite"),
        (np.where(FEATURES[4, 1] == FEATURES, np.nan, FEATURES), LABELS, "classification", "row 4"),
        (FEATURES[0], LABELS, "classification", "rows × dimensions"),
        (FEATURES[:0], [], "classification", "rows × dimensions"),
        ([[1.0], [1.0, 2.0]], [0, 1], "classification", "one length"),
        (FEATURES.astype(str), LABELS, "classification", "numbers"),
    ],
)
def test_what_cannot_be_scored_is_an_error(features, labels, task, message):
    with pytest.raises(DataError, match=message):
        logme(features, labels, task=task)


def test_unknown_words_are_errors():
    with pytest.raises(SetupError, match="task"):
        logme(FEATURES, LABELS, task="ranking")
    with pytest.raises(SetupError, match="precision"):
        logme(FEATURES, LABELS, precision="float16")
