"""FLARE around the model: reads the source with the adapters off, and keeps it for the target's forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional

from graftlm.adapters.flare_call import cached, fused_tokens, has_source, refuse_cached, taken, tokens_of
from graftlm.adapters.flare_checkpoint import Replays
from graftlm.adapters.flare_fusion import Source
from graftlm.adapters.flare_places import places_of
from graftlm.architectures import describe
from graftlm.errors import DataError, ModelError, SetupError


class SourceContext:
    """What all fused projections of one model share: the source of the call that is being computed."""

    def __init__(self, model: nn.Module):
        self.places = places_of(model)
        self.is_encoder_decoder = any(layer.stack == "encoder" for layer in describe(model).layers)
        self.current: Source | None = None
        self.prompt: Source | None = None  # while generating
        self.maps: dict[str, nn.Linear] = {}  # adapter → P of FLARE MT
        self.encoder: Any = None  # an `EncoderStates` of FLARE MT that was attached
        self.replays = Replays()
        self._reading = False
        self._handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    @classmethod
    def of(cls, model: nn.Module) -> SourceContext:
        """The one that a model has, or a new one."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(model)

    def remove(self) -> None:
        """Take it off its model."""
        for handle in self._handles:
            handle.remove()

    def source(self, shape: tuple[int, int]) -> Source | None:
        """What a projection whose input has this (batch, length) is to fuse; None = plain LoRA.

        Raises:
            SetupError: a checkpoint that was not told which source its pass belongs to.
            ModelError: an input that is not the target as it was given.
        """
        source = self.replays.source if self.replays.running else self.current
        if source is None:
            if not self.replays.running:
                self.replays.refuse_others()
            return None
        if shape != source.shape:
            raise ModelError(
                "A fused projection reads something else than the target that the model was given.",
                found=f"(batch, length) = {shape}",
                allowed=str(source.shape),
                fix="no adapter_names and no packing together with source_input_ids",
            )
        return source

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Read the source; the model's own forward never sees our keywords."""
        if self._reading:
            return None
        signature = inspect.signature(model.forward)
        given = taken(kwargs, signature.parameters)
        inputs = signature.bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        if self.prompt is not None:
            if not self.is_encoder_decoder:
                self.current = self._step(inputs)
        else:
            if not self.is_encoder_decoder and has_source(given):
                refuse_cached(inputs)
            self.current = self.read(model, inputs, **given)
        self.replays.bind(model, self.current)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Forget the source: autograd and `Replays` hold what the backward pass needs."""
        if self._reading:
            return
        self.replays.release()
        self.current = self.prompt if self.is_encoder_decoder else None

    def read(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        source_input_ids: Tensor | None = None,
        source_states: Tensor | None = None,
        source_attention_mask: Tensor | None = None,
        source_token_type_ids: Tensor | None = None,
        fusion_mask: Tensor | None = None,
    ) -> Source | None:
        """The source for a target with these inputs, read or as it was given; None without one or without adapters."""
        given = source_input_ids if source_states is None else source_states
        idle = {
            "source_attention_mask": source_attention_mask if given is None else None,
            "source_token_type_ids": source_token_type_ids if source_input_ids is None else None,
            "fusion_mask": fusion_mask if given is None else None,
        }
        if found := [name for name, tensor in idle.items() if tensor is not None]:
            raise DataError(
                "Something was given for a source that is not there.",
                found=", ".join(found),
                fix="model(…, source_input_ids=…, source_attention_mask=…)",
            )
        if given is None:
            return None
        if getattr(model, "_is_replica", False):
            raise SetupError(
                "FLARE does not work in torch.nn.DataParallel: its copies of the model would take each other's source.",
                fix="one process a GPU (torchrun, accelerate launch), or CUDA_VISIBLE_DEVICES=0",
            )
        if source_input_ids is not None and source_states is not None:
            raise DataError("A source is read or given, not both.", found="source_input_ids and source_states")
        if any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)):
            return None
        target = fused_tokens(model, inputs, fusion_mask, self.is_encoder_decoder)
        shape = tuple(given.shape) if source_states is None else (given.shape[0], *given.shape[2:3])
        mask = given.new_ones(shape, dtype=torch.long) if source_attention_mask is None else source_attention_mask
        fits = given.ndim == (2 if source_states is None else 4) and tuple(mask.shape) == shape
        if not fits or len(mask) != len(target) or 0 in given.shape:
            raise DataError(
                "Source and target are no pairs.",
                found=f"source {tuple(given.shape)}, source_attention_mask {tuple(mask.shape)}, "
                f"{len(target)} target rows",
                allowed="source_input_ids and mask (batch, source length), source_states (batch, layers, source "
                "length, width), with a row for each row of the target and a column at least",
                fix="rows without a source have source_attention_mask 0, and plain LoRA",
            )
        states: Sequence[Tensor]
        if source_input_ids is not None:
            types = {} if source_token_type_ids is None else {"token_type_ids": source_token_type_ids}
            tokens = {"input_ids": source_input_ids, "attention_mask": mask, **types}
            states = self.states_of(model, **tokens) if self.encoder is None else [self.encoder.states(**tokens)]
        else:
            states = given.unbind(1)
        there = mask.bool()
        # Padding may hold anything, even NaN where a row has no token at all: none of it may reach a gradient.
        clean = tuple(state.masked_fill(~there.to(state.device)[..., None], 0.0) for state in states)
        return Source(clean, there, target)

    def backbone(self, model: nn.Module) -> Any:
        """The part of a model that reads the source: without a head, of an encoder-decoder the encoder."""
        if not self.is_encoder_decoder:
            return getattr(model, "base_model", model)
        first = describe(model).layers[0].name.split(".")
        return model.get_submodule(".".join(first[:-2]))

    def states_of(self, model: nn.Module, **inputs: Any) -> list[Tensor]:
        """What each layer's queries and values read from these inputs, and what the top layer gives."""
        backbone = self.backbone(model)
        states: list[Tensor] = []
        handles = [
            model.get_submodule(place.query).register_forward_pre_hook(partial(_keep, states)) for place in self.places
        ]
        more = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
        self._reading = True
        try:
            with _at_rest(model), torch.no_grad():
                output = backbone(**inputs, **more)
        finally:
            self._reading = False
            for handle in handles:
                handle.remove()
        return [*states, output[0]]

    def _step(self, inputs: dict[str, Any]) -> Source | None:
        """The part of the prompt's source that one forward pass of `generate` needs."""
        prompt, tokens = self.prompt, tokens_of(inputs)
        if prompt is None or tokens is None:
            return None
        if len(tokens) != len(prompt.target):
            self.prompt = prompt = prompt.repeated(len(tokens) // len(prompt.target))
        past, now, length = cached(inputs), tokens.shape[1], prompt.target.shape[1]
        if past >= length:
            return None
        target = functional.pad(prompt.target, (0, max(0, past + now - length)))
        return Source(prompt.states, prompt.mask, target, (past, past + now))

    @contextmanager
    def generating(self, model: nn.Module, inputs: dict[str, Any], given: dict[str, Any]) -> Iterator[None]:
        """Within it `model.generate` fuses the prompt with the source."""
        if inputs.get("attention_mask") is None and given.get("fusion_mask") is None:
            raise DataError("generate() with a source needs to know the tokens of the prompt.", fix="attention_mask=…")
        if cached(inputs) and given.get("fusion_mask") is None and not self.is_encoder_decoder:
            raise DataError(
                "generate() goes on from a KV cache, and has to know which tokens are the prompt that was fused.",
                found=f"{cached(inputs)} tokens in past_key_values, and no fusion_mask",
                fix="fusion_mask=…, (batch, length), 1 at that prompt and 0 at what was written after it",
            )
        self.prompt = self.read(model, inputs, **given)
        self.current = self.prompt if self.is_encoder_decoder else None
        try:
            yield
        finally:
            self.prompt = self.current = None


def _keep(states: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    states.append(args[0].detach())


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Adapters and dropout off, and all as it was afterwards; PEFT's own switch would thaw what is frozen."""
    training = [module for module in model.modules() if module.training]
    switches = [
        (module, module._disable_adapters)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for module in training:
        module.training = False
    for module, _ in switches:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, switch in switches:
            module._disable_adapters = switch
