"""Everything of a run but the training: checked splits, model, and a Trainer that is ready to start."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.integrations import integration_utils

from graftlm import source_encoder
from graftlm.adapted import Loaded
from graftlm.adapters.penalty_log import PenaltyLog
from graftlm.callbacks import StopAndSave, TrainingClock
from graftlm.data import Labels, Split, load_texts
from graftlm.errors import MissingExtra, RecipeError
from graftlm.evaluation.metrics import METRICS, metrics_for, statistics
from graftlm.folder import load_model, load_tokenizer, locate
from graftlm.mixed_text import mixed
from graftlm.new_tokens import extend_tokenizer
from graftlm.parallel import load_pairs
from graftlm.raw_text import Blocks, EpochOfBlocks, held_out, training_text
from graftlm.recipe import LANGUAGE_MODELLING, Recipe, Source
from graftlm.recipe_dropout import MOST_TEXTS
from graftlm.tasks import Encoded, Task, task_for
from graftlm.trainer import make_trainer
from graftlm.training.callback import ScheduledUnfreezing
from graftlm.training.dropout.apply import Applied
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.layers import trainable_layers
from graftlm.yaml_lines import nearest

CHECKPOINTS = "checkpoints"
UNFREEZING_LOG = "unfreezing.jsonl"
DROPOUT = "dropout.json"
SOURCES = "sources"  # among the checkpoints, and gone with them
_UNDEFINED = -1e30  # of a dev metric: no worse value exists, and NaN would win every later comparison

# TrainingArguments that have a key of their own in the recipe, or that the run folder depends on
_OWN_KEYS = {
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "warmup_steps": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "eval_steps": "training.eval_steps",
    "save_steps": "training.eval_steps",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "seed": "seed",
    "output_dir": "output.folder",
    "run_name": "name",
    "report_to": "output.report_to",
    "push_to_hub": "output.push_to_hub",
    "hub_model_id": "output.push_to_hub",
    "hub_private_repo": "output.private",
    **dict.fromkeys(
        ("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "data.dev",
    ),
    **dict.fromkeys(("label_names", "remove_unused_columns", "resume_from_checkpoint", "save_only_model"), None),
}

# the loss is a mean over the tokens of an optimizer step, and the order of blocks follows from the seed
_NOT_FOR_RAW_TEXT = ("label_smoothing_factor", "train_sampling_strategy", "average_tokens_across_devices", "data_seed")


@dataclass(frozen=True)
class Splits:
    """The recipe's data, read and checked."""

    train: Split
    dev: Split | None
    test: dict[str, Split]
    original: Split | None = None  # that `mixing` puts among `train`


@dataclass(frozen=True)
class Prepared:
    """A run before its first step."""

    recipe: Recipe
    splits: Splits
    task: Task
    tokenizer: PreTrainedTokenizerBase
    loaded: Loaded
    train: Encoded
    original: Encoded | None
    dev: Encoded | None
    trainer: Trainer
    steps: int
    metric: str
    schedule: ScheduledUnfreezing | None
    every_n_steps: int | None
    clock: TrainingClock
    stop: StopAndSave
    dropout: tuple[GuidedDropout, Applied] | None = None


def read_splits(recipe: Recipe) -> tuple[Splits, Task]:
    """All splits and the task with its labels; every label must be known from training."""
    train = read_split(recipe, recipe.data.train, "train")
    task = task_for(recipe, train)
    dev = read_split(recipe, recipe.data.dev, "dev") if recipe.data.dev else None
    test = {language: read_split(recipe, source, "test", language) for language, source in recipe.data.test.items()}
    test = {key: checked(task, split) for key, split in test.items()}
    original = read_split(recipe, recipe.mixing.data, "mixing") if recipe.mixing else None
    return Splits(train, dev and checked(task, dev), test, original), task


