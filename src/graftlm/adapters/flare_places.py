"""Where FLARE fuses: the query and value projection of each layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from graftlm.architectures import describe
from graftlm.errors import ModelError

# Paths in a layer; both read the same tensor.
QUERY_AND_VALUE = (
    ("attention.self.query", "attention.self.value"),  # BERT, RoBERTa, XLM-R
    ("attention.q_lin", "attention.v_lin"),  # DistilBERT
    ("self_attn.q_proj", "self_attn.v_proj"),  # Llama, Qwen, Mistral, Gemma
    ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"),  # T5, mT5
)


class Place(NamedTuple):
    """Query and value projection of a layer: their paths in the model, and the ends of names that find all of them."""

    query: str
    value: str

    @property
    def ends(self) -> set[str]:
        return {path.rpartition(".")[2] for path in self}


def places_of(model: nn.Module) -> list[Place]:
    """Where a model fuses, bottom first; in an encoder-decoder in the encoder's self-attention.

    Raises:
        ModelError: a layer without a query and a value projection of its own; a model that reads more than text.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ModelError(
            "FLARE fuses texts, and this model reads images or sounds too.",
            found=type(model).__name__,
            allowed="its text model alone",
            fix="for Gemma 3: Gemma3ForCausalLM.from_pretrained(…, key_mapping={r'^language_model\\.': ''})",
        )
    found = []
    for layer in describe(model).layers:
        if layer.stack == "decoder":
            continue
        modules = dict(layer.module.named_modules())
        pair = next((pair for pair in QUERY_AND_VALUE if set(pair) <= modules.keys()), None)
        if pair is None:
            raise ModelError(
                f"FLARE knows no query and value projection in a {type(layer.module).__name__}.",
                found=f"{layer.name}: {', '.join(name for name, _ in layer.module.named_children())}",
                allowed=[" and ".join(pair) for pair in QUERY_AND_VALUE],
                fix="a model with separate layers for queries and values; GPT-2 and ModernBERT have one for both",
            )
        found.append(Place(*(f"{layer.name}.{path}" for path in pair)))
    return found
