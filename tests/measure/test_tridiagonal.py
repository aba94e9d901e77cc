"""Determinants and solves of a shifted matrix against dense ones: with numba, its loops uncompiled, with LAPACK."""

import sys
import types

import numpy as np
import pytest

from graftlm.measure import compiled, tridiagonal
from graftlm.measure.evidence import by_svd
from graftlm.measure.mapped import MappedEvidence
from graftlm.measure.tridiagonal import Shifted


def with_numba():
    pytest.importorskip("numba", reason="needs the extra [fast]: pip install 'graftlm[fast]'")
    return compiled.kernels()


PATHS = {"numpy": lambda: None, "uncompiled": lambda: compiled, "numba": with_numba}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """With which functions."""
    functions = PATHS[request.param]()
    monkeypatch.setattr(tridiagonal, "kernels", lambda: functions)
    return request.param


def problem(size, ranks, targets, *, diagonal_only, seed=0):
    """A positive tridiagonal or diagonal part, right-hand sides (with a share of the update's, where there is a
    seed), an update with an indefinite core; and all dense."""
    rng = np.random.default_rng([seed, size, ranks, targets])
    beside = None if diagonal_only else rng.normal(size=size - 1)
    diagonal = 6 + rng.random(size)
    columns, update = rng.normal(size=(size, targets)), rng.normal(size=(size, ranks))
    core = rng.normal(size=(ranks, ranks)) / (10 * size)
    core += core.T
    dense = np.diag(diagonal) + update @ core @ update.T
    if beside is not None:
        dense += np.diag(beside, 1) + np.diag(beside, -1)
    share = rng.normal(size=(ranks, targets)) if seed else None
    sides = columns if share is None else columns + update @ share
    return Shifted(diagonal, beside, columns, update, core, share), dense, sides


@pytest.mark.parametrize("diagonal_only", [False, True])
@pytest.mark.parametrize(("size", "ranks", "targets"), [(1, 1, 1), (2, 1, 3), (40, 2, 1), (40, 17, 5), (9, 3, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_determinants_and_solves_are_those_of_the_dense_matrix(path, diagonal_only, size, ranks, targets, seed):
    shifted, dense, columns = problem(size, ranks, targets, diagonal_only=diagonal_only, seed=seed)
    t = np.exp(np.linspace(-1, 9, 7))
    which = np.arange(7) % targets
    determinant, quadratic = shifted.at(t)
    paired, chosen = shifted.at(t, which)
    assert quadratic.shape == (7, targets) and chosen.shape == (7, 1)
    for number, one in enumerate(t):
        whole = dense + one * np.eye(size)
        expected = (columns * np.linalg.solve(whole, columns)).sum(axis=0)
        sign, log = np.linalg.slogdet(whole)
        assert sign > 0
        assert [determinant[number], paired[number]] == pytest.approx([log, log], rel=1e-12, abs=1e-12)
        assert quadratic[number] == pytest.approx(expected, rel=1e-11)
        assert chosen[number] == pytest.approx(expected[which[number]], rel=1e-11)


@pytest.mark.parametrize("diagonal_only", [False, True])
def test_the_ways_agree_to_rounding(diagonal_only):
    found = []
    for functions in (None, compiled):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tridiagonal, "kernels", lambda functions=functions: functions)
            found.append(problem(60, 2, 4, diagonal_only=diagonal_only, seed=1)[0].at(np.array([0.01, 1.0, 100.0])))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_a_matrix_that_is_not_positive_is_nan(path):
    shifted = Shifted(np.array([1.0, -3.0, 1.0]), np.zeros(2), np.ones((3, 2)), np.ones((3, 1)), np.zeros((1, 1)))
    with np.errstate(invalid="ignore"):
        determinant, quadratic = shifted.at(np.array([1.0, 4.0]))
    assert np.isnan(determinant[0]) and np.isnan(quadratic[0]).all()
    assert determinant[1] == pytest.approx(np.log(5 * 1 * 5)) and quadratic[1] == pytest.approx([1.4, 1.4])


def test_a_negative_determinant_of_the_update_is_nan(path):
    shifted = Shifted(np.ones(3), np.zeros(2), np.ones((3, 1)), np.ones((3, 1)), np.array([[-1.0]]))
    determinant, quadratic = shifted.at(np.array([1.0, 4.0]))  # det(M + t) = (1 + t)² (t − 2)
    assert np.isnan(determinant[0]) and np.isnan(quadratic[0, 0])
    assert determinant[1] == pytest.approx(np.log(25 * 2)) and quadratic[1] == pytest.approx(3 / 2)


@pytest.mark.parametrize(("rows", "width"), [(50, 30), (30, 50)])
@pytest.mark.parametrize("targets", [1, 12])
def test_maps_are_scored_alike(path, rows, width, targets):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(rows, width)) + 3 * rng.normal(size=width)
    columns = features[:, :targets] + rng.normal(size=(rows, targets))
    weight, bias = rng.normal(size=(width, width)) / np.sqrt(width), rng.normal(size=width)
    low = weight[:, :8], weight[:8].T
    many = MappedEvidence(features, columns)
    for found, mapped in [
        (many.linear(weight, bias), features @ weight.T),
        (many.low_rank(*low, bias, identity=True), features + features @ low[1] @ low[0].T),
    ]:
        exact = by_svd(mapped + bias, columns)
        assert found.columns == pytest.approx(exact.columns, abs=1e-9)
        peaked = np.isfinite(exact.ratios)
        assert (np.isfinite(found.ratios) == peaked).all() and peaked.any()
        assert np.log(found.ratios[peaked]) == pytest.approx(np.log(exact.ratios[peaked]), abs=1e-3)
    assert many.fallbacks == 0


@pytest.fixture
def anew():
    """What was found out about numba is forgotten before and after."""
    compiled.kernels.cache_clear()
    yield
    compiled.kernels.cache_clear()


def test_without_numba_nothing_is_said(anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled.kernels() is None


def test_a_numba_that_cannot_be_used_is_named(anew, monkeypatch):
    def njit(**_):
        raise RuntimeError("cannot cache function: no locator available")

    fake = types.ModuleType("numba")
    fake.njit = njit
    monkeypatch.setitem(sys.modules, "numba", fake)
    with pytest.warns(RuntimeWarning, match="no locator available"):
        assert compiled.kernels() is None