def read_split(recipe: Recipe, source: Source, role: str, language: str | None = None) -> Split:
    """One split, labelled or raw text, as the recipe's task wants it; raw text to train on is not held in memory."""
    if recipe.task not in LANGUAGE_MODELLING:
        return load_pairs(recipe, source, role, language)
    return held_out(recipe, source, role) if role in ("dev", "test") else training_text(recipe, source, role)


def checked(task: Task, split: Split) -> Split:
    """The split, once its labels are known to the task."""
    labels: Labels = task.labels
    return labels.check(task.name, split) if labels.names else split


def prepare(recipe: Recipe, folder: Path, *, progress: bool = True) -> Prepared:
    """Reads the data, loads and adapts the model, and makes the Trainer; the model's folder is not touched.

    Args:
        recipe: what to run.
        folder: the run folder; checkpoints and the unfreezing log go there once training begins.
        progress: whether a bar is shown.
    """
    arguments = training_arguments(recipe, folder, progress=progress)
    splits, task = read_splits(recipe)
    tokenizer = load_tokenizer(recipe)
    pieces: dict[int, list[int]] = {}
    if recipe.new_tokens:
        tokenizer, pieces = extend_tokenizer(tokenizer, splits.train.texts, recipe.new_tokens)
    transformers.set_seed(recipe.seed)  # the head's weights are drawn next
    loaded = load_model(recipe, task, tokenizer, pieces)
    task.source_encoder = source_encoder.encoder_of(loaded.model)
    for split in splits.test.values():
        task.check_split(split, tokenizer, recipe.training)
    dropout = _dropout(recipe, folder, loaded, splits, arguments.device, progress=progress)
    with arguments.main_process_first(local=False):  # one process writes a cache, the others read it
        if recipe.adapter.source_cache:
            loaded.model.to(arguments.device)
            often = [splits.train, *([splits.dev] if splits.dev else [])]
            task.source_cache = source_encoder.cached(
                recipe, loaded.model, tokenizer, often, folder / CHECKPOINTS / SOURCES, progress=progress
            )
        train = task.training(splits.train, tokenizer, recipe, folder / CHECKPOINTS)
        original = None
        if splits.original is not None:
            original = task.training(splits.original, tokenizer, recipe, folder / CHECKPOINTS)
    examples = train.features
    if original is not None:
        examples = mixed(recipe, train.features, original.features, arguments)
        counted = recipe.adapter.method == "neutral_residues" and recipe.adapter.original_share == "auto"
        if counted and examples.mix.originals:
            adapted: Any = loaded.model
            adapted.active_peft_config.original_share = examples.token_share()
    dev = task.encode(splits.dev, tokenizer, recipe.training) if splits.dev else None
    metric = metrics_for(task.name, task.gold((splits.dev or splits.train).labels))[0]

    steps = planned_steps(arguments, len(examples))
    every = _interval(recipe, loaded, steps)
    schedule = _schedule(recipe, every, folder)
    clock, stop = TrainingClock(), StopAndSave()
    trainer = make_trainer(
        loaded.model,
        arguments,
        task,
        tokenizer,
        progress=progress,
        train_dataset=examples,
        eval_dataset=dev.features if dev else None,
        compute_metrics=_dev_metrics(task, dev, splits.dev, metric) if dev and splits.dev else None,
        callbacks=[clock, stop, *_order_of(examples), *([schedule] if schedule else [])],
    )
    if _has_gates_or_penalty(recipe):
        PenaltyLog().first_in(trainer)
    return Prepared(
        recipe,
        splits,
        task,
        tokenizer,
        loaded,
        train,
        original,
        dev,
        trainer,
        steps,
        metric,
        schedule,
        every,
        clock,
        stop,
        dropout,
    )


def _order_of(examples: Any) -> list[EpochOfBlocks]:
    return [EpochOfBlocks(examples.order)] if isinstance(examples, Blocks) else []


def _has_gates_or_penalty(recipe: Recipe) -> bool:
    adapter = recipe.adapter
    return adapter.method == "neutral_residues" and (adapter.penalty_weight > 0 or adapter.gate == "relu")


