"""Neutral residues as a PEFT method: gated adapters that learn a new domain and stay silent on the old one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from graftlm.adapters import checkpoint, registry
from graftlm.adapters.injected_loss import Call, Domains, PenalisedLayer, attach, domains_of, inject, product_of_signs
from graftlm.adapters.neutral_config import PREFIX, NeutralResiduesConfig, size_of
from graftlm.adapters.tuner import SublayerModel, places, width_of
from graftlm.architectures import Sublayer, describe, unwrapped
from graftlm.errors import ModelError, SetupError

_GATE, _GLU, _IN, _OUT = (f"{PREFIX}{role}" for role in ("gate", "glu", "in", "out"))
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "elu": functional.elu,
    "sigmoid": torch.sigmoid,
}
# Norms of what the feed-forward block gives: Gemma 2 and 3, OLMo 2; GLM 4.
_NORMS_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")


class NeutralResidues(PenalisedLayer):
    """Gated GLU blocks beside a feed-forward block whose module returns its output.

    Where a norm follows the module the residue waits for it, and is added to what the norm gives.
    """

    adapter_layer_names = (_GATE, _GLU, _IN, _OUT)
    other_param_names = ("neutral_residues_activation", "neutral_residues_dropout", "neutral_residues_configs")

    def __init__(self, place: Sublayer, base_layer: nn.Module, domains: Domains):
        super().__init__(base_layer)
        for role in self.adapter_layer_names:
            setattr(self, role, nn.ModuleDict())
        self.neutral_residues_activation = nn.ModuleDict()
        self.neutral_residues_dropout = nn.ModuleDict()
        self.neutral_residues_configs: dict[str, NeutralResiduesConfig] = {}
        self.place, self.stack, self._domains = place.name, place.layer.stack, domains
        self.on_gate: Callable[[NeutralResidues, Tensor | None, Tensor], None] | None = None
        self._waiting: Tensor | None = None
        norm = _norm_behind(place)
        self._handle = norm.register_forward_hook(self._behind_norm) if norm is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None}

    def update_layer(self, adapter: str, config: NeutralResiduesConfig, width: int) -> None:
        """Adds one adapter."""
        if config.size is None:
            raise ModelError("the size of neutral residues is known only beside a model", fix="get_peft_model")
        units, layers = config.size["hidden_units"], config.size["model_layers"]
        std = math.sqrt(1 / (width * layers) if config.initialisation == "low_variance" else 2 / width)
        new = {_GLU: (width, units, std), _IN: (width, units, std), _OUT: (units, width, 0.0)}
        if config.gate != "none":
            new = {_GATE: (width, 1, std), **new}
        for role, shape in new.items():
            getattr(self, role)[adapter] = _matrix(*shape)
        self.neutral_residues_activation[adapter] = ACT2FN[config.activation]
        self.neutral_residues_dropout[adapter] = nn.Dropout(config.dropout)
        self.neutral_residues_configs[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter)

    def release(self) -> None:
        """Leaves the norm alone again."""
        if self._handle is not None:
            self._handle.remove()

    @property
    def gated(self) -> bool:
        """Whether the adapter on top has a gate."""
        return self.neutral_residues_configs[self.active_here[-1]].gate != "none"

    @property
    def penalised(self) -> bool:
        """Whether the adapter on top has a penalty."""
        active = self.active_here
        return bool(active) and self.neutral_residues_configs[active[-1]].penalty_weight > 0

    @property
    def expected_share(self) -> float | None:
        config = self.neutral_residues_configs[self.active_here[-1]]
        return config.original_share if config.penalty == "l1" else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        f = self.base_layer(x, *args, **kwargs)
        self._waiting = None  # left over where checkpointing stopped between this module and the norm
        if not self.active_here:
            return f
        residue = self._residue(x)
        if self._handle is None and isinstance(f, tuple):  # experts give the scores of their router too
            return (f[0] + residue.to(f[0].dtype), *f[1:])
        if self._handle is None:
            return f + residue.to(f.dtype)
        self._waiting = residue
        return f

    def _behind_norm(self, module: nn.Module, args: tuple, normed: Tensor) -> Tensor:
        residue, self._waiting = self._waiting, None
        return normed if residue is None else normed + residue.to(normed.dtype)

    def _residue(self, x: Tensor) -> Tensor:
        call = self._domains.running if self.training and self.trains else None
        *below, top = self.active_here
        total = self.neutral_residues_dropout[top](self._block(top, x, call))
        for adapter in below:
            total = total + self.neutral_residues_dropout[adapter](self._block(adapter, x, None))
        return total

    def _block(self, adapter: str, x: Tensor, call: Call | None) -> Tensor:
        if call is None or not call.layers or self.neutral_residues_configs[adapter].penalty_through_input:
            return self._gated(adapter, x, call)
        return attach(self._gated(adapter, x, None), self._gated(adapter, x.detach(), call))

    def _gated(self, adapter: str, x: Tensor, call: Call | None) -> Tensor:
        config = self.neutral_residues_configs[adapter]
        leaves = self.leaves(adapter)
        n = self._cast_input_dtype(x, leaves[_OUT].weight.dtype)
        z = leaves[_GATE](n) if config.gate != "none" else None
        if z is not None and call is not None:
            z = self._at_gate(z, call, config)
        gate = _GATES[config.gate](z) if z is not None else None
        sparse = config.sparse_inference and not self.training
        if sparse:
            config.check_sparse()  # it may have been switched on since
        parts: tuple[Tensor, ...] = ()
        if gate is None:
            residue = self._glu(adapter, n)
        elif sparse:
            residue = self._of_open_tokens(adapter, n, gate)
        else:
            parts = gate, self._glu(adapter, n)  # the product keeps both for its backward pass
            residue = gate * parts[1]
        if self.on_gate is not None and adapter == self.active_here[-1]:
            self.on_gate(self, gate, residue)
        if call is not None and call.layers and config.penalty == "l1":
            residue = self._l1(residue, parts, call, config)
        return residue

    def _glu(self, adapter: str, n: Tensor) -> Tensor:
        leaves = self.leaves(adapter)
        return leaves[_OUT](self.neutral_residues_activation[adapter](leaves[_GLU](n)) * leaves[_IN](n))

    def _of_open_tokens(self, adapter: str, n: Tensor, gate: Tensor) -> Tensor:
        opened = gate[..., 0] > 0
        found = gate[opened] * self._glu(adapter, n[opened])
        return found.new_zeros(n.shape).index_put((opened,), found)

    def _at_gate(self, z: Tensor, call: Call, config: NeutralResiduesConfig) -> Tensor:
        if config.gate == "relu":
            new = self._tokens(z, call) & call.new.to(z.device)[:, None]
            call.opened[self.place] = ((z.detach()[..., 0] > 0) & new).any()
        return self._cross_entropy(z, call, config) if call.layers and config.penalty == "cross_entropy" else z

    def _l1(self, r: Tensor, parts: tuple[Tensor, ...], call: Call, config: NeutralResiduesConfig) -> Tensor:
        """`parts`: whose product r is, where there are any."""
        tokens = self._tokens(r, call)
        original = tokens & ~call.new.to(r.device)[:, None]
        count = original.sum() if config.original_share is None else config.original_share * tokens.sum()
        share = original / (count.clamp(min=torch.finfo(torch.float32).tiny) * call.layers * r.shape[-1])
        parts = parts or (r.detach().sign().to(torch.int8),)
        return self._inject(r, product_of_signs, parts, r.detach().abs().sum(-1), share, call, config)

    def _cross_entropy(self, z: Tensor, call: Call, config: NeutralResiduesConfig) -> Tensor:
        tokens = self._tokens(z, call)
        logits = z.detach()
        new = call.new[:, None, None].to(z).expand_as(z)
        each = functional.binary_cross_entropy_with_logits(logits, new, reduction="none")[..., 0]
        share = tokens / (tokens.sum().clamp(min=1) * call.layers)
        return self._inject(z, torch.clone, (logits.sigmoid() - new,), each, share, call, config)

    def _inject(
        self,
        x: Tensor,
        direction: Callable[..., Tensor],
        parts: tuple[Tensor, ...],
        each: Tensor,
        share: Tensor,
        call: Call,
        config: NeutralResiduesConfig,
    ) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        share = share.to(precise)
        call.values.setdefault(self.place, (each.to(precise) * share).sum())
        weights = config.penalty_weight * share
        if call.part is not None:
            weights = weights * torch.as_tensor(call.part, device=weights.device)
        return inject(x, direction, parts, weights, call, self.place)

    def _tokens(self, x: Tensor, call: Call) -> Tensor:
        tokens = call.tokens[self.stack]
        if x.shape[:2] != tokens.shape:
            raise SetupError(
                "the penalty does not know which tokens a layer reads",
                found=f"{self.place}: shape {tuple(x.shape)}",
                allowed=f"(batch, length) = {tuple(tokens.shape)}",
                fix="chunk_size_feed_forward=0 in the model's configuration; attn_implementation=sdpa",
            )
        return tokens.to(x.device)


class AddingNeutralResidues(NeutralResidues):
    """Blocks in a module of BERT's kind, which adds the residual and norms the sum itself."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        base = self.base_layer
        if not self.active_here:
            return base(hidden_states, input_tensor)
        f = base.dropout(base.dense(hidden_states))
        return base.LayerNorm(f + self._residue(input_tensor).to(f.dtype) + input_tensor)


