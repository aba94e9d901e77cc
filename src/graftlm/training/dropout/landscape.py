"""The pretraining loss on a plane around a model's weights: how much a step in some of its tensors costs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from graftlm.errors import DataError, SetupError
from graftlm.measure.fisher import undisturbed
from graftlm.measure.pretraining import model_losses
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.sites import backbone_of, canonical
from graftlm.training.dropout.texts import pretraining_task, pretraining_windows

SCHEMA = "graftlm.loss_landscape/1"
HALVES = ("tensors", "matrices")


@dataclass(frozen=True)
class LossLandscape:
    """Surfaces over one pair of directions.

    Attributes:
        axis: distances along each direction.
        losses: ``all``, ``top`` and ``bottom`` → rows of losses (nats); row i, column j lies at axis[i] along the first
            and axis[j] along the second direction.
        moved: the number of tensors that move on each surface.
        radius: the length of the step at distance 1 along the first direction, in weight space. Surfaces whose steps
            differ in length are not compared at equal radius.
        halves: see `loss_landscape`.
        examples: texts behind each point.
    """

    axis: tuple[float, ...]
    losses: dict[str, tuple[tuple[float, ...], ...]]
    moved: dict[str, int]
    radius: dict[str, float]
    halves: str
    examples: int

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON; as ``landscape.json`` in a run folder it becomes a picture of the report."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"schema": SCHEMA} | dataclasses.asdict(self)) + "\n", encoding="utf-8")
        os.replace(part, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossLandscape:
        """Reads what `save` wrote.

        Raises:
            DataError: no such file, or another schema.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("schema", None) != SCHEMA:
                raise DataError("not a file of a loss landscape", found=path, allowed=SCHEMA)
            values["axis"] = tuple(values["axis"])
            values["losses"] = {name: tuple(map(tuple, rows)) for name, rows in values["losses"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"a loss landscape cannot be read: {error}", found=path) from error


def loss_landscape(
    model: nn.Module,
    texts: Iterable[str],
    rates: GuidedDropout,
    *,
    tokenizer,
    reach: float = 0.5,
    points: int = 11,
    halves: str = "tensors",
    max_examples: int | None = None,
    max_length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> LossLandscape:
    r"""The pretraining loss at :math:`\theta + a\,\delta + b\,\eta` for three choices of the tensors that move.

    .. math:: \delta_t = \lVert \theta_t \rVert \, \frac{z_t}{\lVert z_t \rVert}, \qquad z_t \sim N(0, I)

    for every matrix t, and 0 for tensors of one dimension. The surfaces are those of ``all`` tensors, of the half with
    the highest mean Fisher information (``top``) and of the other half (``bottom``), on the same two directions.

    Args:
        model: with its language-model head; left as it was.
        texts: read once; the same texts and masks at every point.
        rates: the measurement that the halves come from.
        tokenizer: the model's.
        reach: distance from the centre to the edge; 1 is a step as long as the tensor itself.
        points: points along each direction, an odd number, so that the centre is one.
        halves: ``tensors``: halves of all measured tensors, as in the paper. ``matrices``: halves of those that move.
        max_examples: the first so many texts are used; None: all. Each is read at every point of three surfaces.
        max_length, batch_size: as for `GuidedDropout.estimate`.
        seed: of directions and masks.
        progress: whether a bar is shown.

    Raises:
        SetupError: a grid without a centre, a reach that is no distance, or a number that is too small.
        ModelError: not the model that was measured.
        DataError: no text with anything to predict.

    Source: arXiv 2406.14005, Section 3 (figures of the loss landscape); directions after Li et al. 2018.

    Differs from the paper in: ``halves="matrices"``. Tensors of one dimension hold much information and get no
    direction, so the paper's top half moves less of the model than its bottom half; ``radius`` shows how much less.
    """
    if halves not in HALVES:
        raise SetupError("unknown halves of a loss landscape", found=repr(halves), allowed=HALVES)
    if points < 3 or points % 2 == 0:
        raise SetupError("a grid needs a centre", found=f"points={points}", allowed="3, 5, 7, …")
    if not (reach > 0 and math.isfinite(reach)):
        raise SetupError("reach is a distance", found=reach, allowed="a finite number above 0")
    backbone = backbone_of(model)
    rates.fingerprint.check(backbone)
    parameters = {canonical(name): p for name, p in backbone.named_parameters() if canonical(name) in rates.tensors}
    task, device = pretraining_task(model), next(iter(parameters.values())).device
    stream = pretraining_windows(
        backbone,
        texts,
        tokenizer,
        task,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        max_examples=max_examples,
    )
    found = list(chain.from_iterable(stream))
    if not found:
        raise DataError("no text has anything to predict", found="texts", fix="give texts of two words and more")
    inputs = [{name: value.to(device) for name, value in batch.items()} for _, batch in found]
    sets = moving_sets(rates, parameters, halves)
    first, second = (directions(parameters, (seed, number)) for number in (1, 2))
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    axis[points // 2] = 0.0
    losses: dict[str, tuple[tuple[float, ...], ...]] = {}
    with (
        undisturbed(model, {}),
        torch.no_grad(),
        tqdm(total=len(sets) * points**2, desc="loss landscape", unit="point", disable=not progress) as bar,
    ):
        for name, tensors in sets.items():
            rows = []
            for a in axis:
                row = []
                for b in axis:
                    with _moved({t: parameters[t] for t in tensors}, first, second, a, b):
                        row.append(_mean_loss(model, task, inputs))
                    bar.update()
                rows.append(tuple(row))
            losses[name] = tuple(rows)
    radius = {name: math.sqrt(sum(float(first[t].square().sum()) for t in tensors)) for name, tensors in sets.items()}
    moved = {name: len(tensors) for name, tensors in sets.items()}
    examples = sum(len(part) for part, _ in found)
    return LossLandscape(tuple(axis), losses, moved, radius, halves, examples)


def moving_sets(rates: GuidedDropout, parameters: dict[str, nn.Parameter], halves: str) -> dict[str, list[str]]:
    """The matrices that move on each surface."""
    order = sorted(parameters, key=lambda name: rates.tensors[name].score)
    if halves == "matrices":
        order = [name for name in order if parameters[name].ndim > 1]
    parts = {"all": order, "top": order[len(order) // 2 :], "bottom": order[: len(order) // 2]}
    return {name: [t for t in part if parameters[t].ndim > 1] for name, part in parts.items()}


def directions(parameters: dict[str, nn.Parameter], seed: Sequence[int]) -> dict[str, Tensor]:
    """A random direction for each matrix, as long as the matrix."""
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    found = {}
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            found[name] = (drawn * (parameter.detach().float().norm().cpu() / drawn.norm())).to(parameter)
    return found


class _moved:
    """The weights at a point of the plane inside the block, and exactly the old ones outside."""

    def __init__(self, parameters, first, second, a: float, b: float):
        self._parameters, self._step = parameters, {t: a * first[t] + b * second[t] for t in parameters}
        self._old: dict[str, Tensor] = {}

    def __enter__(self):
        self._old = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.add_(self._step[name])

    def __exit__(self, *exception):
        for name, parameter in self._parameters.items():
            parameter.copy_(self._old[name])


def _mean_loss(model: nn.Module, task: str, inputs: Sequence[dict[str, Tensor]]) -> float:
    return float(torch.cat([model_losses(model, task, batch) for batch in inputs]).double().mean())
