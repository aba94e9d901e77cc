"""The recipe: one YAML file that says what is trained on what, as frozen, typed models.

    recipe = graftlm.load_recipe("topics.yaml", ["training.learning_rate=5e-4", "seed=1"])

Reading is strict: YAML 1.2, unknown keys and wrong types are errors that name the line, and every value remembers where
it came from.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from graftlm import recipe_errors, yaml_lines
from graftlm.recipe_adapter import FILE_TYPES as FILE_TYPES
from graftlm.recipe_adapter import TEXT_TYPES as TEXT_TYPES
from graftlm.recipe_adapter import Adapter, Count, Language, Part, Positive, Share, relocate
from graftlm.recipe_adapter import Source as Source
from graftlm.recipe_dropout import Dropout
from graftlm.starter import MODELS

TaskName = Literal[
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "causal_lm",
    "masked_lm",
]
Schedule = Literal["standard", "gradual", "reverse", "random", "fixed", "lpft", "fisher"]
LANGUAGE_MODELLING = ("causal_lm", "masked_lm")
_FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Parallel(Part):
    """The same items in the source language: a column of the same rows, or files of their own, joined by `data.id`."""

    text: str = Field("text", description="column of the source-language text")
    text_b: str | None = Field(None, description="its second text, where data.text_b names one")
    train: Source | None = Field(None, description="null: in the rows of data.train, data.dev and data.test")
    dev: Source | None = None
    test: dict[str, Source] = Field(default_factory=dict, description="language tag of data.test → its items' source")
    read: Literal["fused", "target", "source", "both", "zero_shot"] = Field(
        "fused",
        description="fused: both, as FLARE does; its rivals: target alone; source in its place (translate-test); both "
        "in one input; zero_shot: source in train and dev, target in test",
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> "Parallel":
        if self.train is None and (self.dev or self.test):
            raise ValueError("files of dev or test, and none of train; name all of them or none")
        return self


class Data(Part):
    """The splits and their columns."""

    train: Source = Field(description="labelled text, or raw text (files: a pattern such as novels/*.txt too)")
    dev: Source | None = Field(None, description="source-language text that the best checkpoint is chosen on")
    test: dict[Language, Source] = Field(min_length=1, description="language tag → text that is scored at the end")
    text: str = Field("text", description="text column (token_classification: list of words; QA: question)")
    text_b: str | None = Field(None, description="second text of a pair (QA: context)")
    label: str = Field("label", description="label column (QA: SQuAD's answers, or answer texts)")
    answer_start: str | None = Field(None, description="QA with answer texts: column of their position in the context")
    id: str | None = Field(None, description="column that names each item; its row number otherwise")
    label_separator: str | None = Field(None, min_length=1, description="splits multi-label cells of a CSV file")
    documents: Literal["paragraphs", "lines", "files"] = Field("paragraphs", description="of .txt files, for raw text")
    old: tuple[str, ...] = Field((), description="raw text: languages of `test` that the model knew before")
    parallel: Parallel | None = Field(None, description="null: texts in one language")


class Mixing(Part):
    """Raw text of the original domain among that of the new one, against forgetting."""

    data: Source = Field(description="text of the original domain, or of a proxy of it; none that is in `test`")
    share: Share = Field(0.1, description="of the sequences of the run, exactly")


class Unfreezing(Part):
    """The arguments of `graftlm.ScheduledUnfreezing`."""

    schedule: Schedule = "standard"
    every_n_steps: Literal["auto"] | Count = Field(
        "auto", description="steps between two decisions; auto: the schedule takes half of the run"
    )
    order: tuple[int | str, ...] | None = Field(
        None, description="for schedule fixed: layer names or positions (0 = bottom), first to open first"
    )
    fisher: Literal["sampled", "mode", "empirical", "exact"] = "sampled"
    trace_examples: Count | None = Field(None, description="training examples of one measurement; chosen when null")
    record_trace: Count | None = Field(None, description="also record tr(F) of every layer each so many steps")

    @model_validator(mode="after")
    def _order_fits(self) -> "Unfreezing":
        if (self.schedule == "fixed") != (self.order is not None):
            raise ValueError("order: goes with schedule: fixed, and only with it")
        return self


class Training(Part):
    """How long and how fast; names are those of transformers' TrainingArguments where it has the same thing."""

    epochs: Positive = 3.0
    max_steps: Count | None = Field(None, description="optimizer steps; replaces epochs")
    learning_rate: Positive = 5e-4
    batch_size: Count = Field(32, description="examples per device and forward pass")
    eval_batch_size: Count = 64
    gradient_accumulation_steps: Count = 1
    max_length: Annotated[int, Field(ge=8)] = Field(
        128, description="tokens; longer text is cut and counted; words, contexts and raw text become windows"
    )
    stride: Annotated[int, Field(ge=0)] = Field(32, description="tokens that windows share (QA; causal LM, scored)")
    masking: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="masked_lm: share of tokens to fill in")
    warmup_steps: Annotated[float, Field(ge=0)] = Field(0.0, description="steps; below 1: a share of the run")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_scheduler_type: str = "linear"
    eval_steps: Count | None = Field(None, description="evaluate and save each so many steps; null: each epoch")
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    arguments: dict[str, Any] = Field(default_factory=dict, description="more TrainingArguments, handed on")


