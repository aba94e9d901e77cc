"""Raw text for language modelling: documents are streamed, tokenised and cut into blocks in a memory-mapped file.

A block holds a piece of *one* document. So no token attends to another document, whatever the architecture does with
masks, positions and windows, and no loss crosses a boundary; every token of the text is predicted (causal LM) or may be
masked (masked LM) in exactly one block. Blocks of like length share a batch, so that little is padded.
"""

import glob
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from graftlm.data import Split, cell, file_of, from_hub, open_text, plain_text, read_file, refuse_hub_keys
from graftlm.errors import DataError
from graftlm.evaluation.bits_per_byte import AS_TEXT, Marks, causal_pieces, check_document, gaps, marks
from graftlm.evaluation.record import write_text
from graftlm.measure.likelihood import IGNORED
from graftlm.recipe import FILE_TYPES, TEXT_TYPES, Recipe, Source, key_of
from graftlm.starter import STARTER
from graftlm.training.dropout.texts import KEPT, REPLACED

_CHARACTERS = 200_000  # of documents that are tokenised at once
_ROWS = 1000  # blocks written at once
WINDOW = 64  # batches whose blocks are sorted by length together
_SCHEMA = pyarrow.schema(
    {"input_ids": pyarrow.list_(pyarrow.int32()), "first": pyarrow.int32(), "last": pyarrow.int32()}
)


