"""Squared gradients of a pretraining loss: one number for each example and tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftlm.measure import likelihood
from graftlm.measure.example_gradients import squared_norms
from graftlm.measure.likelihood import IGNORED


def example_losses(task: str, outputs, batch: Mapping[str, Tensor]) -> Float[Tensor, " examples"]:
    """The mean cross-entropy of each example over *its own* predicted tokens.

    `outputs.loss` would be a mean over the tokens of the whole batch, in which a long text counts more.

    Args:
        task: ``masked_lm``, ``causal_lm`` or ``seq2seq_lm`` (span corruption).
        outputs: of the model; logits (examples, tokens, vocabulary).
        batch: with ``labels`` (examples, tokens); −100 is not predicted.
    """
    logits = getattr(outputs, "logits", None)
    logits, labels = outputs[0] if logits is None else logits, batch["labels"]
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    # only the predicted positions become float32 and log-probabilities: every seventh in masked LM
    found = logits[mask]
    found = found if found.dtype == torch.float64 else found.float()
    losses = nn.functional.cross_entropy(found, labels[mask], reduction="none")
    rows = mask.nonzero()[:, 0]
    sums = torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)
    return sums / mask.sum(1)


def model_losses(model: Any, task: str, batch: Mapping[str, Tensor]) -> Float[Tensor, " examples"]:
    """`example_losses` of a forward pass.

    In a masked LM the output matrix is applied to the predicted tokens alone, every seventh: of a vocabulary of 250,000
    words the logits of 16 texts of 128 tokens are 2 GB. The rows of a batch stay apart, for per-example gradients.
    """
    labels, matrix = batch["labels"], getattr(model, "get_output_embeddings", lambda: None)()
    mask = labels != IGNORED
    most = int(mask.sum(1).max())
    if task != "masked_lm" or matrix is None or most == labels.shape[1]:
        return example_losses(task, model(**likelihood.inputs(task, batch)), batch)
    places = mask.int().argsort(dim=1, descending=True, stable=True)[
        :, :most
    ]  # a row with fewer: others, not predicted

    def gather(_, arguments: tuple) -> tuple:
        states = arguments[0]
        return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1])), *arguments[1:]

    handle = matrix.register_forward_pre_hook(gather, prepend=True)
    try:
        outputs = model(**likelihood.inputs(task, batch))
    finally:
        handle.remove()
    return example_losses(task, outputs, {"labels": labels.gather(1, places)})


def squared_gradients(
    model: nn.Module, batch: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], *, task: str
) -> tuple[Float[Tensor, " examples"], Float[Tensor, "examples tensors"]]:
    r"""The diagonal empirical Fisher of the pretraining loss, averaged over the elements of each tensor.

    .. math:: f_{it} = \frac{1}{|\theta_t|} \lVert \nabla_{\theta_t} \ell_i \rVert^2, \qquad
              \ell_i = \frac{1}{|M_i|} \sum_{j \in M_i} -\log p(x_{ij} \mid \tilde x_i)

    with :math:`M_i` the predicted tokens of example i. Only squared norms are needed, so no gradient of a weight is
    formed (see `ExampleGradients`); a parameter that this cannot reach is differentiated example by example.

    Args:
        model: in the mode in which it is to be measured (dropout off: `graftlm.measure.fisher.undisturbed`).
        batch: input tensors by name and ``labels``, batch first.
        parameters: name → parameter, each requiring a gradient.
        task: see `example_losses`.

    Returns:
        The losses of the examples (nats) and f, both in float64 on the CPU; the columns are in the order of
        `parameters`.

    Source: arXiv 2406.14005, Section 3 (the empirical Fisher of the pretraining loss).
    """
    losses: list[Tensor] = []

    def forward(part: Mapping[str, Tensor], which: slice) -> tuple[Tensor, list[Tensor]]:
        found = model_losses(model, task, part)
        losses.append(found.detach())
        return found.sum(), [torch.ones_like(found.sum())]

    tensors, rows = list(parameters.values()), len(batch["labels"])
    squares = squared_norms(model, batch, tensors, forward, examples=rows, rows=rows)
    return losses[0].double().cpu(), squares / torch.tensor([p.numel() for p in tensors], dtype=torch.float64)
