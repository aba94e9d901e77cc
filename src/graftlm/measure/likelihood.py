r"""What a model predicts, as log p(y|x), and the directions in which its Fisher information is measured.

Every kind of Fisher trace is :math:`\sum_v \lVert J^\top v \rVert^2` with J the Jacobian of the logits and v a few
directions at the logits. For a categorical distribution :math:`\nabla_z \log p(y) = e_y - p`, so a sampled, modal or
gold label is one direction, and the exact expectation is the directions :math:`\sqrt{p_c}\,(e_c - p)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from graftlm.errors import SetupError

KINDS = ("sampled", "exact", "mode", "empirical")
TASKS = {
    "classification": "categorical",
    "multiple_choice": "categorical",
    "token_classification": "categorical",
    "question_answering": "categorical",
    "causal_lm": "categorical",
    "masked_lm": "categorical",
    "seq2seq_lm": "categorical",
    "multi_label": "bernoulli",
    "regression": "gaussian",
}
LABEL_NAMES = ("labels", "start_positions", "end_positions")
IGNORED = -100
MOST_EXACT_PASSES = 1024


def check(task: str, kind: str) -> None:
    """Raises for a task or a kind of Fisher trace that is not known, or that makes no sense together."""
    if task not in TASKS:
        raise SetupError("unknown task for a Fisher trace", found=repr(task), allowed=TASKS)
    if kind not in KINDS:
        raise SetupError("unknown kind of Fisher trace", found=repr(kind), allowed=KINDS)
    if kind == "mode" and TASKS[task] == "gaussian":
        raise SetupError(
            "at the mode of a normal distribution the gradient of log p is zero, so the trace says nothing",
            found="kind='mode' with task='regression'",
            fix="kind='exact' (as cheap as sampled for regression)",
        )
    if kind == "exact" and task in ("causal_lm", "masked_lm", "seq2seq_lm"):
        raise SetupError(
            "the exact expectation over a whole vocabulary at every token cannot be enumerated",
            found=f"kind='exact' with task={task!r}",
            allowed="sampled, mode, empirical",
            fix="kind='sampled' (an unbiased estimate of the same trace)",
        )


def inputs(task: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch as the model is called with: without labels, unless the decoder's input is made from them."""
    dropped = () if task == "seq2seq_lm" else LABEL_NAMES
    return {name: value for name, value in batch.items() if name not in dropped}


def rows_per_example(task: str, batch: Mapping[str, Tensor]) -> int:
    """How many rows of the model's layers belong to one example: the number of choices, else 1."""
    return batch["input_ids"].shape[1] if task == "multiple_choice" else 1


