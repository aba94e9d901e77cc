"""Batches of a recipe with mixing: each has its share of originals, although the domains differ in length."""

from itertools import pairwise

import numpy as np
import pytest

from graftlm.context import ORIGINAL
from graftlm.mixed_text import MixedBlocks
from graftlm.raw_text import ShuffledBlocks


class Lengths:
    """Blocks of which nothing but the length matters."""

    def __init__(self, lengths):
        self.order = ShuffledBlocks(np.array(lengths, dtype=np.int32), 1, 0)

    def __len__(self):
        return len(self.order)


def blocks_of(share, batch, new=600, original=90, epochs=3, seed=5):
    rng = np.random.default_rng(1)
    short, long = rng.integers(5, 40, size=original), rng.integers(60, 250, size=new)
    return MixedBlocks(Lengths(long), Lengths(short), share=share, epochs=epochs, seed=seed, batch_size=batch)


def epochs_of(blocks, epochs=3):
    found = []
    for blocks.order.epoch in range(epochs):
        found.append(list(blocks.order))
    return found


@pytest.mark.parametrize("batch", [1, 4, 8, 32])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_every_batch_and_every_stretch_from_the_start_has_its_share_of_originals(share, batch):
    blocks = blocks_of(share, batch)
    domains = []
    for epoch, places in enumerate(epochs_of(blocks)):
        assert sorted(places) == list(range(epoch * len(blocks), (epoch + 1) * len(blocks))), "each place once"
        here = [blocks.mix.place(place)[0] == ORIGINAL for place in places]
        for start in range(0, len(here), batch):
            rows = here[start : start + batch]
            assert abs(sum(rows) - share * len(rows)) <= 1 + batch / len(here)
        seen = np.cumsum(here)
        for end in range(batch, len(here), batch):
            assert abs(seen[end - 1] - share * end) < 2
        domains += here
    assert abs(sum(domains) - share * len(domains)) <= 0.5, "exact over the run"


def test_blocks_of_a_batch_are_of_like_length_within_their_domain():
    blocks = blocks_of(0.25, 8)
    _, lengths = blocks.at(0)
    batches = [np.array(epochs_of(blocks, 1)[0][start : start + 8]) for start in range(0, len(blocks) - 8, 8)]
    spread = {domain: [] for domain in (0, 1)}
    for batch in batches:
        for domain in (0, 1):
            one = lengths[batch[blocks.mix.domains[batch] == domain]]
            spread[domain].append(one.max() - one.min())
    assert np.mean(spread[1]) < 190 / 8 and np.mean(spread[0]) < 35 / 8
    longest = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4, "no order of lengths over the epoch"


def test_the_order_follows_from_seed_and_epoch_alone():
    first = epochs_of(blocks_of(0.1, 8))
    assert first == epochs_of(blocks_of(0.1, 8)) != epochs_of(blocks_of(0.1, 8, seed=6))
    resumed = blocks_of(0.1, 8)
    resumed.order.epoch = 2
    assert list(resumed.order) == first[2], "without the epochs before it"
    assert all(one != [place - 3 for place in other] for one, other in pairwise(first))
