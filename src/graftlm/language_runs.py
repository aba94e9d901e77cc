"""Language adapters that a recipe names the text of: each is a run of the shipped recipe language-adapter, done first.

Its folder is `language-TAG` beside the recipe's own, so that all runs of one output folder share it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm import yaml_lines
from graftlm.errors import GraftError, RecipeError
from graftlm.evaluation.result import FILE as RESULT
from graftlm.recipe import Recipe, load_recipe, shipped
from graftlm.recipe_adapter import LanguageText

_SETTINGS = "adapter.language_training"
# what the recipe above or the language's own entry says
_TAKEN: tuple[str, ...] = ("name", "model", "task", "source", "data.train", "data.dev", "data.test", "output")
_TAKEN += ("adapter.method", "adapter.kind", "adapter.language_adapters", "adapter.language_training")


def language_runs(recipe: Recipe) -> dict[str, Recipe]:
    """Language tag → the run that trains its adapter; nothing where the recipe names adapters that are there.

    Raises:
        RecipeError: `adapter.language_training` has a key that the recipe language-adapter does not know, a value that
            it does not take, or one that is said elsewhere.
    """
    texts = {tag: text for tag, text in recipe.adapter.language_adapters.items() if isinstance(text, LanguageText)}
    if not texts:
        return {}
    base = load_recipe(shipped()["language-adapter"]).relocated(recipe.base)
    try:
        base = base.changed(*_settings(recipe))
    except RecipeError as error:
        raise _of(error, f"{recipe.origin(_SETTINGS)}: {_SETTINGS}") from error
    return {tag: base.changed(*_overrides(recipe, tag, text)) for tag, text in texts.items()}


def unfinished(recipe: Recipe) -> dict[str, Recipe]:
    """Those that a run of the recipe would begin with."""
    return {tag: one for tag, one in language_runs(recipe).items() if not (one.folder / RESULT).is_file()}


def placed(recipe: Recipe) -> Recipe:
    """The recipe with the folders of these runs in place of the texts, whether they are finished or not."""
    runs = language_runs(recipe)
    places = {tag: Path(os.path.relpath(one.folder, recipe.base)).as_posix() for tag, one in runs.items()}
    return recipe.with_language_adapters(places) if places else recipe


def trained(recipe: Recipe, run: Callable[[Recipe], object]) -> Recipe:
    """`placed`, once `run` has done what is not finished yet.

    Raises:
        GraftError: as `graftlm.run_recipe`; it says which language adapter it is about.
    """
    for tag, one in language_runs(recipe).items():
        try:
            run(one)
        except GraftError as error:
            key = f"adapter.language_adapters.{tag}"
            raise _of(error, f"{recipe.origin(key)}: the language adapter of {tag}") from error
    return placed(recipe)


def _settings(recipe: Recipe) -> list[str]:
    found = [(".".join(path), value) for path, value in yaml_lines.flatten(recipe.adapter.language_training)]
    for key, _ in found:
        taken = [one for one in _TAKEN if f"{key}.".startswith(f"{one}.")]
        if taken:
            raise RecipeError(
                f"{taken[0]} of a language adapter follows from the recipe itself",
                found=key,
                allowed="such as training.max_steps, adapter.reduction_factor, data.text, seed",
            )
    return [f"{key}={json.dumps(value)}" for key, value in found]


def _overrides(recipe: Recipe, tag: str, text: LanguageText) -> list[str]:
    plain = text.model_dump(mode="json")
    values: dict[str, Any] = {
        "name": f"language-{tag}",
        "model": recipe.model,
        "source": tag,
        "data.train": plain["train"],
        "data.dev": plain["dev"],
        "data.test": {tag: plain["test"]},
        "adapter.kind": recipe.adapter.kind,
        "output.folder": recipe.output.folder,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _of(error: GraftError, what: str) -> GraftError:
    """The same error with what it is about; a run of ours gets another folder, not another name."""
    problem = error.problem.removeprefix("override: ")
    fix = error.fix and error.fix.replace("name=ANOTHER_NAME", "output.folder=ANOTHER_FOLDER")
    return type(error)(f"{what}: {problem}", found=error.found, allowed=error.allowed, fix=fix)
