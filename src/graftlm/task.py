"""What differs between tasks: the model class, how items become features, how logits become predictions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import transformers
from transformers import PreTrainedTokenizerBase

from graftlm.adapters.flare_cache import SourceCache
from graftlm.adapters.flare_encode import EncoderStates
from graftlm.adapters.flare_text import has_marks, marked, tokenised
from graftlm.data import Labels, Split
from graftlm.raw_text import Counts
from graftlm.recipe import Recipe, Training

_SOURCE = "source_"  # of the columns that FLARE fuses
_TEXTS = f"{_SOURCE}texts"  # to be found in the cache
_CHUNK = 1000  # items tokenised at once, so that a large set needs no second copy in Python objects


@dataclass(frozen=True)
class Encoded:
    """Tokenised items.

    Attributes:
        features: model inputs, labels included; one row a window.
        owners: the item that each row comes from.
        truncated: items of which something was cut off.
        tokens: tokens of all rows, without the marks that the tokenizer adds.
        unknown: how many of them are the unknown token.
        places: for each row what decoding needs: (position, word) pairs, character offsets of the context's tokens, or
            the window that is scored.
        counts: of raw text to train on, which is not held in memory; `owners` and `places` are empty then.
    """

    features: Any
    owners: list[int]
    truncated: int
    tokens: int
    unknown: int
    places: list[Any] = field(repr=False)
    counts: Counts | None = None


@dataclass(frozen=True)
class Prediction:
    """What the model says of one item; `scores` are probabilities in the order of the labels, where there are any."""

    value: Any
    scores: list[float] | None = None


class Task:
    """One kind of supervised task; see the subclasses."""

    auto_class: ClassVar[str]
    peft_type: ClassVar[str | None]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    logits: ClassVar[int] = 1  # how many of the model's outputs are predictions
    source_encoder: EncoderStates | None = None  # of FLARE MT: its tokenizer takes a split's `sources`
    source_cache: SourceCache | None = None  # that FLARE reads in place of them, for splits that it holds

    def __init__(self, name: str, labels: Labels):
        self.name, self.labels = name, labels

    def model_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` must know of the labels."""
        return {"id2label": dict(enumerate(self.labels.names)), "label2id": dict(self.labels.ids)}

    def check_model(self, config: Any, where: str) -> None:
        """Raises where transformers would load the model with a head in which it was not pretrained."""

    def check_split(self, split: Split, tokenizer: PreTrainedTokenizerBase, training: Training) -> None:
        """Raises before the training where this split could not be scored after it."""
        self._reader(split, tokenizer)

    def check_fresh(self, fresh: tuple[str, ...], where: str) -> None:
        """Raises where the task cannot begin with these modules random."""

    def loss(self) -> Callable[..., Any] | None:
        """Trainer's `compute_loss_func`; None: the model computes its own."""
        return None

    def keep(self, logits: Any, labels: Any) -> Any:
        """Of the model's outputs for a batch, what `decode` needs."""
        if not isinstance(logits, tuple | list):
            return logits
        return tuple(logits[: self.logits]) if self.logits > 1 else logits[0]

    def training(self, split: Split, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, cache: Path) -> Encoded:
        """The training split as examples; `cache` is a folder for what is too big for memory."""
        return self.encode(split, tokenizer, recipe.training)

    def encode(self, split: Split, tokenizer: PreTrainedTokenizerBase, training: Training) -> Encoded:
        """Tokenises a split; its labels must have been checked."""
        columns: dict[str, list[Any]] = {}
        owners: list[int] = []
        places: list[Any] = []
        cut: set[int] = set()
        tokens = unknown = 0
        marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        is_cached = self._is_cached(split)
        for start in range(0, len(split), _CHUNK):
            stop = min(start + _CHUNK, len(split))
            sources = self._sources(split, range(start, stop), tokenizer, training, is_cached=is_cached)
            for owner, row, place, truncated in self._rows(split, range(start, stop), tokenizer, training):
                for key, value in (row | (sources[owner - start] if sources else {})).items():
                    columns.setdefault(key, []).append(value)
                owners.append(owner)
                places.append(place)
                if truncated:
                    cut.add(owner)
                tokens += sum(token not in marks for token in row["input_ids"])
                unknown += row["input_ids"].count(tokenizer.unk_token_id)
        return Encoded(datasets.Dataset.from_dict(columns), owners, len(cut), tokens, unknown, places)

    def _rows(
        self, split: Split, items: range, tokenizer: PreTrainedTokenizerBase, training: Training
    ) -> Iterator[tuple[int, dict[str, Any], Any, bool]]:
        raise NotImplementedError

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a padded batch of features."""
        theirs = self.source_encoder.tokenizer if self.source_encoder else tokenizer
        pad = transformers.DataCollatorWithPadding
        return _Padded(pad(tokenizer), pad(theirs), self.source_cache)

    def _is_cached(self, split: Split) -> bool:
        cache, encoder = self.source_cache, self.source_encoder
        if cache is None or split.sources is None:
            return False
        same_marks = encoder is None or encoder.language in (None, split.source_language)
        return same_marks and all(texts in cache for texts in split.sources)

    def _sources(
        self, split: Split, items: range, tokenizer: Any, training: Training, *, is_cached: bool
    ) -> list[dict] | None:
        """What FLARE fuses each item with: its arguments, or the texts that the cache holds."""
        if split.sources is None:
            return None
        chosen = split.sources[items.start : items.stop]
        if is_cached:
            return [{_TEXTS: list(texts)} for texts in chosen]
        encoded = tokenised(self._reader(split, tokenizer), chosen, training.max_length)
        return [{f"{_SOURCE}{key}": encoded[key][index] for key in encoded} for index in range(len(items))]

    def _reader(self, split: Split, tokenizer: Any) -> Any:
        """The tokenizer of a split's `sources`."""
        if self.source_encoder is None:
            return tokenizer
        theirs = self.source_encoder.tokenizer
        return marked(theirs, split.source_language if has_marks(theirs) else None)

    def decode(self, outputs: Any, encoded: Encoded, split: Split) -> list[Prediction]:
        """One prediction an item, from the outputs of all rows (arrays with one row each)."""
        raise NotImplementedError

    def gold(self, labels: Sequence[Any]) -> list[Any]:
        """Labels or predicted values in the form in which `graftlm.evaluation` scores them."""
        return list(labels)

    def plain(self, label: Any) -> Any:
        """A label as JSON."""
        return label


@dataclass(frozen=True)
class _Padded:
    """Pads what FLARE fuses as texts of their own, where the features have any."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    sources: Callable[[list[dict[str, Any]]], dict[str, Any]]
    cache: SourceCache | None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        own = [{key: value for key, value in row.items() if not key.startswith(_SOURCE)} for row in rows]
        batch = dict(self.collator(own))
        if self.cache is not None and _TEXTS in rows[0]:
            states, mask = self.cache([tuple(row[_TEXTS]) for row in rows])
            batch |= {f"{_SOURCE}states": states, f"{_SOURCE}attention_mask": mask}
        elif own[0].keys() != rows[0].keys():
            theirs = [{key.removeprefix(_SOURCE): row[key] for key in row.keys() - own[0].keys()} for row in rows]
            batch |= {f"{_SOURCE}{key}": value for key, value in self.sources(theirs).items()}
        return batch
