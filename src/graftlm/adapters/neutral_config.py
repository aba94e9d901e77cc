"""The settings of neutral residues, and the size that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn
from transformers.activations import ACT2FN

from graftlm.adapters import checkpoint, registry
from graftlm.architectures import describe
from graftlm.errors import SetupError

GATES = ("relu", "elu", "sigmoid", "none")
PENALTIES = ("l1", "cross_entropy")
INITIALISATIONS = ("low_variance", "he")
COUNTS = ("non_embedding", "all")
PREFIX = "neutral_residues_"


@dataclass
class NeutralResiduesConfig(PeftConfig):
    r"""Neutral residues for `peft.get_peft_model`: gated GLU blocks beside the FFNs, held silent on old text.

    With n the input of a layer's feed-forward block, of width d, and u the residual stream:

    .. math:: a = W_o (\mathrm{silu}(W_g n) \odot (W_i n)), \qquad r = \mathrm{relu}(w \cdot n)\, a,
              \qquad u \leftarrow u + \mathrm{FFN}(n) + r

    W_o is zero at the start, so step 0 equals the base model exactly. In training α·T is added to the loss, as a
    gradient (see `graftlm.adapters.injected_loss`), on original-domain tokens only:

    .. math:: T = \frac{1}{L} \sum_l \frac{1}{p\,N} \sum_{t\ \text{original}} \lVert r_{l,t} \rVert_1 / d

    N is the number of tokens in the batch, in a causal LM of those that predict a label, else of those that are not
    padding, p the share of original-domain tokens in the data, and L the layers whose blocks train. So in a causal LM T
    is a mean over original-domain tokens that stays exact however a step is cut into batches; in other tasks a Trainer
    weights each batch by its share of the labels, and T moves a little with the cut. With ``penalty="cross_entropy"``,
    the paper's rejected alternative, T is the mean over all tokens and layers of the gate's cross-entropy with the
    domain (new = open).

    The domain of each sequence reaches the layers through a batch column ``domain`` or `graftlm.domain`. Where a norm
    follows the feed-forward block (Gemma 2 and 3) the residue is added behind it, as it would be rescaled otherwise. In
    post-norm models (BERT, XLM-R) it is part of the sum that the layer norms.

    Args:
        added_parameters: size of all blocks as a share of the base model's weights; the number of hidden units is the
            nearest whole one. After `get_peft_model`, ``config.size`` says what came of it.
        counts: the weights that the share is of: ``non_embedding`` (without input embeddings and output matrix) or
            ``all``.
        gate: ``relu``, ``elu``, ``sigmoid`` or ``none``.
        penalty: ``l1`` or ``cross_entropy``; None = ``cross_entropy`` for a sigmoid gate, else ``l1``.
        penalty_weight: α; 0 = no penalty. The right one depends on width and task: sweep it.
        original_share: p in T, a share of tokens (`graftlm.PenaltyLog` logs the one that is found, and warns where it
            is another); None = the share found in each batch, so that T is the mean over this batch's original-domain
            tokens, which depends on how a step is cut up.
        penalty_through_input: whether the term's gradient also reaches the layers below, through n; if not, the block
            is computed a second time in training.
        initialisation: of w, W_g and W_i: ``low_variance``, 1 / (d·L) with L layers, or ``he``, 2 / d.
        activation: of the GLU block, a name of transformers' ``ACT2FN``.
        dropout: probability with which entries of the residue r are dropped in training; the penalty is on r before it.
        sparse_inference: in evaluation mode compute the block of tokens with an open ReLU gate only; the same within
            rounding. It can be switched at any time, ``model.peft_config["default"].sparse_inference = True``.
        layers_to_transform, exclude_modules, modules_to_save: see `graftlm.BottleneckConfig`.
        trainable_token_indices: rows of embeddings, and of an output matrix of its own, that train and are saved too:
            those of new tokens, as in `peft.LoraConfig`.
        size: filled in by `get_peft_model`.

    Raises:
        SetupError: a value that is not allowed; in training a batch without the domain of its sequences.
            `get_peft_model` raises `ModelError` for a model whose feed-forward blocks are not known.

    Source: Talla, Jégou, Grave, *Neutral residues*, arXiv 2410.02744. The paper's ablations: vanilla adapter =
    ``gate="none", penalty_weight=0, initialisation="he"``; ``gate="none"``; ``gate="sigmoid"``; ``gate="elu"`` (first
    version).

    Differs from the paper in: no code was released, so that one scalar gate a token and layer, the place of the
    penalty (r), the missing biases, and p·N in place of the counted original-domain tokens are our reading; dropout is
    ours, and off.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = get_peft_model(
        ...     LlamaForCausalLM(
        ...         LlamaConfig(
        ...             num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=10
        ...         )
        ...     ),
        ...     NeutralResiduesConfig(added_parameters=0.2, task_type="CAUSAL_LM"),
        ... )
        >>> size = model.peft_config["default"].size
        >>> size["hidden_units"], size["added"], size["of"], size["counted"]
        (5, 256, 1320, 'non_embedding')
    """

    added_parameters: float = 0.2
    counts: str = "non_embedding"
    gate: str = "relu"
    penalty: str | None = None
    penalty_weight: float = 0.01
    original_share: float | None = 0.1
    penalty_through_input: bool = True
    initialisation: str = "low_variance"
    activation: str = "silu"
    dropout: float = 0.0
    sparse_inference: bool = False
    layers_to_transform: list[int] | int | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    size: dict[str, Any] | None = field(default=None)

    target_modules = None  # PEFT asks every configuration for it
    kind: ClassVar[str] = "parallel"  # what `places` and `graftlm.stack` call it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registry.peft_type("neutral_residues")
        self._read_from: checkpoint.Origin | None = None
        if self.penalty is None:
            self.penalty = "cross_entropy" if self.gate == "sigmoid" else "l1"
        for name, allowed in (
            ("gate", GATES),
            ("penalty", PENALTIES),
            ("initialisation", INITIALISATIONS),
            ("counts", COUNTS),
            ("activation", tuple(ACT2FN)),
        ):
            if getattr(self, name) not in allowed:
                raise SetupError(
                    f"unknown {name} of neutral residues", found=repr(getattr(self, name)), allowed=allowed
                )
        if self.penalty == "cross_entropy" and self.gate != "sigmoid":
            raise SetupError(
                "only a sigmoid gate is a probability, of which a cross-entropy can be taken",
                found=f'gate="{self.gate}", penalty="cross_entropy"',
                fix='gate="sigmoid", or penalty="l1"',
            )
        if self.sparse_inference:
            self.check_sparse()
        _number("added_parameters", self.added_parameters, "a number above 0", lambda x: x > 0)
        _number("penalty_weight", self.penalty_weight, "0 or more", lambda x: x >= 0)
        _number("dropout", self.dropout, "from 0 to below 1", lambda x: 0 <= x < 1)
        if self.original_share is not None:
            _number("original_share", self.original_share, "above 0, up to 1; or None", lambda x: 0 < x <= 1)

    def check_sparse(self) -> None:
        """Raises a `SetupError` where blocks cannot be left out."""
        if self.gate != "relu":
            raise SetupError(
                "only a ReLU gate is exactly zero, so that blocks can be left out",
                found=f'gate="{self.gate}", sparse_inference=True',
                fix='gate="relu", or sparse_inference=False',
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Reads the configuration of a saved adapter; the adapter's weights are checked before they are loaded."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._read_from = checkpoint.Origin(
            str(pretrained_model_name_or_path), {"subfolder": subfolder, **cls._split_kwargs(kwargs)[0]}
        )
        return config


def size_of(model: nn.Module, config: NeutralResiduesConfig, blocks: int, width: int) -> dict[str, Any]:
    """How large the blocks become, and what the share was taken of.

    Returns:
        ``hidden_units`` h of a block, ``added`` parameters in all, ``of`` how many of the base model's, ``counted``
        which (`NeutralResiduesConfig.counts`), the ``share`` that came of it, ``blocks``, ``model_layers``.

    Raises:
        SetupError: the share is less than half of what blocks of one hidden unit would have.
    """
    found = describe(model)
    apart: set[int] = set()
    if config.counts == "non_embedding":
        outside = [model.get_submodule(name) for name in found.embeddings]
        ask = getattr(model, "get_output_embeddings", None)
        outside += [output] if callable(ask) and (output := ask()) is not None else []
        apart = {id(parameter) for module in outside for parameter in module.parameters()}
    of = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in apart and PREFIX not in name and ".modules_to_save." not in name
    )
    gates = blocks * width * (config.gate != "none")
    unit = 3 * width * blocks
    units = math.floor((config.added_parameters * of - gates) / unit + 0.5)
    if units < 1:
        raise SetupError(
            "the share of added parameters leaves no hidden unit",
            found=f"added_parameters={config.added_parameters} of {of} parameters ({config.counts})",
            allowed=f"from {(unit / 2 + gates) / of:.2g}",
        )
    added = units * unit + gates
    return {
        "hidden_units": units,
        "added": added,
        "of": of,
        "counted": config.counts,
        "share": added / of,
        "blocks": blocks,
        "model_layers": len(found.layers),
    }


def _number(name: str, value: Any, allowed: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise SetupError(f"{name} of neutral residues is out of range", found=repr(value), allowed=allowed)
