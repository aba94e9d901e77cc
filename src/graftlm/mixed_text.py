"""Raw text of two domains as one stream of training examples: the blocks of a new language, and a share of the old."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import TrainingArguments

from graftlm.context import NEW, ORIGINAL
from graftlm.errors import RecipeError, SetupError
from graftlm.raw_text import WINDOW, Blocks, ShuffledBlocks
from graftlm.recipe import Recipe
from graftlm.training.mixing import DomainMix


class MixedBlocks(Blocks):
    """Training examples of both domains, each with its ``domain``; an epoch is the new text read once.

    Position ``epoch · len + place``. Which block comes at which place follows from the seed alone (`DomainMix`), and
    what is masked in it from how often it was seen before.

    Args:
        new: blocks of the new language.
        original: blocks of the original domain.
        share: of the sequences, below 1.
        epochs: of the run, rounded up: the share is exact over all of them.
        seed: of the mix.
        batch_size: blocks of like length come in groups of so many.

    Raises:
        SetupError, DataError: as `DomainMix`.
    """

    def __init__(self, new: Blocks, original: Blocks, *, share: float, epochs: int, seed: int, batch_size: int):
        self._blocks = {NEW: new, ORIGINAL: original}
        self._length = math.floor(len(new) / (1 - share) + 0.5)
        self.mix = DomainMix(new, original, share=share, length=self._length * epochs, seed=seed)
        self.order = MixedOrder(self, batch_size, seed)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> dict[str, Any]:
        domain, row, times = self.mix.place(int(position))
        blocks = self._blocks[domain]
        return {**blocks[times * len(blocks) + row], "domain": domain}

    def token_share(self) -> float:
        """The share of original-domain tokens in the run, which differs from that of sequences as their lengths do."""
        tokens = {}
        for domain, blocks in self._blocks.items():
            tokens[domain] = float(blocks.counted()[self.mix.rows[self.mix.domains == domain]].sum())
        return tokens[ORIGINAL] / sum(tokens.values())

    def at(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Domains and tokens of the blocks at the places of an epoch."""
        here = slice(epoch * len(self), (epoch + 1) * len(self))
        domains, rows = self.mix.domains[here], self.mix.rows[here]
        lengths = np.empty(len(self), dtype=np.int32)
        for domain, blocks in self._blocks.items():
            lengths[domains == domain] = blocks.order.lengths[rows[domains == domain]]
        return domains, lengths


class MixedOrder(ShuffledBlocks):
    """The places of a mix in an order in which each batch has its share of originals, and blocks of like length.

    Of an epoch's n places k hold an original; the first i batches, m places, hold round(k·m / n) of them, for every i.
    Within a domain the blocks of 64 batches are sorted by length, so that a batch has short ones of both, or long ones:
    sorted together, a domain of shorter text would fill batches of its own.
    """

    def __init__(self, blocks: MixedBlocks, batch_size: int, seed: int):
        super().__init__(np.zeros(len(blocks), dtype=np.int32), batch_size, seed)
        self._blocks = blocks

    def _batches(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        domains, lengths = self._blocks.at(self.epoch)
        edges = np.minimum(np.arange(0, len(self) + self._batch, self._batch), len(self))
        wanted = {ORIGINAL: (2 * (domains == ORIGINAL).sum() * edges + len(self)) // (2 * len(self))}
        wanted[NEW] = edges - wanted[ORIGINAL]
        for first in range(0, len(edges) - 1, WINDOW):
            numbers = np.arange(first, min(first + WINDOW, len(edges) - 1))
            shorter = rng.permutation(numbers)  # batches, in the order in which their blocks grow longer
            batches: dict[int, list[np.ndarray]] = {number: [] for number in numbers.tolist()}
            for domain, upto in wanted.items():
                places = np.flatnonzero(domains == domain)[upto[numbers[0]] : upto[numbers[-1] + 1]]
                places = places[np.argsort(lengths[places], kind="stable")]
                ends = np.cumsum(upto[shorter + 1] - upto[shorter])
                for number, part in zip(shorter.tolist(), np.split(places, ends[:-1]), strict=True):
                    batches[number].append(part)
            yield from (np.concatenate(batches[number]) for number in numbers.tolist())


def mixed(recipe: Recipe, new: Blocks, original: Blocks, arguments: TrainingArguments) -> MixedBlocks:
    """The training examples of a recipe with `mixing`."""
    epochs = math.ceil(arguments.num_train_epochs)
    if arguments.max_steps > 0:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        epochs = math.ceil(arguments.max_steps * batch / len(new))
    share = recipe.mixing.share if recipe.mixing else 0.0
    try:
        return MixedBlocks(
            new, original, share=share, epochs=epochs, seed=recipe.seed, batch_size=recipe.training.batch_size
        )
    except SetupError as error:
        where = f"{recipe.origin('mixing.share')}: {error.problem}"
        raise RecipeError(where, found=error.found, allowed=error.allowed, fix="mixing.share=…") from error