class NeutralResiduesModel(SublayerModel):
    """PEFT's face of the method."""

    prefix = PREFIX

    def _prepare_model(self, peft_config: NeutralResiduesConfig, model: nn.Module) -> None:
        """Called before anything is changed: everything that can be wrong is found here."""
        self._width = width_of(model)
        self._places = {place.name: place for place in places(model, peft_config)}
        _check_rows(peft_config, model)
        size = size_of(model, peft_config, len(self._places), self._width)
        if peft_config._read_from is not None and peft_config.size is not None:
            size["hidden_units"] = peft_config.size["hidden_units"]  # under another head the share may round otherwise
        peft_config.size = size
        further = self._give_head(peft_config)
        if peft_config._read_from is not None:
            units, width = size["hidden_units"], self._width
            shapes = {"gate": (1, width), "glu": (units, width), "in": (units, width), "out": (width, units)}
            if peft_config.gate == "none":
                del shapes["gate"]
            leaves = {f"{at}.{PREFIX}{role}.weight": shape for at in self._places for role, shape in shapes.items()}
            needed = {**leaves, **_new_rows(peft_config, model)}
            checkpoint.check_file(peft_config, model, needed, width, headless=further)
            peft_config._read_from = None
        if domains_of(model) is None:
            Domains().install(model)

    def _layer_for(self, target: nn.Module, key: str) -> NeutralResidues:
        place, domains = self._places[key], domains_of(self.model)
        if domains is None:
            raise ModelError(
                "the hooks of neutral residues were removed from the model", found=type(self.model).__name__
            )
        return (AddingNeutralResidues if place.adds else NeutralResidues)(place, target, domains)

    def unload(self) -> nn.Module:
        """The base model, without blocks and hooks."""
        model = super().unload()
        if (domains := domains_of(model)) is not None:
            domains.remove(model)
        return model

    def _check_merge_allowed(self) -> None:
        raise ModelError(
            "Neutral residues cannot be merged into the weights of their model: their gate is a nonlinearity.",
            fix="keep the adapter beside the model (save_pretrained), or take it off: model.unload()",
        )


