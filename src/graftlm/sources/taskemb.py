"""TaskEmb: a task as the diagonal of the Fisher information of the model that was fine-tuned on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from graftlm.architectures import describe
from graftlm.errors import DataError, ModelError, SetupError
from graftlm.measure.transferability import cosine
from graftlm.sources.embed import LENGTH
from graftlm.sources.pool import Skipped
from graftlm.sources.result import Ranking, ranked

FUSION = 60  # of reciprocal-rank fusion


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """What a task asks of each layer.

    Attributes:
        model: name of the base model.
        examples: labelled texts that it was made from.
        components: "layer.3 weights" → one number a parameter, "layer.3 outputs" → one a dimension.
    """

    model: str
    examples: int
    components: Mapping[str, np.ndarray] = field(repr=False)

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file."""
        about = {"model": self.model, "examples": str(self.examples)}
        save_file({name: np.ascontiguousarray(one) for name, one in self.components.items()}, file, metadata=about)

    @classmethod
    def load(cls, file: str | Path) -> TaskEmbedding:
        """Reads what `save` wrote; a DataError where it is missing or damaged."""
        try:
            with safetensors.safe_open(file, framework="numpy") as held:
                about = held.metadata() or {}
                components = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  no mapping
                return cls(about["model"], int(about["examples"]), components)
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"no task embedding: {error}", found=file) from error


def task_embedding(
    model: nn.Module,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = LENGTH,
    max_examples: int = 1000,
    progress: bool = False,
) -> TaskEmbedding:
    r"""The empirical Fisher diagonal of a classifier, layer by layer.

    .. math:: F_\theta = \frac1n \sum_i \big(\nabla_\theta \log p(y_i \mid x_i)\big)^2

    for the weights θ of each layer, and for its outputs, where the mean is over tokens too.

    Args:
        model: fine-tuned on the task, with its head; ``logits`` in its output.
        texts, labels: of the task; the first `max_examples`.
        tokenizer: the model's.
        max_length: tokens; longer texts are cut.
        max_examples: one backward pass each.
        progress: a bar.

    Raises:
        DataError: no text, texts and labels of different numbers, a label that the model has no output for.
        ModelError: a model without logits.

    Source: Vu et al., *Exploring and Predicting Transferability across NLP Tasks*, EMNLP 2020, arXiv 2005.00770,
    Section 4.1; the Fisher diagonal as a task's embedding: Achille et al., *Task2Vec*, ICCV 2019.

    Differs from the paper in: components are a layer's weights together and its outputs, not each weight matrix; the
    embeddings and the head are left out.
    """
    if not len(texts) or len(texts) != len(labels):
        raise DataError("there is one label for each text", found=f"{len(texts)} texts, {len(labels)} labels")
    layers = describe(model).layers
    weights = {layer.short: [p for p in layer.module.parameters() if p.is_floating_point()] for layer in layers}
    frozen = [p for params in weights.values() for p in params if not p.requires_grad]
    count = min(len(texts), max_examples)
    sums: dict[str, Tensor] = {}
    with _differentiable(model, frozen):
        for row in tqdm(range(count), desc="Fisher", unit="text", disable=not progress):
            inputs = tokenizer(texts[row], truncation=True, max_length=max_length, return_tensors="pt")
            for name, square in _squares(model, inputs.to(_device(model)), int(labels[row]), layers, weights):
                sums[name] = sums[name] + square if name in sums else square
    components = {name: (total / count).cpu().numpy() for name, total in sums.items()}
    return TaskEmbedding(str(getattr(model.config, "name_or_path", "")) or type(model).__name__, count, components)


def _squares(
    model: nn.Module, inputs: Any, label: int, layers: Sequence[Any], weights: Mapping[str, list[nn.Parameter]]
) -> Iterator[tuple[str, Tensor]]:
    """Squared gradients of one example's log probability, component by component."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            outputs[name] = made[0] if isinstance(made, tuple) else made

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(keep(layer.short)).remove)
        logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.ndim != 2:
        raise ModelError("a task embedding is that of a classifier", found=type(model).__name__)
    if not 0 <= label < logits.shape[1]:
        raise DataError("the model has no output for a label", found=label, allowed=f"0 to {logits.shape[1] - 1}")
    wanted = [*outputs.values(), *(p for params in weights.values() for p in params)]
    found = iter(
        torch.autograd.grad(logits.float().log_softmax(-1)[0, label], wanted, allow_unused=True, materialize_grads=True)
    )
    for name in outputs:
        yield f"{name} outputs", next(found).float().square().reshape(-1, outputs[name].shape[-1]).mean(0)
    for name, params in weights.items():
        yield f"{name} weights", torch.cat([next(found).float().square().ravel() for _ in params])


@contextmanager
def _differentiable(model: nn.Module, frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and gradients of all layers; everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes:
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def rank_by_task_embedding(target: TaskEmbedding, sources: Mapping[str, TaskEmbedding]) -> Ranking:
    r"""Ranks source tasks by how alike their task embeddings are to the target's.

    In each component the sources are ordered by cosine; the orders are fused by reciprocal rank,
    :math:`\sum_c 1/(60 + \mathrm{rank}_c)`.

    Args:
        target: of the base model fine-tuned on the target task.
        sources: name → that of the same base model fine-tuned on a source task.

    Returns:
        The ranking; sources with other components than the target are named in `Ranking.skipped`.

    Raises:
        SetupError: no source.
        DataError: none that fits.

    Source: Vu et al., arXiv 2005.00770, Section 4.1; the fusion: Cormack, Clarke, Büttcher, SIGIR 2009.

    Example:
        >>> one, two = (TaskEmbedding("base", 1, {"layer.0 outputs": np.array(v)}) for v in ([1.0, 0.0], [0.0, 1.0]))
        >>> [source.name for source in rank_by_task_embedding(one, {"two": two, "one": one}).sources]
        ['one', 'two']
    """
    started = time.perf_counter()
    if not sources:
        raise SetupError("there is no source task to rank", fix="sources={name: task_embedding(…)}")
    shapes = {name: one.shape for name, one in target.components.items()}
    fitting = {
        name: one for name, one in sources.items() if {key: c.shape for key, c in one.components.items()} == shapes
    }
    skipped = tuple(Skipped(name, "its components are not the target's") for name in sources if name not in fitting)
    if not fitting:
        raise DataError("no source task has the components of the target", found=", ".join(sources))
    scores = dict.fromkeys(fitting, 0.0)
    for component, own in target.components.items():
        alike = {name: cosine(own, one.components[component]) for name, one in fitting.items()}
        for rank, name in enumerate(sorted(fitting, key=lambda name: -alike[name]), 1):
            scores[name] += 1 / (FUSION + rank)
    return Ranking(
        method="taskemb",
        model=target.model,
        rows=target.examples,
        classes=None,
        sources=ranked([(name, score, 0.0, None, None) for name, score in scores.items()]),
        skipped=skipped,
        seconds=time.perf_counter() - started,
    )