def training_arguments(recipe: Recipe, folder: Path, *, progress: bool) -> TrainingArguments:
    """The recipe's `training` and `output` in transformers' words.

    Raises:
        RecipeError: `training.arguments` has a name that transformers does not know, or one that has its own key.
    """
    training, has_dev = recipe.training, recipe.data.dev is not None
    _check_arguments(recipe)
    _check_trackers(recipe)
    strategy, warmup = "steps" if training.eval_steps else "epoch", training.warmup_steps
    values: dict[str, Any] = {
        "output_dir": str(folder / CHECKPOINTS),
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": warmup if warmup < 1 else int(warmup),
        "weight_decay": training.weight_decay,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "logging_steps": 0.01,  # a share of the run
        "eval_strategy": strategy if has_dev else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": strategy,
        "save_steps": training.eval_steps or 500,
        "save_total_limit": 1,  # the last one; the best one is kept beside it
        "load_best_model_at_end": has_dev,
        "metric_for_best_model": "eval_score" if has_dev else None,
        "greater_is_better": True if has_dev else None,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "seed": recipe.seed,
        "report_to": list(recipe.output.report_to) or "none",
        "run_name": recipe.name,
        "label_names": list(task_for(recipe).label_names),
        # blocks of raw text are named by their place in the stream, and made when they are asked for; the source that
        # FLARE reads is no argument of the model's own
        "remove_unused_columns": recipe.task not in LANGUAGE_MODELLING and recipe.adapter.method != "flare",
        "disable_tqdm": not progress,
        "dataloader_pin_memory": torch.cuda.is_available(),  # else there is nothing to pin for, and torch warns
        # frozen layers take no part in the backward pass; DDP has to know that this may happen
        "ddp_find_unused_parameters": True if recipe.unfreezing or recipe.adapter.method != "none" else None,
    }
    try:
        return TrainingArguments(**values | recipe.training.arguments)
    except (ValueError, TypeError, KeyError) as error:
        no_gpu = training.precision == "bf16" and not (training.arguments.get("use_cpu") or torch.cuda.is_available())
        fix = "training.precision=float32, or, if the processor has bf16, training.arguments={use_cpu: true}"
        raise RecipeError(
            f"transformers refuses the training arguments: {error}",
            found=f"precision: {training.precision}, arguments: {training.arguments}",
            fix=fix if no_gpu else None,
        ) from error


def _check_trackers(recipe: Recipe) -> None:
    known = sorted({*integration_utils.INTEGRATION_TO_CALLBACK, "all"})
    for name in recipe.output.report_to:
        if name not in known:
            raise RecipeError(f"{recipe.origin('output.report_to')}: no such tracker", found=name, allowed=known)
        if name != "all" and name not in integration_utils.get_available_reporting_integrations():
            raise MissingExtra(f"output.report_to: {name} is not installed", found=name, fix=f"pip install {name}")


def _check_arguments(recipe: Recipe) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in recipe.training.arguments:
        where = recipe.origin(f"training.arguments.{name}")
        if recipe.task in LANGUAGE_MODELLING and name in _NOT_FOR_RAW_TEXT:
            raise RecipeError(f"{where}: task: {recipe.task} sets this itself", found=f"training.arguments.{name}")
        if name in _OWN_KEYS:
            own = _OWN_KEYS[name]
            raise RecipeError(
                f"{where}: the argument {name!r} is set by the run" + (f": write {own}" if own else ""),
                found=f"training.arguments.{name}",
            )
        if name not in known:
            near = nearest(name, known)
            raise RecipeError(
                f"{where}: TrainingArguments has no {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                found=f"training.arguments.{name}",
                fix=f"training.arguments: {{{near}: …}}" if near else None,
            )


