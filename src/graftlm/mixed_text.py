"""Raw text of two domains as one stream of training examples: the blocks of a new language, and a share of the old."""

import math
from typing import Any

import numpy as np
from transformers import TrainingArguments

from graftlm.context import NEW, ORIGINAL
from graftlm.raw_text import Blocks, ShuffledBlocks
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

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens of the blocks at the places of an epoch."""
        places = (self.mix.place(epoch * len(self) + place) for place in range(len(self)))
        return np.array([self._blocks[domain].order.lengths[row] for domain, row, _ in places])


class MixedOrder(ShuffledBlocks):
    """The mix in its own order, so that the share is near p everywhere; the blocks of a batch are of like length."""

    def __init__(self, blocks: MixedBlocks, batch_size: int, seed: int):
        super().__init__(np.zeros(len(blocks), dtype=np.int32), batch_size, seed)
        self._blocks = blocks

    def _shuffled(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(self)), self._blocks.lengths(self.epoch)


def mixed(recipe: Recipe, new: Blocks, original: Blocks, arguments: TrainingArguments) -> MixedBlocks:
    """The training examples of a recipe with `mixing`."""
    epochs = math.ceil(arguments.num_train_epochs)
    if arguments.max_steps > 0:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        epochs = math.ceil(arguments.max_steps * batch / len(new))
    share = recipe.mixing.share if recipe.mixing else 0.0
    return MixedBlocks(
        new, original, share=share, epochs=epochs, seed=recipe.seed, batch_size=recipe.training.batch_size
    )
