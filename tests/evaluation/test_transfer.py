"""Intervals: against scipy's bootstrap, against a loop, and by how often they cover the truth."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, root_mean_squared_error

from graftlm.errors import DataError, SetupError
from graftlm.evaluation.metrics import majority
from graftlm.evaluation.transfer import paired_gain, score
from graftlm.measure import statistics as resampling


def made_up(n, accuracy, seed, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    wrong = (labels + rng.integers(1, classes, size=n)) % classes
    return labels, np.where(rng.random(n) < accuracy, labels, wrong)


def test_interval_equals_scipys_percentile_bootstrap():
    labels, guesses = made_up(150, 0.7, seed=0)
    ours = score("classification", labels, guesses, resamples=20_000)["accuracy"]
    hits = (labels == guesses).astype(float)
    theirs = stats.bootstrap((hits,), np.mean, n_resamples=20_000, method="percentile", vectorized=True, rng=1)
    assert ours.value == hits.mean()
    # both are multiples of 1/150; two streams of 20,000 may differ by one of them
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=1.01 / 150)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=1.01 / 150)


@pytest.mark.parametrize(("task", "metric"), [("classification", "accuracy"), ("regression", "spearman")])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(task, metric):
    if task == "classification":
        truth = 0.65
        sets = [made_up(120, truth, seed=seed) for seed in range(400)]
    else:
        rho = 0.6
        truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a bivariate normal
        draw = (np.random.default_rng(seed).normal(size=(2, 120)) for seed in range(400))
        sets = [(x, rho * x + np.sqrt(1 - rho**2) * e) for x, e in draw]
    found = [score(task, *pair, seed=seed, resamples=400)[metric] for seed, pair in enumerate(sets)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    # 400 sets: the standard error of a true 95 % is 1.1 points; percentile intervals are a little narrow
    assert 0.915 <= covered <= 0.98


def test_paired_gain_equals_a_loop_over_the_same_resamples():
    labels, guesses = made_up(60, 0.7, seed=1)
    _, reference = made_up(60, 0.6, seed=2)
    ours = paired_gain("classification", labels, guesses, reference, metric="macro_f1", seed=5, resamples=300)

    def f1(items, answers):
        return f1_score(labels[items], answers[items], average="macro", zero_division=0)

    everything = np.arange(60)
    rng = np.random.default_rng([5, 60])
    gains = []
    for _ in range(300):
        items = rng.integers(60, size=60)
        gains.append(f1(items, guesses) - f1(items, reference))
    assert ours.value == pytest.approx(f1(everything, guesses) - f1(everything, reference))
    assert (ours.low, ours.high) == (pytest.approx(np.quantile(gains, 0.025)), pytest.approx(np.quantile(gains, 0.975)))


def test_pairing_makes_the_interval_narrower_than_two_unpaired_ones():
    labels, guesses = made_up(200, 0.6, seed=3)
    reference = guesses.copy()
    reference[:10] = (labels[:10] + 1) % 3  # the same answers but for ten items
    gain = paired_gain("classification", labels, guesses, reference)
    alone = score("classification", labels, guesses)["accuracy"]
    assert 0 <= gain.low < gain.value < gain.high
    assert gain.high - gain.low < (alone.high - alone.low) / 2


def test_a_smaller_error_is_a_positive_gain():
    labels = np.arange(10.0)
    gain = paired_gain("regression", labels, labels + 1, labels + 3, metric="rmse")
    assert gain.value == pytest.approx(2) == root_mean_squared_error(labels, labels + 3) - 1
    assert (gain.low, gain.high) == (pytest.approx(2), pytest.approx(2))
    assert paired_gain("classification", ["a", "b"], ["a", "b"], ["a", "b"]).value == 0


def test_block_size_and_seed(monkeypatch):
    labels, guesses = made_up(50, 0.6, seed=4)
    first = score("classification", labels, guesses, seed=1)
    assert first == score("classification", labels, guesses, seed=1)
    assert first["macro_f1"] != score("classification", labels, guesses, seed=2)["macro_f1"]
    monkeypatch.setattr(resampling, "_CELLS", 1000)
    assert first == score("classification", labels, guesses, seed=1), "memory must not decide the figures"


def test_small_and_degenerate_sets_are_defined_and_quiet():
    one = score("classification", ["a"], ["b"])["accuracy"]
    assert (one.value, one.low, one.high) == (0, None, None)
    constant = score("regression", [1.0, 2.0, 3.0], [5.0, 5.0, 5.0])
    assert constant["pearson"].value is None and constant["pearson"].low is None
    assert constant["rmse"].low is not None
    one_class = score("classification", ["a"] * 5, ["a"] * 5)["macro_f1"]
    assert (one_class.value, one_class.low, one_class.high) == (1, 1, 1)
    # two items: half of the resamples hold one of them twice, where no correlation is defined
    two = score("regression", [1.0, 2.0], [1.0, 3.0], resamples=1000)["pearson"]
    assert two.value == pytest.approx(1)
    rare = score("multi_label", [[1]] + [[0]] * 400, [[0]] * 401, resamples=500)["micro_f1"]
    assert rare.value == 0, "resamples without the one positive item are left out, not counted as 0 or 1"


def test_gain_over_the_majority_uses_the_same_scores():
    labels, guesses = made_up(90, 0.8, seed=6)
    top = majority("classification", labels, labels)
    gain = paired_gain("classification", labels, guesses, [np.bincount(labels).argmax()] * 90)
    assert gain.value == pytest.approx(score("classification", labels, guesses)["accuracy"].value - top)


def test_other_items_are_an_error_that_says_which():
    labels, guesses = ["a", "b", "a"], ["a", "b", "b"]
    pair = {"labels": labels, "predictions": guesses, "reference": guesses}
    assert paired_gain("classification", **pair, ids=[1, 2, 3], reference_ids=[1, 2, 3]).value == 0
    with pytest.raises(DataError, match=r"same ids in another order[\s\S]*2 against 3 at position 1"):
        paired_gain("classification", **pair, ids=[1, 2, 3], reference_ids=[1, 3, 2])
    with pytest.raises(DataError, match="other ids"):
        paired_gain("classification", **pair, ids=[1, 2, 3], reference_ids=[1, 2, 4])
    with pytest.raises(DataError, match="2 reference ids"):
        paired_gain("classification", **pair, ids=[1, 2, 3], reference_ids=[1, 2])
    with pytest.raises(DataError, match="both sides or for none"):
        paired_gain("classification", **pair, ids=[1, 2, 3])
    with pytest.raises(DataError, match="differ in number"):
        paired_gain("classification", labels, guesses, guesses[:2])
    with pytest.raises(SetupError, match=r"recall[\s\S]*accuracy, macro_f1"):
        paired_gain("classification", **pair, metric="recall")
    with pytest.raises(SetupError, match="resamples"):
        score("classification", labels, guesses, resamples=0)
    with pytest.raises(SetupError, match="confidence"):
        score("classification", labels, guesses, confidence=95)
