"""A model's trainable parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from graftlm.architectures import describe
from graftlm.errors import SetupError

EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class TrainableLayers:
    """What trains in a model, in the order in which a signal passes through it.

    Attributes:
        names: short stable names, bottom first: "embeddings" where the input embeddings train, then "layer.0", … (in an
            encoder-decoder "encoder.0", …, "decoder.0", …). Layers in which nothing trains are left out.
        parameters: for each of `names`, its trainable parameters with their names in `model.named_parameters()`.
        head: the trainable parameters above or outside the layers: classifier, pooler, final norm, output matrix.
        tied: names of the head's parameters that are input embeddings as well (a shared output matrix). They train from
            the first step on, so the backward pass goes down to the input whatever is frozen between.
    """

    names: tuple[str, ...]
    parameters: dict[str, list[tuple[str, nn.Parameter]]]
    head: list[tuple[str, nn.Parameter]]
    tied: tuple[str, ...] = ()


def trainable_layers(model: nn.Module, layers: Sequence[str] | None = None) -> TrainableLayers:
    """Group the parameters of `model` that require a gradient now by the layer they belong to.

    Every trainable parameter is in exactly one group: one of the layers, "embeddings", or the head. In an
    encoder-decoder the encoder's final norm belongs to the encoder's top layer: the decoder reads it.

    Args:
        model: see `graftlm.describe`.
        layers: patterns that name the layers of a model whose structure is not recognised, see `graftlm.describe`.

    Raises:
        SetupError: nothing trains in any layer.
        ModelError: the layers cannot be found.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> adapted = get_peft_model(BertForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", r=2))
        >>> found = trainable_layers(adapted)
        >>> {name: sum(p.numel() for _, p in found.parameters[name]) for name in found.names}
        {'layer.0': 64, 'layer.1': 64}
        >>> sum(p.numel() for _, p in found.head)                      # the classifier: 2 × 8 weights and 2 biases
        18
    """
    architecture = describe(model, layers)
    groups = {EMBEDDINGS: architecture.embeddings}
    groups |= {layer.short: (layer.name, *layer.also) for layer in architecture.layers}
    owner = {path: group for group, paths in groups.items() for path in paths}
    below, above = _parameter_ids(model, architecture.embeddings), _parameter_ids(model, architecture.head)

    parameters: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in groups}
    head: list[tuple[str, nn.Parameter]] = []
    tied: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = next((owner[name[:cut]] for cut in _prefix_ends(name) if name[:cut] in owner), None)
        if group is None or id(parameter) in above:
            head.append((name, parameter))
            if id(parameter) in below:
                tied.append(name)
        else:
            parameters[group].append((name, parameter))
    names = tuple(group for group in groups if parameters[group])
    if not set(names) - {EMBEDDINGS}:
        raise _nothing_trains([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    return TrainableLayers(names, {name: parameters[name] for name in names}, head, tuple(tied))


def _parameter_ids(model: nn.Module, paths: Sequence[str]) -> set[int]:
    return {id(parameter) for path in paths for parameter in model.get_submodule(path).parameters()}


def _prefix_ends(name: str) -> list[int]:
    return [position for position, character in enumerate(name) if character == "."]


def _nothing_trains(trainable: list[str]) -> SetupError:
    shown = ", ".join(trainable[:6]) + (f" and {len(trainable) - 6} more" if len(trainable) > 6 else "")
    return SetupError(
        "No parameter in any layer of this model requires a gradient.",
        found=f"trainable: {shown}" if trainable else "nothing is trainable",
        allowed="at least one layer with trainable parameters",
        fix="get_peft_model(model, LoraConfig(task_type=...)), or model.requires_grad_(True) for full fine-tuning, "
        "before the Trainer is made",
    )
