"""What our PEFT layers have in common: they wrap a module of any kind, and a stack of them trains its top only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graftlm.errors import ModelError


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with adapters beside it.

    Leaves are flat, `PREFIX_ROLE.ADAPTER.weight`: PEFT loads deeper ones under their old name only. Of several active
    adapters, bottom first, the last one trains. Switching adapters off and on leaves what trains as it was, where
    PEFT's layers train everything afterwards (peft#3447).
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter: str, config: Any, width: int) -> None:
        """Adds one adapter for a model of this width."""
        raise NotImplementedError

    def release(self) -> None:
        """Called when the layer is taken off its module."""

    def leaves(self, adapter: str) -> dict[str, nn.Module]:
        """The trainable modules of one adapter in this layer: role → module; empty if it has none here."""
        found = {role: getattr(self, role) for role in self.adapter_layer_names}
        return {role: modules[adapter] for role, modules in found.items() if adapter in modules}

    @property
    def active_here(self) -> list[str]:
        """The active adapters that have weights in this layer, bottom first."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if self.leaves(name)]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters, bottom first; the last one trains unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for role in self.adapter_layer_names:
            for name, leaf in getattr(self, role).items():
                leaf.requires_grad_(names[-1:] == [name] and not inference_mode)
        self._freeze_non_trainable_peft_weights(names)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `no_merge`."""
        raise no_merge()

    def unmerge(self) -> None:
        """Nothing was ever merged."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple:
        weights = [p for p in base_layer.parameters() if p.is_floating_point()] or list(base_layer.parameters())
        return (weights[0].device, weights[0].dtype) if weights else (None, None)


def no_merge() -> ModelError:
    """The error of whoever asks PEFT to merge one of our adapters."""
    return ModelError(
        "A bottleneck adapter cannot be merged into the weights of its model: between its two projections lies a "
        "nonlinearity.",
        fix="keep the adapter beside the model (save_pretrained), or take it off: model.unload()",
    )


def new_linear(width_in: int, width_out: int, *, zero: bool) -> nn.Linear:
    """A projection with zero bias and weights of 0, or drawn with BERT's standard deviation of 0.02."""
    leaf = nn.Linear(width_in, width_out)
    with torch.no_grad():
        nn.init.zeros_(leaf.bias)
        if zero:
            nn.init.zeros_(leaf.weight)
        else:
            nn.init.normal_(leaf.weight, std=0.02)
    return leaf
