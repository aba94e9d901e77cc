"""Scheduled unfreezing: which layer opens when, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from graftlm.errors import SetupError
from graftlm.training.layers import trainable_layers

Traces = Callable[[int], Mapping[str, float]]

_ORDERS: dict[str, Callable[[tuple[str, ...], int], Sequence[str]]] = {
    "gradual": lambda names, seed: names[::-1],
    "reverse": lambda names, seed: names,
    "random": lambda names, seed: [names[i] for i in np.random.default_rng(seed).permutation(len(names))],
}
SCHEDULES = ("standard", *_ORDERS, "fixed", "lpft", "fisher")


class Unfreezer:
    r"""Freezes a model's layers and opens them one after another; the head always trains.

    .. code-block:: text

        S = {head}
        for step i = 0 … N−1:
            if i mod k == 0 and i < k·L:
                S = S ∪ SELECT(frozen layers)
            train S

    ========  =====================================================================
    schedule  SELECT
    ========  =====================================================================
    standard  every layer at step 0
    gradual   the next layer from the top down
    reverse   the next layer from the bottom up (a control: it hurts)
    random    one of the frozen layers, uniformly
    fixed     the next of `order`
    lpft      head only for k steps, then every layer (linear probing, fine-tuning)
    fisher    the frozen layer with the largest tr(F) (FUN)
    ========  =====================================================================

    A *layer* is what is trainable in one transformer layer when this object is made: its LoRA pairs, its bottleneck, or
    all of it in full fine-tuning. Trainable input embeddings are one more layer, below the others.

    Args:
        model: make it trainable in every layer first, then the optimizer (and the DDP wrapper), then this object.
        schedule: one of the table.
        every_n_steps: the interval k in optimizer steps.
        order: for ``fixed``: every layer's name or position (0 = bottom) in the order of opening.
        traces: for ``fisher``: called with the step, returns tr(F) by layer name. See `graftlm.fisher_trace`.
        layers: module-name patterns for models whose layers are not recognised; see `graftlm.describe`.
        seed: for ``random``.

    Attributes:
        layer_names: the layers, bottom first.
        opened: layer name → step at which it opened, in the order of opening.

    Raises:
        SetupError: an unknown schedule, an interval below 1, an `order` that is not a permutation, ``fisher`` without
            `traces`, a model without trainable layers, or one that an interrupted schedule had left frozen.

    Source: arXiv 2301.05487, Algorithm 1.

    Differs from the paper in: nothing; the condition i < k·L is our reading of its algorithm. The authors' release
    differs from both: (1) its top adapter is open from step 0 on, so that FUN's first choice is made for it; (2) its
    gradual schedule opens one interval later than FUN and random; (3) mode labels instead of sampled ones, and the
    squared gradient of the batch mean; (4) the pooler is frozen with the base model. What an untrained adapter's trace
    measures: with LoRA's B = 0 the gradient in A is 0, so tr(F) comes from B alone and says mostly how strong the
    signal is that reaches this layer from above.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> model.bert.embeddings.requires_grad_(False)  # doctest: +ELLIPSIS
        BertEmbeddings(...)
        >>> optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        >>> unfreezer = Unfreezer(model, "gradual", every_n_steps=10)
        >>> [unfreezer.step(i) for i in (0, 1, 10)]
        [('layer.1',), (), ('layer.0',)]
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: str = "gradual",
        every_n_steps: int = 50,
        *,
        order: Sequence[str | int] | None = None,
        traces: Traces | None = None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
    ):
        check_schedule(schedule, every_n_steps, order)
        if schedule == "fisher" and traces is None:
            raise SetupError(
                "the fisher schedule needs tr(F) to choose by",
                fix="traces=lambda step: graftlm.fisher_trace(model, batches, groups, task=…, step=step).traces",
            )
        _refuse_leftovers(model)
        groups = trainable_layers(model, layers)
        self.layer_names = groups.names
        self.tied = groups.tied
        self.opened: dict[str, int] = {}
        self._parameters = {name: [p for _, p in groups.parameters[name]] for name in groups.names}
        self._traces = traces
        self._fisher = schedule == "fisher"
        self._discarding: dict[str, list] = {}
        self.plan = plan(groups.names, schedule, every_n_steps, order, seed)
        for name in self.layer_names:
            self._freeze(name)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers that are still closed, bottom first."""
        return tuple(name for name in self.layer_names if name not in self.opened)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Layer name → its parameters, open or not; the groups that `graftlm.fisher_trace` takes."""
        return dict(self._parameters)

    def step(self, i: int) -> tuple[str, ...]:
        """Call before optimizer step i (from 0). Opens what is due, keeps the rest frozen, returns what it opened."""
        due = [(when, names) for when, names in self.plan if when <= i][self._decided :]
        if self._fisher and len(due) > 1:
            raise SetupError(
                f"at step {i} the fisher schedule has {len(due)} choices to make that belong to earlier steps",
                found=f"steps {[when for when, _ in due]} were never seen",
                fix="call step(i) at every step, and load_state_dict() the saved choices when a run is resumed",
            )
        opened: list[str] = []
        for when, names in due:
            for name in names or (self._largest_trace(i),):
                self.opened[name] = when
                self._open(name)
                opened.append(name)
        self.apply()
        return tuple(opened)

    def apply(self) -> None:
        """Sets `requires_grad` of every layer again: PEFT's disable_adapter() and set_adapter() thaw what is frozen."""
        for name, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(name in self.opened)

    def drop_frozen_gradients(self) -> None:
        """Call before the optimizer steps where something in the step may have thawed a layer."""
        for name in self.frozen:
            for parameter in self._parameters[name]:
                parameter.grad = None

    def release(self) -> None:
        """Makes every layer trainable again, as it was before."""
        for name in self.layer_names:
            self._open(name)
            for parameter in self._parameters[name]:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The decisions so far, as plain numbers that JSON keeps."""
        return {"opened": dict(self.opened)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Takes up decisions saved by `state_dict`; raises SetupError where they name layers that are not here."""
        unknown = set(state["opened"]) - set(self.layer_names)
        if unknown:
            raise SetupError(
                "the saved unfreezing decisions name layers that this model does not have",
                found=sorted(unknown),
                allowed=self.layer_names,
                fix="resume with the model and adapter that the checkpoint was written with",
            )
        self.opened = dict(state["opened"])
        for name in self.layer_names:
            (self._open if name in self.opened else self._freeze)(name)
        self.apply()

    @property
    def _decided(self) -> int:
        """How many entries of the plan are done; each opens its layers at the plan's own step."""
        done = set(self.opened.values())
        return sum(when in done for when, _ in self.plan)

    def _largest_trace(self, i: int) -> str:
        if len(self.frozen) == 1:
            return self.frozen[0]
        traces = self._traces(i)  # type: ignore[misc]  # __init__ refuses the fisher schedule without them
        missing = [name for name in self.frozen if not math.isfinite(traces.get(name, math.nan))]
        if missing:
            raise SetupError(
                f"no finite Fisher trace at step {i}",
                found={name: traces.get(name) for name in missing},
                fix="look at the loss: traces that are not finite come from a model that has diverged "
                "(lower the learning rate) or from float16 (use bf16)",
            )
        return max(self.frozen, key=lambda name: traces[name])

    def _freeze(self, name: str) -> None:
        if name not in self._discarding:
            self._discarding[name] = []
            for parameter in self._parameters[name]:
                parameter.requires_grad_(True)  # a hook can be hung on nothing else
                self._discarding[name].append(parameter.register_post_accumulate_grad_hook(_discard_gradient))
        for parameter in self._parameters[name]:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _open(self, name: str) -> None:
        for handle in self._discarding.pop(name, ()):
            handle.remove()


