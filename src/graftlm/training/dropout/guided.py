"""Guided dropout: rates from what the pretrained model knows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.training.dropout.adapter_sites import adapter_sites, has_adapters
from graftlm.training.dropout.apply import Applied, check_target, set_rates
from graftlm.training.dropout.estimate import Settled, TensorScore, estimate_scores
from graftlm.training.dropout.fingerprint import Fingerprint, encoder_alone
from graftlm.training.dropout.heads import load_with_head
from graftlm.training.dropout.rates import Schedule, ranks
from graftlm.training.dropout.sites import Block, find_sites

SCHEMA = "graftlm.guided_dropout/1"


@dataclass(frozen=True)
class GuidedDropout:
    r"""Dropout rates, one a block, from the Fisher information of a model's *pretraining* loss.

    .. math:: F_t = \frac{1}{n} \sum_{i=1}^n \frac{1}{|\theta_t|}
              \lVert \nabla_{\theta_t} \ell_i \rVert^2, \qquad s_B = \frac{1}{|B|} \sum_{t \in B} F_t

    with :math:`\ell_i` the mean loss of *one* text over its predicted tokens, in evaluation mode. A block B is the
    tensors in front of one dropout: query, key and value (dropout on attention probabilities); a sub-layer's output and
    the norm behind it; the embeddings. The more information, the less dropout: see `Schedule`. The classifier's own
    dropout is left alone. Measured once per pretrained model; nothing is added to fine-tuning.

    Made by `estimate` or `load`; `using` gives the same measurement under another schedule.

    Attributes:
        tensors: what was measured, tensor by tensor; names start at the backbone.
        blocks: the model's own blocks.
        modules: its linear layers; adapters on them, or on modules that hold some of them, can be guided.
        fingerprint: of the model that was measured.
        task: ``masked_lm``, ``causal_lm`` or ``seq2seq_lm`` (span corruption).
        settled: how the measurement ended: examples, tokens, loss, error of the ranking.
        without_dropout: whether models of this family ship without dropout; then rates are for adapters.
        schedule: from scores to rates.

    Source: arXiv 2406.14005, Section 4 and Algorithm 1.

    Differs from the paper in: (1) modules are found by name and kind, on every supported family, where the release
    counts positions; (2) attention rates that are kept as numbers for SDPA and flash attention are set as well; (3) the
    number of texts follows from the error of the ranking; (4) adapters, above all on models that ship without dropout
    (Llama, Gemma, Qwen), get one rate a wrapped module, ranked by the Fisher information of the linear layers that it
    wraps: our extension; (5) in families that norm *before* a sub-layer the norm belongs to no block.

    Example:
        .. code-block:: python

            rates = graftlm.GuidedDropout.estimate(mlm_model, texts, tokenizer=tokenizer)
            print(rates.table())
            print(rates.apply(classifier))                      # module, old rate, new rate, measured
            rates.using("shuffled", seed=1).apply(classifier)   # a control
    """

    tensors: Mapping[str, TensorScore] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    modules: tuple[Block, ...] = field(repr=False)
    fingerprint: Fingerprint = field(repr=False)
    task: str
    settled: Settled
    without_dropout: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def estimate(
        cls,
        model: nn.Module | str | os.PathLike[str],
        texts: Iterable[str],
        *,
        tokenizer: Any = None,
        max_examples: int | None = None,
        tolerance: float = 0.02,
        max_length: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        check_head: bool = True,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> GuidedDropout:
        """Measures a pretrained model on texts like those that it was pretrained on.

        Args:
            model: with its language-model head; or a folder or hub id, which is then loaded with it.
            texts: any iterable; read as far as needed.
            tokenizer: the model's; may be left out where `model` is a folder or hub id.
            max_examples: stop after so many texts; None: at the end of `texts`.
            tolerance: stop once the ranking is settled: the bootstrap's standard deviation of r / R, averaged over
                blocks, is at most this. 0: use all texts.
            max_length: tokens; longer text is cut.
            batch_size: texts a forward pass. Scores do not depend on it; whether to stop is asked behind each eight
                batches.
            seed: of masks and spans.
            check_head: refuse a head that predicts no better than word frequencies do.
            device: where a model that is loaded by name is measured; None: a CUDA device if there is one, else the CPU.
                A model in memory is measured where it lies.
            progress: whether a bar is shown.

        Raises:
            ModelError: no language-model head, a freshly initialised one, a layout of modules that is not known, or a
                gradient that is not finite.
            DataError: fewer than two texts with something to predict.
            SetupError: a number out of its range, or a device for a model that has one already.
        """
        if not isinstance(model, nn.Module):
            model, tokenizer = load_with_head(model, tokenizer, device)
        elif device is not None:
            raise SetupError(
                "a model in memory is measured where it lies",
                found=f"device={str(device)!r}",
                fix=f"estimate(model.to({str(device)!r}), …) without device",
            )
        if tokenizer is None:
            raise SetupError("the tokenizer is missing", fix="estimate(model, texts, tokenizer=tokenizer)")
        found = find_sites(model)
        blocks = tuple(dataclasses.replace(block, sites=()) for block in found.blocks)
        ranked = found.modules if found.without_dropout else blocks
        tensors, task, settled = estimate_scores(
            model,
            found.backbone,
            texts,
            tokenizer,
            names=list(dict.fromkeys(name for block in (*blocks, *found.modules) for name in block.tensors)),
            ranked=ranked,
            max_examples=max_examples,
            tolerance=tolerance,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            check_head=check_head,
            progress=progress,
        )
        fingerprint = Fingerprint.of(found.backbone, tensors)
        return cls(tensors, blocks, found.modules, fingerprint, task, settled, found.without_dropout)

    def using(self, schedule: str | None = None, **options: Any) -> GuidedDropout:
        """The same measurement under another schedule.

        Args:
            schedule: ``guided`` or a control's name; None: as it is.
            options: the other fields of `Schedule`; those that are left out stay as they are.

        Example:
            .. code-block:: python

                rates.using("uniform")                        # the same mean everywhere
                rates.using(linear_in="score", mean=0.1)      # linear in the score, at the usual mean
                rates.using(upper=0.3).using("shuffled")      # from 0.3 to 0, in a random order
        """
        fields = {one.name for one in dataclasses.fields(Schedule)} - {"name"}
        if unknown := sorted(options.keys() - fields):
            raise SetupError("unknown option of guided dropout", found=", ".join(unknown), allowed=sorted(fields))
        name = self.schedule.name if schedule is None else schedule
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, name=name, **options))

    def score(self, block: Block) -> float:
        """The unweighted mean over a block's tensors of each tensor's mean Fisher information."""
        return math.fsum(self.tensors[name].score for name in block.tensors) / len(block.tensors)

    def rates_of(self, blocks: Iterable[Block]) -> dict[str, float]:
        """Block name → rate, ranked among `blocks`."""
        blocks = list(blocks)
        rates = self.schedule.rates([self.score(block) for block in blocks], [block.kind for block in blocks])
        return {block.name: rate for block, rate in zip(blocks, rates, strict=True)}

    @property
    def rates(self) -> dict[str, float]:
        """Block name → rate; for models that ship without dropout, linear layer → rate of an adapter on it."""
        return self.rates_of(self._ranked)

    @property
    def _ranked(self) -> tuple[Block, ...]:
        return self.modules if self.without_dropout else self.blocks

    def rows(self) -> list[dict[str, Any]]:
        """One row a block, in the order of the model: block, type, score, rank (0 = least information), rate."""
        scores = [self.score(block) for block in self._ranked]
        rates, order = self.rates, ranks(np.asarray(scores)).tolist()
        return [
            {"block": block.name, "type": block.kind, "score": score, "rank": rank, "rate": rates[block.name]}
            for block, score, rank in zip(self._ranked, scores, order, strict=True)
        ]

    def table(self) -> str:
        """`rows` as text, with how certain the ranking is."""
        rows = self.rows()
        width = max(len(row["block"]) for row in rows)
        lines = [f"{'block':{width}}  {'score':>9}  rank    rate"]
        lines += [f"{r['block']:{width}}  {r['score']:9.3e}  {r['rank']:4}  {r['rate']:.4f}" for r in rows]
        mean = math.fsum(row["rate"] for row in rows) / len(rows)
        return "\n".join([*lines, f"{self.schedule.name}, mean rate {mean:.4f}; {self.settled}"])

    def apply(
        self,
        model: nn.Module,
        *,
        on: str = "auto",
        adapter: str | None = None,
        check: str = "weights",
        verify: bool = True,
    ) -> Applied:
        """Sets the rates on a model with the same backbone, and measures them in a forward pass.

        The rates live in the modules of `model`; a saved model does not keep them, so apply them again after loading,
        and inside ``model_init`` where a Trainer makes its own model.

        Args:
            model: bare or inside PEFT and other wrappers; any head.
            on: ``model`` (its own dropouts), ``adapters`` (PEFT's, one rate a wrapped module), or ``auto``: adapters
                where models of this family ship without dropout.
            adapter: which adapter; None: the active one, of a stack the one on top.
            check: ``weights``: the backbone has to be the one that was measured, tokens that were added since aside;
                ``config``: one of the same shape, with any vocabulary. Of an encoder-decoder the encoder alone will do;
                its blocks are then ranked among themselves.
            verify: run a small forward pass in training mode and compare the share that each dropout drops with its
                rate. Leaves no trace in random state, modes or gradients.

        Returns:
            Module, old rate, new rate and measured rate of each dropout.

        Raises:
            ModelError: another model; a block without a dropout, or a dropout without a block; no adapter to guide; a
                measured rate that does not agree with the one that was set.
        """
        found = find_sites(model)
        self.fingerprint.check(found.backbone, check)
        if check_target(on, found.without_dropout, has_adapters(found.backbone)) == "adapters":
            blocks = adapter_sites(model, found.backbone, self.modules, adapter)
        else:
            blocks = list(found.blocks)
            _check_same_blocks(self.blocks, blocks, without_decoder=encoder_alone(found.backbone))
        scores = [self.score(block) for block in blocks]
        return set_rates(found.backbone, blocks, scores, self.rates_of(blocks), self.schedule.noise, verify)

    def save(self, path: str | os.PathLike[str], applied: Applied | None = None) -> Path:
        """Writes the measurement, the schedule and the model's fingerprint as JSON; no weights, no text.

        Args:
            path: the file.
            applied: what `apply` returned, to stand beside the rates; the report shows these.
        """
        path = Path(path)
        values = self.as_dict() | ({"applied": dataclasses.asdict(applied)["rows"]} if applied else {})
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
        return path

    def as_dict(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "settled": dataclasses.asdict(self.settled),
            "without_dropout": self.without_dropout,
            "schedule": dataclasses.asdict(self.schedule),
            "rates": self.rows(),
            "model": dataclasses.asdict(self.fingerprint),
            "blocks": [[block.name, block.kind, list(block.tensors)] for block in self.blocks],
            "modules": [[block.name, block.kind, list(block.tensors)] for block in self.modules],
            "tensors": {name: dataclasses.astuple(score) for name, score in self.tensors.items()},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuidedDropout:
        """Reads what `save` wrote.

        Raises:
            DataError: no such file, no JSON, or another schema.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.get("schema") != SCHEMA:
                raise DataError("not a file of dropout rates", found=values.get("schema"), allowed=SCHEMA)
            return cls(
                {name: TensorScore(*score) for name, score in values["tensors"].items()},
                _blocks(values["blocks"]),
                _blocks(values["modules"]),
                Fingerprint.from_dict(values["model"]),
                values["task"],
                Settled(**values["settled"]),
                values["without_dropout"],
                Schedule(**values["schedule"]),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"dropout rates cannot be read: {error}", found=path) from error


def _blocks(rows: list[list[Any]]) -> tuple[Block, ...]:
    return tuple(Block(name, kind, tuple(tensors)) for name, kind, tensors in rows)


def _check_same_blocks(measured: tuple[Block, ...], found: list[Block], *, without_decoder: bool) -> None:
    known = {block.name for block in measured if not (without_decoder and block.name.startswith("decoder."))}
    there = {block.name for block in found}
    if known != there:
        raise ModelError(
            "the model's blocks are not those that were measured",
            found=f"measured, but not in the model: {', '.join(sorted(known - there)[:4]) or 'none'}; "
            f"in the model, but not measured: {', '.join(sorted(there - known)[:4]) or 'none'}",
            fix="estimate the rates on the pretrained form of this very model",
        )
