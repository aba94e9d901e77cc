"""The penalty of the layers in the logs of a Trainer, and gates that stay closed."""

from __future__ import annotations

import warnings

from torch import Tensor
from transformers import TrainerCallback

from graftlm.adapters.injected_loss import Call, domains_of


class PenaltyLog(TrainerCallback):
    """Adds the penalty term to the logs of a Trainer as a number of its own, and warns of gates that never open.

    ``penalty`` is T, without its weight, averaged over the steps since the last log; ``original_share`` the share of
    original-domain tokens in the last batch. `loss` stays the loss of the model alone. Of several processes each has
    the figures of its own batches.

    A ReLU gate that was closed for every token of the new domain since the last log is named in a warning, once: its
    block learns nothing. `graftlm.gate_statistics` shows all gates.
    """

    def __init__(self) -> None:
        self._step: list[tuple[float, float | None]] = []
        self._steps: list[float] = []
        self._share = 0.0
        self._opened: dict[str, Tensor] = {}
        self._new: Tensor | None = None
        self._named: set[str] = set()

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        domains = domains_of(model)
        if domains is not None and domains.call is not None:
            call = domains.call
            self._step.append((call.term(), None if call.part is None else float(call.part)))
            self._share = call.original_share()
            self._look_at_gates(call)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_substep_end(args, state, control, model=model)
        if self._step:
            equal = 1 / len(self._step)
            self._steps.append(sum(term * (equal if part is None else part) for term, part in self._step))
            self._step = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._steps and logs is not None and "loss" in logs:
            found = {"penalty": sum(self._steps) / len(self._steps), "original_share": self._share}
            logs.update(found)
            state.log_history[-1].update(found)
            self._steps = []
            self._warn(state.global_step)

    def _look_at_gates(self, call: Call) -> None:
        for layer, opened in call.opened.items():
            self._opened[layer] = opened | self._opened.get(layer, opened)
        any_new = call.new.any()
        self._new = any_new if self._new is None else any_new | self._new

    def _warn(self, step: int) -> None:
        closed = [layer for layer, opened in self._opened.items() if not opened] if self._new else []
        if fresh := [layer for layer in closed if layer not in self._named]:
            left = "no block learns anything any more" if len(closed) == len(self._opened) else "these learn nothing"
            warnings.warn(
                f"step {step}: gates that no token of the new domain has opened since the last log, so that {left}: "
                f"{', '.join(fresh)}. A smaller penalty_weight or learning rate keeps them open.",
                stacklevel=2,
            )
            self._named.update(fresh)
        self._opened, self._new = {}, None
