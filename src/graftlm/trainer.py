"""The Trainer of graftlm's own runs."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from graftlm.adapters.injected_loss import with_penalty
from graftlm.callbacks import ProgressBar
from graftlm.context import domain
from graftlm.language_modelling import logits_at
from graftlm.measure.likelihood import IGNORED
from graftlm.raw_text import Blocks
from graftlm.tasks import Task


class _InOrder(Trainer):
    """Predicts items in their order: with `train_sampling_strategy: group_by_length` Trainer mixes test items too."""

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset if train_dataset is None else train_dataset
        return data.order if isinstance(data, Blocks) else super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    masked = False  # a masked LM: the loss needs the logits of masked tokens alone

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.masked and not return_outputs:
            labels = inputs["labels"]
            places = labels != IGNORED
            inputs = inputs | {"labels": labels[places][None]}
            with logits_at(self.accelerator.unwrap_model(model), places):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "domain" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with domain(inputs.pop("domain"), targets=inputs["labels"], items=num_items_in_batch):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def make_trainer(
    model: Any,
    arguments: TrainingArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool,
    **kwargs: Any,
) -> Trainer:
    """A Trainer for one of our tasks."""
    trainer = _InOrder(
        model,
        arguments,
        data_collator=task.collator(tokenizer),
        preprocess_logits_for_metrics=task.keep,
        compute_loss_func=_with_penalty(model, task.loss()),
        **kwargs,
    )
    # compiled code sees no hook, and DataParallel cuts the batch after it
    trainer.masked = task.name == "masked_lm" and not arguments.torch_compile and arguments.n_gpu <= 1
    # our models' losses are means over the batch and do not look at num_items_in_batch; where Trainer believes that
    # they do, it leaves out the division by the accumulation steps (transformers#47688)
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    return trainer


def _with_penalty(model: Any, loss: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor] | None:
    if loss is None:
        return None
    return lambda outputs, labels, num_items_in_batch=None: with_penalty(
        model, loss(outputs, labels, num_items_in_batch)
    )
