"""A study: one recipe, several variants of it, the seeds; and the runs that follow from them.

study:    recipe + variants, optionally folds and settings to tune
run:      one variant, one fold, one seed, one choice of the tuned settings; a recipe of its own
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftlm import recipe_errors, yaml_lines
from graftlm.errors import RecipeError
from graftlm.recipe import Recipe, load_recipe

RUNS = "runs"
Values = dict[str, Any]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_OURS = ("name", "seed", "output", "references")  # keys that a study sets itself


class StudyFile(BaseModel):
    """The keys of a study's YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=_NAME, description="folder name under `folder`")
    recipe: str = Field(min_length=1, description="the recipe's file, seen from this one")
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(
        None, description="dotted key → values; all combinations are variants, the first is the one compared with"
    )
    variants: dict[str, Values] | None = Field(
        None, description="instead of vary: name → dotted keys with their values; the first is the one compared with"
    )
    tune: dict[str, Annotated[list[Any], Field(min_length=2)]] | None = Field(
        None, description="dotted key → values; each variant gets the combination that is best on dev (and each fold)"
    )
    folds: list[Values] | None = Field(
        None, description="dotted keys with their values, a mapping a fold; the folds' test items are scored together"
    )
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] = Field(
        3, description="how many seeds, from the recipe's on; or the seeds"
    )
    folder: str = Field("studies", min_length=1, description="where studies go, seen from the working folder")

    @model_validator(mode="after")
    def _one_way(self) -> "StudyFile":
        if (self.vary is None) == (self.variants is None):
            raise ValueError("a study has either vary: or variants:")
        return self


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared: a name, and the recipe's keys that it sets."""

    name: str
    values: Values

    @property
    def slug(self) -> str:
        """The name as part of a folder name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-.") or "variant"


@dataclass(frozen=True)
class Run:
    """One run of a study; `choice` is an index into the combinations that are tuned."""

    variant: int
    seed: int
    fold: int | None = None
    choice: int | None = None

    @property
    def group(self) -> tuple[int, int | None]:
        """Runs of one group share what was tuned."""
        return self.variant, self.fold


@dataclass(frozen=True)
class Study:
    """What is compared, made by `plan_study` or `load_study`."""

    name: str
    recipe: Recipe
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    tune: tuple[Values, ...] = ()
    folds: tuple[Values, ...] = ()
    root: Path = field(default_factory=lambda: Path("studies"))

    @property
    def folder(self) -> Path:
        """The study's folder; its runs lie in `runs/` there."""
        return self.root / self.name

    def trials(self) -> list[Run]:
        """The runs that tuning chooses from: each combination, with the first seed."""
        return [
            Run(variant, self.seeds[0], fold, choice)
            for fold in self._folds()
            for choice in range(len(self.tune))
            for variant in range(len(self.variants))
        ]

    def scored(self) -> list[Run]:
        """The runs that are compared, those of one seed together; their choice is open until it is tuned."""
        return [
            Run(variant, seed, fold)
            for seed in self.seeds
            for fold in self._folds()
            for variant in range(len(self.variants))
        ]

    def _folds(self) -> Iterable[int | None]:
        return range(len(self.folds)) if self.folds else (None,)

    def title(self, run: Run) -> str:
        """The run for people: variant, fold, seed, and what it tries."""
        parts = [self.variants[run.variant].name]
        parts += [f"fold {run.fold + 1}"] if run.fold is not None else []
        parts.append(f"seed {run.seed}")
        parts += [describe(self.tune[run.choice])] if run.choice is not None and run.seed == self.seeds[0] else []
        return " · ".join(parts)

    def run_name(self, run: Run) -> str:
        """The name of the run's folder."""
        parts = [self.variants[run.variant].slug]
        parts += [f"fold{run.fold + 1}"] if run.fold is not None else []
        parts.append(f"seed{run.seed}")
        parts += [f"try{run.choice + 1}"] if run.choice is not None and run.seed == self.seeds[0] else []
        return ".".join(parts)

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe of one run."""
        values: Values = {}
        if run.fold is not None:
            values |= self.folds[run.fold]
        values |= self.variants[run.variant].values
        if run.choice is not None:
            values |= self.tune[run.choice]
        values |= {
            "seed": run.seed,
            "name": self.run_name(run),
            "output.folder": str(self.folder / RUNS),
            "output.push_to_hub": None,
            "references.standard": None,  # the first variant is what all are compared with
        }
        return self.recipe.changed(*(f"{key}={json.dumps(value)}" for key, value in values.items()))

    def check(self) -> None:
        """An error where a variant, a fold or a combination makes no recipe, or two runs would share a folder."""
        names = [variant.slug for variant in self.variants]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise RecipeError("two variants have one name", found=", ".join(twice), fix="name them under variants:")
        if len(set(self.seeds)) < len(self.seeds):
            raise RecipeError("a seed is named twice", found=self.seeds)
        for values in [*(variant.values for variant in self.variants), *self.tune, *self.folds]:
            for key in values:
                if key.split(".")[0] in _OURS:
                    raise RecipeError(f"a study sets {key.split('.')[0]} itself", found=key)
        tuned = {key for values in self.tune for key in values}
        for variant in self.variants:
            if both := tuned & set(variant.values):
                raise RecipeError("a key is both tuned and set by a variant", found=", ".join(sorted(both)))
        for run in self.trials() or [run for run in self.scored() if run.seed == self.seeds[0]]:
            recipe = self.recipe_of(run)
            if self.tune and recipe.data.dev is None:
                raise RecipeError("tuning chooses on the dev split, and the recipe names none", fix="data.dev: …")


def describe(values: Mapping[str, Any]) -> str:
    """Settings in a few words: the last part of each key with its value.

    >>> describe({"training.learning_rate": 0.001, "adapter.r": 4})
    'learning_rate 0.001, r 4'
    """
    return ", ".join(f"{key.rpartition('.')[2]} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`KEY=a,b,c` → key and values; values are YAML, so lists keep their brackets.

    >>> parse_vary("adapter.target_modules=[query],[query, value]")
    ('adapter.target_modules', [['query'], ['query', 'value']])
    """
    key, equals, values = text.partition("=")
    if not equals or not key or not values.strip():
        raise RecipeError("what varies is written KEY=a,b,c", found=text, fix="unfreezing.schedule=standard,gradual")
    holder: Values = {}
    yaml_lines.override(holder, f"values=[{values}]")
    return key.strip(), holder["values"]