class StandardReference(Part):
    """The same recipe with every layer open from the start, trained too."""

    learning_rate: Positive | None = Field(None, description="of the reference; null: that of the recipe")


class References(Part):
    """What the scores are held against; a list of names is short for a mapping."""

    majority: bool = Field(False, description="always the most frequent label of the training split")
    standard: StandardReference | None = Field(None, description="standard training; fills the gain")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        known = {"majority": True, "standard": {}}
        for name in value:
            if name not in known:
                raise ValueError(f"unknown reference {name!r}; allowed: {', '.join(known)}")
        return {name: known[name] for name in value}


class Licences(Part):
    """Licences that the run's card and result repeat; null: read from the model's own card where it has one."""

    model: str | None = None
    data: str | None = None
    weights: str | None = Field(None, description="of what this run makes")


class Output(Part):
    """Where results go. Nothing leaves the machine unless `report_to` or `push_to_hub` say so."""

    folder: str = Field("runs", min_length=1)
    report_to: tuple[str, ...] = Field((), description="trackers of transformers, such as tensorboard or wandb")
    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="hub repository for the result")
    private: bool = Field(True, description="whether that repository is made private")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value in (None, "none"):
            return ()
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Recipe(Part):
    """One run, every value set; made by `load_recipe`."""

    name: str = Field(pattern=_FOLDER_NAME, description="folder name under output.folder")
    model: str = Field("starter", min_length=1, description="starter, starter-decoder, a hub id, or a local folder")
    task: TaskName = "classification"
    source: Language = Field("eng", description="language tag of the training text")
    data: Data
    adapter: Adapter = Adapter()
    new_tokens: Count | None = Field(None, description="causal_lm: tokens to learn from the text, that are trained too")
    mixing: Mixing | None = Field(None, description="raw text: null: the training text alone")
    unfreezing: Unfreezing | None = Field(None, description="null: plain training")
    dropout: Dropout | None = Field(None, description="null: the model's own rates")
    training: Training = Training()
    references: References = References(majority=True)
    licences: Licences = Licences()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: Output = Output()

    _text: str = PrivateAttr("")
    _base: Path = PrivateAttr(default_factory=Path)
    _origins: dict[yaml_lines.Path_, str] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr("recipe")

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Recipe":
        recipe_errors.refuse_idle(self, LANGUAGE_MODELLING)
        recipe_errors.refuse_lone_parallel(self)
        return self

    @property
    def text(self) -> str:
        """The YAML as it was written."""
        return self._text

    @property
    def base(self) -> Path:
        """The folder that relative paths in the recipe start from: that of its file."""
        return self._base

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output.folder) / self.name

    def values(self) -> dict[str, Any]:
        """Every value as plain YAML data."""
        return self.model_dump(mode="json")

    def origin(self, key: str) -> str:
        """Where a dotted key's value came from: `default`, `file:line` or `override`."""
        path = tuple(key.split("."))
        if path in self._origins:
            return self._origins[path]
        for end in range(len(path) - 1, 0, -1):  # a value in its short form: the key above it holds no other keys
            inner = [other for other in self._origins if other[:end] == path[:end] and len(other) > end]
            if path[:end] in self._origins and all(other[end].isdigit() for other in inner):
                return self._origins[path[:end]]
        return "default"

    def path(self, text: str) -> Path:
        """A path of the recipe, seen from the working folder."""
        return self._base / Path(text).expanduser()

    def sources(self) -> list[Source]:
        """All data that the recipe names, as it names them."""
        more = [self.dropout.texts if self.dropout else None, self.mixing.data if self.mixing else None]
        parts = [part for part in (self.data, self.data.parallel) if part]
        named = [source for part in parts for source in (part.train, part.dev, *part.test.values())]
        return [source for source in (*named, *more) if source]

    def resolved(self) -> str:
        """Every value with its origin, as YAML that `load_recipe` reads again."""
        values = self.values()
        comments = {path: self.origin(".".join(path)) for path, _ in yaml_lines.flatten(values)}
        return yaml_lines.dump(values, comments)

    def changed(self, *overrides: str) -> "Recipe":
        """The same recipe with `key=value` overrides on top."""
        return _build(
            self.values(), overrides, text=self._text, base=self._base, file=self._file, origins=self._origins
        )

    def with_language_adapters(self, places: Mapping[str, str]) -> "Recipe":
        """The same recipe with these folders in place of the texts that language adapters are trained from."""
        values = self.values()
        values["adapter"]["language_adapters"] |= places
        values["adapter"].pop("language_training", None)
        return _build(values, (), text=self._text, base=self._base, file=self._file, origins=self._origins)

    def relocated(self, folder: Path) -> "Recipe":
        """The same recipe with its relative paths seen from `folder`, so that a copy of it there works too."""

        def move(path: str, *, there: bool = False) -> str:
            local = self.path(path)
            there = there or local.exists() or ("*" in path and local.parent.is_dir())
            return Path(os.path.relpath(local, folder)).as_posix() if there else path

        values = self.values()
        values["model"] = self.model if self.model in MODELS else move(self.model)
        data, dropout = values["data"], values["dropout"] or {"rates": None, "texts": None}
        mixing = values["mixing"] or {"data": None}
        relocate(values["adapter"], move)
        if dropout["rates"]:
            dropout["rates"] = move(dropout["rates"])
        places = [(dropout, "texts"), (mixing, "data")]
        for part in filter(None, (data, data["parallel"])):
            places += [(part, "train"), (part, "dev"), *((part["test"], tag) for tag in part["test"])]
        languages = values["adapter"].get("language_adapters", {}).values()
        places += [(one, key) for one in languages if isinstance(one, dict) for key in one]
        for splits, key in places:
            if isinstance(splits[key], str):
                splits[key] = move(splits[key])
            elif splits[key]:
                splits[key] = {**splits[key], "path": move(splits[key]["path"])}
        return _build(values, (), text=self._text, base=folder, file=self._file, origins=self._origins)


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file; its relative paths start from its own folder.
        overrides: `key=value` with dots between keys (`training.learning_rate=1e-4`); the value is YAML.

    Raises:
        RecipeError: a file that is missing or no YAML 1.2, an unknown key (with the nearest known one), a wrong type or
            a value that is not allowed; each with `file:line`.

    Example:
        >>> from graftlm.recipe import load_recipe, shipped
        >>> recipe = load_recipe(shipped()["demo"], ["training.learning_rate=1e-4"])
        >>> recipe.training.learning_rate, recipe.origin("training.learning_rate"), recipe.origin("training.stride")
        (0.0001, 'override', 'default')
    """
    file = Path(path)
    text = yaml_lines.read_file(file)
    values, lines = yaml_lines.read(text, file.name)
    origins = {key: f"{file.name}:{line}" for key, line in lines.items()}
    return _build(values, overrides, text=text, base=file.parent, file=file.name, origins=origins)


def key_of(role: str) -> str:
    """The key under which a recipe names a text: train, dev, test, mixing."""
    return "mixing.data" if role == "mixing" else f"data.{role}"


def shipped() -> dict[str, Path]:
    """The recipes that come with graftlm, by name."""
    folder = Path(__file__).parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, those under `output` left out: they do not change what is computed."""
    one, two = (dict(yaml_lines.flatten(recipe.values())) for recipe in (first, second))
    keys = [key for key in dict.fromkeys([*one, *two]) if key[0] != "output"]
    return {".".join(key): (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def _build(
    values: dict[str, Any],
    overrides: Iterable[str],
    *,
    text: str,
    base: Path,
    file: str,
    origins: dict[yaml_lines.Path_, str],
) -> Recipe:
    for assignment in overrides:
        path = yaml_lines.override(values, assignment)
        origins = {key: line for key, line in origins.items() if key[: len(path)] != path}
        inner = yaml_lines.at(values, path)
        leaves = [key for key, _ in yaml_lines.flatten(inner)] if isinstance(inner, dict) else []
        origins |= {path: "override"} | {(*path, *leaf): "override" for leaf in leaves}
    try:
        # JSON mode: strict about types, and a list may stand for a tuple
        recipe = Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise recipe_errors.explain(error, Recipe, values, file, origins) from None
    recipe_errors.refuse_non_finite(values, file, origins)
    recipe._text, recipe._base, recipe._file, recipe._origins = text, base, file, origins
    return recipe
