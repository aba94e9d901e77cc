"""What a model is made of: its layers in order, its input embeddings, its head.

The roles are read from the model's structure, not from a table of names, so that a model which transformers adds
tomorrow is understood today, and so that wrappers (PEFT, DDP, torch.compile, FSDP) do not matter.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from graftlm.errors import ModelError

_COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.")
_EMBEDDING_NAME = re.compile(r"(?:^|_)emb")


@dataclass(frozen=True)
class Layer:
    """One transformer layer.

    Attributes:
        name: path of the module in the model that was given to `describe`, wrappers included.
        module: the module itself.
        stack: "encoder" or "decoder" in an encoder-decoder, else "layer".
        index: position in its stack, 0 = bottom.
        also: paths of modules that belong to this layer but lie beside it (an encoder's final norm).
    """

    name: str
    module: nn.Module = field(repr=False)
    stack: str
    index: int
    also: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """A short stable name, the same with and without wrappers: "layer.11", "decoder.0"."""
        return f"{self.stack}.{self.index}"


@dataclass(frozen=True)
class Architecture:
    """The roles in a model; all names are module paths in the model that was given to `describe`.

    Attributes:
        family: `config.model_type`, or "custom".
        layers: bottom first; in an encoder-decoder the encoder's layers, then the decoder's.
        embeddings: everything below the layers that turns ids into vectors (its norm and projection included).
        head: everything else that holds parameters: final norm, pooler, classifier, output matrix.
    """

    family: str
    layers: tuple[Layer, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]


def describe(model: nn.Module, layers: Sequence[str] | None = None) -> Architecture:
    """Find the layers, the input embeddings and the head of `model`.

    A stack of layers is an outermost `nn.ModuleList` that is as long as the configuration above it says
    (`num_hidden_layers` and its aliases). Nothing is run and nothing is changed.

    Args:
        model: a transformers model, bare or inside PEFT, DDP, FSDP or `torch.compile` wrappers; or any module if
            `layers` names its layers.
        layers: module-name patterns, bottom first, for a model whose structure is not recognised. `*` stands for a part
            of one dotted component ("blocks.*"), `**` for any number of components; "re:…" is a regular expression for
            the whole name. Names may be given with or without the wrappers' prefixes; the matches of one pattern are
            ordered by their numbers.

    Raises:
        ModelError: no stack of layers, more than one candidate, one layer that is run many times, or a pattern that
            matches nothing.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> found = describe(BertForSequenceClassification(config))
        >>> [layer.name for layer in found.layers]
        ['bert.encoder.layer.0', 'bert.encoder.layer.1']
        >>> found.embeddings, found.head
        (('bert.embeddings',), ('bert.pooler', 'classifier'))
    """
    if isinstance(layers, str):
        raise ModelError(
            "layers must be a list of patterns, bottom first.", found=repr(layers), fix=f"layers=[{layers!r}]"
        )
    stacks = {"layer": _named(model, layers)} if layers is not None else _stacks(model)
    embeddings, rest = _outside(model, {name for entries in stacks.values() for name, _ in entries})
    encoder_extras: list[str] = []
    if "encoder" in stacks:
        bottom = stacks["encoder"][0][0].split(".")
        root = ".".join(bottom[: _common_depth([entries[0][0] for entries in stacks.values()]) + 1])
        encoder_extras = [name for name in rest if name.startswith(f"{root}.")]
    described = []
    for stack, entries in stacks.items():
        for index, (name, module) in enumerate(entries):
            is_top = index == len(entries) - 1
            also = tuple(encoder_extras) if stack == "encoder" and is_top else ()
            described.append(Layer(name, module, stack, index, also))
    return Architecture(
        family=_family(model),
        layers=tuple(described),
        embeddings=tuple(embeddings),
        head=tuple(name for name in rest if name not in encoder_extras),
    )


@dataclass(frozen=True)
class Sublayer:
    """Where the attention or the feed-forward part of a layer gives its output, before the residual sum.

    Attributes:
        name: path of the module in the model that was given to `sublayers`.
        module: the module itself. It returns the output, or, where `adds`, it is called with the residual as its second
            argument, adds that and norms the sum, as BERT's does.
        layer: the layer it belongs to.
        part: "attention" (self-attention) or "ffn".
        adds: see `module`.
        norm: the LayerNorm of the sum in a post-norm model; None in a pre-norm model.
    """

    name: str
    module: nn.Module = field(repr=False)
    layer: Layer
    part: str
    adds: bool
    norm: nn.Module | None = field(repr=False)


# Paths in a layer; of a path that ends a feed-forward block the whole block is meant.
_ENDS = {
    "attention": (
        "attention.output",  # BERT, RoBERTa, XLM-R
        "attention.out_lin",  # DistilBERT
        "attn.Wo",  # ModernBERT
        "self_attn.o_proj",  # Llama, Qwen, Mistral, Gemma
        "attn.c_proj",  # GPT-2
        "layer.0.SelfAttention.o",  # T5, mT5
    ),
    "ffn": ("output", "ffn", "mlp", "layer.1.DenseReluDense", "layer.2.DenseReluDense"),
}
_NORMS_OF_THE_SUM = {"attention.out_lin": "sa_layer_norm", "ffn": "output_layer_norm"}  # DistilBERT


def sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """Find where each layer's self-attention and feed-forward block give their output, bottom first.

    Args:
        model: see `describe`; modules that PEFT has wrapped are looked through.

    Raises:
        ModelError: a layer in which these modules are not recognised.
    """
    return tuple(_end(layer, part) for layer in describe(model).layers for part in _ENDS)


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without what PEFT has put around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _end(layer: Layer, part: str) -> Sublayer:
    modules = dict(layer.module.named_modules())
    for path in _ENDS[part]:
        if (module := modules.get(path)) is None:
            continue
        inside = dict(unwrapped(module).named_children())
        if path.endswith("output"):
            if inside.keys() == {"dense", "dropout", "LayerNorm"}:
                return Sublayer(f"{layer.name}.{path}", module, layer, part, adds=True, norm=inside["LayerNorm"])
            continue
        norm = modules.get(_NORMS_OF_THE_SUM[path]) if path in _NORMS_OF_THE_SUM else None
        return Sublayer(f"{layer.name}.{path}", module, layer, part, adds=False, norm=norm)
    raise ModelError(
        f"Where the {'self-attention' if part == 'attention' else 'feed-forward block'} of a "
        f"{type(layer.module).__name__} gives its output is not known.",
        found=f"{layer.name}: {', '.join(name for name, _ in layer.module.named_children())}",
        allowed=_ENDS[part],
        fix="LoRA, which needs no such place: adapter={method: lora} in a recipe, peft.LoraConfig in code",
    )


def bare_name(name: str) -> str:
    """A module or parameter name without the prefixes of PEFT, DDP, `torch.compile` and FSDP1.

    >>> bare_name("module.base_model.model.bert.encoder.layer.0")
    'bert.encoder.layer.0'
    """
    return _WRAPPERS.sub("", name)


def _stacks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    modules = dict(model.named_modules())
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    found: dict[str, nn.ModuleList] = {}
    for name, module in lists.items():  # parents come before their children
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if not nested and len(module) in _expected_lengths(name, modules):
            found[name] = module
    if not found:
        raise _unknown(model, lists, modules)
    for name, module in found.items():
        if len({id(entry) for entry in module}) < len(module):
            raise _shared(name, len(module), distinct=len({id(entry) for entry in module}))
    if len(found) == 1:
        (name,) = found
        return {"layer": _entries(name, found[name])}
    depth = _common_depth(list(found))
    parts = {name.split(".")[depth]: name for name in found}
    if parts.keys() != {"encoder", "decoder"}:
        raise ModelError(
            "This model has several stacks of layers, and which of them is meant is not clear.",
            found=_lengths(found),
            fix="name the layers: " + " or ".join(f'layers=["{bare_name(name)}.*"]' for name in found),
        )
    return {part: _entries(parts[part], found[parts[part]]) for part in ("encoder", "decoder")}


def _entries(name: str, stack: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{index}", module) for index, module in enumerate(stack)]


def _expected_lengths(name: str, modules: dict[str, nn.Module]) -> set[int]:
    """The layer counts in the nearest configuration above the module `name`."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        config = getattr(modules[path], "config", None)
        counts = {value for key in _COUNTS if isinstance(value := getattr(config, key, None), int)}
        if counts:
            return counts
    return set()


def _family(model: nn.Module) -> str:
    for module in model.modules():
        if isinstance(family := getattr(getattr(module, "config", None), "model_type", None), str):
            return family
    return "custom"


def _outside(model: nn.Module, layers: set[str]) -> tuple[list[str], list[str]]:
    """Split what lies outside the layers into (embeddings, rest), as the largest modules that hold no layer."""
    embeddings: list[str] = []
    rest: list[str] = []
    inputs, outputs = _vocabulary_modules(model)
    ancestors = {name[:cut] for name in layers for cut in _cuts(name)}

    def visit(name: str, module: nn.Module) -> None:
        for key, child in module._modules.items():  # not named_children: that drops a module's second name
            path = f"{name}.{key}" if name else key
            if child is None or path in layers:
                continue
            if path in ancestors:
                visit(path, child)
            elif any(True for _ in child.parameters()):
                is_input = _EMBEDDING_NAME.search(key) or any(
                    id(part) in inputs or isinstance(part, nn.Embedding) for part in child.modules()
                )
                (embeddings if is_input and id(child) not in outputs else rest).append(path)

    visit("", model)
    return embeddings, rest


def _vocabulary_modules(model: nn.Module) -> tuple[set[int], set[int]]:
    inputs: set[int] = set()
    outputs: set[int] = set()
    for module in model.modules():
        for ask, answers in (("get_input_embeddings", inputs), ("get_output_embeddings", outputs)):
            method = getattr(module, ask, None)
            if callable(method):
                try:
                    answers.add(id(method()))
                except (NotImplementedError, AttributeError):
                    continue  # transformers raises where a module has none
    return inputs, outputs - inputs


def _cuts(name: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", name))


def _common_depth(names: Sequence[str]) -> int:
    """How many leading components all `names` share."""
    split = [name.split(".") for name in names]
    depth = 0
    while len({tuple(parts[: depth + 1]) for parts in split}) == 1:
        depth += 1
    return depth


def _named(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        regex = _compile(pattern)
        hits = [name for name in modules if regex.fullmatch(name) or regex.fullmatch(bare_name(name))]
        if not hits:
            close = difflib.get_close_matches(pattern, [bare_name(name) for name in modules], n=4, cutoff=0.3)
            raise ModelError("No module has a name like this.", found=pattern, allowed=close or list(modules)[:8])
        for name in sorted(hits, key=_natural):
            chosen.setdefault(name, modules[name])
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ModelError(
                "A layer that was named lies inside another one.",
                found=f"{name} in {outer}",
                fix="use patterns that name whole layers: * stays within one dotted component",
            )
    if len({id(module) for module in chosen.values()}) < len(chosen):
        raise _shared(patterns[0], len(chosen), distinct=len({id(module) for module in chosen.values()}))
    if not chosen:
        raise ModelError("The list of layer patterns is empty.", found="layers=[]", fix='layers=["blocks.*"]')
    return list(chosen.items())


def _compile(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ModelError(f"This regular expression cannot be read: {error}.", found=pattern) from error
    pieces = {"**": ".*", "*": "[^.]*"}
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern)))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _lengths(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name or 'the model itself'} ({len(module)})" for name, module in lists.items())


def _shared(name: str, times: int, *, distinct: int) -> ModelError:
    return ModelError(
        f"The layers of this model share their parameters: {times} layers are run from {distinct} set(s) of weights.",
        found=name,
        fix="choose a model with a set of weights for each layer: shared ones cannot be told apart layer by layer",
    )


def _unknown(model: nn.Module, lists: dict[str, nn.ModuleList], modules: dict[str, nn.Module]) -> ModelError:
    for name, module in lists.items():  # ALBERT: one group of weights, run num_hidden_layers times
        parents = [modules[name[:cut]] for cut in _cuts(name)]
        groups = {getattr(getattr(parent, "config", None), "num_hidden_groups", None) for parent in parents}
        if len(module) in groups:
            return _shared(name, max(_expected_lengths(name, modules)), distinct=len(module))
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    counts = sorted({count for name in lists for count in _expected_lengths(name, modules)})
    expected = f" = {' or '.join(map(str, counts))}" if counts else ""
    example = f"{bare_name(outer[0])}.*".removeprefix(".") if outer else "blocks.*"
    return ModelError(
        f"The layers of this {type(model).__name__} were not recognised.",
        found=f"lists of modules: {_lengths(lists)}" if lists else "no nn.ModuleList",
        allowed=f"an nn.ModuleList as long as the model's config says (num_hidden_layers{expected})",
        fix=f'name the layers, bottom first: layers=["{example}"]',
    )
