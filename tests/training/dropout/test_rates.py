"""The schedule and its controls against figures worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.errors import SetupError
from graftlm.training.dropout.rates import Schedule

SCORES = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0]
KINDS = ["a", "a", "b", "b", "c", "c"]


def test_linear_in_rank_as_in_the_paper():
    """Rank 0 (1.0) gets 0.10, rank 5 (9.0) gets 0; the values between say nothing."""
    assert Schedule().rates(SCORES, KINDS) == pytest.approx([0.04, 0.1, 0.0, 0.06, 0.02, 0.08])
    assert Schedule().rates([100.0 * s for s in SCORES], KINDS) == Schedule().rates(SCORES, KINDS)


def test_the_paper_figures_for_bert():
    """37 blocks whose types are apart: the ranges and the mean that follow for each type."""
    kinds = ["embeddings"] + ["attention", "output", "ffn"] * 12
    level = {"attention": 0, "output": 1, "ffn": 2, "embeddings": 3}
    scores = [level[kind] * 100 + i for i, kind in enumerate(kinds)]
    rates = np.array(Schedule().rates(scores, kinds))
    kinds = np.array(kinds)
    ranges = {kind: (rates[kinds == kind].min(), rates[kinds == kind].max()) for kind in level}
    assert ranges["attention"] == pytest.approx((0.1 - 0.1 * 11 / 36, 0.1))
    assert ranges["output"] == pytest.approx((0.1 - 0.1 * 23 / 36, 0.1 - 0.1 * 12 / 36))
    assert ranges["embeddings"] == (0, 0)
    assert rates.mean() == pytest.approx(0.05)


def test_options():
    score = Schedule(linear_in="score").rates(SCORES, KINDS)
    assert score == pytest.approx([0.1 * (9 - s) / 8 for s in SCORES])
    inside = Schedule(within_type=True).rates(SCORES, KINDS)
    assert inside == pytest.approx([0.0, 0.1, 0.0, 0.1, 0.0, 0.1])
    bounds = Schedule(upper=0.5, lower=0.2).rates(SCORES, KINDS)
    assert (min(bounds), max(bounds)) == pytest.approx((0.2, 0.5))
    held = Schedule(mean=0.08).rates(SCORES, KINDS)
    assert np.mean(held) == pytest.approx(0.08)
    assert held == pytest.approx([1.6 * rate for rate in Schedule().rates(SCORES, KINDS)])
    assert Schedule(mean=0.0).rates(SCORES, KINDS) == [0.0] * 6


def test_controls():
    guided = Schedule().rates(SCORES, KINDS)
    uniform = Schedule("uniform").rates(SCORES, KINDS)
    assert uniform == pytest.approx([0.05] * 6)
    assert Schedule("uniform", mean=0.1).rates(SCORES, KINDS) == pytest.approx([0.1] * 6)
    assert Schedule("reversed").rates(SCORES, KINDS) == pytest.approx([0.1 - rate for rate in guided])
    by_type = Schedule("type").rates(SCORES, KINDS)
    assert by_type == pytest.approx([0.07, 0.07, 0.03, 0.03, 0.05, 0.05])
    shuffles = [Schedule("shuffled", seed=seed).rates(SCORES, KINDS) for seed in range(20)]
    assert all(sorted(one) == pytest.approx(sorted(guided)) for one in shuffles)
    assert len({tuple(one) for one in shuffles}) > 15
    assert shuffles[3] == Schedule("shuffled", seed=3).rates(SCORES, KINDS)
    assert np.mean(shuffles, axis=0) == pytest.approx([0.05] * 6, abs=0.03)


@given(
    st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=30),
    st.sampled_from(["guided", "uniform", "shuffled", "reversed", "type"]),
    st.sampled_from(["rank", "score"]),
    st.booleans(),
)
def test_rates_stay_in_their_range_and_keep_their_mean(scores, name, linear_in, within):
    kinds = ["even" if i % 2 == 0 else "odd" for i in range(len(scores))]
    guided = Schedule(linear_in=linear_in, within_type=within).rates(scores, kinds)
    found = Schedule(name, linear_in=linear_in, within_type=within).rates(scores, kinds)
    assert all(-1e-12 <= rate <= 0.1 + 1e-12 for rate in found)
    if name != "reversed":
        assert math.fsum(found) == pytest.approx(math.fsum(guided), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "random"}, "shuffled"),
        ({"linear_in": "log"}, "rank, score"),
        ({"noise": "uniform"}, "gaussian"),
        ({"upper": 1.0}, "0 ≤ rate < 1"),
        ({"lower": -0.1}, "0 ≤ rate < 1"),
        ({"upper": 0.1, "lower": 0.2}, "above the highest"),
        ({"mean": float("nan")}, "dropout rate"),
    ],
)
def test_what_makes_no_sense_is_said(options, message):
    with pytest.raises(SetupError, match=message):
        Schedule(**options)


def test_a_mean_that_cannot_be_reached():
    with pytest.raises(SetupError, match="lose all of its signal"):
        Schedule(mean=0.6).rates(SCORES, KINDS)
    with pytest.raises(SetupError, match="all rates are 0"):
        Schedule(upper=0.0, mean=0.1).rates(SCORES, KINDS)
