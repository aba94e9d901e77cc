"""Which tensors of a model stand in front of which of its dropouts.

Found by the names of modules inside a layer and checked for completeness: every dropout in the layers and the
embeddings has a block, and every block has a dropout. A position in `modules()` means nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from graftlm.architectures import Layer, describe, unwrapped
from graftlm.errors import ModelError

_BETWEEN = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.|$)")
_NUMBER = re.compile(r"(?:^|_)(?:dropout|drop)(?:$|_)")


@dataclass(frozen=True)
class Site:
    """A dropout in a model.

    Attributes:
        path: of the module, from the backbone; of a number, its attribute.
        owner: the module that holds it.
        name: its name there.
        watch: the module during whose call the mask is drawn: an attention reads the rate and draws in its kernel.
    """

    path: str
    owner: nn.Module = field(repr=False)
    name: str
    watch: nn.Module = field(repr=False)

    @property
    def value(self) -> Any:
        """A dropout module, an `nn.Identity` in place of one, or a number."""
        return self.owner[self.name] if isinstance(self.owner, nn.ModuleDict) else getattr(self.owner, self.name)

    @property
    def rate(self) -> float:
        """The rate that is set now."""
        value = self.value
        return float(value) if isinstance(value, int | float) else float(getattr(value, "p", 0.0))


@dataclass(frozen=True)
class Block:
    """Tensors that share one rate.

    Attributes:
        name: such as ``encoder.layer.3.attention``.
        kind: ``embeddings``, ``attention``, ``attention_output``, ``cross_attention``, ``cross_attention_output``,
            ``ffn_inner``, ``ffn_output``; for adapters the wrapped module's path in its layer.
        tensors: parameter names, from the backbone.
        sites: the dropouts behind them.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]
    sites: tuple[Site, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Role:
    kind: str
    site: str
    modules: tuple[str, ...]
    optional: bool = False  # only some models of the family have it

    @property
    def in_kernel(self) -> bool:
        """Whether it is attention's probabilities that are dropped: in its kernel, whoever holds the rate."""
        return self.kind in ("attention", "cross_attention")


@dataclass(frozen=True)
class _Layout:
    roles: tuple[_Role, ...]
    embeddings: tuple[_Role, ...] = ()
    without_dropout: bool = False  # ships with rates of 0, and with no dropout but the attention's


def _t5(kind: str, layer: int, attention: str) -> tuple[_Role, _Role]:
    inner = f"layer.{layer}.{attention}"
    return (
        _Role(kind, f"{inner}.dropout", (f"{inner}.q", f"{inner}.k", f"{inner}.v")),
        _Role(f"{kind}_output", f"layer.{layer}.dropout", (f"{inner}.o",)),
    )


def _t5_ffn(layer: int) -> tuple[_Role, _Role]:
    inner = f"layer.{layer}.DenseReluDense"
    return (
        _Role("ffn_inner", f"{inner}.dropout", (f"{inner}.wi", f"{inner}.wi_0", f"{inner}.wi_1")),
        _Role("ffn_output", f"layer.{layer}.dropout", (f"{inner}.wo",)),
    )


def _bert(kind: str, module: str, *, optional: bool = False) -> tuple[_Role, _Role]:
    inner, output = f"{module}.self", f"{module}.output"
    return (
        _Role(kind, f"{inner}.dropout", (f"{inner}.query", f"{inner}.key", f"{inner}.value"), optional),
        _Role(f"{kind}_output", f"{output}.dropout", (f"{output}.dense", f"{output}.LayerNorm"), optional),
    )


_T5_EMBEDDINGS = _Role("embeddings", "dropout", ("embed_tokens",))
_LAYOUTS = {
    "BERT, RoBERTa, XLM-R, ELECTRA, MiniLM": _Layout(
        (
            *_bert("attention", "attention"),
            *_bert("cross_attention", "crossattention", optional=True),
            _Role("ffn_output", "output.dropout", ("output.dense", "output.LayerNorm")),
        ),
        (_Role("embeddings", "embeddings.dropout", ("embeddings",)),),
    ),
    "DistilBERT": _Layout(
        (
            _Role("attention", "attention.dropout", ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
            _Role("ffn_output", "ffn.dropout", ("ffn.lin2", "output_layer_norm")),
        ),
        (_Role("embeddings", "embeddings.dropout", ("embeddings",)),),
    ),
    "ModernBERT": _Layout(
        (
            _Role("attention", "attn.attention_dropout", ("attn.Wqkv",)),
            _Role("attention_output", "attn.out_drop", ("attn.Wo",)),
            _Role("ffn_inner", "mlp.drop", ("mlp.Wi",)),
        ),
        (_Role("embeddings", "embeddings.drop", ("embeddings",)),),
    ),
    "GPT-2": _Layout(
        (
            _Role("attention", "attn.attn_dropout", ("attn.c_attn",)),
            _Role("attention_output", "attn.resid_dropout", ("attn.c_proj",)),
            _Role("ffn_output", "mlp.dropout", ("mlp.c_proj",)),
        ),
        (_Role("embeddings", "drop", ("wte", "wpe")),),
    ),
    "T5's and mT5's decoder": _Layout(
        (*_t5("attention", 0, "SelfAttention"), *_t5("cross_attention", 1, "EncDecAttention"), *_t5_ffn(2)),
        (_T5_EMBEDDINGS,),
    ),
    "T5's and mT5's encoder": _Layout((*_t5("attention", 0, "SelfAttention"), *_t5_ffn(1)), (_T5_EMBEDDINGS,)),
    "Llama, Mistral, Qwen, Gemma": _Layout(
        (
            _Role(
                "attention",
                "self_attn.attention_dropout",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
            ),
        ),
        without_dropout=True,
    ),
}


@dataclass(frozen=True)
class Sites:
    """The blocks of a model with their dropouts, and its linear layers, which an adapter may wrap.

    Attributes:
        backbone: the model without its head; all names start here.
        blocks: bottom first.
        modules: one block for each linear layer inside the transformer layers.
        without_dropout: whether models of this family ship with no dropout to guide.
    """

    backbone: Any = field(repr=False)
    blocks: tuple[Block, ...]
    modules: tuple[Block, ...]
    without_dropout: bool


def find_sites(model: nn.Module) -> Sites:
    """The dropouts of a model and what stands in front of each.

    Norms in front of a sub-layer (GPT-2, T5, ModernBERT, Llama) belong to no block: the paper's blocks hold the norm
    behind a dropout only, as BERT has it. FFN-in belongs to a block where a dropout follows it (T5, ModernBERT).

    Raises:
        ModelError: a model of no known layout, a block without a dropout, or a dropout without a block.
    """
    backbone = backbone_of(model)
    layers = describe(backbone).layers
    names = {
        id(parameter): canonical(name)
        for name, parameter in backbone.named_parameters()
        if not _in_adapter(backbone, name)
    }
    layouts = {stack: _layout(next(layer for layer in layers if layer.stack == stack)) for stack in _stacks(layers)}
    embeddings: dict[tuple[str, ...], list[Site]] = {}
    blocks = []
    for stack, layout in layouts.items():
        for role in layout.embeddings:
            root = f"{stack}." if stack != "layer" else _root(layers, role)
            site = _site(backbone, f"{root}{role.site}", role, role.kind)
            tensors = _tensors(backbone, [f"{root}{module}" for module in role.modules], names)
            embeddings.setdefault(tensors, []).append(site)
    for tensors, sites in embeddings.items():  # T5's encoder and decoder share one table: one block, two dropouts
        name = "embeddings" if len(embeddings) == 1 else f"embeddings of {sites[0].path.rpartition('.')[0]}"
        blocks.append(Block(name, "embeddings", tensors, tuple(sites)))
    for layer in layers:
        blocks += _layer_blocks(backbone, layer, layouts[layer.stack], names)
    _check_complete(backbone, layers, blocks)
    modules = tuple(_linear_blocks(backbone, layers, names))
    return Sites(backbone, tuple(blocks), modules, all(layout.without_dropout for layout in layouts.values()))


def backbone_of(model: nn.Module) -> Any:
    """The transformers model inside all wrappers, without its head."""
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ModelError("guided dropout needs a transformers model", found=type(model).__name__)
    return found.base_model


def canonical(name: str) -> str:
    """A parameter or module name without what PEFT puts between a module and its weight.

    >>> canonical("embeddings.word_embeddings.token_adapter.base_layer.weight")
    'embeddings.word_embeddings.weight'
    """
    return _BETWEEN.sub("", name)


def is_dropout(module: object) -> bool:
    """Whether this is a dropout module."""
    return isinstance(module, _DropoutNd)


def in_kernel(site: Site) -> bool:
    """Whether the mask is drawn in an attention's kernel, which only reads the rate."""
    return site.watch is site.owner


def _stacks(layers: tuple[Layer, ...]) -> list[str]:
    return list(dict.fromkeys(layer.stack for layer in layers))


def _root(layers: tuple[Layer, ...], role: _Role) -> str:
    """Where the embeddings of a T5 encoder that stands alone lie: beside its list of layers."""
    return layers[0].name.rpartition("block.")[0] if role is _T5_EMBEDDINGS else ""


def _layout(layer: Layer) -> _Layout:
    for layout in _LAYOUTS.values():
        if all(role.optional or _existing(layer.module, role.modules) for role in layout.roles):
            return layout
    children = sorted(
        {canonical(name) for name, module in layer.module.named_modules() if name and not list(module.children())}
    )
    raise ModelError(
        f"which dropout stands behind which weights is not known for a {type(layer.module).__name__}",
        found=f"{layer.name}: {', '.join(children[:12])}",
        allowed=_LAYOUTS,
    )


def _existing(module: nn.Module, paths: tuple[str, ...]) -> list[str]:
    return [path for path in paths if _get(module, path) is not None]


def _get(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _layer_blocks(backbone: nn.Module, layer: Layer, layout: _Layout, names: dict[int, str]) -> Iterator[Block]:
    for role in layout.roles:
        modules = _existing(layer.module, role.modules)
        if modules:
            site = _site(backbone, f"{layer.name}.{role.site}", role, f"{layer.name}: {role.kind}")
            tensors = _tensors(backbone, [f"{layer.name}.{path}" for path in modules], names)
            yield Block(f"{layer.name}.{role.kind}", role.kind, tensors, (site,))


def _site(backbone: nn.Module, path: str, role: _Role, block: str) -> Site:
    value = _get(backbone, path)
    owner_path, _, name = path.rpartition(".")
    if not (is_dropout(value) or isinstance(value, nn.Identity | float | int)) or isinstance(value, bool):
        raise ModelError(
            "a block has no dropout behind it",
            found=f"block {block}; no dropout at {path}" + (f" ({type(value).__name__})" if value is not None else ""),
            fix="a model with the usual modules of its family; graftlm sets rates by name and guesses none",
        )
    owner = unwrapped(backbone.get_submodule(owner_path)) if owner_path else backbone
    inside = role.in_kernel or not isinstance(value, nn.Module)
    return Site(path, owner, name, owner if inside else value)


def _tensors(backbone: nn.Module, modules: list[str], names: dict[int, str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for module in modules:
        for parameter in backbone.get_submodule(module).parameters():
            if id(parameter) in names:  # what PEFT added is not
                found[names[id(parameter)]] = None
    return tuple(found)


def _in_adapter(backbone: nn.Module, path: str) -> bool:
    """Whether a parameter was added by PEFT: it lies in a module that holds the model's own, but not in that."""
    parts = path.split(".")
    module: Any = backbone
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return False
        for own in ("base_layer", "original_module"):
            if own in module._modules and following != own:
                return True
    return False


def _linear_blocks(backbone: nn.Module, layers: tuple[Layer, ...], names: dict[int, str]) -> Iterator[Block]:
    for layer in layers:
        for inner, module in layer.module.named_modules():
            path = f"{layer.name}.{inner}"
            plain = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            weight = getattr(module, "weight", None)
            if plain and isinstance(weight, nn.Parameter) and not _in_adapter(backbone, f"{path}.weight"):
                own = (names[id(p)] for p in module.parameters(recurse=False))
                yield Block(canonical(path), canonical(inner), tuple(own))


def _check_complete(backbone: nn.Module, layers: tuple[Layer, ...], blocks: list[Block]) -> None:
    known = {site.path for block in blocks for site in block.sites}
    seen: dict[str, str] = {}
    for block in blocks:
        for site in block.sites:
            if site.path in seen:
                raise ModelError(
                    "one dropout stands behind two blocks", found=f"{site.path}: {seen[site.path]}, {block.name}"
                )
            seen[site.path] = block.name
    for path, module in backbone.named_modules():
        if is_dropout(module) and ".modules_to_save." in path:
            raise ModelError(
                "a dropout lies in a part of the model that PEFT has copied, to train it whole",
                found=path,
                allowed="parts without a dropout in modules_to_save, such as norms, embeddings and heads",
                fix="leave this part out of modules_to_save, or fine-tune without PEFT",
            )
        if _in_adapter(backbone, f"{path}.x") or (path and _in_adapter(backbone, path)):
            continue
        numbers = [key for key, value in vars(module).items() if _NUMBER.search(key) and isinstance(value, float)]
        found = [f"{path}.{key}" if path else key for key in numbers if not is_dropout(module)]
        for stray in [*found, *([path] if is_dropout(module) else [])]:
            if canonical(stray) not in known:
                raise ModelError(
                    "a dropout has no block in front of it, so it would keep its rate unseen",
                    found=f"{stray} ({type(module).__name__})",
                    allowed=f"the dropouts that are known here: {', '.join(sorted(known)[:6])}, …",
                )
