"""FLARE as a PEFT method: LoRA that fuses the source sentence's representations in its bottleneck."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn
from torch.nn import functional

from graftlm.adapters import registry
from graftlm.adapters.flare_call import has_source, taken
from graftlm.adapters.flare_fusion import ALIGNMENTS, FUSIONS, Source, aligned
from graftlm.adapters.flare_source import SourceContext
from graftlm.errors import DataError, ModelError, SetupError

MAP_LEAF = "lora_fusion_map"
ATTENTION_LEAVES = ("lora_fusion_query", "lora_fusion_key", "lora_fusion_value")
_STARTS = (True, False, "gaussian")


@dataclass
class FlareConfig(LoraConfig):
    r"""FLARE for `peft.get_peft_model`: LoRA whose bottleneck fuses a target sentence with its source-language version.

    .. math:: W x_T + \tfrac{\alpha}{r}\, B\, \varphi(A\, x_S,\, A\, x_T)

    at the query and value projections; the same A and B for both, so there are no parameters beyond LoRA's (three r × r
    matrices with ``cross_attention``). x_S is what the same model reads from the source, with the adapters off, without
    gradients and without dropout. The source goes into the call, and nothing else changes:

        ``model(input_ids=…, attention_mask=…, source_input_ids=…, source_attention_mask=…)``

    What was computed before goes in as ``source_states``, (batch, layers + 1, source length, width), in place of
    ``source_input_ids``: see `graftlm.SourceCache`.

    **FLARE MT**: with ``encoder_width`` the source is the last hidden state of another encoder, frozen, which reads the
    target text; ``source_states`` is (batch, 1, source length, encoder width), from `graftlm.EncoderStates`. A trained
    linear map P leads to the width of the model, and the same tensor is fused at every layer: A x_S becomes A P x_S.

    **Without a source it is plain LoRA on the target**, in training and at test: φ is left out, not fed with the target
    twice. The same holds for every target token that has no source token, and for padding. B is zero at the start: step
    0 equals the base model.

    ===================  ===============================================================================
    ``fusion``           φ(S, T)
    ===================  ===============================================================================
    ``add``              S + T
    ``mul``              S ⊙ T
    ``add_relu``         relu(S) + relu(T), the paper's setting
    ``mul_relu``         relu(S) ⊙ relu(T)
    ``cross_attention``  softmax((W_q T)(W_k S)ᵀ/√r) W_v S
    ===================  ===============================================================================

    A new one is a line in the table of functions, with ``from graftlm.adapters.flare_fusion import FUSIONS``:
    ``FUSIONS["mean"] = lambda source, target: (source + target) / 2``.

    =============  =====================================================================================
    ``align``      the source that target token i (of n) is fused with
    =============  =====================================================================================
    ``position``   source token i, as in the paper; none where the source is shorter
    ``relative``   source token ⌊(i + ½) m / n⌋ of m
    ``pooled``     the mean of the source tokens
    ``attention``  softmax(T Sᵀ/√r) S, without parameters
    =============  =====================================================================================

    Tokens are counted from the first one that is not padding, so that padding on either side changes nothing. A
    decoder that writes fuses its prompt, in training (``fusion_mask``, (batch, length), 1 at the prompt) as in
    ``model.generate(…, source_input_ids=…, source_attention_mask=…)``; what it writes passes through plain LoRA. The
    latter needs the adapter's ``task_type``. In an encoder-decoder the encoder's self-attention fuses; its decoder has
    plain LoRA.

    Args:
        fusion: φ.
        source_layer: ``next``: layer i reads the output of the source's layer i as layer i + 1 does (in a pre-norm
            model with that layer's norm; the top layer the last hidden state); ``same``: what layer i itself reads.
        align: see above; None = ``position``, and with ``cross_attention``, which aligns by itself, ``attention``.
        encoder_width: of the encoder of FLARE MT; None = the source is read by the model itself. P is saved with the
            lowest fused projection, and is part of that layer for a schedule.
        encoder_name: that encoder's hub id or folder, for the record; `EncoderStates.attach` fills it in where it is
            None, and refuses another encoder where it is not.
        encoder_language: how its tokenizer marked the texts of the training, for the record.
        r: rank.
        lora_alpha: α.
        target_modules: as in LoRA. None = all query and value projections. Others are allowed and have plain LoRA;
            "all-linear" is the paper's setting for decoders.

    All other arguments are those of `peft.LoraConfig`.

    Raises:
        SetupError: a value that is not allowed, or a variant of LoRA (DoRA, PiSSA, …) that does not go with FLARE.
            `get_peft_model` raises `ModelError` for a model without separate query and value projections, and for
            quantised weights for which PEFT has plain LoRA only (AWQ, AQLM, EETQ). The call raises `DataError` for a
            source that does not fit the target.

    Source: Borchert et al., arXiv 2501.06892, Section 3.

    Differs from the paper in: (1) ``next`` in a pre-norm model carries the norm, as the target does; the authors' code
    feeds the raw residual stream; (2) padding is never fused, and target tokens without a source token have plain LoRA;
    (3) cross-attention has the target's length: the target asks, keys and values are the source's; (4) the source is
    read without dropout; (5) a decoder fuses its prompt only.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> model = get_peft_model(BertModel(config), FlareConfig(r=2, lora_alpha=4))
        >>> sorted(model.peft_config["default"].target_modules)
        ['query', 'value']
        >>> target, source = torch.tensor([[2, 5, 3]]), torch.tensor([[2, 7, 8, 3]])
        >>> model(input_ids=target, source_input_ids=source).last_hidden_state.shape
        torch.Size([1, 3, 8])
    """

    fusion: str = "add_relu"
    source_layer: str = "next"
    align: str | None = None
    encoder_width: int | None = None
    encoder_name: str | None = None
    encoder_language: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registry.peft_type("flare")
        _check(self.fusion in FUSIONS, "fusion", self.fusion, FUSIONS)
        _check(self.source_layer in ("next", "same"), "source_layer", self.source_layer, ("next", "same"))
        itself = self.fusion == "cross_attention"
        if self.align is None:
            self.align = "attention" if itself else "position"
        _check(self.align in ALIGNMENTS, "align", self.align, ALIGNMENTS)
        _check(not itself or self.align == "attention", "align with cross_attention", self.align, ("attention",))
        width = self.encoder_width
        _check(width is None or (type(width) is int and width > 0), "encoder_width", width, "None, or 1, 2, …")
        _check(
            width is not None or not self.encoder_name, "encoder_name", self.encoder_name, "None without encoder_width"
        )
        _check(any(self.init_lora_weights is s or self.init_lora_weights == s for s in _STARTS), "init_lora_weights",
               self.init_lora_weights, _STARTS)  # fmt: skip
        _check(self.bias == "none", "bias", self.bias, ("none",))
        _check(not self.layer_replication, "layer_replication", self.layer_replication, ("None",))
        for option in dataclasses.fields(self):
            if option.metadata.get("is_lora_variant") and getattr(self, option.name):
                raise SetupError(
                    "FLARE cannot be combined with another variant of LoRA.",
                    found=f"{option.name}={getattr(self, option.name)!r}",
                    fix=f"leave {option.name} out",
                )


class Fused(LoraVariant):
    """One adapter's fusion in one projection."""

    def __init__(self, context: SourceContext, layer: int, config: FlareConfig):
        self.context, self.fusion, self.how = context, config.fusion, str(config.align)
        self.state = layer + 1 if config.source_layer == "next" else layer
        self.encoder_width = config.encoder_width

    def supports_lora_conversion(self) -> bool:
        """There is no matrix that would do the same."""
        return False

    def add_leaves(self, module: Any, adapter: str) -> None:
        """The matrices of cross-attention, and in the first projection of FLARE MT the map P."""
        rank, leaves = module.r[adapter], {}
        if self.fusion == "cross_attention":
            leaves = {name: nn.Linear(rank, rank, bias=False) for name in ATTENTION_LEAVES}
        if self.encoder_width is not None and adapter not in self.context.maps:
            leaves[MAP_LEAF] = nn.Linear(self.encoder_width, module.in_features)
            self.context.maps[adapter] = leaves[MAP_LEAF]
        for name, leaf in leaves.items():
            if not hasattr(module, name):
                setattr(module, name, nn.ModuleDict())
                module.adapter_layer_names = (*module.adapter_layer_names, name)
            getattr(module, name)[adapter] = leaf
        module._move_adapter_to_device_of_base_layer(adapter)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the fused update."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module._cast_input_dtype(x, down.weight.dtype)
        inner = down(module.lora_dropout[active_adapter](x))
        record = self.context.source((x.shape[0], x.shape[1]))
        if record is not None:
            inner = self._fuse(module, active_adapter, record, inner)
        return result + up(inner) * module.scaling[active_adapter]

    def _fuse(self, module: Any, adapter: str, record: Source, target: Tensor) -> Tensor:
        down = module.lora_A[adapter]
        states = self._states(record, down.in_features)
        states = module.lora_dropout[adapter](module._cast_input_dtype(states, down.weight.dtype).to(target.device))
        if self.encoder_width is None:
            source = down(states)
        else:  # A (P x + b) without P x, which is as long as the text and as wide as the model
            to_width = self.context.maps[adapter]
            source = functional.linear(states, down.weight @ to_width.weight, down.weight @ to_width.bias)
        queries, keys, values = target, source, source
        if self.fusion == "cross_attention":
            ask, offer, give = (getattr(module, name)[adapter] for name in ATTENTION_LEAVES)
            queries, keys, values = ask(target), offer(source), give(source)
        partner, there = aligned(source, queries, keys, values, record, self.how)
        return FUSIONS[self.fusion](partner, target).where(there[..., None], target)

    def _states(self, record: Source, width: int) -> Tensor:
        number, expected = len(self.context.places) + 1, width
        if self.encoder_width is not None:
            number, expected = 1, self.encoder_width
        found = len(record.states), record.states[0].shape[-1]
        if found != (number, expected):
            raise DataError(
                "The source was represented by another model than this adapter reads.",
                found=f"states of {found[0]} layers, width {found[1]}",
                allowed=f"{number} layers, width {expected}",
                fix="graftlm.ModelStates without encoder_width; with it graftlm.EncoderStates, for source_input_ids "
                "after EncoderStates(…).attach(model)",
            )
        return record.states[0 if self.encoder_width is not None else self.state]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refuse: see `no_merge`."""
        raise no_merge()

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse: see `no_merge`."""
        raise no_merge()


