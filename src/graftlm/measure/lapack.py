"""BLAS and LAPACK in place and without the GIL, so that each thread can score a map of its own.

scipy's own wrappers hold the GIL and copy most of their arguments. The same routines are open to Cython through
capsules with their addresses, which ctypes can call. All matrices here are in Fortran's order, float32 or float64.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

_api = ctypes.pythonapi
_api.PyCapsule_GetName.restype, _api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_ARGUMENTS = {"trmm": 11, "syrk": 10, "sytrd": 10, "ormtr": 13}
_BLOCK = 64  # columns of a block in LAPACK, at most


def _routine(name: str) -> Callable[..., None]:
    capsules = {**cython_blas.__pyx_capi__, **cython_lapack.__pyx_capi__}
    signature = _api.PyCapsule_GetName(capsules[name])
    address = _api.PyCapsule_GetPointer(capsules[name], signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * _ARGUMENTS[name[1:]])(address)


_ROUTINES = {(kind, name): _routine(kind + name) for kind in "sd" for name in _ARGUMENTS}


def _call(name: str, matrix: np.ndarray, *arguments: Any) -> None:
    """Everything by reference, as Fortran has it; a string is one letter."""
    passed: list[Any] = []
    for one in arguments:
        if isinstance(one, np.ndarray):
            passed.append(one.ctypes.data_as(ctypes.c_void_p))
        elif isinstance(one, str):
            passed.append(ctypes.byref(ctypes.c_char(one.encode())))
        elif isinstance(one, int):
            passed.append(ctypes.byref(ctypes.c_int(one)))
        else:
            passed.append(ctypes.byref((ctypes.c_float if matrix.dtype == np.float32 else ctypes.c_double)(one)))
    _ROUTINES["s" if matrix.dtype == np.float32 else "d", name](*passed)


def multiply_lower(lower: np.ndarray, matrix: np.ndarray) -> None:
    """matrix ← lowerᵀ · matrix, with a lower triangular factor."""
    rows, columns = matrix.shape
    _call("trmm", matrix, "L", "L", "T", "N", rows, columns, 1.0, lower, rows, matrix, rows)


def gram(matrix: np.ndarray, into: np.ndarray) -> None:
    """The lower triangle of `into` ← matrixᵀ · matrix."""
    rows, columns = matrix.shape
    _call("syrk", matrix, "L", "T", columns, rows, 1.0, matrix, max(rows, 1), 0.0, into, columns)


def tridiagonal(matrix: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Diagonal and what stands beside it of T, and Qᵀ · sides, with matrix = QTQᵀ; returned in float64.

    Only the lower triangle of `matrix` is read, and it is overwritten.
    """
    size, dtype = len(matrix), matrix.dtype
    diagonal, beside, tau = (np.empty(count, dtype) for count in (size, max(size - 1, 0), max(size - 1, 0)))
    rotated = np.array(sides, dtype=dtype, order="F")
    work = np.empty(_BLOCK * max(size, rotated.shape[1], 1), dtype)
    _call("sytrd", matrix, "L", size, matrix, size, diagonal, beside, tau, work, len(work), 0)
    columns = rotated.shape[1]
    larger = np.empty(_BLOCK * (columns + _BLOCK + 1), dtype)
    _call("ormtr", matrix, "L", "L", "T", size, columns, matrix, size, tau, rotated, size, larger, len(larger), 0)
    return diagonal.astype(float), beside.astype(float), rotated.astype(float)


class Workspace(threading.local):
    """Arrays that are used again for each map, since fresh memory costs as much as the work on it."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, tuple[int, ...], str], np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, int], dtype: Any) -> np.ndarray:
        """An array in Fortran's order that holds whatever was left in it."""
        key = name, shape, np.dtype(dtype).name
        if key not in self._arrays:
            self._arrays[key] = np.zeros(shape, dtype, order="F")
        return self._arrays[key]