def plan(
    names: Sequence[str], schedule: str, every_n_steps: int, order: Sequence[str | int] | None = None, seed: int = 0
) -> list[tuple[int, tuple[str, ...] | None]]:
    """The schedule's decisions as (step, layers that open then); None where tr(F) will choose one layer.

    >>> plan(["layer.0", "layer.1"], "gradual", 50)
    [(0, ('layer.1',)), (50, ('layer.0',))]
    >>> plan(["layer.0", "layer.1"], "lpft", 50)
    [(50, ('layer.0', 'layer.1'))]
    """
    names = tuple(names)
    if schedule in ("standard", "lpft"):
        return [(every_n_steps if schedule == "lpft" else 0, names)]
    if schedule == "fisher":
        return [(n * every_n_steps, None) for n in range(len(names))]
    chosen = _permutation(names, order or ()) if schedule == "fixed" else _ORDERS[schedule](names, seed)
    return [(n * every_n_steps, (name,)) for n, name in enumerate(chosen)]


def check_schedule(schedule: str, every_n_steps: int, order: Sequence[str | int] | None) -> None:
    """Raises SetupError for arguments that make no schedule."""
    if schedule not in SCHEDULES:
        raise SetupError("unknown unfreezing schedule", found=repr(schedule), allowed=SCHEDULES)
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise SetupError(
            "every_n_steps counts optimizer steps between two openings", found=every_n_steps, allowed="1, 2, 3, …"
        )
    if (schedule == "fixed") != (order is not None):
        raise SetupError(
            "`order` belongs to the fixed schedule" if order is not None else "the fixed schedule needs its `order`",
            found=f"schedule={schedule!r}, order={order}",
            fix='schedule="fixed", order=[11, 10, 9, …] (positions, 0 = bottom, or layer names; first opened first)',
        )


def _permutation(names: tuple[str, ...], order: Sequence[str | int]) -> list[str]:
    by_position = dict(enumerate(names))
    chosen = [by_position.get(entry, entry) if isinstance(entry, int) else entry for entry in order]
    if sorted(map(str, chosen)) != sorted(names):
        raise SetupError(
            "`order` must name every trainable layer once",
            found=list(order),
            allowed=f"a permutation of 0 … {len(names) - 1}, or of {', '.join(names)}",
        )
    return [str(name) for name in chosen]


def _discard_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _refuse_leftovers(model: nn.Module) -> None:
    """A run that was stopped in the middle leaves layers frozen, which the next one would take for not trainable."""
    left = 0
    for parameter in model.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if hook is _discard_gradient]:
            del hooks[key]
            parameter.requires_grad_(True)
            left += 1
    if left:
        raise SetupError(
            "an earlier unfreezing schedule on this model was stopped in the middle and had left layers frozen",
            found=f"{left} frozen parameters, which are trainable again now",
            fix="the same once more: make the Trainer (or the optimizer) anew, so that it takes all parameters",
        )
