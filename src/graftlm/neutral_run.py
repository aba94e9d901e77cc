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
from graftlm.context import ORIGINAL
from graftlm.data import Split
from graftlm.errors import DataError
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

    Raises:
        DataError: no sequence of the original domain in an epoch.
    """
    weight = recipe.adapter.penalty_weight
    if recipe.adapter.method != "neutral_residues" or not weight or recipe.mixing is None:
        return None
    model: Any = trainer.model
    config = model.active_peft_config
    batches = _first_batches(trainer)
    _gradients(trainer, model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= recipe.training.learning_rate * parameter.grad.sign()
    both, loss, term, share = _gradients(trainer, model, batches)
    config.penalty_weight = 0.0  # the layers read it there
    try:
        alone, *_ = _gradients(trainer, model, batches)
    finally:
        config.penalty_weight = weight
    added = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(both, alone, strict=True)))
    size = math.sqrt(sum(float(b.square().sum()) for b in alone))
    scale = config.original_share / share if config.penalty == "l1" and config.original_share else 1.0
    return PenaltySize(weight, scale * term, loss, scale * added / size if size else math.inf)


def _first_batches(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The first ones, and where these hold no original the first that does."""
    batches: list[dict[str, Tensor]] = []
    originals = seen = 0
    for batch in trainer.get_train_dataloader():
        here = int((batch["domain"] == ORIGINAL).sum())
        seen += len(batch["domain"])
        if here or len(batches) < _MOST:
            batches.append(batch)
        originals += here
        if originals >= _SEQUENCES or (originals and len(batches) >= _MOST):
            break
    if not originals:
        raise DataError(
            "there is no sequence of the original domain, on which the penalty could be measured",
            found=f"{seen} sequences of the new one",
            fix="a larger mixing.share, or adapter.penalty_weight=0",
        )
    return batches


def _gradients(
    trainer: Trainer, model: nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[list[Tensor], float, float, float]:
    """The mean gradient of some batches, their mean loss, mean term and share of original tokens.

    Dropout is the same each time: gradients are subtracted from each other.
    """
    model.zero_grad()
    losses, terms, tokens = [], [], []
    device = trainer.args.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(trainer.args.seed)
        for batch in batches:
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, {key: value.to(device) for key, value in batch.items()})
            (loss / len(batches)).backward()
            losses.append(float(loss.detach()))
            domains = domains_of(model)
            if domains is not None and domains.call is not None:
                terms.append(domains.call.term())
                tokens.append(domains.call.token_counts())
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    original, counted, _ = torch.stack(tokens).sum(0).tolist()
    return gradients, sum(losses) / len(losses), sum(terms) / len(terms), original / counted


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
