"""What a run with neutral residues measures beside its scores: the size of its penalty, and how far its gates open."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from graftlm.adapters.gates import gate_statistics
from graftlm.adapters.injected_loss import domains_of
from graftlm.adapters.neutral import NeutralResidues
from graftlm.context import ORIGINAL
from graftlm.data import Split
from graftlm.evaluation.gates_section import FILE, SCHEMA
from graftlm.evaluation.record import write_text
from graftlm.recipe import Recipe
from graftlm.tasks import Task

_WINDOWS = 64  # of each language, that gates are looked at on
_SEQUENCES = 4  # of the original domain that the penalty is measured on; their share in so few batches is made up for
_MOST = 32  # batches

log = logging.getLogger("graftlm")


@dataclass(frozen=True)
class PenaltySize:
    """The penalty beside the loss, after a first step of Adam: at step 0 the residue is zero.

    Attributes:
        weight: α.
        term: T.
        loss: of the model alone.
        gradients: ‖∇ αT‖ / ‖∇ loss‖ over the adapter. Far below 1 the penalty does nothing yet, far above it the
            adapter learns nothing but silence.
    """

    weight: float
    term: float
    loss: float
    gradients: float

    @property
    def even_weight(self) -> float | None:
        """The α with which both gradients are of one size, to two digits; None where one of them is zero."""
        even = self.weight / self.gradients if self.gradients else math.inf
        return float(f"{even:.2g}") if 0 < even < math.inf else None


def penalty_size(trainer: Trainer, recipe: Recipe) -> PenaltySize | None:
    """Measures the penalty on the first batches of a run; the adapter's weights are changed by it.

    Returns:
        None where the recipe has no penalty.
    """
    weight = recipe.adapter.penalty_weight
    if recipe.adapter.method != "neutral_residues" or not weight or recipe.mixing is None:
        return None
    model = trainer.model
    batches = _first_batches(trainer)
    labels = torch.cat([batch["domain"] for batch in batches])
    scale = recipe.mixing.share / max(float((labels == ORIGINAL).float().mean()), 1 / len(labels))
    _gradients(trainer, model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= recipe.training.learning_rate * parameter.grad.sign()
    both, loss, term = _gradients(trainer, model, batches)
    layers = [module for module in model.modules() if isinstance(module, NeutralResidues)]
    configs = [config for layer in layers for config in layer.neutral_residues_configs.values()]
    for config in configs:
        config.penalty_weight = 0.0
    try:
        alone, _, _ = _gradients(trainer, model, batches)
    finally:
        for config in configs:
            config.penalty_weight = weight
    added = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(both, alone, strict=True)))
    size = math.sqrt(sum(float(b.square().sum()) for b in alone))
    return PenaltySize(weight, scale * term, loss, scale * added / size if size else math.inf)


def _first_batches(trainer: Trainer) -> list[dict[str, Tensor]]:
    batches: list[dict[str, Tensor]] = []
    originals = 0
    for batch in trainer.get_train_dataloader():
        batches.append(batch)
        originals += int((batch["domain"] == ORIGINAL).sum())
        if originals >= _SEQUENCES or len(batches) == _MOST:
            break
    return batches


def _gradients(
    trainer: Trainer, model: nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[list[Tensor], float, float]:
    """The mean gradient of some batches, their mean loss and mean term."""
    model.zero_grad()
    losses, terms = [], []
    for batch in batches:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, {key: value.to(trainer.args.device) for key, value in batch.items()})
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
        domains = domains_of(model)
        terms.append(domains.call.term() if domains is not None and domains.call is not None else 0.0)
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return gradients, sum(losses) / len(losses), sum(terms) / len(terms)


def write_gates(
    model: nn.Module, task: Task, tokenizer: Any, recipe: Recipe, splits: Mapping[str, Split], folder: Path
) -> tuple[str, ...] | None:
    """Writes ``gates.json``, how far the gates are open on each language of the test; nothing for other methods.

    Returns:
        The layers whose ReLU gate no token of a new language opens, each of them said in a warning; None where there
        is no such gate or no such language.
    """
    if recipe.adapter.method != "neutral_residues":
        return None
    batches = {language: _batches(task, tokenizer, recipe, split) for language, split in splits.items()}
    gates = gate_statistics(model, batches)
    rows = [asdict(gate) for gate in gates]
    values = {"schema": SCHEMA, "gate": recipe.adapter.gate, "old": list(recipe.data.old), "rows": rows}
    write_text(folder / FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    new = [gate for gate in gates if gate.domain not in recipe.data.old]
    if recipe.adapter.gate != "relu" or not new:
        return None
    opened = {gate.layer for gate in new if gate.open}
    closed = tuple(dict.fromkeys(gate.layer for gate in new if gate.layer not in opened))
    if closed:
        smaller = (
            "adapter.penalty_weight or training.learning_rate"
            if recipe.adapter.penalty_weight
            else "training.learning_rate"
        )
        log.warning(
            "no token of the new language's test text opens the gates of these layers, which do nothing there: %s; "
            "a smaller %s keeps them open",
            ", ".join(closed),
            smaller,
        )
    return closed


def _batches(task: Task, tokenizer: Any, recipe: Recipe, split: Split) -> Iterator[Any]:
    size = recipe.training.eval_batch_size
    features = task.encode(split, tokenizer, recipe.training).features
    collate = task.collator(tokenizer)
    for start in range(0, min(_WINDOWS, len(features)), size):
        yield collate([features[row] for row in range(start, min(start + size, _WINDOWS, len(features)))])