def _dev_metrics(task: Task, encoded: Encoded, split: Split, metric: str) -> Any:
    """Trainer's `compute_metrics` for this dev split; Trainer keeps the checkpoint with the highest `eval_score`."""
    gold = task.gold(split.labels)
    sign = 1 if METRICS[metric].higher_is_better else -1

    def compute(outputs: transformers.EvalPrediction) -> dict[str, float]:
        said = task.gold([one.value for one in task.decode(outputs.predictions, encoded, split)])
        once = np.ones((1, len(gold)))
        values = {name: float(value(once)[0]) for name, value in statistics(task.name, gold, said).items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        return values | {"score": sign * values[metric] if metric in values else _UNDEFINED}

    return compute


def planned_steps(arguments: TrainingArguments, examples: int) -> int:
    """Optimizer steps of the whole run, counted as Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    share = math.ceil(examples / arguments.world_size)
    batches = share // arguments.per_device_train_batch_size
    if not arguments.dataloader_drop_last:
        batches = math.ceil(share / arguments.per_device_train_batch_size)
    updates = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * updates)


def _dropout(
    recipe: Recipe, folder: Path, loaded: Loaded, splits: Splits, device: torch.device, *, progress: bool
) -> tuple[GuidedDropout, Applied] | None:
    """Sets the recipe's dropout rates on the model; what they are measured on is read first, where it has to be."""
    chosen = recipe.dropout
    if chosen is None:
        return None
    if chosen.rates is not None:
        rates = GuidedDropout.load(recipe.path(chosen.rates))
    elif (folder / DROPOUT).is_file():  # of the same recipe, interrupted: measured already
        rates = GuidedDropout.load(folder / DROPOUT)
    else:
        texts = load_texts(recipe, chosen.texts, chosen.text) if chosen.texts else splits.train.texts
        rates = GuidedDropout.estimate(
            locate(recipe),
            (text if isinstance(text, str) else " ".join(text) for text in texts),
            max_examples=chosen.max_examples or MOST_TEXTS,
            max_length=recipe.training.max_length,
            seed=recipe.seed,
            device=device,
            progress=progress,
        )
    [rates] = broadcast_object_list([rates])  # devices may differ in the last digit, and so in a rank
    keys = {"upper", "lower", "mean", "linear_in", "within_type", "noise"}
    options = chosen.model_dump(include=keys, exclude_none=True)
    if chosen.schedule is not None:
        options["seed"] = recipe.seed  # of shuffled
    rates = rates.using(chosen.schedule, **options)
    return rates, rates.apply(loaded.model, on=chosen.target)


def _interval(recipe: Recipe, loaded: Loaded, steps: int) -> int | None:
    """`unfreezing.every_n_steps` in steps. auto: half of the run is scheduled, an interval is steps / (2 · layers)."""
    unfreezing = recipe.unfreezing
    if unfreezing is None:
        return None
    layers = len(trainable_layers(loaded.model).names)
    openings = 1 if unfreezing.schedule == "lpft" else layers
    every = unfreezing.every_n_steps
    if unfreezing.schedule == "standard":
        return every if isinstance(every, int) else 1
    needed = openings if every == "auto" else openings * every
    if needed > steps:
        most = steps // openings
        longer = f"training.epochs={math.ceil(recipe.training.epochs * needed / steps)}"
        raise RecipeError(
            f"{recipe.origin('unfreezing.every_n_steps')}: the schedule is longer than the run",
            found=f"{openings} openings, one every {every} steps, in a run of {steps} steps",
            allowed=f"every_n_steps up to {most}" if most else None,
            fix=f"unfreezing.every_n_steps=auto, or {longer}" if most else longer,
        )
    return max(1, steps // (2 * openings)) if every == "auto" else every


def _schedule(recipe: Recipe, every: int | None, folder: Path) -> ScheduledUnfreezing | None:
    unfreezing = recipe.unfreezing
    if unfreezing is None or every is None:
        return None
    return ScheduledUnfreezing(
        unfreezing.schedule,
        every,
        order=unfreezing.order,
        fisher=unfreezing.fisher,
        trace_examples=unfreezing.trace_examples,
        record_trace=unfreezing.record_trace,
        seed=recipe.seed,
        log_path=folder / UNFREEZING_LOG,
    )