class Documents:
    """The texts of a source, read from its files again on each pass: memory holds one document at a time.

    Attributes:
        origin: what errors call the source.
        files: the files behind it; empty for a hub data set.
    """

    def __init__(self, recipe: Recipe, source: Source, role: str):
        self.origin, self._columns = source.path, recipe.data
        self._rows: Any = None
        self.files: list[Path] = []
        if "*" in source.path:
            refuse_hub_keys(source)
            found = glob.glob(str(recipe.path(source.path)), recursive=True)
            self.files = sorted(Path(path) for path in found if path.endswith(FILE_TYPES + TEXT_TYPES))
            if not self.files:
                raise DataError(f"{key_of(role)}: no file fits the pattern", found=recipe.path(source.path))
        elif source.path.startswith(STARTER) or source.is_file():
            self.files = [file_of(recipe, source, role, FILE_TYPES + TEXT_TYPES)]
        else:
            self.origin, self._rows, _ = from_hub(recipe, source, role)

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.placed())

    def placed(self) -> Iterator[tuple[str, str]]:
        """(place, text) of each document, in order.

        Raises:
            DataError: no text column, an empty or malformed row, a file that cannot be read, or no document at all.
        """
        empty = True
        for place, text in self._from_rows(self.origin, self._rows) if self._rows is not None else self._from_files():
            empty = False
            yield place, text
        if empty:
            raise DataError(f"{self.origin}: there is no text in it", fix="check the files that the recipe names")

    def _from_files(self) -> Iterator[tuple[str, str]]:
        for path in self.files:
            name = path.name if len(self.files) > 1 else self.origin
            if path.name.endswith(TEXT_TYPES):
                yield from self._from_text(path, name)
            else:
                yield from self._from_rows(name, read_file(path, name))

    def _from_rows(self, name: str, rows: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(rows, start=1):
            place = f"{name}, row {number}"
            text = plain_text(cell(row, self._columns.text, place, "data.text"), place, self._columns.text)
            yield place, _encodable(text, place)

    def _from_text(self, path: Path, name: str) -> Iterator[tuple[str, str]]:
        unit = self._columns.documents
        with open_text(path, name) as file:
            if unit == "files":
                texts: Iterator[tuple[int, str]] = iter([(1, file.read())])
            elif unit == "lines":
                texts = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, start=1))
            else:
                texts = _paragraphs(file)
            for line, text in texts:
                if text.strip():
                    yield f"{name}, line {line}", _encodable(text, f"{name}, line {line}")


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of the paragraphs between blank lines; their own line breaks stay."""
    held: list[str] = []
    first = 1
    for number, line in enumerate(lines, start=1):
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield first, "".join(held).rstrip("\r\n")
            held = []
    if held:
        yield first, "".join(held).rstrip("\r\n")


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half of a surrogate pair, which is no character", found=repr(error.object)[:60]
        ) from error
    return text


def training_text(recipe: Recipe, source: Source, role: str = "train") -> Split:
    """A corpus of any size as a split whose texts are read when they are asked for."""
    documents: Any = Documents(recipe, source, role)
    return Split(documents.origin, [], documents, None, [])


def held_out(recipe: Recipe, source: Source, role: str) -> Split:
    """Text to be scored, in memory: one item a document, its label the bytes of its text."""
    documents = Documents(recipe, source, role)
    texts = list(documents)
    return Split(documents.origin, list(range(len(texts))), texts, None, [len(text.encode()) for text in texts])


@dataclass
class Counts:
    """What a tokenizer made of a text."""

    documents: int = 0
    words: int = 0
    characters: int = 0
    tokens: int = 0
    unknown: int = 0

    def add(self, text: str, ids: list[int], unknown: int | None) -> None:
        """One document more."""
        self.documents += 1
        self.words += len(text.split())
        self.characters += len(text)
        self.tokens += len(ids)
        self.unknown += ids.count(unknown) if unknown is not None else 0


def blocks(
    documents: Iterable[tuple[str, str]], tokenizer: Any, task: str, length: int, counts: Counts | None = None
) -> Iterator[tuple[list[int], int, int]]:
    """Documents as blocks of at most `length` tokens: (ids, first, last), the tokens to learn being ids[first:last].

    Masked LM: the tokenizer's marks around consecutive pieces of the document. Causal LM: the token that begins a text,
    the last token of the piece before (so that the first one of this piece is predicted from a true prefix), the piece;
    after the last one the end-of-text token, where the tokenizer has one.

    Args:
        documents: (place, text) pairs.
        tokenizer: of the model.
        task: ``causal_lm`` or ``masked_lm``.
        length: tokens of a block, special ones included.
        counts: added to, where given.

    Raises:
        DataError: a document of fewer than two tokens.
    """
    around, causal = marks(tokenizer, task), task == "causal_lm"
    room = Marks(around.before, () if causal else around.after).room(length)
    for place, text, ids in _tokenised(documents, tokenizer):
        check_document(ids, place)
        if counts is not None:
            counts.add(text, ids, tokenizer.unk_token_id)
        whole = [*ids, *around.after] if causal else ids
        for given, start, end in causal_pieces(len(whole), room, int(causal)):
            first = len(around.before) + start - given
            block = [*around.before, *whole[given:end], *(() if causal else around.after)]
            yield block, first, first + end - start


def _tokenised(documents: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[str, str, list[int]]]:
    held: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document[1])
        if size >= _CHARACTERS:
            yield from _tokenise(held, tokenizer)
            held, size = [], 0
    if held:
        yield from _tokenise(held, tokenizer)


def _tokenise(held: list[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[str, str, list[int]]]:
    ids = tokenizer([text for _, text in held], **AS_TEXT)["input_ids"]
    for (place, text), one in zip(held, ids, strict=True):
        yield place, text, one


def cached_blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, task: str, length: int, folder: Path
) -> tuple[datasets.Dataset, Counts]:
    """The blocks of a corpus as a memory-mapped Arrow file in `folder`, written once for these files and settings.

    Raises:
        DataError: checkpoints in `folder` were written while the text was another one, and as `Documents`.
    """
    name = f"blocks-{_fingerprint(documents, tokenizer, task, length)}"
    file, note = folder / f"{name}.arrow", folder / f"{name}.json"  # the note is written last: the file is whole
    if not note.is_file():
        if any(folder.glob("blocks-*.json")) and any(folder.glob("checkpoint-*")):
            raise DataError(
                "the training text, or the tokenizer, has changed since this run was interrupted",
                found=", ".join(path.name for path in documents.files) or documents.origin,
                fix=f"name=ANOTHER_NAME, or delete {folder.parent}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        counts = Counts()
        part = folder / f"{name}.part"
        rows = blocks(documents.placed(), tokenizer, task, length, counts)
        with pyarrow.OSFile(str(part), "wb") as sink, pyarrow.ipc.new_stream(sink, _SCHEMA) as writer:
            while held := list(islice(rows, _ROWS)):
                columns = zip(*held, strict=True)
                writer.write_batch(
                    pyarrow.record_batch(
                        [pyarrow.array(column, kind.type) for column, kind in zip(columns, _SCHEMA, strict=True)],
                        schema=_SCHEMA,
                    )
                )
        os.replace(part, file)
        write_text(note, json.dumps(asdict(counts)))
    counts = Counts(**json.loads(note.read_text(encoding="utf-8")))
    return datasets.Dataset.from_file(str(file)), counts


def _fingerprint(documents: Documents, tokenizer: PreTrainedTokenizerBase, task: str, length: int) -> str:
    """Of everything that the blocks follow from."""
    source: list[str] = []
    for path in documents.files:
        with path.open("rb") as file:
            source += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    if documents._rows is not None:
        source.append(getattr(documents._rows, "_fingerprint", documents.origin))
    around = marks(tokenizer, task)
    parts = [source, documents._columns.text, documents._columns.documents, task, length, around.before, around.after]
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden.

    Attributes:
        share: of the tokens of a block, at least one.
        mask: id of the mask token.
        ordinary: ids that a replaced token is drawn from.
    """

    share: float
    mask: int
    ordinary: np.ndarray


