"""How far the gates of neutral residues are open, layer by layer, on text of several kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from graftlm.adapters.injected_loss import counted_tokens
from graftlm.adapters.neutral import NeutralResidues
from graftlm.errors import DataError, ModelError


@dataclass(frozen=True)
class Gate:
    """One layer's gate on one kind of text.

    Attributes:
        layer: name of the module that carries the block.
        domain: the kind of text, as it was given.
        tokens: how many were looked at.
        open: share of them with a gate above zero; None without a gate.
        value: mean of what the gate multiplies with; None without a gate.
        size: mean of ‖r‖₁ / d, the part of the penalty term that comes from this layer.
    """

    layer: str
    domain: str
    tokens: int
    open: float | None
    value: float | None
    size: float


@torch.no_grad()
def gate_statistics(model: nn.Module, domains: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Gate]:
    """How far the gates are open, for each layer and kind of text, layers bottom first.

    Args:
        model: with neutral residues; the adapter on top of the active ones is looked at. Which of its modules are in
            training mode is as before in the end.
        domains: name → batches, such as ``{"eng": batches, "dan": batches}``; a batch is what the model is called with.
            Tokens count as they do in the penalty: those that predict a label in a causal LM with labels, else all that
            are not padding.

    Raises:
        ModelError: no active neutral residues.
        DataError: a domain without a token.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from graftlm import NeutralResiduesConfig
        >>> config = LlamaConfig(
        ...     num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=10
        ... )
        >>> model = get_peft_model(LlamaForCausalLM(config), NeutralResiduesConfig())
        >>> (gate,) = gate_statistics(model, {"eng": [{"input_ids": torch.tensor([[1, 2, 3]])}]})
        >>> gate.layer, gate.domain, gate.tokens, gate.size
        ('model.layers.0.mlp', 'eng', 3, 0.0)
    """
    layers = [module for module in model.modules() if isinstance(module, NeutralResidues) and module.active_here]
    if not layers:
        raise ModelError("there are no active neutral residues in the model", found=type(model).__name__)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device, modes = next(model.parameters()).device, [(module, module.training) for module in model.modules()]
    found = []
    model.eval()
    try:
        for name, batches in domains.items():
            sums = {layer.place: torch.zeros(4, dtype=torch.float64) for layer in layers}
            for batch in batches:
                here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                here.pop("domain", None)
                tokens = counted_tokens(base, (), here)
                with _counting(layers, tokens, sums):
                    model(**here)
            for layer in layers:
                count, opened, value, size = sums[layer.place].tolist()
                if not count:
                    raise DataError(f"there is no token in the text of {name}", found=layer.place)
                share, mean = (opened / count, value / count) if layer.gated else (None, None)
                found.append(Gate(layer.place, name, int(count), share, mean, size / count))
    finally:
        for module, training in modes:
            module.training = training
    return found


@contextmanager
def _counting(layers: list[NeutralResidues], tokens: dict[str, Tensor], sums: dict[str, Tensor]) -> Iterator[None]:
    def seen(layer: NeutralResidues, gate: Tensor | None, residue: Tensor) -> None:
        mask = tokens[layer.stack].to(residue.device)
        opened, value = (mask.sum() * 0, mask.sum() * 0) if gate is None else ((gate[mask] > 0).sum(), gate[mask].sum())
        size = residue[mask].abs().mean(-1).sum()
        sums[layer.place] += torch.stack([part.double().cpu() for part in (mask.sum(), opened, value, size)])

    for layer in layers:
        layer.on_gate = seen
    try:
        yield
    finally:
        for layer in layers:
            layer.on_gate = None
