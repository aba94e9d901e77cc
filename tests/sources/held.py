"""How many maps of a pool are in memory at a time."""

from __future__ import annotations

import gc
import weakref

import pytest

from graftlm import SourcePool


def count_held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled whenever a map is read: how many that were read before are still there."""
    alive: list[weakref.ref] = []
    held: list[int] = []
    load = SourcePool.load

    def watched(self, name):
        gc.collect(0)
        held.append(sum(one() is not None for one in alive))
        esm = load(self, name)
        alive.append(weakref.ref(esm))
        return esm

    monkeypatch.setattr(SourcePool, "load", watched)
    return held
