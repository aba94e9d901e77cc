"""Scheduled unfreezing in a transformers Trainer."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from graftlm.errors import SetupError
from graftlm.measure.fisher import FisherTrace
from graftlm.measure.likelihood import KINDS, TASKS
from graftlm.training.setups import check_distributed, check_traceable, is_fsdp, without_input_gradients
from graftlm.training.trace_probe import TraceProbe, examples_within_budget
from graftlm.training.unfreezing import Unfreezer, check_schedule


class ScheduledUnfreezing(TrainerCallback, ExportableState):
    """Opens the layers of a model one after another while a Trainer trains it.

    The schedules, the algorithm and its source stand at `graftlm.Unfreezer`; tr(F) at `graftlm.fisher_trace`.

    Args:
        schedule: ``standard``, ``gradual``, ``reverse``, ``random``, ``fixed``, ``lpft`` or ``fisher`` (FUN).
        every_n_steps: optimizer steps between two openings (k); k × layers has to fit into the run.
        order: for ``fixed``, see `graftlm.Unfreezer`.
        fisher: where the labels of tr(F) come from: ``sampled``, ``exact``, ``mode``, ``empirical``.
        trace_examples: training examples a trace pass; None = as many as keep all passes within 5 % of the run.
        record_trace: measure and record tr(F) every so many steps under any schedule, for the heat map.
        task: what the model predicts, see `graftlm.fisher_trace`; None = from the model's class.
        trace_data: the examples that tr(F) is estimated on; None = the Trainer's training set.
        layers: module-name patterns for models whose layers are not recognised, see `graftlm.describe`.
        seed: of the random schedule, the trace's sample and its labels.
        log_path: a file that holds `history` as JSON lines at every moment of the run.

    Attributes:
        history: one row for each layer at each step with a decision or a measurement: step, layer, position (0 =
            bottom), trace, standard_error, open (after this step's decision), opened (at this very step), kind,
            examples.
        layer_names: the layers, bottom first; known once training has begun.
        trace_seconds: what the trace passes took.

    Raises:
        SetupError: when training begins, before the first step: where the schedule cannot do what it says. No trainable
            layer; openings beyond the run's end; DDP without unused-parameter detection or with a static graph; FSDP1
            without use_orig_params or with tr(F); DeepSpeed; a checkpoint of another schedule.

    Everything that is ever to train must require gradients when the Trainer is made: its optimizer and DDP take no
    other parameters. This callback freezes once training begins and leaves the model trainable when it ends. A run that
    is resumed from a checkpoint goes on with the saved decisions.

    Differs from the paper in: see `graftlm.Unfreezer` and `graftlm.fisher_trace`. In addition, the size of the sample
    follows from the length of the run, where the release takes 41 batches; when one frozen layer is left it is opened
    without a pass; the examples are a fresh random sample at every decision.

    Example:
        .. code-block:: python

            model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
            callback = graftlm.ScheduledUnfreezing("fisher", every_n_steps=50)
            Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        schedule: str = "gradual",
        every_n_steps: int = 50,
        *,
        order: Sequence[str | int] | None = None,
        fisher: str = "sampled",
        trace_examples: int | None = None,
        record_trace: int | None = None,
        task: str | None = None,
        trace_data=None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        log_path: str | os.PathLike | None = None,
    ):
        check_schedule(schedule, every_n_steps, order)
        if fisher not in KINDS:
            raise SetupError("unknown kind of Fisher trace", found=repr(fisher), allowed=KINDS)
        if task is not None and task not in TASKS:
            raise SetupError("unknown task for a Fisher trace", found=repr(task), allowed=TASKS)
        for name, value in (("trace_examples", trace_examples), ("record_trace", record_trace)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SetupError(f"{name} is a number of at least 1, or None", found=repr(value))
        self._arguments: dict[str, Any] = {
            "schedule": schedule,
            "every_n_steps": every_n_steps,
            "order": None if order is None else list(order),
            "fisher": fisher,
            "trace_examples": trace_examples,
            "record_trace": record_trace,
            "task": task,
            "layers": None if layers is None else list(layers),
            "seed": seed,
        }
        self._log_path = None if log_path is None else str(log_path)
        self._trace_data = trace_data
        self.needs_trace_data = trace_data is not None
        self.progress: dict = {}
        self._began = 0.0
        self._unfreezer: Unfreezer | None = None
        self._probe: TraceProbe | None = None
        self._measured: tuple[int, FisherTrace] | None = None
        self._forget()

    def _forget(self) -> None:
        self._input_gradients: list[PreTrainedModel] = []
        self.history: list[dict] = []
        self.layer_names: tuple[str, ...] = ()
        self.trace_seconds = 0.0

    def state(self) -> dict:
        """What a Trainer writes into a checkpoint's trainer_state.json."""
        opened = self._unfreezer.state_dict()["opened"] if self._unfreezer else {}
        progress = {"opened": opened, "history": self.history, "trace_seconds": self.trace_seconds}
        return {
            "args": self._arguments | {"log_path": self._log_path},
            "attributes": {"progress": progress, "needs_trace_data": self.needs_trace_data},
        }

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        schedule, every = self._arguments["schedule"], self._arguments["every_n_steps"]
        if schedule != "standard":
            check_distributed(args, model)
        if self.needs_trace_data and self._trace_data is None:
            raise SetupError(
                "the data set for the Fisher trace is not part of a checkpoint",
                fix="restore_callback_states_from_checkpoint=False: the unfreezing decisions are taken up without it",
            )
        self._forget()
        self._began = time.perf_counter()
        chosen = {name: self._arguments[name] for name in ("order", "layers", "seed")}
        self._unfreezer = Unfreezer(model, schedule, every, traces=self._traces, **chosen)
        try:
            self._begin(args, state, model, train_dataloader)
        except SetupError:
            self._unfreezer.release()
            raise

    def _begin(self, args, state, model, train_dataloader) -> None:
        self.layer_names = self._unfreezer.layer_names
        self._check_length(state.max_steps)
        if self._unfreezer.tied:
            warnings.warn(
                f"the head's {self._unfreezer.tied[0]} is the input embeddings as well: it trains from the first step, "
                "so frozen layers save no time in the backward pass",
                stacklevel=2,
            )
        elif self._arguments["schedule"] != "standard":
            self._input_gradients = without_input_gradients(model)
        self._probe = None
        if self._trace_passes(state):
            check_traceable()
            self._probe = self._make_probe(args, state, model, train_dataloader)
        if state.global_step > 0:
            self._take_up(state)

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step
        opened = self._unfreezer.step(step)
        record = self._arguments["record_trace"]
        if record is not None and step % record == 0:
            self._traces(step)
        if opened or self._measured is not None:
            self._write_down(step, opened, state.is_world_process_zero)

    def on_substep_end(self, args, state, control, **kwargs):
        self._unfreezer.apply()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._unfreezer.drop_frozen_gradients()

    def on_train_end(self, args, state, control, **kwargs):
        self._unfreezer.release()
        for module in self._input_gradients:
            module.enable_input_require_grads()
        if self._probe is not None and state.is_world_process_zero and not args.disable_tqdm:
            measured = [row for row in self.history if row["trace"] is not None]
            share = self._probe.seconds / (time.perf_counter() - self._began)
            tqdm.write(
                f"tr(F): {len({row['step'] for row in measured})} passes over {measured[-1]['examples']} examples, "
                f"{self.trace_seconds:.1f} s ({share:.1%} of this run)"
            )

    def _traces(self, step: int) -> Mapping[str, float]:
        if self._measured is None or self._measured[0] != step:
            before = self._probe.seconds
            self._measured = (step, self._probe.measure(step))
            self.trace_seconds += self._probe.seconds - before
        return self._measured[1].traces

    def _write_down(self, step: int, opened: Sequence[str], writes: bool) -> None:
        measured, self._measured = self._measured, None
        trace = measured[1] if measured is not None else None
        for position, name in enumerate(self.layer_names):
            self.history.append(
                {
                    "step": step,
                    "layer": name,
                    "position": position,
                    "trace": trace.traces[name] if trace else None,
                    "standard_error": trace.standard_errors[name] if trace and trace.examples > 1 else None,
                    "open": name in self._unfreezer.opened,
                    "opened": name in opened,
                    "kind": trace.kind if trace else None,
                    "examples": trace.examples if trace else 0,
                }
            )
        if writes and self._log_path is not None:
            path = Path(self._log_path)
            part = path.with_name(path.name + ".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
            os.replace(part, path)

    def _trace_passes(self, state) -> int:
        """How many trace passes the whole run takes."""
        every, record = self._arguments["every_n_steps"], self._arguments["record_trace"]
        steps = set(range(0, state.max_steps, record)) if record is not None else set()
        if self._arguments["schedule"] == "fisher":
            steps |= {n * every for n in range(len(self.layer_names) - 1)}
        return len(steps)

    def _make_probe(self, args, state, model, train_dataloader) -> TraceProbe:
        examples = self._arguments["trace_examples"]
        if examples is None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            examples = examples_within_budget(state.max_steps, batch, self._trace_passes(state))
        if is_fsdp():  # every process must run as many forward passes
            examples = max(examples // args.world_size, 1) * args.world_size
        return TraceProbe(
            model,
            self._unfreezer.parameters(),
            self._trace_data if self._trace_data is not None else train_dataloader.dataset,
            train_dataloader.collate_fn,
            examples=examples,
            batch_size=args.per_device_train_batch_size,
            kind=self._arguments["fisher"],
            task=self._arguments["task"],
            seed=self._arguments["seed"],
            device=args.device,
        )

    def _take_up(self, state) -> None:
        """Trainer restores callbacks only when told to; their saved state is at hand all the same."""
        progress, saved = self.progress, state.stateful_callbacks.get(type(self).__name__)
        if not progress and saved is not None:
            saved = saved[0] if isinstance(saved, list) else saved
            differing = {
                name: (saved["args"].get(name), value)
                for name, value in self._arguments.items()
                if name not in ("trace_examples", "task") and saved["args"].get(name) != value
            }
            if differing:
                raise SetupError(
                    "the checkpoint was written under another unfreezing schedule",
                    found="; ".join(f"{k}: {new!r} (checkpoint: {old!r})" for k, (old, new) in differing.items()),
                    fix="resume with the checkpoint's values, or start a new run",
                )
            progress = saved["attributes"]["progress"]
        if progress:
            self._unfreezer.load_state_dict(progress)
            self.history = [dict(row) for row in progress["history"]]
            self.trace_seconds = progress["trace_seconds"]
        self.progress = {}

    def _check_length(self, max_steps: int) -> None:
        schedule, every, count = self._arguments["schedule"], self._arguments["every_n_steps"], len(self.layer_names)
        if schedule == "standard":
            return
        if count == 1:
            warnings.warn(
                f"only one layer is trainable ({self.layer_names[0]}), so there is nothing to schedule; make more "
                "layers trainable (LoraConfig(layers_to_transform=None)) or leave the callback out",
                stacklevel=2,
            )
        last = self._unfreezer.plan[-1][0]
        needed = 2 * every if schedule == "lpft" else every * count
        fitting = max_steps // 2 if schedule == "lpft" else max_steps // count
        fix = (
            f"every_n_steps={fitting}" if fitting else f"train for at least {2 if schedule == 'lpft' else count} steps"
        )
        if last >= max_steps:
            raise SetupError(
                "the run ends before the last layer opens, so some layers would never train",
                found=f"{count} layers, one every {every} steps: the last opens at step {last} of {max_steps}",
                fix=f"{fix} or less, or a longer run",
            )
        if needed > max_steps:
            warnings.warn(
                f"the last layer opens at step {last} and trains for {max_steps - last} of {max_steps} steps, less "
                f"than one interval; the paper's schedules end well before the run does: {fix} or less",
                stacklevel=2,
            )
