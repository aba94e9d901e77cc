"""The tasks of a recipe: how items become features, how logits become predictions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from graftlm.data import Answers, Labels, Split
from graftlm.errors import ModelError, RecipeError
from graftlm.language_modelling import CausalLM, MaskedLM
from graftlm.measure.likelihood import IGNORED
from graftlm.recipe import Recipe
from graftlm.task import Encoded as Encoded
from graftlm.task import Prediction as Prediction
from graftlm.task import Task as Task

_BEST = 20  # start and end positions of a QA window that are combined
_LONGEST_ANSWER = 30  # tokens


def _slice(column: list[Any] | None, items: range) -> list[Any] | None:
    return None if column is None else column[items.start : items.stop]


class WholeText(Task):
    """One label, a set of labels or a number for a text or a pair."""

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    _problems: ClassVar = {
        "classification": "single_label_classification",
        "multi_label": "multi_label_classification",
        "regression": "regression",
    }

    def model_arguments(self) -> dict[str, Any]:
        problem = {"problem_type": self._problems[self.name]}
        return problem | ({"num_labels": 1} if self.name == "regression" else super().model_arguments())

    def _rows(self, split, items, tokenizer, training):
        encoded = tokenizer(
            _slice(split.texts, items), _slice(split.texts_b, items), truncation=True, max_length=training.max_length
        )
        for index, item in enumerate(items):
            row = {key: encoded[key][index] for key in encoded} | {"labels": self._target(split.labels[item])}
            yield item, row, None, bool(encoded.encodings[index].overflowing)

    def _target(self, label: Any) -> int | float | list[float]:
        if self.name == "classification":
            return self.labels.ids[label]
        return float(label) if self.name == "regression" else self._indicator(label)

    def _indicator(self, names: Sequence[str]) -> list[float]:
        return [float(name in names) for name in self.labels.names]

    def decode(self, outputs, encoded, split):
        logits = np.asarray(outputs, dtype=np.float64)
        if self.name == "regression":
            return [Prediction(float(value)) for value in logits.reshape(-1)]
        if self.name == "multi_label":
            rows = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
            names = [[name for name, p in zip(self.labels.names, row, strict=True) if p > 0.5] for row in rows]
        else:
            rows = np.exp(logits - logits.max(axis=1, keepdims=True))
            rows /= rows.sum(axis=1, keepdims=True)
            names = [self.labels.names[best] for best in logits.argmax(axis=1)]
        return [Prediction(name, [round(float(p), 6) for p in row]) for name, row in zip(names, rows, strict=True)]

    def gold(self, labels):
        return [self._indicator(names) for names in labels] if self.name == "multi_label" else list(labels)


class Tokens(Task):
    """A label for each word. A text beyond `max_length` becomes several windows, so no word is lost."""

    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"

    def _rows(self, split, items, tokenizer, training):
        encoded = tokenizer(
            _slice(split.texts, items),
            is_split_into_words=True,
            truncation=True,
            max_length=training.max_length,
            return_overflowing_tokens=True,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        seen: set[tuple[int, int]] = set()
        for index, owner in enumerate(owners):
            item = items[owner]
            row = {key: encoded[key][index] for key in encoded}
            row["labels"] = [IGNORED] * len(row["input_ids"])
            place = []
            for position, word in enumerate(encoded.word_ids(index)):
                if word is not None and (item, word) not in seen:  # a word's first token carries its label
                    seen.add((item, word))
                    row["labels"][position] = self.labels.ids[split.labels[item][word]]
                    place.append((position, word))
            yield item, row, place, False

    def collator(self, tokenizer):
        return transformers.DataCollatorForTokenClassification(tokenizer)

    def decode(self, outputs, encoded, split):
        best = np.asarray(outputs).argmax(axis=-1)
        # a word that the tokenizer turns into nothing (a lone zero-width space) has no logits
        silent = "O" if "O" in self.labels.ids else self.labels.names[0]
        predicted = [[silent] * len(words) for words in split.texts]
        for row, (owner, place) in enumerate(zip(encoded.owners, encoded.places, strict=True)):
            for position, word in place:
                predicted[owner][word] = self.labels.names[best[row, position]]
        return [Prediction(tags) for tags in predicted]


class Answering(Task):
    """The span of a context that answers a question; a long context becomes windows that share `stride` tokens.

    "No answer" is position 0, and is predicted only where the training split has questions without an answer.
    """

    auto_class = "AutoModelForQuestionAnswering"
    peft_type = "QUESTION_ANS"
    label_names = ("start_positions", "end_positions")
    logits = 2
    may_refuse = False

    def model_arguments(self) -> dict[str, Any]:
        return {"num_labels": 2}  # start and end; a checkpoint tuned on other labels would bring their number along

    def _rows(self, split, items, tokenizer, training):
        if training.stride >= training.max_length // 2:
            raise RecipeError(
                "training.stride must be less than half of training.max_length",
                found=f"stride {training.stride}, max_length {training.max_length}",
                fix=f"training.stride={training.max_length // 4}",
            )
        questions, contexts = _slice(split.texts, items), _slice(split.texts_b, items)
        lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
        room = training.max_length - tokenizer.num_special_tokens_to_add(pair=True) - training.stride
        if max(lengths) >= room:
            row = items[int(np.argmax(lengths))] + 1
            raise RecipeError(
                f"{split.origin}, row {row}: the question leaves no room for its context",
                found=f"a question of {max(lengths)} tokens, training.max_length {training.max_length}",
                fix=f"training.max_length={2 * (max(lengths) + training.stride)}",
            )
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=training.max_length,
            stride=training.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        for index, owner in enumerate(owners):
            item = items[owner]
            place = [
                (position, *offsets[index][position])
                for position, sequence in enumerate(encoded.sequence_ids(index))
                if sequence == 1 and offsets[index][position][1] > offsets[index][position][0]
            ]
            start, end = _positions(split.labels[item], place)
            row = {key: encoded[key][index] for key in encoded} | {"start_positions": start, "end_positions": end}
            yield item, row, place, False

    def decode(self, outputs, encoded, split):
        starts, ends = (np.asarray(side, dtype=np.float64) for side in outputs)
        best: dict[int, tuple[float, int, int]] = {}
        refusal: dict[int, float] = {}
        for row, (item, place) in enumerate(zip(encoded.owners, encoded.places, strict=True)):
            refusal[item] = min(refusal.get(item, np.inf), starts[row, 0] + ends[row, 0])
            if not place:
                continue
            positions, left, right = (np.array(column) for column in zip(*place, strict=True))
            first = np.argsort(-starts[row, positions], kind="stable")[:_BEST]
            last = np.argsort(-ends[row, positions], kind="stable")[:_BEST]
            score = starts[row, positions[first]][:, None] + ends[row, positions[last]][None, :]
            length = last[None, :] - first[:, None]
            score = np.where((length >= 0) & (length < _LONGEST_ANSWER), score, -np.inf)
            top = np.unravel_index(int(score.argmax()), score.shape)
            if score[top] > best.get(item, (-np.inf, 0, 0))[0]:
                best[item] = (float(score[top]), int(left[first[top[0]]]), int(right[last[top[1]]]))
        answers = []
        for item, context in enumerate(split.texts_b):
            score, start, end = best.get(item, (-np.inf, 0, 0))
            refused = self.may_refuse and refusal[item] > score
            answers.append(Prediction("" if refused else context[start:end]))
        return answers

    def gold(self, labels):
        return [list(label.texts) if isinstance(label, Answers) else label for label in labels]

    def plain(self, label):
        return list(label.texts)


def _positions(answers: Answers, place: list[tuple[int, int, int]]) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) where this window does not hold all of it."""
    if not answers.texts or answers.starts is None or not place:
        return 0, 0
    start, end = answers.starts[0], answers.starts[0] + len(answers.texts[0])
    if place[0][1] > start or place[-1][2] < end:
        return 0, 0
    first = max((position for position, left, _ in place if left <= start), default=0)
    last = min((position for position, _, right in place if right >= end), default=0)
    return (first, last) if 0 < first <= last else (0, 0)


_TASKS: dict[str, type[Task]] = {
    "classification": WholeText,
    "multi_label": WholeText,
    "regression": WholeText,
    "token_classification": Tokens,
    "question_answering": Answering,
    "masked_lm": MaskedLM,
    "causal_lm": CausalLM,
}


def task_for(recipe: Recipe, train: Split | None = None) -> Task:
    """The recipe's task, its labels taken from the training split."""
    if train is None:
        return _TASKS[recipe.task](recipe.task, Labels(()))
    task = _TASKS[recipe.task](recipe.task, Labels.of_training(recipe.task, train))
    if isinstance(task, Answering):
        task.may_refuse = any(not answers.texts for answers in train.labels)
    return task


def check_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """An error where `training.max_length` is more than the tokenizer or the model can take."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (tokenizer.model_max_length, positions) if isinstance(limit, int)]
    if limits and recipe.training.max_length > min(limits):
        raise ModelError(
            "training.max_length is more than this model has positions for",
            found=recipe.training.max_length,
            allowed=f"at most {min(limits)}",
            fix=f"training.max_length={min(limits)}",
        )
