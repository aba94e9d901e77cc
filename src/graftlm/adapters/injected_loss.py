r"""A loss term inside the layers, added to the training as a gradient.

.. math:: \nabla (L + \alpha\, T), \qquad T = \frac{1}{L_a} \sum_{\text{layers}} \sum_t w_t\, \ell(x_{l,t})

The value of T is not added to ``outputs.loss``: collected by side effect it is lost or wrong under checkpointing, and
under a Trainer its gradient is multiplied by the accumulation steps. Instead an autograd function lets the activations
through and adds the term's gradient on the way back, times the gradient that arrives at ``outputs.loss`` (loss scaling,
division by the accumulation steps) and this batch's share of what the loss is a mean over (``num_items_in_batch``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.auto import modeling_auto

from graftlm.adapters.layer import AdapterLayer
from graftlm.context import NEW, ORIGINAL, Batch, current_batch
from graftlm.errors import SetupError

_IGNORED = -100


class PenalisedLayer(AdapterLayer):
    """An adapter layer with a term of its own."""

    @property
    def trains(self) -> bool:
        """Whether the layer's active adapter trains."""
        active = self.active_here
        return bool(active) and any(
            p.requires_grad for leaf in self.leaves(active[-1]).values() for p in leaf.parameters()
        )

    @property
    def penalised(self) -> bool:
        """Whether that adapter has a penalty."""
        raise NotImplementedError

    @property
    def expected_share(self) -> float | None:
        """The share of original-domain tokens that the penalty counts on; None where it counts on none."""
        raise NotImplementedError


@dataclass
class Call:
    """One forward pass with the penalty on, or with an eye on the gates.

    Attributes:
        new: (batch,), whether a sequence is of the new domain.
        tokens: per stack of layers (batch, length): the positions that count; an encoder-decoder has two stacks.
        layers: how many layers the term is a mean over; 0 without a penalty.
        part: this batch's share of what the loss is a mean over; None where the loss is this batch's own mean.
        values: per layer its part of T.
        opened: per layer whether its ReLU gate was open for any counted token of the new domain.
    """

    new: Tensor
    tokens: dict[str, Tensor]
    layers: int
    part: Tensor | float | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    opened: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    done: set[str] = field(default_factory=set)

    def term(self) -> float:
        """T of this batch."""
        values = list(self.values.values())
        return float(torch.stack([value.to(values[0].device) for value in values]).sum()) if values else 0.0

    def token_counts(self) -> Tensor:
        """Of the counted tokens those in original-domain sequences, and all; the sequences."""
        masks = self.tokens.values()
        counts = [torch.stack([(mask & ~self.new[:, None]).sum(), mask.sum()]) for mask in masks]
        return torch.cat([torch.stack(counts).sum(0), self.new.new_tensor([len(self.new)], dtype=torch.long)]).float()


