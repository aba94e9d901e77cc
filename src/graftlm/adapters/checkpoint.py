"""Whether a saved adapter fits the model it is to be loaded into: every tensor, and no other.

PEFT loads what has a place and passes over the rest in silence.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from graftlm.adapters.layer import AdapterLayer
from graftlm.errors import ModelError

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """Where the configuration of an adapter was read from: a folder or hub id, and what was asked of the hub."""

    where: str
    options: dict[str, Any]

    def weights(self) -> dict[str, Tensor] | None:
        """The adapter's tensors; None in a folder that holds a configuration only.

        Raises:
            ModelError: a file that cannot be read.
        """
        folder = os.path.join(self.where, self.options.get("subfolder") or "")
        if os.path.isdir(folder):
            files = [os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
            if not any(map(os.path.isfile, files)):
                return None
        options = {key: value for key, value in self.options.items() if value is not None}
        try:
            return load_peft_weights(self.where, device="cpu", **options)
        except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
            raise ModelError(
                f"The adapter's file cannot be read: {error}.",
                found=self.where,
                fix="copy or download it again; a safetensors file that was cut short cannot be saved",
            ) from error


def check_file(config: Any, model: nn.Module, leaves: Shapes, width: int, *, headless: bool) -> None:
    """Holds the file that a configuration was read with against the model, before the model is touched.

    Args:
        config: of the adapter; its `modules_to_save` is emptied where the file brings no head and need not.
        model: without the adapter.
        leaves: names, from the base model, and shapes of the adapter's tensors.
        width: of the model.
        headless: whether the file may lack every tensor of the heads: a language adapter that joins a task adapter.

    Raises:
        ModelError: a tensor that is missing, left over or of another shape, or a file that cannot be read.
    """
    origin: Origin = config._read_from
    found = origin.weights()
    if found is None or getattr(model, "_checkpoint_conversion_mapping", None):
        return
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in found.items()}
    heads = _heads(model, config.modules_to_save or ())
    if headless and config.task_type is None and not shapes.keys() & heads.keys():
        config.modules_to_save, heads = None, {}
    there = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }  # resized embeddings are saved too
    _compare(shapes, {**leaves, **heads}, {**there, **leaves, **heads}, origin.where, width)


def check_loaded(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Holds tensors that are about to be loaded, under the names of the model, against the adapter that is there.

    Raises:
        ModelError: as `check_file`.
    """
    there = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = {
        f"{name}.{role}.{adapter}.{part}".removeprefix(PREFIX): tuple(parameter.shape)
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer)
        for role, leaf in module.leaves(adapter).items()
        for part, parameter in leaf.named_parameters()
    }
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state.items()}
    _compare(shapes, needed, there, f"the state dict for {adapter!r}", None)


def _compare(found: Shapes, needed: Shapes, allowed: Shapes, where: str, width: int | None) -> None:
    wrong = {name: shape for name, shape in found.items() if name in allowed and shape != allowed[name]}
    widths = {shape[1] for name, shape in wrong.items() if name.endswith("_down.weight")}
    if width is not None and widths - {width}:
        raise ModelError(
            "The adapter was made for a base model of another width.",
            found=f"{where}: width {', '.join(map(str, sorted(widths)))}",
            allowed=f"{width}, the width of this model",
            fix="load it into the model that its adapter_config.json names; dataclasses.replace(config) makes a "
            "configuration for a new adapter",
        )
    if wrong:
        shown = _listed(f"{name} {shape} instead of {allowed[name]}" for name, shape in wrong.items())
        raise ModelError("Tensors of the adapter have other shapes than the model needs.", found=f"{where}: {shown}")
    if missing := needed.keys() - found.keys():
        raise ModelError(
            f"The adapter lacks {len(missing)} of the {len(needed)} tensors that its configuration asks for.",
            found=f"{where}; missing: {_listed(sorted(missing))}",
            fix="the base model and the file that the adapter was saved with; PEFT would leave these at random",
        )
    if extra := found.keys() - allowed.keys():
        raise ModelError(
            f"The adapter holds {len(extra)} tensors that have no place in this model.",
            found=f"{where}; left over: {_listed(sorted(extra))}",
            fix="the base model and the configuration that the adapter was saved with",
        )


def _heads(model: nn.Module, wanted: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `modules_to_save` saves, found by PEFT's rule: the end of a module's name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.endswith(end) for end in wanted):
            inner = getattr(module, "original_module", module)
            found |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in inner.state_dict().items()}
    return found


def _listed(names: Iterable[str], most: int = 4) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
