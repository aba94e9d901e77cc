"""The dropouts of a PEFT model's adapters, one block for each wrapped module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graftlm.architectures import describe, unwrapped
from graftlm.errors import ModelError
from graftlm.training.dropout.sites import Block, Site, canonical


def has_adapters(backbone: nn.Module) -> bool:
    """Whether any module of it carries an adapter with a dropout."""
    return any(_slots(backbone))


def adapter_sites(model: nn.Module, backbone: nn.Module, modules: Sequence[Block], adapter: str | None) -> list[Block]:
    """One block for each module that the adapter wraps, of the tensors of all linear layers in it.

    Args:
        model: with everything around the backbone.
        backbone: see `find_sites`.
        modules: its linear layers, as they were measured.
        adapter: the adapter's name; None: the active one, of a stack the one on top.

    Raises:
        ModelError: no adapter of this name, no module with an adapter's dropout, or one on a module without scores.
    """
    slots = list(_slots(backbone))
    names = list(dict.fromkeys(name for _, _, _, slot in slots for name in slot))
    if adapter is not None and slots and adapter not in names:
        raise ModelError("the model has no adapter of this name", found=f"adapter={adapter!r}", allowed=names)
    inside = {id(module) for module in backbone.modules()}
    for path, wrapper, name, slot in _slots(model):
        if id(wrapper) not in inside and _chosen(wrapper, adapter) in slot:
            raise _not_measured(f"{path}.{name} ({type(unwrapped(wrapper)).__name__}, outside the layers)")
    layers = [layer.name for layer in describe(backbone).layers]
    found = []
    for path, wrapper, name, slot in slots:
        chosen = _chosen(wrapper, adapter)
        if chosen not in slot:
            continue  # this adapter does not wrap this module
        wrapped = canonical(path)
        tensors = [
            tensor
            for block in modules
            if block.name == wrapped or block.name.startswith(f"{wrapped}.")
            for tensor in block.tensors
        ]
        layer = next((layer for layer in layers if wrapped.startswith(f"{layer}.")), None)
        if not tensors or layer is None:
            raise _not_measured(f"{path}.{name}.{chosen}")
        site = Site(f"{path}.{name}.{chosen}", slot, chosen, slot[chosen])
        found.append(Block(wrapped, wrapped.removeprefix(f"{layer}."), tuple(tensors), (site,)))
    if not found:
        raise ModelError(
            "no adapter was found whose dropout could be guided",
            found=type(backbone).__name__,
            allowed="adapters with a dropout for each module: LoRA, FLARE, bottleneck adapters, neutral residues",
            fix="get_peft_model(model, LoraConfig(…)) first; or apply(model, on='model') for the model's own dropouts",
        )
    return found


def _slots(model: nn.Module) -> Iterator[tuple[str, Any, str, nn.ModuleDict]]:
    """Path and module that PEFT put around another, with the name of its dropouts and these by adapter."""
    for path, wrapper in model.named_modules():
        if "base_layer" not in wrapper._modules or not hasattr(wrapper, "active_adapters"):
            continue
        if isinstance(unwrapped(wrapper), nn.Embedding):
            continue  # LoRA holds a dropout there that it never calls
        for name, slot in wrapper.named_children():
            if name.endswith("dropout") and isinstance(slot, nn.ModuleDict):
                yield path, wrapper, name, slot


def _chosen(wrapper: Any, adapter: str | None) -> str:
    """The adapter that is asked for, or the one on top; "" where none is active, which no slot has."""
    return adapter or (wrapper.active_adapters[-1] if wrapper.active_adapters else "")


def _not_measured(found: str) -> ModelError:
    return ModelError(
        "an adapter's dropout has no block: the module that it wraps was not measured",
        found=found,
        allowed="adapters on modules inside the transformer layers",
        fix="leave this module out of target_modules; or apply(model, on='model') for the model's own dropouts",
    )
