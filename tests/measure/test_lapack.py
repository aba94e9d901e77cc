"""The routines that are called by address, against numpy; what a workspace held before must not matter."""

import threading

import numpy as np
import pytest

from graftlm.measure.lapack import Workspace, gram, multiply_lower, tridiagonal

NEAR = {"float64": 1e-12, "float32": 2e-5}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5), (1, 1), (70, 90)])
def test_products_are_those_of_numpy(dtype, rows, columns):
    rng = np.random.default_rng(0)
    matrix = np.asfortranarray(rng.normal(size=(rows, columns)).astype(dtype))
    square = np.full((columns, columns), np.nan, dtype=dtype, order="F")
    gram(matrix, square)
    assert np.tril(square) == pytest.approx(np.tril(matrix.T @ matrix), abs=NEAR[dtype] * rows)
    lower = np.asfortranarray(rng.normal(size=(rows, rows)).astype(dtype))
    expected = np.tril(lower).T @ matrix
    multiply_lower(lower, matrix)
    assert matrix == pytest.approx(expected, abs=NEAR[dtype] * rows)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("size", [1, 2, 3, 40, 130])
def test_a_tridiagonal_matrix_solves_what_the_whole_one_solves(dtype, size):
    rng = np.random.default_rng(size)
    factor, sides = rng.normal(size=(size, size)), rng.normal(size=(size, 4))
    whole = (factor @ factor.T / size + np.eye(size)).astype(dtype)
    below = np.asfortranarray(np.tril(whole))
    diagonal, beside, rotated = tridiagonal(below, sides)
    made = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    assert np.linalg.eigvalsh(made) == pytest.approx(np.linalg.eigvalsh(whole.astype(float)), abs=10 * NEAR[dtype])
    inside = rotated.T @ np.linalg.solve(made, rotated)
    assert inside == pytest.approx(sides.T @ np.linalg.solve(whole.astype(float), sides), abs=100 * NEAR[dtype])


def test_threads_do_not_share_their_arrays():
    space, found = Workspace(), []
    thread = threading.Thread(target=lambda: found.append(space.array("a", (2, 2), np.float32)))
    thread.start()
    thread.join()
    mine = space.array("a", (2, 2), np.float32)
    assert mine is space.array("a", (2, 2), "float32") and mine is not found[0] and mine.flags.f_contiguous
    assert mine is not space.array("a", (2, 2), np.float64)
