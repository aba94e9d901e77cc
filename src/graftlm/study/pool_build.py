"""`graftlm pool build`: fine-tunes the base model on each source task, fits its Embedding Space Map, fills a pool.

The source tasks are the variants of a study, so that they are trained, resumed, sharded and put on a cluster as those
of `graftlm compare` are.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftlm import recipe_errors, yaml_lines
from graftlm.errors import DataError, GraftError, ModelError, RecipeError
from graftlm.evaluation.result import Result
from graftlm.folder import load, locate
from graftlm.prepare import read_split
from graftlm.recipe import Recipe, load_recipe
from graftlm.sources.embed import PAIR, Embedder
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import INDEX, Skipped, SourcePool
from graftlm.starter import MODELS
from graftlm.study.claims import Claims
from graftlm.study.execute import WHOLE, Shard, execute, needed, shown_score
from graftlm.study.plan import Run, Study, Values, Variant
from graftlm.study.runner import CLAIMS, error_of, finished

MAPS = "maps"
_TASKS = ("classification", "multi_label", "regression")  # of one text or pair each
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_HELD_OUT = 0.1  # of the texts, for the error that is reported; the map itself is fitted to all
_LEAST = 20  # texts, for a part to be held out
log = logging.getLogger("graftlm")


class MapSettings(BaseModel):
    """How the maps are made: the arguments of `graftlm.EmbeddingSpaceMap.fit` and of the embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: Literal["linear", "low_rank", "identity_low_rank"] = "linear"
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="of a low-rank map")
    method: Literal["closed_form", "sgd"] = "closed_form"
    max_texts: int = Field(10_000, ge=2, description="of a task's training texts, drawn with the recipe's seed")
    pooling: Literal["auto", "pooler", "cls", "mean", "last"] = "auto"
    max_length: Annotated[int, Field(ge=1)] | None = Field(None, description="tokens; null: that of the recipe")


class TasksFile(BaseModel):
    """The keys of a YAML of source tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=_NAME, description="folder name under `folder`, for the runs")
    recipe: str = Field(min_length=1, description="the recipe's file, seen from this one: what all tasks share")
    tasks: dict[str, Values] = Field(min_length=1, description="name → dotted keys of the recipe with their values")
    pool: str = Field(min_length=1, description="the pool's folder, seen from the working folder; made if need be")
    map: MapSettings = MapSettings()
    folder: str = Field("studies", min_length=1, description="where the runs go, seen from the working folder")


@dataclass(frozen=True)
class Built:
    """What has become of the source tasks.

    Attributes:
        pool: the pool's folder.
        tasks: one line of text a task whose map is in the pool.
        skipped: tasks that failed, and why.
        waiting: tasks that other processes or shards are at, or have yet to begin.
    """

    pool: Path
    tasks: dict[str, str]
    skipped: tuple[Skipped, ...]
    waiting: tuple[str, ...]


@dataclass(frozen=True)
class PoolBuild:
    """Source tasks, and the pool that their maps go into; made by `load_tasks`."""

    study: Study
    pool: Path
    settings: MapSettings

    @property
    def base_model(self) -> str:
        """What the pool calls the base model: a shipped model (`starter`), a hub id, or the name of a local folder."""
        recipe = self.study.recipe
        local = recipe.model not in MODELS and recipe.path(recipe.model).is_dir()
        return recipe.path(recipe.model).resolve().name if local else recipe.model

    @cached_property
    def base(self) -> Embedder:
        """The base model, as it embeds texts."""
        recipe, settings = self.study.recipe, self.settings
        return Embedder(
            locate(recipe),
            pooling=settings.pooling,
            max_length=settings.max_length or recipe.training.max_length,
        )

    def name(self, run: Run) -> str:
        """What the run's map is called, here and in the pool."""
        return self.study.variants[run.variant].slug

    def path(self, run: Run) -> Path:
        """The folder of the run's map, before it is in the pool."""
        return self.study.folder / MAPS / self.name(run)

    def up_to_date(self, run: Run) -> EmbeddingSpaceMap | None:
        """The run's map, where there is one of this run and these settings."""
        try:
            found = EmbeddingSpaceMap.load(self.path(run))
        except DataError:  # not there, or damaged: it is made again
            return None
        return found if found.details.get("made_from") == self._made_from(run) else None

    def _made_from(self, run: Run) -> dict[str, Any]:
        result = Result.read(self.study.recipe_of(run).folder)
        return {"settings": self.settings.model_dump(mode="json"), "run": result.created.isoformat()}

    def fit(self, run: Run) -> EmbeddingSpaceMap:
        """The map of a finished run.

        Raises:
            ModelError: fine-tuning has not moved the embeddings.
        """
        recipe = self.study.recipe_of(run)
        texts = texts_of(recipe, self.settings.max_texts)
        model, tokenizer = load(recipe.folder, tokenizer=True)
        base = self.base(texts)
        same: dict[str, Any] = {"pooling": self.base.pooling, "max_length": self.base.max_length}
        tuned = Embedder(model, tokenizer=tokenizer, **same)(texts)
        if not (base != tuned).any():
            raise ModelError("fine-tuning has not moved the embeddings, so that there is no map", found=recipe.folder)
        training = recipe.training
        details = {
            "unexplained": self._unexplained(base, tuned),
            "text_column": [recipe.data.text, recipe.data.text_b] if recipe.data.text_b else recipe.data.text,
            "label_column": recipe.data.label,
            "language": recipe.source,
            "seed": recipe.seed,
            "lm_num_epochs": training.epochs,
            "lm_batch_size": training.batch_size,
            "lm_learning_rate": training.learning_rate,
            "lm_adapter": recipe.adapter.method,
            "pooling": self.base.pooling,
            "made_from": self._made_from(run),
        }
        return self._fitted(base, tuned, self.study.variants[run.variant].name, details)

    def _fitted(self, base: np.ndarray, tuned: np.ndarray, task: str, details: dict[str, Any]) -> EmbeddingSpaceMap:
        made = self.settings
        return EmbeddingSpaceMap.fit(
            base,
            tuned,
            base_model=self.base_model,
            task=task,
            architecture=made.architecture,
            rank=made.rank,
            method=made.method,
            details=details,
        )

    def _unexplained(self, base: np.ndarray, tuned: np.ndarray) -> float | None:
        """Share of what fine-tuning moves that a map fitted to other texts does not foresee; None: too few texts."""
        if len(base) < _LEAST:
            return None
        order = np.random.default_rng(0).permutation(len(base))
        held, rest = np.split(order, [max(1, int(_HELD_OUT * len(base)))])
        missed = self._fitted(base[rest], tuned[rest], "held out", {})(base[held]) - tuned[held]
        moved = float(((base[held] - tuned[held]) ** 2).sum())
        return float((missed**2).sum()) / moved if moved else None