def parse_variant(text: str) -> tuple[str, Values]:
    """`[NAME: ]KEY=value KEY=value` → name and values.

    >>> parse_variant("slow: training.learning_rate=1e-4 unfreezing.schedule=gradual")
    ('slow', {'training.learning_rate': 0.0001, 'unfreezing.schedule': 'gradual'})
    """
    name, colon, rest = text.partition(": ")
    assignments = (rest if colon else text).split()
    values: Values = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise RecipeError(
                "a variant is written KEY=value KEY=value", found=text, fix="'slow: training.learning_rate=1e-4'"
            )
        holder: Values = {}
        yaml_lines.override(holder, f"value={value}")
        values[key] = holder["value"]
    return (name if colon else describe(values)), values


def grid(vary: Mapping[str, Sequence[Any]]) -> list[Values]:
    """All combinations, the last key changing fastest.

    >>> grid({"a": [1, 2], "b": [3, 4]})
    [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}]
    """
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def _varied(vary: Mapping[str, Sequence[Any]]) -> dict[str, Values]:
    """Variants of a grid; a key with names for values needs no name of its own in the title."""
    bare = len(vary) == 1 and all(isinstance(value, str) for values in vary.values() for value in values)
    return {(next(iter(values.values())) if bare else describe(values)): values for values in grid(vary)}


def plan_study(
    recipe: Recipe,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    variants: Mapping[str, Values] | None = None,
    tune: Mapping[str, Sequence[Any]] | None = None,
    folds: Sequence[Values] = (),
    seeds: int | Sequence[int] = 3,
    name: str | None = None,
    folder: str | os.PathLike[str] = "studies",
) -> Study:
    """A study from its parts; `StudyFile` says what each is.

    >>> from graftlm.recipe import load_recipe, shipped
    >>> demo = load_recipe(shipped()["demo"])
    >>> study = plan_study(demo, vary={"unfreezing.schedule": ["standard", "gradual"]}, seeds=2)
    >>> study.name, [study.run_name(run) for run in study.scored()]
    ('demo-schedule', ['standard.seed0', 'gradual.seed0', 'standard.seed1', 'gradual.seed1'])
    """
    if (vary is None) == (variants is None):
        raise RecipeError("a study needs something that varies", fix="--vary unfreezing.schedule=standard,gradual")
    if vary is not None and any(len(set(map(json.dumps, values))) < len(values) for values in vary.values()):
        raise RecipeError("a value is named twice", found=vary)
    chosen = _varied(vary) if vary is not None else dict(variants or {})
    if len(chosen) < 2:
        raise RecipeError("there is nothing to compare with", found=", ".join(chosen), allowed="two variants or more")
    if isinstance(seeds, int):
        seeds = range(recipe.seed, recipe.seed + seeds)
    suffix = "-".join(key.rpartition(".")[2] for key in vary) if vary is not None else "compare"
    study = Study(
        name=name or f"{recipe.name}-{suffix}",
        recipe=recipe,
        variants=tuple(Variant(title, values) for title, values in chosen.items()),
        seeds=tuple(seeds),
        tune=tuple(grid(tune)) if tune else (),
        folds=tuple(folds),
        root=Path(folder),
    )
    if not re.match(_NAME, study.name):
        raise RecipeError("a study's name is a folder name", found=study.name)
    study.check()
    return study


def load_study(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Study:
    """Reads a study's YAML: the keys of `StudyFile`.

    Args:
        path: the file; its `recipe` is relative to it, and paths in `folds` and `variants` are relative to the recipe.
        overrides: `key=value` for the recipe that all variants share.

    Raises:
        RecipeError: as `graftlm.load_recipe`, for the study and for each recipe that it makes.
    """
    file = Path(path)
    values, lines = yaml_lines.read(yaml_lines.read_file(file), file.name)
    try:
        read = StudyFile.model_validate(values)
    except ValidationError as error:
        origins = {key: f"{file.name}:{line}" for key, line in lines.items()}
        raise recipe_errors.explain(error, StudyFile, values, file.name, origins) from None
    return plan_study(
        load_recipe(file.parent / read.recipe, overrides),
        vary=read.vary,
        variants=read.variants,
        tune=read.tune,
        folds=read.folds or (),
        seeds=read.seeds,
        name=read.name,
        folder=read.folder,
    )


def is_study(path: str | os.PathLike[str]) -> bool:
    """Whether a YAML file is a study, not a recipe: it names a recipe."""
    file = Path(path)
    values, _ = yaml_lines.read(yaml_lines.read_file(file), file.name)
    return "recipe" in values
