"""Activation checkpointing of a FLARE model: layers that are computed again find the source of their own call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from graftlm.adapters.flare_fusion import Source
from graftlm.errors import SetupError


class Replays:
    """Ties each checkpointed layer to the source of the call in which it was first computed."""

    def __init__(self) -> None:
        self.source: Source | None = None  # of the layer that is being computed
        self.running = False
        self._fuses = False  # whether a call that is to be trained ever had a source
        self._bound: list[tuple[nn.Module, Callable]] = []

    def bind(self, model: nn.Module, source: Source | None) -> None:
        """From now on, and until `release`, checkpointed layers of the model belong to this source."""
        self._fuses |= source is not None and torch.is_grad_enabled()
        if not (model.training and torch.is_grad_enabled()):
            return
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and getattr(module, "gradient_checkpointing", False):
                self._bound.append((module, function))
                module._gradient_checkpointing_func = partial(self._checkpoint, function, source)  # type: ignore[assignment]

    def release(self) -> None:
        """Leave the model's checkpointing as it was."""
        for module, function in self._bound:
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
        self._bound = []

    def refuse_others(self) -> None:
        """Raise where a layer is computed again by checkpointing that `bind` does not know.

        Raises:
            SetupError: its source would be lost.
        """
        if self._fuses and torch._C._current_graph_task_id() != -1:
            raise SetupError(
                "A layer is computed a second time for the backward pass, and its source is gone.",
                found="activation checkpointing that is not the model's own",
                fix="gradient_checkpointing=True in TrainingArguments, or model.activation_checkpointing_enable()",
            )

    def _checkpoint(self, function: Callable, source: Source | None, layer: Callable, *args: Any) -> Any:
        def run(*inner: Any) -> Any:
            before = self.source, self.running
            self.source, self.running = source, True
            try:
                return layer(*inner)
            finally:
                self.source, self.running = before

        return function(run, *args)