@dataclass(frozen=True)
class Prediction:
    """Logits with what is predicted from them.

    Attributes:
        family: ``categorical``, ``bernoulli`` or ``gaussian``.
        logits: (examples, predictions, classes), float32, part of the graph; one class for the other families.
        targets: (examples, predictions) gold labels, or None.
        mask: (examples, predictions), False where nothing is predicted.
    """

    family: str
    logits: Float[Tensor, "examples predictions classes"]
    targets: Shaped[Tensor, "examples predictions"] | None
    mask: Bool[Tensor, "examples predictions"]

    def directions(
        self, kind: str, keys: Sequence[tuple[int, ...]]
    ) -> Iterator[Float[Tensor, "examples predictions classes"]]:
        """The directions v at the logits; `keys` seed the draws, one an example."""
        z = self.logits.detach()
        if kind == "exact":
            yield from self._exact(z)
            return
        if self.family == "categorical":
            p = z.softmax(-1)
            labels = self._labels(kind, lambda: (p.cumsum(-1) < self._draws("random", keys)).sum(-1), p.argmax(-1))
            step = torch.zeros_like(p).scatter_(-1, labels.clamp(0, p.shape[-1] - 1).unsqueeze(-1), 1.0) - p
        elif self.family == "bernoulli":
            p = z.sigmoid()
            labels = self._labels(kind, lambda: (self._draws("random", keys) < p).squeeze(-1), (z > 0).squeeze(-1))
            step = labels.unsqueeze(-1).to(p) - p
        else:
            step = self._draws("standard_normal", keys) if kind == "sampled" else self._gold().unsqueeze(-1).to(z) - z
        yield torch.where(self.mask.unsqueeze(-1), step, 0.0)

    def _labels(self, kind: str, draw, mode: Tensor) -> Tensor:
        if kind == "empirical":
            return self._gold()
        if kind == "mode":
            return mode
        return draw().clamp(max=self.logits.shape[-1] - 1) if self.family == "categorical" else draw()

    def _gold(self) -> Tensor:
        if self.targets is None:
            raise SetupError(
                "the empirical Fisher needs gold labels, and the batch has none",
                fix="add 'labels' to the batches, or kind='sampled'",
            )
        return self.targets

    def _draws(self, method: str, keys: Sequence[tuple[int, ...]]) -> Tensor:
        """(examples, predictions, 1): an example's j-th prediction gets its generator's j-th draw, padded or not."""
        draws = np.zeros(self.mask.shape)
        mask = self.mask.cpu().numpy()
        for row, key in enumerate(keys):
            draws[row, mask[row]] = getattr(np.random.default_rng(key), method)(int(mask[row].sum()))
        return torch.as_tensor(draws, dtype=self.logits.dtype, device=self.logits.device).unsqueeze(-1)

    def _exact(self, z: Tensor) -> Iterator[Tensor]:
        columns = self.mask.any(0).nonzero().flatten().tolist()
        passes = len(columns) * z.shape[-1]
        if passes > MOST_EXACT_PASSES:
            raise SetupError(
                "the exact Fisher trace would need too many backward passes for each batch",
                found=f"{len(columns)} predictions × {z.shape[-1]} labels = {passes}",
                allowed=f"at most {MOST_EXACT_PASSES}",
                fix="kind='sampled' (an unbiased estimate of the same trace), or shorter texts",
            )
        p = {"categorical": z.softmax(-1), "bernoulli": z.sigmoid(), "gaussian": torch.ones_like(z)}[self.family]
        mask = self.mask.to(z)
        for column in columns:
            for label in range(z.shape[-1]):
                direction = torch.zeros_like(z)
                chosen = p[:, column, label]
                if self.family == "categorical":
                    direction[:, column] = -p[:, column] * chosen.sqrt().unsqueeze(-1)
                    direction[:, column, label] += chosen.sqrt()
                elif self.family == "bernoulli":
                    direction[:, column, label] = (chosen * (1 - chosen)).sqrt()
                else:
                    direction[:, column, label] = 1.0
                yield direction * mask.unsqueeze(-1)


def predict(task: str, outputs, batch: Mapping[str, Tensor]) -> Prediction:
    """Reads the model's outputs as predictions of `task`; `outputs` is a tensor, a tuple or has named logits."""
    if task == "question_answering":
        return _question_answering(outputs, batch)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    logits = (outputs[0] if logits is None else logits).float()
    labels = batch.get("labels")
    if task in ("classification", "multiple_choice"):
        return Prediction("categorical", logits.unsqueeze(1), _column(labels), _everything(logits[:, :1]))
    if task in ("multi_label", "regression"):
        logits = logits.reshape(len(logits), -1)
        labels = None if labels is None else labels.reshape(len(logits), -1)
        return Prediction(TASKS[task], logits.unsqueeze(-1), labels, _everything(logits))
    if labels is None:
        raise SetupError(f"{task} needs 'labels' to know which tokens are predicted", found=list(batch))
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return Prediction("categorical", logits, labels, labels != IGNORED)


def _question_answering(outputs, batch: Mapping[str, Tensor]) -> Prediction:
    """Start and end as two predictions of one example, over the tokens that are not padding."""
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
    if (attention := batch.get("attention_mask")) is not None:
        logits = logits.masked_fill(attention.unsqueeze(1) == 0, torch.finfo(logits.dtype).min)
    if "start_positions" not in batch or "end_positions" not in batch:
        return Prediction("categorical", logits, None, _everything(logits[..., 0]))
    targets = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    return Prediction("categorical", logits, targets, inside)


def _column(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.reshape(-1, 1)


def _everything(like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=torch.bool, device=like.device)