def _check_rows(config: NeutralResiduesConfig, model: nn.Module) -> None:
    rows = config.trainable_token_indices or {}
    rows = rows if isinstance(rows, dict) else {describe(model).embeddings[0]: rows}
    for name, module in model.named_modules():
        chosen = [row for end, found in rows.items() if f".{name}".endswith(f".{end}") for row in found]  # PEFT's rule
        there = len(getattr(module, "weight", ())) if chosen else 0
        if there and max(chosen) >= there:
            raise ModelError(
                "the adapter has rows for tokens that the model does not know",
                found=f"{name}: {there} rows, and token {max(chosen)}",
                allowed=f"up to token {there - 1}",
                fix=f"model.resize_token_embeddings({max(chosen) + 1}) first, or graftlm.load(RUN), which does it",
            )


def _new_rows(config: NeutralResiduesConfig, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the rows of new tokens in a saved adapter."""
    rows = config.trainable_token_indices or {}
    if isinstance(rows, list):
        rows = {describe(model).embeddings[0]: rows}
    width = width_of(model)
    return {f"{name}.token_adapter.trainable_tokens_delta": (len(chosen), width) for name, chosen in rows.items()}


def _norm_behind(place: Sublayer) -> nn.Module | None:
    children = dict(place.layer.module.named_children())
    return next((unwrapped(children[name]) for name in _NORMS_BEHIND if name in children), None)


def _matrix(width_in: int, width_out: int, std: float) -> nn.Linear:
    leaf = nn.Linear(width_in, width_out, bias=False)
    with torch.no_grad():
        nn.init.normal_(leaf.weight, std=std)
    return leaf


registry.register("neutral_residues", config_cls=NeutralResiduesConfig, model_cls=NeutralResiduesModel)