class Domains:
    """The forward pass that runs, and the one whose layers checkpointing may run again: known to all layers of a model.

    Its two methods are hooks of the base model.

    Attributes:
        looks_at_gates: whether gates are looked at where nothing is penalised too; see `graftlm.PenaltyLog`.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.silent = False
        self.looks_at_gates = False

    def __getstate__(self) -> dict[str, Any]:
        return {"call": None, "silent": False, "looks_at_gates": False}  # copies and files of the model hold no batch

    def install(self, model: nn.Module) -> None:
        """Hooks itself to the base model."""
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def remove(self, model: nn.Module) -> None:
        """Takes the hooks off again."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[number]
                model._forward_pre_hooks_with_kwargs.pop(number, None)
                model._forward_hooks_always_called.pop(number, None)

    @property
    def running(self) -> Call | None:
        """The pass to whose term the layers add."""
        return None if self.silent else self.call

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Takes the column `domain` off the batch."""
        given, around = kwargs.pop("domain", None), current_batch()
        if given is not None and around is not None:
            raise SetupError("the domain of the sequences is given twice: in the batch and by graftlm.domain")
        training: list[PenalisedLayer] = []
        if model.training and torch.is_grad_enabled():
            training = [part for part in model.modules() if isinstance(part, PenalisedLayer)]
            if getattr(model, "_is_replica", False) and any(part.penalised for part in training):
                raise SetupError(
                    "the penalty does not work in torch.nn.DataParallel: its copies of the model train nothing",
                    fix="one process a GPU (torchrun, accelerate launch), or CUDA_VISIBLE_DEVICES=0",
                )
            training = [part for part in training if part.trains]
        layers = sum(part.penalised for part in training)
        # where it is silent an earlier pass stays: checkpointing may still have to run its layers again
        self.silent = not (layers or (self.looks_at_gates and training))
        if not self.silent:
            batch = around or (None if given is None else Batch(given))
            if batch is None and not layers:
                batch = Batch([NEW] * len(_inputs(args, kwargs)))
            if batch is None:
                raise SetupError(
                    "the penalty needs the domain of every sequence, and this batch does not say it",
                    found=f"a batch of {', '.join(kwargs) or 'positional arguments'}",
                    allowed="a column domain: 0 for the original domain, 1 for the new one",
                    fix="TrainingArguments(remove_unused_columns=False) if a Trainer dropped the column; with "
                    "graftlm.domain(labels): …; NeutralResiduesConfig(penalty_weight=0)",
                )
            self.call = _call(model, batch, layers, args, kwargs)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Sees to it that the gradient which arrives at the loss becomes known; called where a pass has failed too."""
        call, self.silent = self.running, False
        if output is None or call is None or not call.layers or not torch.is_grad_enabled():
            return output
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            return output  # without a loss `backward` will say so
        seen = _Arrival.apply(loss, call)
        if isinstance(output, dict):
            output["loss"] = seen
            return output
        return (seen, *output[1:])


def with_penalty(model: nn.Module, loss: Tensor) -> Tensor:
    """A loss that is computed outside of the model, so that its backward pass carries the penalty of the layers.

    `outputs.loss` needs no such call. The penalty is scaled by the gradient that arrives at what this returns::

        with graftlm.domain(domains, targets=labels):
            logits = model(input_ids=…, attention_mask=…).logits
        loss = graftlm.with_penalty(model, cross_entropy(logits, labels))
        loss.backward()

    Args:
        model: with the adapter; its last forward pass is the one that the loss comes from.
        loss: a number.
    """
    domains = domains_of(model)
    if domains is None or domains.call is None or not loss.requires_grad:
        return loss
    return _Arrival.apply(loss, domains.call)


def inject(
    x: Tensor, direction: Callable[..., Tensor], parts: Sequence[Tensor], weights: Tensor, call: Call, key: str
) -> Tensor:
    """x, whose gradient will be that of the loss plus ``weights * direction(*parts)``.

    Args:
        x: (batch, length, size), activations of a layer.
        direction: what makes dℓ/dx, of x's shape, in the backward pass.
        parts: what it is made of, and all that is kept: best what is kept anyway.
        weights: (batch, length), the factor of each token.
        call: the pass that x belongs to.
        key: of the layer, one of its own in `call`.
    """
    return _Inject.apply(x, weights, call, key, direction, *(part.detach() for part in parts))


def product_of_signs(*parts: Tensor) -> Tensor:
    """The sign of a product, without the product."""
    return reduce(torch.mul, (part.sign() for part in parts))


