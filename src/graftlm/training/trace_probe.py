"""Measures tr(F) of every layer in the middle of a Trainer's run, without leaving a mark on it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from graftlm.errors import SetupError
from graftlm.measure.fisher import FisherTrace, fisher_trace
from graftlm.measure.likelihood import TASKS

_TASK_OF_CLASS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMultipleChoice": "multiple_choice",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "ForSeq2SeqLM": "seq2seq_lm",
}
_PROBLEM_TYPES = {"multi_label_classification": "multi_label", "regression": "regression"}

TRACE_BUDGET = 0.05
RELATIVE_COST = 1.2
FEWEST_EXAMPLES, MOST_EXAMPLES = 4, 1024


def examples_within_budget(steps: int, batch_size: int, passes: int) -> int:
    """How many examples each trace pass may take so that all passes stay within 5 % of the run.

    An example is taken to cost `RELATIVE_COST` times as much in a trace pass as in training
    (`benchmarks/unfreezing_speed` measured 0.9); at least 4 and at most 1,024 examples. The least is more than 5 % of a
    very short run; what the passes took is printed when training ends.

    Args:
        steps: optimizer steps of the run.
        batch_size: examples an optimizer step, over all devices and accumulation steps.
        passes: trace passes in the run.
    """
    affordable = int(TRACE_BUDGET * steps * batch_size / (max(passes, 1) * RELATIVE_COST))
    return min(max(affordable, FEWEST_EXAMPLES), MOST_EXAMPLES)


def infer_task(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> str:
    """The task in the sense of `graftlm.fisher_trace`, from the class of the model and the type of its labels."""
    for module in model.modules():
        name = type(module).__name__
        task = next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), None)
        if task is None:
            continue
        if task != "classification":
            return task
        config: Any = module.config
        labels = batch.get("labels")
        if (problem := getattr(config, "problem_type", None)) is not None:
            return _PROBLEM_TYPES.get(problem, "classification")
        if config.num_labels == 1:
            return "regression"
        return "multi_label" if labels is not None and labels.is_floating_point() else "classification"
    raise SetupError(
        f"what a {type(model).__name__} predicts is not known, so its Fisher trace is not defined",
        allowed=TASKS,
        fix='ScheduledUnfreezing(…, task="classification")',
    )


class TraceProbe:
    """tr(F) of each layer on a fresh sample of training examples, shared over the processes.

    Args:
        model: the bare model (not the DDP wrapper).
        groups: layer name → parameters.
        dataset: examples by index.
        collate: a list of examples → a batch.
        examples: how many a pass, over all processes.
        batch_size: examples a forward pass.
        kind, task, seed: see `graftlm.fisher_trace`; `task` None = from the model's class.
        device: where the batches go.
    """

    def __init__(self, model, groups, dataset, collate, *, examples, batch_size, kind, task, seed, device):
        try:
            self._size = len(dataset)
        except TypeError as error:
            raise SetupError(
                "the training set is a stream, from which no random sample can be drawn for the Fisher trace",
                found=type(dataset).__name__,
                fix="ScheduledUnfreezing(…, trace_data=a data set of a few hundred examples with a length)",
            ) from error
        self._model, self._groups, self._dataset, self._collate = model, groups, dataset, collate
        self._examples, self._batch_size, self._kind = min(examples, self._size), batch_size, kind
        self._task, self._seed, self._device = task, seed, device
        self.seconds = 0.0

    def measure(self, step: int) -> FisherTrace:
        """The same numbers on every process; the sample is drawn from (seed, step)."""
        started = time.perf_counter()
        chosen = np.random.default_rng([self._seed, step]).choice(self._size, self._examples, replace=False).tolist()
        rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        own = chosen[rank::world]
        ids = [own[i : i + self._batch_size] for i in range(0, len(own), self._batch_size)]
        sums = dict.fromkeys(self._groups, (0.0, 0.0))
        with _same_random_state(self._collate):
            batches = [self._batch(part) for part in ids]
        if batches:
            task = self._task or infer_task(self._model, batches[0])
            sums = fisher_trace(
                self._model,
                batches,
                self._groups,
                task=task,
                kind=self._kind,
                seed=self._seed,
                step=step,
                example_ids=ids,
            ).sums
        trace = FisherTrace.from_sums(self._added_up(sums), self._examples, self._kind)
        self.seconds += time.perf_counter() - started
        return trace

    def _batch(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = self._collate([self._dataset[i] for i in ids])
        return {name: value.to(self._device) for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _added_up(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        if not _distributed():
            return dict(sums)
        values = torch.tensor([sums[name] for name in self._groups], dtype=torch.float64, device=self._device)
        dist.all_reduce(values)
        dist.broadcast(values, src=0)  # the choice between layers must not hang on the order of an addition
        return {name: (row[0], row[1]) for name, row in zip(self._groups, values.tolist(), strict=True)}


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _same_random_state(collate):
    """Collators that mask or augment draw random numbers; the training run must not see that."""
    generator: Any = getattr(getattr(collate, "data_collator", collate), "generator", None)
    states = random.getstate(), np.random.get_state(), getattr(generator, "get_state", lambda: None)()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if hasattr(generator, "set_state"):
            generator.set_state(states[2])