class FlareModel(LoraModel):
    """PEFT's face of the method: LoRA everywhere, fusion at the queries and values."""

    def _prepare_adapter_config(self, peft_config: FlareConfig, model_config: dict) -> FlareConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = set().union(*(place.ends for place in SourceContext.of(self.model).places))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: FlareConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        context = SourceContext.of(model)
        places = context.places
        self._layers = {path: number for number, place in enumerate(places) for path in place}
        # as PEFT does itself after this: "all-linear" becomes the modules that it stands for
        _maybe_include_all_linear_layers(peft_config, model)
        if not any(check_target_module_exists(peft_config, path) for path in self._layers):
            self._leave()
            raise ModelError(
                "FLARE would fuse nowhere: no query or value projection is among the target modules.",
                found=f"target_modules={peft_config.target_modules}",
                allowed=sorted(set().union(*(place.ends for place in places))),
                fix="leave target_modules out, or use peft.LoraConfig",
            )

    def _leave(self) -> None:
        """Before an error: nothing stays on the model, unless another adapter fuses there."""
        if not any(getattr(module, "lora_variant", None) for module in self.model.modules()):
            SourceContext.of(self.model).remove()

    def _create_and_replace(
        self,
        lora_config: FlareConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if adapter_name in getattr(target, "lora_variant", {}):
            raise ModelError(
                "The model has a FLARE adapter of this name already.",
                found=f"{adapter_name!r} at {current_key}",
                fix="base = model.unload() first, or model.add_adapter(ANOTHER_NAME, config)",
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        if current_key in self._layers:
            layer: Any = getattr(parent, target_name)
            if not asks_variants(layer):
                self._leave()
                raise ModelError(
                    "FLARE would be plain LoRA here: PEFT's layer for this kind of weights knows no other.",
                    found=f"{type(layer).__name__} at {current_key}",
                    allowed="weights as floats, torchao's int8, or those of bitsandbytes, GPTQ or HQQ",
                    fix="the model in one of these, loaded anew",
                )
            variant = Fused(SourceContext.of(self.model), self._layers[current_key], lora_config)
            layer.lora_variant[adapter_name] = variant
            variant.add_leaves(layer, adapter_name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; with a source the prompt is fused with it."""
        given = taken(kwargs)
        if not has_source(given):
            SourceContext.of(self.model).read(self.model, {}, **given)  # a mask alone is an error
            return self.model.generate(*args, **kwargs)
        inputs = {"input_ids": args[0] if args else kwargs.get("inputs"), **kwargs}
        with SourceContext.of(self.model).generating(self.model, inputs, given):
            return self.model.generate(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, its map P included."""
        super().delete_adapter(adapter_name)
        SourceContext.of(self.model).maps.pop(adapter_name, None)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of fused adapters is not defined."""
        raise ModelError("FLARE adapters cannot be added up: what they compute is not linear in their weights.")

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        SourceContext.of(self.model).remove()
        return model

    def _check_merge_allowed(self) -> None:
        raise no_merge()


def asks_variants(layer: nn.Module) -> bool:
    """Whether a LoRA layer's forward hands over to its variants; PEFT sets them on layers that never look at them."""
    return "lora_variant" in type(layer).forward.__code__.co_names


def no_merge() -> ModelError:
    """The error of whoever asks PEFT to merge a FLARE adapter."""
    return ModelError(
        "A FLARE adapter cannot be merged into the weights of its model: its update depends on the source sentence.",
        fix="keep the adapter beside the model (save_pretrained), or take it off: model.unload()",
    )


def _check(holds: bool, name: str, found: object, allowed: Any) -> None:
    if not holds:
        raise SetupError(f"FLARE cannot have this {name}.", found=repr(found), allowed=allowed)


# Not `registry.register`: PEFT wants a prefix of its own for each method, and these leaves are LoRA's.
_type = registry.peft_type("flare")
PEFT_TYPE_TO_CONFIG_MAPPING[_type] = FlareConfig
PEFT_TYPE_TO_TUNER_MAPPING[_type] = FlareModel
PEFT_TYPE_TO_PREFIX_MAPPING[_type] = FlareModel.prefix
