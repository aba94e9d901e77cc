"""A recipe's adapter on a pretrained model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import transformers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import nn
from transformers import PreTrainedModel

from graftlm import language_adapters, source_encoder
from graftlm.adapters.bottleneck import BottleneckConfig
from graftlm.adapters.flare import FlareConfig
from graftlm.adapters.neutral_config import NeutralResiduesConfig
from graftlm.architectures import describe
from graftlm.errors import RecipeError
from graftlm.recipe import Recipe
from graftlm.tasks import Task

Rows = dict[str, list[int]] | None


@dataclass(frozen=True)
class Loaded:
    """A pretrained model with the recipe's adapter on it.

    Attributes:
        model: in float32, ready for a Trainer.
        fresh: modules that the checkpoint does not have: the task's head, as a rule. They train and are saved.
        targets: modules that carry LoRA, as PEFT names them; empty for other methods.
    """

    model: nn.Module
    fresh: tuple[str, ...]
    targets: tuple[str, ...]


def with_adapter(recipe: Recipe, model: PreTrainedModel, task: Task, fresh: tuple[str, ...], rows: Rows) -> Loaded:
    """Puts the adapter on; `rows` of the embeddings train too: PEFT's ``trainable_token_indices``."""
    match recipe.adapter.method:
        case "none":
            return Loaded(model, fresh, ())
        case "bottleneck":
            return _with_bottleneck(recipe, model, task, fresh)
        case "flare":
            return _with_flare(recipe, model, task, fresh)
        case "neutral_residues":
            loaded = _with_neutral_residues(recipe, model, task, fresh, rows)
        case _:
            loaded = _with_lora(recipe, model, task, fresh, rows)
    if rows:  # or PEFT would see that the vocabulary has grown, and put all embeddings into each checkpoint
        adapted: Any = loaded.model
        adapted.active_peft_config.base_model_name_or_path = adapted.get_base_model().name_or_path = None
    return loaded


def _with_lora(recipe: Recipe, model: PreTrainedModel, task: Task, fresh: tuple[str, ...], rows: Rows) -> Loaded:
    targets = _asked_targets(recipe, model)
    if targets is None:
        family = model.config.model_type
        if family not in LORA_TARGETS:
            linear = {re.sub(r".*\.", "", name) for name, part in _layer_linears(model)}
            raise RecipeError(
                f"PEFT has no default for the query and value projections of {family!r}",
                found="adapter.target_modules: auto",
                allowed=sorted(linear),
                fix=f"adapter.target_modules=[{', '.join(sorted(linear)[:2])}]",
            )
        targets = list(LORA_TARGETS[family])
        _check_targets(recipe, model, targets)
    # GPT-2's projections are stored transposed; PEFT sets this itself, with a warning
    chosen = [part for name, part in model.named_modules() if name.endswith(tuple(targets))]
    transposed = any(isinstance(part, transformers.pytorch_utils.Conv1D) for part in chosen)
    config = peft.LoraConfig(
        task_type=task.peft_type,
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha,
        lora_dropout=recipe.adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        # PEFT adds the head by task type; whatever else is fresh would be random again after loading
        modules_to_save=list(fresh) or None,
        trainable_token_indices=rows,
    )
    adapted = peft.get_peft_model(model, config)
    return Loaded(adapted, fresh, tuple(sorted(adapted.peft_config["default"].target_modules)))


def _with_bottleneck(recipe: Recipe, model: PreTrainedModel, task: Task, fresh: tuple[str, ...]) -> Loaded:
    chosen = recipe.adapter
    config = BottleneckConfig(
        task_type=task.peft_type,
        kind=chosen.kind,
        reduction_factor=chosen.reduction_factor if chosen.bottleneck_size is None else None,
        bottleneck_size=chosen.bottleneck_size,
        activation=chosen.activation,
        dropout=chosen.dropout,
        scaling=chosen.scaling,
        invertible=chosen.invertible,
        modules_to_save=list(fresh) or None,
    )
    adapted = peft.get_peft_model(model, config, adapter_name=language_adapters.TASK)
    language_adapters.add(adapted, recipe)
    return Loaded(adapted, fresh, ())


def _with_flare(recipe: Recipe, model: PreTrainedModel, task: Task, fresh: tuple[str, ...]) -> Loaded:
    chosen, encoder = recipe.adapter, source_encoder.load_encoder(recipe)
    config = FlareConfig(
        task_type=task.peft_type,
        r=chosen.r,
        lora_alpha=chosen.alpha,
        lora_dropout=chosen.dropout,
        target_modules=_asked_targets(recipe, model),
        fusion=chosen.fusion,
        source_layer=chosen.source_layer,
        align=chosen.align,
        encoder_width=encoder.width if encoder else None,
        modules_to_save=list(fresh) or None,
    )
    adapted = peft.get_peft_model(model, config)
    if encoder:
        encoder.attach(adapted)
    return Loaded(adapted, fresh, tuple(sorted(adapted.peft_config["default"].target_modules)))


def _with_neutral_residues(
    recipe: Recipe, model: PreTrainedModel, task: Task, fresh: tuple[str, ...], rows: Rows
) -> Loaded:
    chosen, share = recipe.adapter, recipe.adapter.original_share
    config = NeutralResiduesConfig(
        task_type=task.peft_type,
        added_parameters=chosen.added_parameters,
        counts=chosen.counts,
        gate=chosen.gate,
        penalty=chosen.penalty,
        penalty_weight=chosen.penalty_weight,
        original_share=share if isinstance(share, float) else None,  # auto: once it is counted
        penalty_through_input=chosen.penalty_through_input,
        initialisation=chosen.initialisation,
        dropout=chosen.dropout,
        activation=chosen.activation,
        layers_to_transform=None if chosen.layers_to_transform is None else list(chosen.layers_to_transform),
        sparse_inference=chosen.sparse_inference,
        trainable_token_indices=rows,
        modules_to_save=list(fresh) or None,
    )
    return Loaded(peft.get_peft_model(model, config), fresh, ())


def _asked_targets(recipe: Recipe, model: PreTrainedModel) -> list[str] | None:
    """The modules that the recipe names; None: the method's own choice."""
    match recipe.adapter.target_modules:
        case "auto":
            return None
        case "all-linear":  # PEFT's own would take heads too
            return [name for name, _ in _layer_linears(model)]
        case names:
            _check_targets(recipe, model, names)
            return list(names)


def _check_targets(recipe: Recipe, model: PreTrainedModel, targets: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise RecipeError(
                f"{recipe.origin('adapter.target_modules')}: the model has no module of this name",
                found=target,
                allowed=sorted({re.sub(r".*\.", "", name) for name, _ in _layer_linears(model)}),
            )


def _layer_linears(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    prefixes = tuple(f"{layer.name}." for layer in describe(model).layers)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        (name, part) for name, part in model.named_modules() if name.startswith(prefixes) and isinstance(part, kinds)
    ]