class Blocks(torch.utils.data.Dataset):
    """Blocks as training examples; position ``epoch · len + row`` is that row as it is seen in that epoch.

    What is masked depends on (seed, epoch, row) alone: a resumed run, or one with more workers or ranks, sees it again.

    Args:
        table: of `cached_blocks`.
        seed: of masks and order.
        batch_size: blocks of like length come in groups of so many.
        masking: None: causal LM.
    """

    def __init__(self, table: datasets.Dataset, *, seed: int, batch_size: int, masking: Masking | None = None):
        self._table, self._seed, self._masking = table, seed, masking
        column = table.data.column("input_ids")
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks])
        self.order = ShuffledBlocks(lengths.astype(np.int32), batch_size, seed)

    def __len__(self) -> int:
        return len(self._table)

    def counted(self) -> np.ndarray:
        """Of each block the tokens that the penalty of neutral residues counts: see `NeutralResiduesConfig`."""
        if self._masking is not None:
            return self.order.lengths
        first = self._table.data.column("first").to_numpy()
        return self.order.lengths - np.maximum(first, 1)  # nothing predicts the first token of a block

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        epoch, row = divmod(int(position), len(self))
        block = self._table[row]
        ids, first, last = list(block["input_ids"]), block["first"], block["last"]
        if self._masking is None:
            return {"input_ids": ids, "labels": [IGNORED] * first + ids[first:]}
        return _masked(ids, first, last, self._masking, np.random.default_rng([self._seed, epoch, row]))


def _masked(ids: list[int], first: int, last: int, masking: Masking, rng: np.random.Generator) -> dict[str, list[int]]:
    """BERT's rule: of the tokens to fill in 80 % are masked, 10 % replaced by any token, 10 % left as they are."""
    labels = [IGNORED] * len(ids)
    chosen = first + gaps(rng, last - first, masking.share)
    draws, others = rng.random(len(chosen)), rng.choice(masking.ordinary, len(chosen))
    for position, draw, other in zip(chosen.tolist(), draws, others.tolist(), strict=True):
        labels[position] = ids[position]
        if draw < 1 - REPLACED - KEPT:
            ids[position] = masking.mask
        elif draw < 1 - KEPT:
            ids[position] = other
    return {"input_ids": ids, "labels": labels}


class ShuffledBlocks(torch.utils.data.Sampler):
    """A new order for each epoch, from (seed, epoch) alone, in which the blocks of a batch are of like length.

    Each block comes once an epoch. Blocks are shuffled, sorted by length within runs of 64 batches, and the batches
    shuffled again.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self._batch, self._seed = lengths, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        for batch in self._batches(np.random.default_rng([self._seed, self.epoch])):
            for row in batch:
                yield self.epoch * len(self) + int(row)

    def _batches(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The epoch's rows; all batches are whole but the last one of a window, which ends it."""
        order = rng.permutation(len(self))
        for start in range(0, len(order), WINDOW * self._batch):
            window = order[start : start + WINDOW * self._batch]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            whole = len(window) // self._batch
            for batch in [*rng.permutation(whole), *([whole] if len(window) % self._batch else [])]:
                yield window[batch * self._batch : (batch + 1) * self._batch]


class EpochOfBlocks(TrainerCallback):
    """Tells the order which epoch begins, also when a run goes on in the middle of one."""

    def __init__(self, order: ShuffledBlocks):
        self._order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._order.epoch = math.floor((state.epoch or 0) + 1e-9)