def texts_of(recipe: Recipe, most: int) -> list[str]:
    """The training texts of a task, at most so many of them, those of a pair in one string."""
    split = read_split(recipe, recipe.data.train, "train")
    texts = list(split.texts)
    if split.texts_b is not None:
        texts = [PAIR.join(pair) for pair in zip(texts, split.texts_b, strict=True)]
    if len(texts) <= most:
        return texts
    chosen = np.random.default_rng(recipe.seed).choice(len(texts), most, replace=False)
    return [texts[row] for row in sorted(chosen.tolist())]


def load_tasks(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> PoolBuild:
    """Reads a YAML of source tasks: the keys of `TasksFile`.

    Args:
        path: the file; its `recipe` is relative to it, and paths in `tasks` are relative to the recipe.
        overrides: `key=value` for the recipe that all tasks share.

    Raises:
        RecipeError: as `graftlm.load_recipe`, for the file and for each recipe that it makes; a task that sets a model
            of its own, or one of words, answers or raw text, which have no map.
    """
    file = Path(path)
    values, lines = yaml_lines.read(yaml_lines.read_file(file), file.name)
    try:
        read = TasksFile.model_validate(values)
    except ValidationError as error:
        origins = {key: f"{file.name}:{line}" for key, line in lines.items()}
        raise recipe_errors.explain(error, TasksFile, values, file.name, origins) from None
    if (read.map.rank is None) != (read.map.architecture == "linear"):
        raise RecipeError("a low-rank map has a rank, and a linear map has none", found=f"map: {read.map!r}")
    recipe = load_recipe(file.parent / read.recipe, overrides)
    study = Study(
        name=read.name,
        recipe=recipe,
        variants=tuple(Variant(name, settings) for name, settings in read.tasks.items()),
        seeds=(recipe.seed,),
        root=Path(read.folder),
    )
    study.check()
    for run in study.scored():
        made, name = study.recipe_of(run), study.variants[run.variant].name
        if made.model != recipe.model:
            raise RecipeError("a pool is that of one base model", found=f"{name}: {made.model}", allowed=recipe.model)
        if made.task not in _TASKS:
            raise RecipeError("a map is one of texts with a label", found=f"{name}: {made.task}", allowed=_TASKS)
    return PoolBuild(study, Path(read.pool), read.map)


def build_pool(build: PoolBuild, shard: Shard = WHOLE, *, ray: str | None = None) -> Built:
    """Fine-tunes the base model on each source task that it was not fine-tuned on yet, and adds what is missing.

    Each task is a run of its own, as in `graftlm.compare`; one that fails ends no other. The map is fitted to the
    embeddings of the task's training texts once its run is finished, and anew where its settings were changed.

    Args:
        build: what `load_tasks` made.
        shard: the part of the tasks that this process is for.
        ray: address of a Ray cluster that does the runs; the maps are fitted here, after them.
    """
    study, problems = build.study, dict[str, Skipped]()

    def make(run: Run) -> None:
        if (problem := _make(build, run)) is not None:
            problems[problem.name] = problem

    if ray is None:
        execute(study, shard, after=make)
    else:
        from graftlm.study.cluster import execute_on_ray

        execute_on_ray(study, ray)
    for run in needed(study, shard):  # what was trained before, or by others
        if build.name(run) not in problems and finished(study.recipe_of(run)):
            make(run)
    return _collect(build, problems)


def _make(build: PoolBuild, run: Run) -> Skipped | None:
    """Fits the map of a finished run, unless it is there or somebody is at it; says what went wrong."""
    claim = Claims(build.study.folder / CLAIMS).take(f"map.{build.name(run)}")
    if claim is None:
        return None
    began = time.monotonic()
    try:
        if build.up_to_date(run) is not None:
            return None
        shutil.rmtree(build.path(run), ignore_errors=True)
        made = build.fit(run)
        made.save(build.path(run))
    except GraftError as error:
        return Skipped(build.name(run), str(error))
    finally:
        claim.give_back()
    log.info("%s: map fitted to %d texts (%.0f s)", made.task, made.details["num_examples"], time.monotonic() - began)
    return None


def _collect(build: PoolBuild, problems: dict[str, Skipped]) -> Built:
    """Every map that is there goes into the pool, if it is not in it; one process at a time."""
    study, claims = build.study, Claims(build.study.folder / CLAIMS)
    ready: dict[str, tuple[Run, EmbeddingSpaceMap]] = {}
    waiting = []
    for run in study.scored():
        name, recipe = build.name(run), study.recipe_of(run)
        found = build.up_to_date(run) if finished(recipe) else None
        if found is not None:
            ready[name] = run, found
        elif (error := error_of(study.folder, recipe.name)) is not None and not finished(recipe):
            problems[name] = Skipped(name, error)
        elif name not in problems:
            waiting.append(name)
    while (claim := claims.take("pool")) is None:
        time.sleep(0.5)
    try:
        for name, (_, esm) in list(ready.items()):
            if (problem := _add(build, name, esm)) is not None:
                problems[name] = Skipped(name, problem)
                del ready[name]
    finally:
        claim.give_back()
    lines = {name: _line(study.recipe_of(run), esm) for name, (run, esm) in ready.items()}
    return Built(build.pool, lines, tuple(problems.values()), tuple(waiting))


def _add(build: PoolBuild, name: str, esm: EmbeddingSpaceMap) -> str | None:
    """Puts one map into the pool; says why it cannot be put there."""
    exists = (build.pool / INDEX).exists()
    pool = (
        SourcePool.open(build.pool)
        if exists
        else SourcePool.create(build.pool, base_model=build.base_model, width=esm.width)
    )
    entry = pool.entries.get(name)
    if entry is not None and entry.task != esm.task:
        return f"the pool has an entry of this name for another task: {entry.task}"
    try:
        if entry is None or pool.load(name).details.get("made_from") != esm.details["made_from"]:
            pool.add(esm, name=name, replace=entry is not None)
    except DataError as error:
        return str(error)
    return None


def _line(recipe: Recipe, esm: EmbeddingSpaceMap) -> str:
    share = esm.details.get("unexplained")
    missed = "" if share is None else f", {share:.0%} of the movement unexplained"
    return f"{shown_score(Result.read(recipe.folder))}; map of {esm.details['num_examples']} texts{missed}"
