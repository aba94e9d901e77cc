"""Sets dropout rates on a model, and makes sure that they are in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from graftlm.errors import ModelError, SetupError
from graftlm.training.dropout.noise import ATTENTION, GaussianDropout, use_gaussian_attention, use_usual_attention
from graftlm.training.dropout.rates import ranks
from graftlm.training.dropout.sites import Block, Site, in_kernel, is_dropout
from graftlm.training.dropout.verify import compare, measure


@dataclass(frozen=True)
class AppliedRate:
    """One dropout: where, what its rate was and is, and the share of elements that a forward pass dropped.

    `kind`, `score` and `rank` (0 = least information) are those of its block among all blocks that were ranked. With
    Gaussian noise `measured` is the rate that has the variance found. None: not measured.
    """

    block: str
    kind: str
    score: float
    rank: int
    module: str
    old: float
    new: float
    measured: float | None
    elements: int


@dataclass(frozen=True)
class Applied:
    """What `GuidedDropout.apply` did; print it, or read `rows`."""

    rows: tuple[AppliedRate, ...]

    def __str__(self) -> str:
        width = max(len(row.module) for row in self.rows)
        lines = [f"{'module':{width}}  old rate  new rate  measured"]
        for row in self.rows:
            measured = "–" if row.measured is None else f"{row.measured:.4f}"
            lines.append(f"{row.module:{width}}  {row.old:8.4f}  {row.new:8.4f}  {measured:>8}")
        return "\n".join(lines)


def set_rates(
    backbone: Any,
    blocks: Sequence[Block],
    scores: Sequence[float],
    rates: Mapping[str, float],
    noise: str,
    verify: bool,
) -> Applied:
    """Sets one rate a block on all of its dropouts, and measures them in a forward pass.

    Args:
        backbone: see `find_sites`.
        blocks: with their dropouts.
        scores: one a block, for the table that is returned.
        rates: block name → rate.
        noise: ``bernoulli`` or ``gaussian``.
        verify: whether they are measured.

    Raises:
        ModelError: a mask rate that does not agree with the rate that was set, or a dropout that never runs. The old
            rates are then back in place.
    """
    before = [(site, site.value, site.rate) for block in blocks for site in block.sites]
    attention = [site for block in blocks for site in block.sites if in_kernel(site)]  # none where blocks are adapters
    was_gaussian = backbone.config._attn_implementation == ATTENTION

    def restore() -> None:
        for site, value, rate in before:
            _put(site, value)
            if is_dropout(value):
                value.p = rate
        if attention:
            (use_gaussian_attention if was_gaussian else use_usual_attention)(backbone)

    with ExitStack() as undo:
        undo.callback(restore)
        for block in blocks:
            for site in block.sites:
                _set(site, rates[block.name], noise)
        if attention:
            (use_gaussian_attention if noise == "gaussian" else use_usual_attention)(backbone)
            _check_kernel(backbone, [rates[block.name] for block in blocks if any(map(in_kernel, block.sites))])
        measured = measure(backbone, blocks, noise) if verify else {}
        if verify:
            compare(blocks, rates, measured, noise)
        undo.pop_all()
    old = {site.path: rate for site, _, rate in before}
    rows = []
    for block, score, rank in zip(blocks, scores, ranks(np.asarray(scores)).tolist(), strict=True):
        for site in block.sites:
            share, count = measured.get(site.path, (None, 0))
            new = rates[block.name]
            rows.append(AppliedRate(block.name, block.kind, score, rank, site.path, old[site.path], new, share, count))
    return Applied(tuple(rows))


def _check_kernel(backbone: Any, rates: Sequence[float]) -> None:
    """Flex attention raises in training, at the first rate above 0; the check, which runs in eager form, would pass."""
    if backbone.config._attn_implementation == "flex_attention" and any(rates):
        raise ModelError(
            "flex attention has no dropout, so that training with these rates would raise",
            found="attn_implementation='flex_attention'",
            allowed="eager, sdpa, flash_attention_2",
            fix="model.set_attn_implementation('sdpa')",
        )


def _put(site: Site, value: Any) -> None:
    if isinstance(site.owner, nn.ModuleDict):
        site.owner[site.name] = value
    else:
        setattr(site.owner, site.name, value)


def _set(site: Site, rate: float, noise: str) -> None:
    value = site.value
    if not isinstance(value, nn.Module):
        _put(site, float(rate))
        return
    wanted = GaussianDropout if noise == "gaussian" and not in_kernel(site) else nn.Dropout
    if type(value) is wanted:
        value.p = float(rate)
        return
    made = wanted(float(rate))
    made.train(value.training)
    _put(site, made)


def check_target(on: str, without_dropout: bool, has_adapters: bool) -> str:
    """``model`` or ``adapters``, from what was asked and what there is."""
    if on not in ("auto", "model", "adapters"):
        raise SetupError("unknown place for dropout rates", found=repr(on), allowed="auto, model, adapters")
    if on != "auto":
        return on
    if without_dropout and not has_adapters:
        raise ModelError(
            "models of this family ship without dropout, so there is nothing to guide in the model itself",
            allowed="rates on the dropouts of adapters, or on attention probabilities alone",
            fix="get_peft_model(model, LoraConfig(…)) first, or apply(model, on='model')",
        )
    return "adapters" if without_dropout else "model"
