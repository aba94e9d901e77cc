"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) as a PEFT method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from graftlm.adapters import checkpoint, invertible, registry
from graftlm.adapters.layer import AdapterLayer, new_linear
from graftlm.adapters.tuner import KINDS, SublayerModel, places, width_of
from graftlm.errors import SetupError


@dataclass
class BottleneckConfig(PeftConfig):
    r"""Bottleneck adapters for `peft.get_peft_model`: two small projections with a nonlinearity between, per sublayer.

    .. math:: A(h) = c \cdot (U\, \varphi(D h + b_D) + b_U), \qquad D \in \mathbb{R}^{m \times d},
              U \in \mathbb{R}^{d \times m}

    U and its bias are zero at the start, so step 0 equals the base model exactly. Let f be what a sublayer gives
    (attention or feed-forward block) and x the residual that is added to it, or, in ``parallel``, the block's input:

    ============  ====================  ==========================================  ================================
    ``kind``      where                 post-norm (BERT, RoBERTa, XLM-R,            pre-norm (ModernBERT, Llama,
                                        DistilBERT)                                 Qwen, Mistral, Gemma, GPT-2, T5)
    ============  ====================  ==========================================  ================================
    ``pfeiffer``  after the FFN         LN(x + f + A(LN(x + f)))                    f ← f + A(f)
    ``houlsby``   after attention, FFN  LN(x + f + A(f))                            f ← f + A(f)
    ``parallel``  beside the FFN        LN(x + f + A(x))                            f ← f + A(x)
    ============  ====================  ==========================================  ================================

    Everything happens before the residual sum. In a pre-norm model no LayerNorm follows the sum, so the Pfeiffer
    adapter reads f itself, and the parallel one the normed input of the FFN. Gemma norms what its sublayers give, and
    the adapter's part with it. Where the model's own dropout is the last step of a sublayer: in BERT, RoBERTa, XLM-R,
    in DistilBERT and in GPT-2's FFN the adapter comes after it, elsewhere before it. Several active adapters:
    see `graftlm.stack`.

    Args:
        kind: ``pfeiffer``, ``houlsby`` or ``parallel``.
        reduction_factor: d / m, rounded so that m is a whole number (downwards); or
        bottleneck_size: m itself. Exactly one of the two.
        activation: φ, a name of transformers' ``ACT2FN``.
        dropout: probability with which entries of A(h) are dropped in training.
        scaling: the constant c.
        invertible: also an invertible adapter at the embeddings, undone in front of a language model's output matrix;
            see `graftlm.adapters.invertible.Invertible`.
        layers_to_transform: numbers of the layers that get an adapter (0 = bottom; in an encoder-decoder of both
            stacks); None = all.
        exclude_modules: modules that get none: a list of names or endings of names, or a regular expression for whole
            names, as in PEFT's other methods.
        modules_to_save: modules of the base model that train too and are saved with the adapter, such as a head.

    Raises:
        SetupError: a value that is not allowed. `get_peft_model` raises `ModelError` for a model whose sublayers are
            not known, and `PeftModel.from_pretrained` and `load_adapter` for a file that does not fit the model, before
            anything is changed.

    Source: Houlsby et al., arXiv 1902.00751, Section 2.1 (``houlsby``); Pfeiffer et al., *MAD-X*, arXiv 2005.00052,
    Equation 1, and arXiv 2005.00247 (``pfeiffer``); He et al., arXiv 2110.04366, Table 1 (``parallel``).

    Differs from the paper in: (1) U is zero, where the papers draw it small: their step 0 is near the base model, ours
    equals it; (2) the form for pre-norm models is ours: the papers have post-norm models only; (3) LayerNorms stay
    frozen, Houlsby et al. train them; (4) in an encoder-decoder cross-attention gets none.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> model = get_peft_model(
        ...     BertForSequenceClassification(config), BottleneckConfig(reduction_factor=4, task_type="SEQ_CLS")
        ... )
        >>> [name for name, _ in model.named_parameters() if "layer.1" in name and "bottleneck" in name]
        ... # doctest: +NORMALIZE_WHITESPACE
        ['base_model.model.bert.encoder.layer.1.output.bottleneck_down.default.weight',
         'base_model.model.bert.encoder.layer.1.output.bottleneck_down.default.bias',
         'base_model.model.bert.encoder.layer.1.output.bottleneck_up.default.weight',
         'base_model.model.bert.encoder.layer.1.output.bottleneck_up.default.bias']
    """

    kind: str = "pfeiffer"
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    scaling: float = 1.0
    invertible: bool = False
    layers_to_transform: list[int] | int | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    # PEFT asks every configuration for it; ours finds its places in the structure of the model.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registry.peft_type("bottleneck")
        self._read_from: checkpoint.Origin | None = None
        _check(self.kind in KINDS, "unknown kind of bottleneck adapter", self.kind, KINDS)
        _check(self.activation in ACT2FN, "unknown activation", self.activation, ACT2FN)
        if (self.reduction_factor is None) == (self.bottleneck_size is None):
            raise SetupError(
                "a bottleneck adapter needs its size: one of reduction_factor and bottleneck_size",
                found=f"reduction_factor={self.reduction_factor}, bottleneck_size={self.bottleneck_size}",
                fix='BottleneckConfig(kind="pfeiffer", reduction_factor=16)',
            )
        factor, size = self.reduction_factor, self.bottleneck_size
        _check(factor is None or (_number(factor) and factor > 0), "no reduction factor", factor, "a number above 0")
        _check(size is None or (isinstance(size, int) and size >= 1), "no bottleneck size", size, "1, 2, …")
        _check(_number(self.dropout) and 0 <= self.dropout < 1, "no dropout rate", self.dropout, "from 0 to below 1")
        _check(_number(self.scaling), "no scaling constant", self.scaling, "a finite number")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Reads the configuration of a saved adapter; the adapter's weights are checked before they are loaded."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._read_from = checkpoint.Origin(
            str(pretrained_model_name_or_path), {"subfolder": subfolder, **cls._split_kwargs(kwargs)[0]}
        )
        return config

    def size(self, width: int) -> int:
        """m for a model of width d."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        size = int(width // self.reduction_factor)  # type: ignore[operator]  # one of the two is set
        if size < 1:
            raise SetupError(
                "the reduction factor leaves no bottleneck",
                found=f"width {width}, reduction_factor={self.reduction_factor}",
                allowed=f"up to {width}",
            )
        return size


class Bottleneck(AdapterLayer):
    """Adapters at the end of a sublayer whose module returns the sublayer's output f."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation", "bottleneck_dropout", "bottleneck_settings")

    def __init__(self, base_layer: nn.Module, norm: nn.Module | None = None):
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_settings: dict[str, tuple[str, float]] = {}
        self._norm = (norm,)  # in a tuple: it belongs to another module

    def update_layer(self, adapter: str, config: BottleneckConfig, width: int) -> None:
        """Adds one adapter."""
        size = config.size(width)
        self.bottleneck_down[adapter] = new_linear(width, size, zero=False)
        self.bottleneck_up[adapter] = new_linear(size, width, zero=True)
        self.bottleneck_activation[adapter] = ACT2FN[config.activation]
        self.bottleneck_dropout[adapter] = nn.Dropout(config.dropout)
        self.bottleneck_settings[adapter] = (config.kind, config.scaling)
        self._move_adapter_to_device_of_base_layer(adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._adapted(self.base_layer(x, *args, **kwargs), x, self._norm[0])

    def _adapted(self, f: Tensor, x: Tensor, norm: nn.Module | None) -> Tensor:
        output = f
        for position, adapter in enumerate(self.active_here):
            kind, scaling = self.bottleneck_settings[adapter]
            if kind == "parallel":
                output = output + self._update(adapter, scaling, x).to(f.dtype)
                continue
            # the next one of a stack reads what the one below gives, and is added to f in its place (MAD-X)
            reads = norm(f + x) if position == 0 and kind == "pfeiffer" and norm is not None else output
            output = f + self._update(adapter, scaling, reads).to(f.dtype)
        return output

    def _update(self, adapter: str, scaling: float, h: Tensor) -> Tensor:
        down, up = self.bottleneck_down[adapter], self.bottleneck_up[adapter]
        h = self._cast_input_dtype(h, down.weight.dtype)
        return self.bottleneck_dropout[adapter](scaling * up(self.bottleneck_activation[adapter](down(h))))


class AddingBottleneck(Bottleneck):
    """Adapters in a module of BERT's kind, which adds the residual and norms the sum itself."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        base = self.base_layer
        if not self.active_here:
            return base(hidden_states, input_tensor)
        f = base.dropout(base.dense(hidden_states))
        return base.LayerNorm(self._adapted(f, input_tensor, base.LayerNorm) + input_tensor)


class BottleneckModel(SublayerModel):
    """PEFT's face of the method."""

    prefix = "bottleneck_"

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Called before anything is changed: everything that can be wrong is found here."""
        self._width = width_of(model)
        self._places = {place.name: place for place in places(model, peft_config)}
        self._embeddings = invertible.place_of(model) if peft_config.invertible else None
        self._output = (invertible.output_of(model),)  # in a tuple: it belongs to another module
        if peft_config.invertible or any(isinstance(module, invertible.Invertible) for module in model.modules()):
            invertible.check_output(model, peft_config.modules_to_save or ())
        leaves = {f"{name}.{leaf}": shape for name in self._places for leaf, shape in self._leaves(peft_config)}
        if self._embeddings is not None:
            leaves |= {f"{self._embeddings}.{leaf}": shape for leaf, shape in invertible.leaves(self._width)}
        further = self._give_head(peft_config)
        if peft_config._read_from is not None:
            checkpoint.check_file(peft_config, model, leaves, self._width, headless=further)
            peft_config._read_from = None

    def _leaves(self, config: BottleneckConfig) -> list[tuple[str, tuple[int, ...]]]:
        size, width = config.size(self._width), self._width
        return [
            ("bottleneck_down.weight", (size, width)),
            ("bottleneck_down.bias", (size,)),
            ("bottleneck_up.weight", (width, size)),
            ("bottleneck_up.bias", (width,)),
        ]

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        return key == self._embeddings or super()._check_target_module_exists(peft_config, key)

    def _layer_for(self, target: nn.Module, key: str) -> AdapterLayer:
        """The layer that takes the place of a module of the base model."""
        if key == self._embeddings:
            return invertible.Invertible(target, *self._output)
        place = self._places[key]
        return AddingBottleneck(target) if place.adds else Bottleneck(target, place.norm)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(holds: bool, problem: str, found: object, allowed: Any) -> None:
    if not holds:
        raise SetupError(problem, found=repr(found), allowed=allowed)


registry.register("bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
