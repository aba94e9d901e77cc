"""Language adapters under the task adapter of a recipe (MAD-X): where they lie, and which one is active."""

from typing import Any

import peft

from graftlm.adapters.bottleneck import BottleneckConfig
from graftlm.adapters.stack import stack
from graftlm.errors import DataError, ModelError
from graftlm.language_runs import placed
from graftlm.recipe import Recipe

TASK = "default"  # PEFT's name of a model's first adapter, here the task's
ADAPTER = "adapter"  # its folder in a run


def name_of(language: str) -> str:
    """The name that the adapter of a language has in the model."""
    return f"lang_{language}"


def add(model: peft.PeftModel, recipe: Recipe) -> None:
    """Loads every language adapter of the recipe beside the task adapter, and puts that of the source below it.

    Raises:
        ModelError: there is no adapter where the recipe says, one of another method, or one that does not fit.
        SetupError: the language adapters are of another kind than the task adapter.
    """
    recipe = placed(recipe)
    for language in recipe.adapter.language_adapters:
        where = _locate(recipe, language)
        try:
            config = peft.PeftConfig.from_pretrained(where)
            if isinstance(config, BottleneckConfig):
                model.load_adapter(where, name_of(language))
                # PEFT looks there, and at the hub where there is nothing, whenever a checkpoint is saved
                base = model.peft_config[TASK].base_model_name_or_path
                model.peft_config[name_of(language)].base_model_name_or_path = base
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _missing(recipe, language, where, first) from error
        if not isinstance(config, BottleneckConfig):
            raise _missing(recipe, language, where, f"{config.peft_type} is no bottleneck adapter")
    use(model, recipe, recipe.source)


def use(model: Any, recipe: Recipe, language: str, *, inference_mode: bool = False) -> None:
    """Puts the adapter of a language below the task adapter; without language adapters nothing is done.

    Raises:
        DataError: the recipe has no adapter for this language.
    """
    known = recipe.adapter.language_adapters
    if not known:
        return
    if language not in known:
        raise DataError(
            "the run has no language adapter for this language",
            found=language,
            allowed=known,
            fix=f"adapter.language_adapters.{language}=FOLDER or ={{train: TEXT, test: HELD_OUT_TEXT}} in the recipe; "
            f"to train one: {recipe.adapter.how_to_make(language)}",
        )
    stack(model, [name_of(language), TASK], inference_mode=inference_mode)


def _locate(recipe: Recipe, language: str) -> str:
    """A folder with an adapter, or a hub id."""
    text = recipe.adapter.language_folders[language]
    local = recipe.path(text)
    for folder in (local / ADAPTER, local):
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    if local.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        reason = "the folder holds no adapter" if local.exists() else "no such folder"
        raise _missing(recipe, language, str(local), reason)
    return text


def _missing(recipe: Recipe, language: str, found: str, reason: str) -> ModelError:
    return ModelError(
        f"{recipe.origin(f'adapter.language_adapters.{language}')}: the language adapter cannot be loaded: {reason}",
        found=found,
        allowed="the folder of a finished run, a folder with a bottleneck adapter, or a hub id OWNER/NAME",
        fix=f"to train it: {recipe.adapter.how_to_make(language)}",
    )
