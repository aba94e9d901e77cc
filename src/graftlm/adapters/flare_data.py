"""Batches of pairs for FLARE: a target text and its source-language version, from two columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from graftlm.adapters.flare_text import Text, parts, tokenised
from graftlm.errors import DataError, SetupError


@dataclass
class FlareCollator:
    """A data collator that tokenizes two columns of text into the call that a FLARE model takes.

    Args:
        tokenizer: of the model, for both texts where there is no `source_tokenizer`.
        target: column of the text in the target language; two columns for pairs of texts, such as ("premise_da",
            "hypothesis_da").
        source: column, or two, of the same in the source language.
        labels: column of the label: a number; a list of integers, one for each token; or a list of floats, one for each
            class (several labels an item). None = no labels.
        answer: for a model that writes: column of what it has to write, to which the end mark is added. In a decoder it
            follows the target in ``input_ids``; labels are -100 at the prompt, and ``fusion_mask`` is 1 there, so that
            only the prompt is fused, as in ``generate``. No ``labels`` then.
        encoder_decoder: whether the model is one (T5, mT5): its encoder reads the target alone, and labels are the
            tokens of the answer alone, padded with -100 on the right to the longest of them. So are ``labels`` that
            are lists of tokens.
        encode: what turns source texts into ``source_states``: a `graftlm.SourceCache`, or for FLARE MT a
            `graftlm.EncoderStates` (then `source` is usually the target's column). None = the model reads the source
            itself.
        source_tokenizer: of the encoder that was attached to a FLARE MT model (`EncoderStates.attach`), which reads
            ``source_input_ids`` then: ``encoder_states.tokenizer``. None = that of the model.
        max_length: longest text in tokens, for target and source each; None = as long as they are. An answer is not
            cut, nor what `encode` reads: that has a ``max_length`` of its own.
        id: column by which errors name a row, if there is one.

    Returns:
        Called with a list of rows: ``input_ids``, ``attention_mask``, ``source_input_ids``, ``source_attention_mask``,
        each (batch, length), padded on the side that the tokenizer pads, and ``labels``, ``fusion_mask`` where asked;
        with `encode` ``source_states`` in place of ``source_input_ids``; for pairs of texts the token types, where the
        tokenizer has them.

    Raises:
        DataError: a row without one of the texts, or with a label that is no number, by its id. With ``Trainer``,
            `remove_unused_columns=False` keeps the columns.

    Example:
        >>> collator = FlareCollator(tokenizer, target="danish", source="english")  # doctest: +SKIP
        >>> sorted(collator([{"danish": "en kat", "english": "a cat", "label": 1}]))  # doctest: +SKIP
        ['attention_mask', 'input_ids', 'labels', 'source_attention_mask', 'source_input_ids']
    """

    tokenizer: Any
    target: str | tuple[str, str] = "text"
    source: str | tuple[str, str] = "source"
    labels: str | None = "label"
    answer: str | None = None
    encode: Callable[[Sequence[Text]], tuple[Tensor, Tensor]] | None = None
    max_length: int | None = None
    id: str = "id"
    encoder_decoder: bool = False
    source_tokenizer: Any = None

    def __post_init__(self) -> None:
        for columns in (self.target, self.source):
            if len(parts(columns)) > 2:
                raise SetupError(
                    "A tokenizer takes a text or a pair of texts.", found=columns, allowed="1 or 2 columns"
                )
        if self.encode is not None and self.source_tokenizer is not None:
            raise SetupError("A source is tokenised or given.", found="encode and source_tokenizer", fix="one of them")
        if self.answer is not None:
            if self.labels not in (None, "label"):
                raise SetupError("A row has labels or an answer.", found=f"labels={self.labels!r}, {self.answer!r}")
            self.labels = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        targets, sources = self._texts(rows, self.target), self._texts(rows, self.source)
        follows = self.answer is not None and not self.encoder_decoder
        batch = self._written(targets, rows) if follows else self._tokens(self.tokenizer, targets)
        if self.encode is not None:
            batch["source_states"], batch["source_attention_mask"] = self.encode(sources)
        else:
            found = self._tokens(self.source_tokenizer or self.tokenizer, sources)
            batch |= {f"source_{name}": values for name, values in found.items()}
        if self.answer is not None and self.encoder_decoder:
            batch["labels"] = self._sequences(self._answers(rows))
        if self.labels is not None and self.labels in rows[0]:
            batch["labels"] = self._labels(rows, batch["attention_mask"])
        return batch

    def _texts(self, rows: Sequence[Mapping[str, Any]], columns: str | tuple[str, ...]) -> list[Text]:
        names = parts(columns)
        for number, row in enumerate(rows):
            for column in names:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    missing = "a column that is missing" if column not in row else repr(row[column])
                    raise DataError(
                        "FLARE needs a pair of texts in every row.",
                        found=self._place(number, row),
                        allowed=f"a text in {column!r}, not {missing}; columns: {', '.join(map(str, row))}",
                        fix="Trainer drops columns that the model does not name: "
                        "TrainingArguments(remove_unused_columns=False)"
                        if column not in row
                        else "leave out rows without a partner",
                    )
        return [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]

    def _place(self, number: int, row: Mapping[str, Any]) -> str:
        return f"row {self.id}={row[self.id]!r}" if self.id in row else f"row {number} of the batch"

    def _tokens(self, tokenizer: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
        found = tokenised(tokenizer, texts, self.max_length, padding=True, return_tensors="pt")
        types = () if isinstance(texts[0], str) else ("token_type_ids",)  # which are 0 in a text alone
        return {name: found[name] for name in ("input_ids", "attention_mask", *types) if name in found}

    def _written(self, targets: Sequence[Text], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": [], "fusion_mask": []}
        for target, written in zip(targets, self._answers(rows), strict=True):
            prompt = tokenised(self.tokenizer, [target], self.max_length).input_ids[0]
            columns["input_ids"].append(prompt + written)
            columns["attention_mask"].append([1] * len(prompt + written))
            columns["labels"].append([-100] * len(prompt) + written)
            columns["fusion_mask"].append([1] * len(prompt) + [0] * len(written))
        fills = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": -100, "fusion_mask": 0}
        length = max(map(len, columns["input_ids"]))
        return {name: self._padded(values, length, fills[name]) for name, values in columns.items()}

    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        texts = self._texts(rows, str(self.answer))
        tokens = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [row if end is None else [*row, end] for row in tokens]

    @staticmethod
    def _sequences(rows: list[list[int]]) -> Tensor:
        length = max(map(len, rows))  # on the right, whatever the side of the text: T5 shifts them to the right
        return torch.tensor([row + [-100] * (length - len(row)) for row in rows])

    def _labels(self, rows: Sequence[Mapping[str, Any]], mask: Tensor) -> Tensor:
        labels: list[Any] = [row.get(str(self.labels)) for row in rows]
        labels = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
        lists: list[Any] = [[label] if isinstance(label, Real) else label for label in labels]
        for number, (row, numbers) in enumerate(zip(rows, lists, strict=True)):
            if isinstance(numbers, str) or not numbers or not all(isinstance(each, Real) for each in numbers):
                raise DataError(
                    "A label has to be a number, or a list of numbers.",
                    found=f"{self._place(number, row)}: {numbers!r}",
                    fix='dataset.class_encode_column("label") makes numbers of names; labels=None leaves them out',
                )
        if all(isinstance(label, Real) for label in labels):
            return torch.tensor(labels)
        if self.encoder_decoder:
            return self._sequences(lists)
        a_class = any(isinstance(each, float) for numbers in lists for each in numbers)
        wanted = [len(lists[0])] * len(lists) if a_class else mask.sum(1).tolist()
        for number, (row, numbers, length) in enumerate(zip(rows, lists, wanted, strict=True)):
            if len(numbers) != length:
                raise DataError(
                    f"A list of labels has another length than the {'other lists' if a_class else 'text has tokens'}.",
                    found=f"{self._place(number, row)}: {len(numbers)} labels, not {length}",
                    allowed="integers, one for each token; floats, one for each class",
                    fix="encoder_decoder=True where they are the tokens that T5 writes",
                )
        return torch.tensor(lists) if a_class else self._padded(lists, mask.shape[1], -100)

    def _padded(self, rows: list[list[int]], length: int, fill: int) -> Tensor:
        left = self.tokenizer.padding_side == "left"
        pads = [[fill] * (length - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
