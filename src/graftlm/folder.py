"""Models in and out: the pretrained model of a recipe, the adapter on it, and the run folder that holds the result."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm import language_adapters, source_encoder
from graftlm import recipe as recipes
from graftlm.adapted import Loaded, with_adapter
from graftlm.architectures import describe
from graftlm.errors import DataError, GraftError, ModelError
from graftlm.language_adapters import ADAPTER
from graftlm.new_tokens import extend_model
from graftlm.recipe import Recipe
from graftlm.starter import MODELS, starter_model
from graftlm.tasks import Task, check_length, task_for

MODEL, MERGED = "model", "merged"
RESOLVED = "recipe.resolved.yaml"


def locate(recipe: Recipe) -> str:
    """What `from_pretrained` is given: a folder for the shipped and for local models, else the hub id.

    Raises:
        ModelError: a local path without a model.
    """
    if recipe.model in MODELS:
        return str(starter_model(recipe.model))
    local = recipe.path(recipe.model)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{recipe.origin('model')}: the folder holds no model (config.json)", found=local)
        return str(local)
    if recipe.model.startswith((".", "/", "~")) or recipe.model.count("/") > 1:
        raise ModelError(
            f"{recipe.origin('model')}: there is no such model folder",
            found=local,
            allowed=f"{', '.join(MODELS)}, a local folder (relative to the recipe), or a hub id OWNER/NAME",
        )
    return recipe.model


@contextmanager
def _explained(recipe: Recipe, where: str) -> Iterator[None]:
    try:
        yield
    except GraftError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{recipe.origin('model')}: the model cannot be loaded: {first}",
            found=where,
            fix="graftlm check RECIPE; code from the hub is never run (trust_remote_code is off)",
        ) from error


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    where = locate(recipe)
    with _explained(recipe, where):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        if recipe.task == "token_classification" and getattr(tokenizer, "add_prefix_space", None) is False:
            # byte-level tokenizers take lists of words only when each word begins with a space
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, add_prefix_space=True
            )
    if not tokenizer.is_fast:
        raise ModelError("graftlm needs a fast tokenizer, for offsets and words", found=type(tokenizer).__name__)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, pieces: dict[int, list[int]] | None = None
) -> Loaded:
    """The pretrained model with a head for the task and the recipe's adapter.

    `pieces` are those of new tokens, see `graftlm.new_tokens`: they get rows, which train.

    Weights are float32 whatever the file holds: `training.precision` says in what the arithmetic is done.

    Raises:
        ModelError: no such model, no head of this kind for it, or a checkpoint without the weights of its layers.
        RecipeError: target modules that are not in the model, or `auto` for a family that PEFT has no default for.
    """
    where = locate(recipe)
    auto = getattr(transformers, task.auto_class)
    with _explained(recipe, where), _quiet():
        task.check_model(transformers.AutoConfig.from_pretrained(where, trust_remote_code=False), where)
        # a checkpoint with a head for other labels gets a fresh one; what is fresh in the layers is an error below
        model, info = auto.from_pretrained(
            where,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **task.model_arguments(),
        )
    check_length(recipe, tokenizer, model.config)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    missing = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    fresh = _fresh_modules(model, missing)
    _refuse_fresh_layers(model, missing, where)
    task.check_fresh(fresh, where)
    return with_adapter(recipe, model, task, fresh, extend_model(model, pieces) if pieces else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and its report on fresh weights, for which `Loaded.fresh` stands."""
    talk = transformers.utils.logging
    verbosity, bar = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(verbosity)
        if bar:
            talk.enable_progress_bar()