def attach(x: Tensor, other: Tensor) -> Tensor:
    """x; the backward pass comes by `other` as well, with a gradient of zero."""
    return _Attach.apply(x, other)


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return loss.clone()  # no view: Trainer multiplies the loss in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.call.scale = gradient.detach()
        ctx.call.done.clear()
        return gradient, None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, call: Call, key: str, direction: Callable[..., Tensor], *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.direction = direction
        # not saved: where checkpointing runs the layer again, another batch may be the running one by then
        ctx.call, ctx.key, ctx.weights = call, key, weights
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        parts = ctx.saved_tensors
        call: Call = ctx.call
        if call.scale is None:
            raise SetupError(
                "the penalty follows the gradient of outputs.loss, and backward did not come through it",
                found="a loss that was computed from the logits, as a Trainer does with label_smoothing_factor or "
                "compute_loss_func, or two forward passes before one backward under reentrant gradient checkpointing",
                fix="label_smoothing_factor=0; outputs = model(**batch, labels=…); outputs.loss.backward(); or "
                "graftlm.with_penalty(model, loss)",
            )
        if ctx.key in call.done:
            raise SetupError(
                "the penalty of a layer would be added twice for one batch",
                found="two forward passes before one backward under reentrant gradient checkpointing",
                fix='call backward after each forward pass, or gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        call.done.add(ctx.key)
        factor = ctx.weights * call.scale.to(ctx.weights)
        added = factor[..., None] * ctx.direction(*parts)
        return gradient + added.to(gradient.dtype), *[None] * (4 + len(parts))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.other = {"size": other.shape, "dtype": other.dtype}
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient, gradient.new_zeros(**ctx.other)


def _call(model: nn.Module, batch: Batch, layers: int, args: tuple, kwargs: dict[str, Any]) -> Call:
    inputs = _inputs(args, kwargs)
    shape, device = inputs.shape[:2], inputs.device
    try:
        domains = torch.as_tensor(batch.domains, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SetupError(
            "the domain labels are no numbers",
            found=repr(batch.domains)[:60],
            allowed="0 (original domain) and 1 (new domain) for each sequence",
        ) from error
    known = (domains == ORIGINAL) | (domains == NEW)
    if domains.shape != shape[:1] or not bool(known.all()):
        raise SetupError(
            "the domain labels do not fit the batch",
            found=f"shape {tuple(domains.shape)}, values {sorted(set(domains.flatten().tolist()))[:6]}",
            allowed=f"shape ({shape[0]},), values 0 (original domain) and 1 (new domain)",
        )
    targets = batch.targets if kwargs.get("labels") is None else kwargs["labels"]
    items = batch.items if kwargs.get("num_items_in_batch") is None else kwargs["num_items_in_batch"]
    part: Tensor | float | None = None
    if items is not None and isinstance(targets, Tensor):
        here = (targets[:, 1:] if _is_causal(model) and targets.ndim == 2 else targets) != _IGNORED
        part = here.sum() / items
    return Call(domains == NEW, counted_tokens(model, args, {**kwargs, "labels": targets}), layers, part)


def counted_tokens(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Per stack of layers (batch, length): the tokens of a call that count.

    In a causal LM those that predict a label: then the term of a step is exact however the step is cut up. Else those
    that are not padding.
    """
    inputs = _inputs(args, kwargs)
    shape, device = inputs.shape[:2], inputs.device
    targets = kwargs.get("labels")
    per_token = isinstance(targets, Tensor) and targets.ndim == 2
    if _is_causal(model) and isinstance(targets, Tensor) and per_token:
        predicts = torch.zeros(shape, dtype=torch.bool, device=device)
        predicts[:, :-1] = targets[:, 1:].to(device) != _IGNORED
        return {"layer": predicts, "encoder": predicts}
    mask = _mask(kwargs.get("attention_mask"), shape, device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoded = targets if per_token else kwargs.get("decoder_input_ids")
        decoded = inputs if decoded is None else decoded
        behind = decoded != _IGNORED if per_token else None
        asked = kwargs.get("decoder_attention_mask")
        return {"encoder": mask, "decoder": _mask(asked if asked is not None else behind, decoded.shape[:2], device)}
    return {"layer": mask, "encoder": mask}


def _is_causal(model: nn.Module) -> bool:
    # by its loss, where its name tells it; GPT2LMHeadModel's does not
    known = getattr(model, "loss_type", None) == "ForCausalLM"
    return known or type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _inputs(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    inputs = next((x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    if inputs is None:
        raise SetupError("the penalty reads the shape of the batch from input_ids or inputs_embeds", found=list(kwargs))
    return inputs


def _mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.shape != shape:
        raise SetupError(
            "which tokens are padding cannot be read from this attention mask",
            found=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
            allowed=f"shape {tuple(shape)}; in a causal LM any, with labels of one number a token",
        )
    return mask.to(device) != 0


def domains_of(model: nn.Module) -> Domains | None:
    """The `Domains` that hooks a model, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(found := getattr(hook, "__self__", None), Domains):
                return found
    return None
