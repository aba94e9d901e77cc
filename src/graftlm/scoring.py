"""What a model says of each test language, and what that is worth."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from graftlm import language_adapters
from graftlm.data import Split
from graftlm.errors import DataError
from graftlm.evaluation.metrics import majority
from graftlm.evaluation.result import Interval, Result, Score
from graftlm.evaluation.transfer import paired_gain, score
from graftlm.folder import load_model, load_tokenizer
from graftlm.prepare import training_arguments
from graftlm.recipe import LANGUAGE_MODELLING, Recipe
from graftlm.tasks import Encoded, Prediction, Task
from graftlm.trainer import make_trainer

PREDICTIONS = "predictions.jsonl"  # of a run folder


@dataclass(frozen=True)
class Scored:
    """One language's test set with what the model says of it."""

    split: Split
    predictions: list[Prediction]


def predictions_of(
    model: Any, recipe: Recipe, task: Task, splits: Mapping[str, Split], tokenizer: Any, *, progress: bool
) -> dict[str, list[Prediction]]:
    """What a model that is not in training says of some splits."""
    # without a dev split there is no evaluation to prepare, and the Trainer's folder is nobody's
    pairs = ["data.parallel.dev=null"] if recipe.data.parallel else []
    bare = recipe.changed("data.dev=null", *pairs, "output.report_to=none")
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = training_arguments(bare, Path(nowhere), progress=progress)
        trainer = make_trainer(model, arguments, task, tokenizer, progress=progress)
        return in_each_language(trainer, task, splits, tokenizer, recipe)


def in_each_language(
    trainer: Trainer, task: Task, splits: Mapping[str, Split], tokenizer: Any, recipe: Recipe
) -> dict[str, list[Prediction]]:
    """Predictions for each split, with the language's own adapter below the task's where the recipe has such."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {}
    for language, split in splits.items():
        language_adapters.use(model, recipe, language)
        found[language] = predict(trainer, task, split, tokenizer, recipe)
    language_adapters.use(model, recipe, recipe.source)
    return found


def base_predictions(
    recipe: Recipe, task: Task, scored: Mapping[str, Scored], *, progress: bool
) -> dict[str, list[Prediction]] | None:
    """What the pretrained model says itself; None for a task whose head it does not have."""
    if recipe.task not in LANGUAGE_MODELLING:
        return None
    tokenizer = load_tokenizer(recipe)  # without new tokens
    model = load_model(recipe.changed("adapter={method: none}", "new_tokens=null"), task, tokenizer).model
    splits = {language: one.split for language, one in scored.items()}
    return predictions_of(model, recipe, task, splits, tokenizer, progress=progress)


def predict(trainer: Trainer, task: Task, split: Split, tokenizer: Any, recipe: Recipe) -> list[Prediction]:
    """One prediction for each item of a split, on all processes."""
    encoded: Encoded = task.encode(split, tokenizer, recipe.training)
    before, trainer.compute_metrics = trainer.compute_metrics, None  # made for the dev split's items
    try:
        outputs = trainer.predict(encoded.features).predictions
    finally:
        trainer.compute_metrics = before
    return task.decode(outputs, encoded, split)


def scores_of(
    recipe: Recipe,
    task: Task,
    scored: Mapping[str, Scored],
    train: Split,
    reference: Path | None,
    base: Mapping[str, list[Prediction]] | None,
) -> list[Score]:
    standard = _reference_predictions(reference) if reference else {}
    theirs = Result.read(reference) if reference else None
    before = {one.language: theirs.primary(one) for one in theirs.scores} if theirs else {}
    scores = []
    for language, one in scored.items():
        gold, said = task.gold(one.split.labels), task.gold([prediction.value for prediction in one.predictions])
        gain: Interval | None = None
        if reference:
            ids, values = standard[language]
            gain = paired_gain(
                task.name, gold, said, task.gold(values), ids=one.split.ids, reference_ids=ids, seed=recipe.seed
            )
        metrics = score(task.name, gold, said, seed=recipe.seed)
        first: Interval | None = None
        change: Interval | None = None
        if base is not None:
            theirs_at_first = task.gold([prediction.value for prediction in base[language]])
            first = score(task.name, gold, theirs_at_first, seed=recipe.seed)[next(iter(metrics))]
            change = paired_gain(task.name, gold, said, theirs_at_first, seed=recipe.seed)
        scores.append(
            Score(
                language=language,
                n=len(one.split),
                is_source=language == recipe.source,
                metrics=metrics,
                majority=majority(task.name, task.gold(train.labels), gold) if recipe.references.majority else None,
                standard=before.get(language),
                gain=gain,
                base=first,
                change=change,
            )
        )
    return scores


def forgetting(recipe: Recipe, scores: list[Score]) -> dict[str, Interval] | None:
    """What the run did to the languages that the model knew before."""
    found = {one.language: one.change for one in scores if one.language in recipe.data.old and one.change is not None}
    return found or None


def _reference_predictions(folder: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    try:
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError("the reference run has no predictions", found=folder, fix=f"delete {folder}") from error
    for row in map(json.loads, lines):
        ids, values = found.setdefault(row["language"], ([], []))
        ids.append(row["id"])
        values.append(row["prediction"])
    return found


def rows_of(task: Task, scored: Mapping[str, Scored]) -> list[dict[str, Any]]:
    rows = []
    for language, one in scored.items():
        for item, label, said in zip(one.split.ids, one.split.labels, one.predictions, strict=True):
            row = {"id": item, "language": language, "label": task.plain(label), "prediction": said.value}
            rows.append(row | ({"scores": said.scores} if said.scores is not None else {}))
    return rows
