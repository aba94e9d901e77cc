"""Recipe → Trainer → run folder."""

import json
import logging
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from graftlm import recipe as recipes
from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.card import write_card
from graftlm.evaluation.record import write_text
from graftlm.evaluation.report import write_report
from graftlm.evaluation.result import FILE as RESULT
from graftlm.evaluation.result import Cost, Licences, Result, Score
from graftlm.fingerprint import changed_files, write_digests
from graftlm.folder import RESOLVED, load, save
from graftlm.hub import licences, push
from graftlm.language_runs import trained, unfinished
from graftlm.neutral_run import write_gates
from graftlm.prepare import (
    CHECKPOINTS,
    DROPOUT,
    Prepared,
    checked,
    prepare,
    read_split,
)
from graftlm.recipe import Recipe, Source
from graftlm.scoring import (
    PREDICTIONS,
    Scored,
    base_predictions,
    forgetting,
    in_each_language,
    predictions_of,
    rows_of,
    scores_of,
)
from graftlm.source_encoder import encoder_of
from graftlm.tasks import task_for

WRITTEN, LOG = "recipe.yaml", "log.jsonl"
REFERENCE = "reference-standard"
_PACKAGES = ("graftlm", "torch", "transformers", "peft", "accelerate", "datasets")

log = logging.getLogger("graftlm")


def run_recipe(recipe: Recipe, *, progress: bool = True) -> Result:
    """Trains a recipe, scores every test language once, and writes the run folder.

    A run that was stopped goes on from its last checkpoint. A finished one is not repeated: its result is read.
    Language adapters of which the recipe names the text are runs of their own, done first.

    Args:
        recipe: what `graftlm.load_recipe` returns.
        progress: whether a bar is shown (on standard error).

    Returns:
        What `result.json` holds.

    Raises:
        RecipeError: the folder holds a run of another recipe, or the recipe makes no sense for this model.
        DataError, ModelError: what the recipe names is missing or malformed.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    recipe = _languages_first(recipe, progress=progress)
    folder = recipe.folder
    if _finished(recipe, folder):
        log.info("%s is finished already; delete the folder to run it again", folder)
        return Result.read(folder)
    prepared = prepare(recipe, folder, progress=progress)
    trainer = prepared.trainer
    writes = trainer.is_world_process_zero()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / WRITTEN, recipe.text)
        write_text(folder / RESOLVED, recipe.relocated(folder).resolved())
        write_digests(recipe, folder)
        if prepared.dropout:
            rates, applied = prepared.dropout
            rates.save(folder / DROPOUT, applied)
    trainer.accelerator.wait_for_everyone()
    _train(prepared, folder)

    began = time.perf_counter()
    said = in_each_language(trainer, prepared.task, prepared.splits.test, prepared.tokenizer, recipe)
    scored = {language: Scored(split, said[language]) for language, split in prepared.splits.test.items()}
    seconds = time.perf_counter() - began
    base = base_predictions(recipe, prepared.task, scored, progress=progress)
    reference = _standard_reference(recipe, folder, progress=progress)
    scores = scores_of(recipe, prepared.task, scored, prepared.splits.train, reference, base)
    if writes:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save(model, prepared.tokenizer, recipe, folder)
        closed = write_gates(model, prepared.task, prepared.tokenizer, recipe, prepared.splits.test, folder)
        write_text(folder / LOG, _json_lines(trainer.state.log_history))
        write_text(folder / PREDICTIONS, _json_lines(rows_of(prepared.task, scored)))
        result = _result(prepared, scores, seconds).model_copy(update={"closed_gates": closed})
        result.write(folder)  # the mark of a finished run, so after everything that cannot be made again from it
        _finish(recipe, folder)
    trainer.accelerator.wait_for_everyone()
    return Result.read(folder)


def evaluate(folder: Path, tests: Mapping[str, str] | None = None, *, progress: bool = True) -> Result:
    """Scores a finished run on its own test sets, or on others.

    Args:
        folder: the run folder.
        tests: language tag → file, folder or hub id, seen from the working folder; None: the recipe's own.
        progress: whether a bar is shown.

    Returns:
        The run's result with these scores in place of its own; nothing is written. Reference points are kept where the
        test sets are the run's own.
    """
    folder = Path(folder)
    model, tokenizer = load(folder, tokenizer=True)
    result = Result.read(folder)
    recipe = recipes.load_recipe(folder / RESOLVED)
    train = read_split(recipe, recipe.data.train, "train")
    task = task_for(recipe, train)
    task.source_encoder = encoder_of(model)
    here = recipe if tests is None else recipe.relocated(Path())  # given paths start from the working folder
    sources = recipe.data.test if tests is None else {tag: Source(path=path) for tag, path in tests.items()}
    splits = {language: read_split(here, source, "test", language) for language, source in sources.items()}
    splits = {language: checked(task, split) for language, split in splits.items()}
    predictions = predictions_of(model, recipe, task, splits, tokenizer, progress=progress)
    scored = {language: Scored(split, predictions[language]) for language, split in splits.items()}
    base = base_predictions(recipe, task, scored, progress=progress)
    scores = scores_of(recipe, task, scored, train, None, base)
    if tests is None:
        old = {one.language: one for one in result.scores}
        scores = [
            one.model_copy(update={"standard": old[one.language].standard, "gain": old[one.language].gain})
            for one in scores
        ]
    return result.model_copy(update={"scores": tuple(scores), "forgetting": forgetting(recipe, scores)})


def _languages_first(recipe: Recipe, *, progress: bool) -> Recipe:
    """The recipe over trained language adapters; what would stop its own run is found before they are begun."""
    if unfinished(recipe):
        with tempfile.TemporaryDirectory() as nowhere:
            prepare(recipe.changed("adapter.language_adapters={}"), Path(nowhere), progress=False)
    return trained(recipe, lambda one: run_recipe(one, progress=progress))


def _finished(recipe: Recipe, folder: Path) -> bool:
    """Whether the folder holds this recipe's finished run; an error where it holds anything else."""
    if not (folder / RESOLVED).is_file():
        if folder.exists() and any(file.name != CHECKPOINTS and file.name[0] != "." for file in folder.iterdir()):
            raise RecipeError("the run folder exists and holds no run", found=folder, fix="name=ANOTHER_NAME")
        return False
    differing = recipes.differences(recipes.load_recipe(folder / RESOLVED), recipe.relocated(folder))
    if differing:
        shown = [f"{key}: {new!r} (there: {old!r})" for key, (old, new) in list(differing.items())[:6]]
        raise RecipeError(
            f"{folder} holds a run of another recipe",
            found="; ".join(shown) + ("; …" if len(differing) > 6 else ""),
            fix=f"name=ANOTHER_NAME, or delete {folder}",
        )
    if changed := changed_files(recipe, folder):
        raise DataError(
            f"{folder} holds a run on other data",
            found=f"changed since: {', '.join(changed[:6])}" + (", …" if len(changed) > 6 else ""),
            fix=f"name=ANOTHER_NAME, or delete {folder}",
        )
    if not (folder / RESULT).is_file():
        return False
    if not (folder / "report.html").is_file() or not (folder / "README.md").is_file():
        _finish(recipe, folder)
    return True


