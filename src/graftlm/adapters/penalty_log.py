"""The penalty of the layers in the logs of a Trainer, gates that stay closed, and a share that is not the one meant."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback

from graftlm.adapters.injected_loss import Call, PenalisedLayer, domains_of

_SURE = 4.0  # standard deviations of a share, in sequences that were drawn alone


class PenaltyLog(TrainerCallback):
    """Adds the penalty term to the logs of a Trainer as a number of its own, and warns of gates that never open.

    ``penalty`` is T, without its weight, averaged over the steps since the last log; ``original_share`` the share of
    original-domain tokens in them. `loss` stays the loss of the model alone. All figures are those of all processes
    together, so every process needs the callback.

    A ReLU gate that was closed for every token of the new domain since the last log is named in a warning, once: its
    block learns nothing. So it is without a penalty too; sequences without a label ``domain`` then count as new ones.
    `graftlm.gate_statistics` shows all gates. A penalty that meets no original-domain token, or whose
    ``NeutralResiduesConfig.original_share`` is off by more than a factor of two, is said in a warning too.

    Trackers (TensorBoard, Weights & Biases) read a log when it is their turn. A callback that is handed to a Trainer
    comes behind them, and they see no `penalty`; one that is put `first_in` it comes before them::

        graftlm.PenaltyLog().first_in(trainer)
    """

    def __init__(self) -> None:
        self._step: list[tuple[float, float | None]] = []
        self._steps: list[tuple[float, float]] = []  # sum of terms times weights, sum of weights
        self._tokens: Tensor | float = 0.0  # original-domain ones, all; sequences
        self._all = (0.0, 0.0, 0.0)  # the same since the beginning
        self._share_named = False
        self._opened: dict[str, Tensor] = {}
        self._new: Tensor | None = None
        self._penalised = False
        self._named: set[str] = set()

    def first_in(self, trainer: Any) -> PenaltyLog:
        """Adds itself to a Trainer, before its trackers."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if (domains := domains_of(model)) is not None:
            domains.looks_at_gates = True

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._all[1] and not self._all[0]:
            self._warn_of_share(model, state.global_step)
        if (domains := domains_of(model)) is not None:
            domains.looks_at_gates = False

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        domains = domains_of(model)
        if domains is not None and (call := domains.call) is not None:
            self._penalised = call.layers > 0
            if self._penalised:
                self._step.append((call.term(), None if call.part is None else float(call.part)))
                self._tokens = self._tokens + call.token_counts()
            self._look_at_gates(call)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_substep_end(args, state, control, model=model)
        if self._step:
            equal = 1 / len(self._step)
            parts = [(term, equal if part is None else part) for term, part in self._step]
            self._steps.append((sum(term * part for term, part in parts), sum(part for _, part in parts)))
            self._step = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        if isinstance(tokens := self._tokens, Tensor) and self._steps:
            sums, weights = _summed(torch.tensor(self._steps, device=tokens.device)).unbind(1)
            original, counted, sequences = _summed(tokens).tolist()
            self._all = (self._all[0] + original, self._all[1] + counted, self._all[2] + sequences)
            self._look_at_share(model, state.global_step)
            found = {"penalty": float((sums / weights).mean()), "original_share": original / max(counted, 1)}
            logs.update(found)
            state.log_history[-1].update(found)
            self._steps, self._tokens = [], 0.0
        if self._new is not None:
            self._warn(state.global_step, self._new)

    def _look_at_share(self, model: Any, step: int) -> None:
        meant, (original, counted, sequences) = _meant(model), self._all
        if meant is None or not counted or not sequences:
            return
        found = original / counted
        chance = math.sqrt(meant * (1 - meant) / sequences)
        if not meant / 2 <= found <= 2 * meant and abs(found - meant) > _SURE * chance:
            self._warn_of_share(model, step)

    def _warn_of_share(self, model: Any, step: int) -> None:
        if self._share_named:
            return
        self._share_named = True
        found, meant = self._all[0] / self._all[1], _meant(model)
        if not found or meant is None:  # where it is above 0, one is meant
            problem = "no token of the original domain has come yet, so that the penalty holds nothing back"
            fix = "Mix sequences of it in (graftlm.training.mixing.DomainMix, share=0.1), or set penalty_weight=0."
        else:
            problem = f"the share of original-domain tokens is {found:.2g}, and original_share={meant:g}"
            fix = f"The penalty is {found / meant:.2g} times as strong as it is meant: original_share={found:.2g}."
        warnings.warn(f"step {step}: {problem}. {fix}", stacklevel=2)

    def _look_at_gates(self, call: Call) -> None:
        for layer, opened in call.opened.items():
            self._opened[layer] = opened | self._opened.get(layer, opened)
        any_new = call.new.any()
        self._new = any_new if self._new is None else any_new | self._new

    def _warn(self, step: int, new: Tensor) -> None:
        seen = torch.stack([new, *(opened.to(new.device) for opened in self._opened.values())])
        any_new, *opened = (_summed(seen.float()) > 0).tolist()
        closed = [layer for layer, one in zip(self._opened, opened, strict=True) if any_new and not one]
        if fresh := [layer for layer in closed if layer not in self._named]:
            left = "no block learns anything any more" if len(closed) == len(self._opened) else "these learn nothing"
            smaller = "penalty_weight or learning rate" if self._penalised else "learning rate"
            warnings.warn(
                f"step {step}: gates that no token of the new domain has opened since the last log, so that {left}: "
                f"{', '.join(fresh)}. A smaller {smaller} keeps them open.",
                stacklevel=2,
            )
            self._named.update(fresh)
        self._opened, self._new = {}, None


def _meant(model: Any) -> float | None:
    """The share of original-domain tokens that the layers' penalty counts on."""
    layers = (part for part in model.modules() if isinstance(part, PenalisedLayer) and part.trains and part.penalised)
    return next((layer.expected_share for layer in layers), None)


def _summed(values: Tensor) -> Tensor:
    """Over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