def _fresh_modules(model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """The highest modules all of whose parameters are missing from the checkpoint."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(remove_duplicate=False)]
        inside = any(name.startswith(f"{one}.") for one in chosen)
        if name and own and not inside and missing.issuperset(own):
            chosen.append(name)
    return tuple(chosen)


def _refuse_fresh_layers(model: PreTrainedModel, missing: set[str], where: str) -> None:
    architecture = describe(model)
    for module in [*(layer.name for layer in architecture.layers), *architecture.embeddings]:
        lost = sorted(key for key in missing if key.startswith(f"{module}."))
        if lost:
            raise ModelError(
                "the checkpoint does not have the weights of all layers, so the model would be partly random",
                found=f"{where}: {', '.join(lost[:4])}" + (f" and {len(lost) - 4} more" if len(lost) > 4 else ""),
            )


@contextmanager
def renamed_into(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp's 0700 would hide a shared run folder's part
        if target.exists():  # a folder cannot be replaced in one step: what a stopped run left goes first
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(
    model: PreTrainedModel | peft.PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> Path:
    """Writes `adapter/`, or `model/` in full fine-tuning, with tokenizer and label names; returns the folder."""
    adapted = isinstance(model, peft.PeftModel)
    target = folder / (ADAPTER if adapted else MODEL)
    with renamed_into(target) as temporary:
        if adapted:
            # without embeddings: no adapter changes them, and PEFT would ask the hub whether they have grown
            model.save_pretrained(temporary, save_embedding_layers=False, selected_adapters=[language_adapters.TASK])
            model.config.save_pretrained(temporary)  # the label names, which an adapter does not hold
            file = temporary / "adapter_config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            # PEFT notes where the base lies on this machine
            config["base_model_name_or_path"] = recipe.relocated(folder).model
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run's own is one folder up
    return target


def load(folder: str | os.PathLike[str], *, tokenizer: bool = False, language: str | None = None) -> Any:
    """The model that a run made, ready for inference: its adapter on its base, or the fully fine-tuned model.

    Args:
        folder: a run folder, such as `runs/demo`.
        tokenizer: also return the tokenizer.
        language: tag of the language adapter below the task adapter, of a recipe that has such; None: the source's.

    Returns:
        The model in evaluation mode; with `tokenizer=True` the pair (model, tokenizer). `model.config.id2label` has the
        label names.

    Raises:
        DataError: the folder holds no finished run, or the recipe has no adapter of this language.
        ModelError: the base model or a language adapter cannot be found.
    """
    folder = Path(folder)
    if not (folder / RESOLVED).is_file():
        raise DataError("there is no run here", found=folder, fix="graftlm train RECIPE makes one")
    recipe = recipes.load_recipe(folder / RESOLVED)
    weights = next((folder / name for name in (ADAPTER, MODEL) if (folder / name).is_dir()), None)
    if weights is None:
        raise DataError("the run has not come to its end", found=folder, fix=f"graftlm train {folder / RESOLVED}")
    task = task_for(recipe)
    auto = getattr(transformers, task.auto_class)
    made = transformers.AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    base = str(weights) if weights.name == MODEL else locate(recipe)
    with _explained(recipe, base), _quiet():
        config = transformers.AutoConfig.from_pretrained(weights, trust_remote_code=False)
        grown = config.vocab_size
        if recipe.new_tokens:
            config.vocab_size = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False).vocab_size
        model = auto.from_pretrained(
            base, config=config, trust_remote_code=False, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        if grown > config.vocab_size:
            model.resize_token_embeddings(grown, mean_resizing=False)  # the adapter holds the new rows
        if weights.name == ADAPTER:
            model = peft.PeftModel.from_pretrained(model, str(weights), adapter_name=language_adapters.TASK)
    if encoder := source_encoder.load_encoder(recipe):
        encoder.attach(model)
    if recipe.adapter.language_adapters:
        language_adapters.add(model, recipe)
        language_adapters.use(model, recipe, language or recipe.source, inference_mode=True)
    elif language is not None:
        raise DataError(
            "the run has no language adapters to choose from",
            found=language,
            fix="adapter.language_adapters in its recipe",
        )
    model.eval()
    return (model, made) if tokenizer else model


def merge(run: str | os.PathLike[str]) -> Path:
    """Writes the model of a finished LoRA run as one checkpoint without an adapter, for a recipe's `model`.

    Args:
        run: a run folder, such as `runs/english`.

    Returns:
        The folder `merged` in it, with model and tokenizer.

    Raises:
        DataError: the folder holds no finished run.
        ModelError: an adapter that cannot be merged.
    """
    model, tokenizer = load(run, tokenizer=True)
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    target = Path(run) / MERGED
    with renamed_into(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target