def _train(prepared: Prepared, folder: Path) -> None:
    trainer = prepared.trainer
    checkpoint = _last_checkpoint(folder / CHECKPOINTS, clean=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        log.info("going on from step %s of %s", checkpoint.name.removeprefix("checkpoint-"), prepared.steps)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        prepared.stop.restore()
    step = trainer.state.global_step
    if prepared.stop.stopped and step < prepared.steps:
        log.info("stopped at step %s of %s; the same command goes on from there", step, prepared.steps)
        raise KeyboardInterrupt


def _last_checkpoint(folder: Path, *, clean: bool) -> Path | None:
    """The last whole checkpoint. Trainer writes its state last, so one without it was cut off; it is deleted."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        state = path / "trainer_state.json"
        try:
            values = json.loads(state.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            if clean:
                shutil.rmtree(path, ignore_errors=True)
            continue
        if clean and values.get("best_model_checkpoint"):
            # Trainer notes a path, which is another one once the run folder has been moved
            values["best_model_checkpoint"] = str(folder / Path(values["best_model_checkpoint"]).name)
            write_text(state, json.dumps(values, indent=2, sort_keys=True) + "\n")
        return path
    return None


def _standard_reference(recipe: Recipe, folder: Path, *, progress: bool) -> Path | None:
    """Trains the same recipe with every layer open from the start, in its own run folder inside this one."""
    standard = recipe.references.standard
    if standard is None:
        return None
    if recipe.unfreezing is None or recipe.unfreezing.schedule == "standard":
        log.info("this run is standard training itself, so there is no gain over it to measure")
        return None
    log.info("the reference: the same recipe with standard training")
    rate = standard.learning_rate or recipe.training.learning_rate
    run_recipe(
        recipe.changed(
            f"name={REFERENCE}",
            f"output.folder={json.dumps(str(folder))}",
            "output.report_to=none",
            "output.push_to_hub=null",
            "unfreezing={schedule: standard}",
            "references=[]",
            f"training.learning_rate={rate}",
        ),
        progress=progress,
    )
    return folder / REFERENCE


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _result(prepared: Prepared, scores: list[Score], seconds: float) -> Result:
    recipe, trainer, cache = prepared.recipe, prepared.trainer, prepared.task.source_cache
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    return Result(
        name=recipe.name,
        model=recipe.model,
        task=recipe.task,
        metric=prepared.metric,
        source=recipe.source,
        selected_on=(recipe.source,) if prepared.dev else (),
        seed=recipe.seed,
        scores=tuple(scores),
        forgetting=forgetting(recipe, scores),
        language_adapters=recipe.adapter.language_folders or None,
        cost=Cost(
            train_seconds=prepared.clock.seconds,
            trace_seconds=prepared.schedule.trace_seconds if prepared.schedule else None,
            source_cache_seconds=cache.seconds if cache else None,
            source_cache_bytes=cache.bytes if cache else None,
            evaluation_seconds=seconds,
            steps=trainer.state.global_step,
            trainable_parameters=sum(p.numel() for _, p in parameters if p.requires_grad),
            total_parameters=sum(p.numel() for _, p in parameters),
            peak_memory_bytes=_peak_memory(trainer.args),
            device=torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        ),
        versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        licences=Licences(**licences(recipe)),
    )


def _peak_memory(arguments: TrainingArguments) -> int:
    if arguments.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finish(recipe: Recipe, folder: Path) -> None:
    """What follows from the finished run's files, and can be made again: report, card, hub, fewer checkpoints."""
    write_report(folder)
    write_card(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if recipe.output.push_to_hub:
        push(recipe, folder)
