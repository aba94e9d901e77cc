"""The comparison's statistics against loops, closed forms, simulation and closed testing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from graftlm.errors import DataError, SetupError
from graftlm.measure.statistics import (
    crossed,
    estimate,
    holm,
    multiplicities,
    noise_floor,
    paired_bootstrap,
    resample_items,
    seed_weights,
)


def table(rng, seeds, items, *, mean=0.0, by_seed=0.0, by_item=0.0, rest=1.0):
    """Outcomes (seeds, items) with a known mean and known variances of seeds, items and what is left."""
    return (
        mean
        + by_seed * rng.normal(size=(seeds, 1))
        + by_item * rng.normal(size=(1, items))
        + rest * rng.normal(size=(seeds, items))
    )


def closed_form_variance(d):
    """Variance of Σ u_s v_i D_si, u = Multinomial(S-1)/(S-1), v = Multinomial(N)/N, independent; sums written out."""
    seeds, items = d.shape
    u = np.full((seeds, seeds), 1 / seeds**2) + (np.eye(seeds) / seeds - 1 / seeds**2) / (seeds - 1)
    v = np.full((items, items), 1 / items**2) + (np.eye(items) / items - 1 / items**2) / items
    second_moment = sum(
        u[s, t] * v[i, j] * d[s, i] * d[t, j]
        for s, t in itertools.product(range(seeds), repeat=2)
        for i, j in itertools.product(range(items), repeat=2)
    )
    return second_moment - d.mean() ** 2


def test_the_crossed_bootstrap_is_the_loop_over_drawn_seeds_and_items():
    rng = np.random.default_rng(1)
    d = table(rng, 4, 6)
    counts = np.concatenate(list(multiplicities(6, 50, 3)))
    weights = seed_weights(4, 50, 3)
    values = resample_items([lambda w, row=row: w @ row / 6 for row in d], 6, 50, 3)
    drawn = crossed(values, weights)
    for b in range(50):
        seeds = np.repeat(np.arange(4), np.rint(3 * weights[b]).astype(int))
        items = np.repeat(np.arange(6), counts[b].astype(int))
        assert len(seeds) == 3 and len(items) == 6
        assert drawn[b] == pytest.approx(np.mean([d[s, i] for s in seeds for i in items]))


@pytest.mark.parametrize("parts", [{"by_seed": 1.0}, {"by_item": 1.0}, {"rest": 1.0}, {"by_seed": 0.4, "by_item": 0.7}])
def test_its_variance_is_the_closed_form(parts):
    d = table(np.random.default_rng(2), 5, 12, **({"rest": 0.0} | parts))
    values = resample_items([lambda w, row=row: w @ row / 12 for row in d], 12, 60_000, 0)
    drawn = crossed(values, seed_weights(5, 60_000, 0))
    assert drawn.var() == pytest.approx(closed_form_variance(d), rel=0.03)


def test_the_variance_over_seeds_alone_is_unbiased():
    d = np.repeat(np.random.default_rng(3).normal(size=(5, 1)), 10, axis=1)
    assert closed_form_variance(d) == pytest.approx(d[:, 0].var(ddof=1) / 5)


def test_one_seed_leaves_the_items():
    d = np.random.default_rng(4).normal(size=(1, 200))
    found = paired_bootstrap(d, np.zeros_like(d))
    ours = found.high - found.low
    assert ours == pytest.approx(2 * 1.96 * d.std() / np.sqrt(200), rel=0.05)


@pytest.mark.parametrize(
    ("parts", "least"),
    [
        ({"by_item": 1.0, "rest": 0.5, "by_seed": 0.0}, 0.93),
        ({"by_item": 0.5, "rest": 0.5, "by_seed": 0.05}, 0.90),
        # five seeds that differ much more than the items do: too narrow, and the documentation says so
        ({"by_item": 0.1, "rest": 0.1, "by_seed": 1.0}, 0.80),
    ],
)
def test_coverage_in_a_known_normal_case(parts, least):
    rng = np.random.default_rng(5)
    trials, hits = 300, 0
    for trial in range(trials):
        d = table(rng, 5, 100, mean=0.3, **parts)
        found = paired_bootstrap(d, np.zeros_like(d), resamples=400, seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert least <= hits / trials <= 1
    assert hits < trials, "an interval that always covers is too wide to be of use"


def test_where_nothing_differs_p_is_uniform_or_larger():
    rng = np.random.default_rng(6)
    p = [
        paired_bootstrap(*(table(rng, 5, 80, by_item=0.5) for _ in range(2)), resamples=400, seed=trial).p
        for trial in range(300)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.08
    assert 0.4 < np.mean(p) < 0.75


def test_p_and_interval_say_the_same():
    rng = np.random.default_rng(7)
    for shift in np.linspace(-0.3, 0.3, 25):
        d = table(rng, 4, 60, mean=shift)
        found = paired_bootstrap(d, np.zeros_like(d), resamples=1999)
        if not 0.045 < found.p < 0.055:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_pairing_cancels_what_both_share():
    rng = np.random.default_rng(8)
    hard, lucky = 3 * rng.normal(size=(1, 150)), 3 * rng.normal(size=(5, 1))
    b = hard + lucky + 0.1 * rng.normal(size=(5, 150))
    a = hard + lucky + 0.1 * rng.normal(size=(5, 150)) + 0.05
    assert paired_bootstrap(a, b).high - paired_bootstrap(a, b).low < 0.05
    broken = paired_bootstrap(a, b[:, ::-1])
    assert broken.high - broken.low > 1


def test_a_mean_against_scipys_bootstrap_of_items():
    d = np.random.default_rng(9).exponential(size=(1, 120))
    found = paired_bootstrap(d, np.zeros_like(d), resamples=20_000)
    theirs = stats.bootstrap((d[0],), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_undefined_resamples():
    drawn = np.array([np.nan, 1.0, 2.0, 3.0])
    assert estimate(2.0, drawn).low == pytest.approx(np.quantile([1, 2, 3], 0.025))
    lost = estimate(2.0, np.array([np.nan, np.nan, np.nan, 1.0]))
    assert np.isnan([lost.low, lost.high, lost.p]).all() and lost.value == 2.0
    assert np.isnan(estimate(float("nan"), drawn).p)


def test_p_is_never_zero_and_never_above_one():
    assert estimate(1.0, np.ones(999)).p == pytest.approx(2 / 1000)
    assert estimate(0.0, np.zeros(999)).p == 1.0


def closed_testing(p):
    """Adjusted p of each hypothesis: the largest Bonferroni p of all intersections that it is part of."""
    tests = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(tests, size)]
    return [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in tests]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_holm_is_closed_testing_with_bonferroni(p):
    assert holm(np.array(p)).tolist() == pytest.approx(closed_testing(p))


def test_holm_leaves_out_what_is_no_test():
    assert holm(np.array([0.02, np.nan, 0.01])).tolist() == pytest.approx([0.02, np.nan, 0.02], nan_ok=True)
    assert holm(np.array([])).tolist() == []


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_noise_floor_follows_from_all_ways_of_parting_the_seeds(k):
    scores = np.random.default_rng(10).normal(size=6)
    squares = [
        (scores[list(one)].mean() - scores[list(other)].mean()) ** 2
        for one in itertools.combinations(range(6), k)
        for other in itertools.combinations(sorted(set(range(6)) - set(one)), k)
    ]
    # scaled from sets of k seeds to sets of 6
    assert noise_floor(scores[None]) == pytest.approx(1.959964 * np.sqrt(np.mean(squares) * k / 6), rel=1e-6)


def test_the_noise_floor_by_simulation():
    rng = np.random.default_rng(11)
    floor = noise_floor(rng.normal(size=(40, 5)))
    differences = rng.normal(size=(20_000, 5)).mean(axis=1) - rng.normal(size=(20_000, 5)).mean(axis=1)
    assert np.mean(np.abs(differences) < floor) == pytest.approx(0.95, abs=0.03)


def test_the_noise_floor_with_missing_runs():
    scores = np.array([[1.0, 3.0, np.nan], [2.0, np.nan, np.nan]])
    assert noise_floor(scores) == pytest.approx(1.959964 * np.sqrt(2 * 2.0 / 2))
    assert noise_floor(scores[1:]) is None


def test_what_cannot_be_resampled():
    with pytest.raises(DataError, match="no item"):
        paired_bootstrap(np.ones((2, 0)), np.ones((2, 0)))
    with pytest.raises(DataError, match="no seed"):
        paired_bootstrap(np.ones((0, 2)), np.ones((0, 2)))
    with pytest.raises(SetupError, match="confidence"):
        estimate(1.0, np.ones(3), confidence=95.0)


def test_the_same_seed_draws_the_same():
    first, second = np.random.default_rng(12).normal(size=(2, 3, 20))
    assert paired_bootstrap(first, second, seed=1) == paired_bootstrap(first, second, seed=1)
    assert paired_bootstrap(first, second, seed=1) != paired_bootstrap(first, second, seed=2)
