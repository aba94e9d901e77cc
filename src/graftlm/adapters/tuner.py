"""PEFT's face of our methods that put layers beside sublayers of a model, and where these lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from graftlm.adapters import checkpoint
from graftlm.adapters.layer import AdapterLayer, no_merge
from graftlm.architectures import Sublayer, describe, sublayers
from graftlm.errors import ModelError, SetupError

KINDS = {"pfeiffer": ("ffn",), "houlsby": ("attention", "ffn"), "parallel": ("ffn",)}
_HEADS = {  # what PEFT trains with a first adapter of these tasks
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


class SublayerModel(BaseTuner):
    """Puts adapters where they belong, stacks them, and takes them off again.

    A method's `_prepare_model` sets `_places`, by name, and `_width`, and finds everything that can be wrong before
    anything is changed; its `_layer_for` makes the layer that takes the place of a module.
    """

    tuner_layer_cls = AdapterLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _places: dict[str, Sublayer]
    _width: int

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _give_head(self, peft_config: PeftConfig) -> bool:
        """Whether this is a further adapter; its head trains and is saved, as PEFT does for the first one."""
        further = len(self.peft_config) > 1
        if further and peft_config.task_type in _HEADS and not peft_config.modules_to_save:
            peft_config.modules_to_save = list(_HEADS[peft_config.task_type])
        return further

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        return check_target_module_exists(selection(peft_config, set(self._places)), key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, AdapterLayer) else self._layer_for(target, current_key)
        layer.update_layer(adapter_name, peft_config, self._width)
        if layer is not target:
            layer.set_adapter([name for top in self.active_adapters for name in self.stacked(top)])
            self._replace_module(parent, target_name, layer, target)

    def _layer_for(self, target: nn.Module, key: str) -> AdapterLayer:
        """The layer that takes the place of a module of the base model."""
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, AdapterLayer):
            child.release()

    def stacked(self, adapter: str) -> list[str]:
        """The adapter and those that `graftlm.stack` has put below it, bottom first."""
        return [*self.__dict__.get("_below", {}).get(adapter, ()), adapter]

    def stack(self, adapters: Sequence[str], inference_mode: bool = False) -> None:
        """Puts all but the last one below that, and activates it; see `graftlm.stack`."""
        self.__dict__.setdefault("_below", {})[adapters[-1]] = list(adapters[:-1])
        self.set_adapter(adapters[-1], inference_mode=inference_mode)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates an adapter with those below it; of several, bottom first, makes a stack."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            self.stack(names, inference_mode)
            return
        super().set_adapter(names[0] if names else [], inference_mode=inference_mode)
        # PEFT and Trainer know the top one as the active adapter: they save, load and switch it by its name.
        for module in self.model.modules():
            if names and isinstance(module, AdapterLayer):
                module.set_adapter(self.stacked(names[0]), inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, from under others too."""
        super().delete_adapter(adapter_name)
        below = self.__dict__.get("_below", {})
        below.pop(adapter_name, None)
        for names in below.values():
            if adapter_name in names:
                names.remove(adapter_name)

    def _check_merge_allowed(self) -> None:
        raise no_merge()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT takes `adapter_names` off the call, whoever heeds it or not."""
        if kwargs.get("adapter_names") is not None:
            raise SetupError(
                "These adapters are the same for all rows of a batch.",
                found=f"adapter_names={kwargs['adapter_names']}"[:80],
                fix="model.set_adapter(NAME) and a batch for each; with model.disable_adapter(): … for __base__",
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        checkpoint.check_loaded(model, adapter_name, mapped)
        return mapped


def width_of(model: nn.Module) -> int:
    """The width d of the residual stream."""
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None and (text := getattr(config, "text_config", None)) is not None:
        name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(text, "model_type", ""), "its text model")
        raise ModelError(
            "An adapter goes into the text model alone, and this one reads images or sounds too.",
            found=type(model).__name__,
            allowed=name,
            fix=f"text = {name}(model.config.text_config); text.model, text.lm_head = model.model.language_model, "
            "model.lm_head",
        )
    if not isinstance(width, int):
        raise ModelError(
            "The width of this model is not known.", found=type(model).__name__, allowed="config.hidden_size"
        )
    return width


def places(model: nn.Module, config: Any) -> list[Sublayer]:
    """Where `config` puts its adapters in `model`.

    Raises:
        ModelError: an unknown structure, a layer number that the model does not have, a name that excludes nothing, or
            no place left.
    """
    found = [place for place in sublayers(model) if place.part in KINDS[config.kind]]
    if (wanted := config.layers_to_transform) is not None:
        numbers = [wanted] if isinstance(wanted, int) else list(wanted)
        available = sorted({layer.index for layer in describe(model).layers})
        if unknown := sorted(set(numbers) - set(available)):
            raise ModelError(
                "The model has no layer of this number.",
                found=f"layers_to_transform={wanted}: {', '.join(map(str, unknown))}",
                allowed=f"{available[0]} to {available[-1]}",
            )
        found = [place for place in found if place.layer.index in numbers]
    excludes = config.exclude_modules or []
    for one in [excludes] if isinstance(excludes, str) else excludes:
        rule = selection(config, {place.name for place in found})
        rule.exclude_modules, rule.modules_to_save = (one if isinstance(excludes, str) else [one]), None
        if all(check_target_module_exists(rule, place.name) for place in found):
            raise ModelError(
                "exclude_modules names no module that would have an adapter.",
                found=one,
                allowed=[place.name for place in found],
            )
    kept = selection(config, {place.name for place in found})
    left = [place for place in found if check_target_module_exists(kept, place.name)]
    if not left:
        raise ModelError(
            "No layer is left to put an adapter into.",
            found=f"layers_to_transform={wanted}, exclude_modules={config.exclude_modules}",
            allowed=[place.name for place in found] or None,
        )
    return left


def selection(config: Any, names: set[str]) -> SimpleNamespace:
    """What PEFT's own rule for excluding modules reads."""
    return SimpleNamespace(
        target_modules=names, exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save
    )
