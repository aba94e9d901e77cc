"""Errors keep what they say through pickling (a worker process raises, the parent shows)."""

import copy
import multiprocessing
import pickle

import pytest

from graftlm import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GraftError)]


def test_the_message_says_what_was_found_what_is_allowed_and_what_to_type():
    error = errors.RecipeError(
        "The schedule is not known.", found="'top-down'", allowed=("gradual", "fisher"), fix="schedule: gradual"
    )
    assert str(error) == (
        "The schedule is not known.\n  found:   'top-down'\n  allowed: gradual, fisher\n  try:     schedule: gradual"
    )
    assert str(errors.DataError("It is empty.")) == "It is empty."
    assert "found:   0" in str(errors.DataError("No rows.", found=0))  # falsy is not missing
    assert "allowed: a number" in str(errors.DataError("No number.", allowed="a number"))  # text is not a list


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_says_the_same(kind, copied):
    error = kind("No layers.", found=["a", 1], allowed=range(3), fix="layers=[...]")
    other = copied(error)
    assert type(other) is kind
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def _raise(_):
    raise errors.ModelError("No layers.", found="none", fix="name them")


def test_an_error_comes_back_from_a_worker_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(errors.ModelError, match="name them"):
        pool.map(_raise, [0])


def test_every_kind_is_a_public_name():
    import graftlm

    assert len(KINDS) >= 6
    assert all(getattr(graftlm, kind.__name__) is kind for kind in KINDS)
