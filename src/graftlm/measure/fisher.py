"""The trace of the Fisher information, layer by layer, from per-example gradients."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from graftlm.errors import SetupError
from graftlm.measure import likelihood
from graftlm.measure.example_gradients import squared_norms

Groups = Mapping[str, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class FisherTrace:
    """Estimates of tr(F), one a group of parameters.

    Attributes:
        traces: group name → mean over examples of the squared gradient norm (units: nats² per squared parameter unit).
        standard_errors: group name → standard error of that mean over examples (NaN for one example).
        examples: the number n of examples that the means are over.
        kind: where the labels came from; see `fisher_trace`.
        sums: group name → (Σ s, Σ s²) over examples; what ranks add up.
    """

    traces: dict[str, float]
    standard_errors: dict[str, float]
    examples: int
    kind: str
    sums: dict[str, tuple[float, float]]

    @classmethod
    def from_sums(cls, sums: Mapping[str, tuple[float, float]], examples: int, kind: str) -> "FisherTrace":
        """Builds the estimate from Σ s and Σ s² per group, which may have been added up over processes."""
        traces, errors = {}, {}
        for name, (total, squares) in sums.items():
            mean = total / examples
            traces[name] = mean
            variance = max(squares / examples - mean**2, 0.0) * examples / (examples - 1) if examples > 1 else np.nan
            errors[name] = float(np.sqrt(variance / examples))
        return cls(traces, errors, examples, kind, dict(sums))


def fisher_trace(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    groups: Groups,
    *,
    task: str,
    kind: str = "sampled",
    seed: int = 0,
    step: int = 0,
    example_ids: Iterable[Sequence[int]] | None = None,
) -> FisherTrace:
    r"""Estimates the trace of the Fisher information of each group of parameters.

    .. math:: \mathrm{tr}(F_j) = \mathbb{E}_x\, \mathbb{E}_{\hat y \sim p(\cdot|x)}
              \lVert \nabla_{\theta_j} \log p(\hat y \mid x) \rVert^2

    summed over the parameters of group j, without a division by their number. The gradient is that of *one example*:
    the squared gradient of a batch mean is another, smaller quantity. Dropout is off during the pass. Nothing of it
    stays behind: no ``.grad``, no moved random state, no changed ``requires_grad``, no switch between train and eval.

    Args:
        model: called with the tensors of a batch by name, the labels left out. Batch first.
        batches: mappings of tensors whose first dimension is the batch. Labels stand under ``labels`` (question
            answering: ``start_positions``, ``end_positions``); positions with label −100 are not predictions.
        groups: name → parameters; they need not require gradients now.
        task: ``classification``, ``multiple_choice``, ``multi_label``, ``regression``, ``token_classification``,
            ``question_answering``, ``causal_lm``, ``masked_lm`` or ``seq2seq_lm``. Where an example has several
            predictions (tokens, start and end), log p is their sum, given the true prefix.
        kind: where ŷ comes from. ``sampled``: one draw from the model's own p(· | x), unbiased for tr(F). ``exact``:
            the expectation over every label, one backward pass for each (classification, multi-label, regression, and
            short token classification or question answering). ``mode``: argmax p, as the authors' release does; biased.
            ``empirical``: the gold labels; not the Fisher information but often used for it.
        seed, step: labels are drawn from (seed, step, example id) alone, on any device, batch size and process.
        example_ids: one sequence of ids a batch; without it 0, 1, 2, … in order.

    Returns:
        The estimates with their standard errors.

    Raises:
        SetupError: an unknown task or kind, gold labels that are missing, no example, or an ``exact`` expectation over
            more labels than 1,024 backward passes.

    Source: arXiv 2301.05487, Section 3 (the definition of tr(F) used by FUN).

    Differs from the paper in: (1) per-example gradients, where the release squares the gradient of a batch mean;
    (2) sampled labels by default, as the paper defines them, where the release takes the mode.

    Regression is read as a normal distribution of unit variance around the prediction.

    Example:
        For p = softmax(Wx + b) the trace over the bias is 1 − Σ p², whatever x is:

        >>> import torch
        >>> layer = torch.nn.Linear(2, 3)
        >>> model = lambda x: layer(x)
        >>> x = torch.tensor([[1.0, -1.0]])
        >>> found = fisher_trace(layer, [{"input": x}], {"bias": [layer.bias]}, task="classification", kind="exact")
        >>> p = layer(x).softmax(-1)
        >>> abs(found.traces["bias"] - (1 - (p**2).sum()).item()) < 1e-6
        True
    """
    likelihood.check(task, kind)
    sums = {name: np.zeros(2) for name in groups}
    examples = 0
    ids_of_batches = iter(example_ids) if example_ids is not None else None
    with undisturbed(model, groups):
        for batch in batches:
            rows = len(next(iter(batch.values())))
            ids = next(ids_of_batches) if ids_of_batches is not None else range(examples, examples + rows)
            squares = _squared_norms(model, batch, groups, task, kind, [(seed, step, i) for i in ids])
            for name, values in squares.items():
                sums[name] += [values.sum().item(), values.square().sum().item()]
            examples += rows
    if examples == 0:
        raise SetupError("no example to estimate the Fisher trace from", fix="give at least one batch")
    return FisherTrace.from_sums({name: (float(a), float(b)) for name, (a, b) in sums.items()}, examples, kind)


def _squared_norms(model, batch, groups: Groups, task: str, kind: str, keys) -> dict[str, Tensor]:
    """Squared gradient norms in float64, group name → tensor (examples,)."""

    def forward(part: Mapping[str, Tensor], which: slice):
        prediction = likelihood.predict(task, model(**likelihood.inputs(task, part)), part)
        return prediction.logits, prediction.directions(kind, keys[which])

    parameters = list(dict.fromkeys(parameter for group in groups.values() for parameter in group))
    rows = len(keys) * likelihood.rows_per_example(task, batch)
    squares = squared_norms(model, batch, parameters, forward, examples=len(keys), rows=rows)
    columns = {parameter: column for column, parameter in enumerate(parameters)}
    return {name: squares[:, [columns[p] for p in group]].sum(1) for name, group in groups.items()}


@contextmanager
def undisturbed(model: nn.Module, groups: Groups):
    """Evaluation mode and gradients for every group inside; everything as it was outside."""
    training = {module: module.training for module in model.modules()}
    wanted = [(p, p.requires_grad) for group in groups.values() for p in group]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(True)
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            yield
    finally:
        for parameter, required in wanted:
            parameter.requires_grad_(required)
        for module, mode in training.items():
            module.training = mode
