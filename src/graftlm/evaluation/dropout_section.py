"""The report's part on guided dropout: rates per block, and the loss landscape."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graftlm.errors import DataError
from graftlm.evaluation.pictures import ACCENT, INK, LINE, MUTED, SECOND, both_widths
from graftlm.evaluation.table import inert

RATES, LANDSCAPE = "dropout.json", "landscape.json"
_SURFACES = {"all": "all tensors", "top": "most information", "bottom": "least information"}
_LOOKS = [(colour, style) for style in ("-", "--") for colour in (ACCENT, SECOND, INK, MUTED)]


def dropout_section(folder: Path) -> dict[str, Any]:
    """What the template shows; every value is None where the folder has no such file.

    Raises:
        DataError: a file that is not what its name says.
    """
    rates, surface = (
        _read(folder / RATES, "graftlm.guided_dropout/1"),
        _read(folder / LANDSCAPE, "graftlm.loss_landscape/1"),
    )
    rows = _rows(rates, folder / RATES) if rates else []
    return {
        "dropout": _shown(rates, rows) if rates else None,
        "dropout_picture": both_widths(rates_picture(rows), "dropout", _rates_label(rows)) if rates else None,
        "landscape": surface,
        "landscape_picture": both_widths(landscape_picture(surface), "landscape", _landscape_label(surface))
        if surface
        else None,
    }


def _read(path: Path, schema: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", found=path) from None
    if not isinstance(values, dict) or values.get("schema") != schema:
        raise DataError("a file of another kind", found=path, allowed=schema)
    return values


def _rows(values: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """One a block: what was set on the model, or the rates of the file where nothing was."""
    applied = values.get("applied")
    if not applied:
        return values["rates"]
    if "kind" not in applied[0]:
        raise DataError(
            "rates without the type of their blocks, from before 0.1", found=path, fix="train the run again"
        )
    blocks = {row["block"]: {**row, "type": row["kind"], "rate": row["new"]} for row in applied}
    return list(blocks.values())


def _shown(values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    shown = [
        {
            "block": row["block"],
            "score": f"{row['score']:.2e}",
            "rank": row["rank"],
            "rate": f"{row['rate']:.4f}",
            "measured": "" if row.get("measured") is None else f"{row['measured']:.4f}",
        }
        for row in rows
    ]
    return {
        "rows": shown,
        "schedule": values["schedule"]["name"],
        "mean": f"{np.mean([row['rate'] for row in rows]):.4f}",
        "task": {"masked_lm": "masked LM", "causal_lm": "next token", "seq2seq_lm": "span corruption"}[values["task"]],
        "examples": values["settled"]["examples"],
        "error": f"{100 * values['settled']['rank_error']:.1f}",
    }


def rates_picture(rows: list[dict[str, Any]]) -> Callable[[bool], Figure]:
    """Rate over depth, one line a type of block."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row["type"], []).append(row["rate"])

    def draw(narrow: bool) -> Figure:
        width, height = 360 if narrow else 720, 270
        columns = 2 if narrow else 4
        head = 24 + 20 * -(-len(kinds) // columns)
        total = height + head
        figure = Figure(figsize=(width / 72, total / 72))
        axes = figure.add_axes((66 / width, 50 / total, 1 - 82 / width, 1 - (50 + head) / total))
        for (kind, rates), (colour, style) in zip(kinds.items(), _LOOKS * 4, strict=False):
            axes.plot(
                range(len(rates)),
                rates,
                style,
                marker="o",
                ms=5,
                lw=1.8,
                color=colour,
                label=inert(kind.replace("_", " ")),
            )
        figure.legend(
            loc="upper left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, borderaxespad=0, handlelength=1.6,
            columnspacing=1.2,
        )  # fmt: skip
        axes.grid(axis="y", color=LINE, lw=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=min(0.0, -0.04 * max((max(r) for r in kinds.values()), default=0.1)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("layer (0 = bottom)")
        axes.set_ylabel("dropout rate")
        return figure

    return draw


def landscape_picture(values: dict[str, Any]) -> Callable[[bool], Figure]:
    """The three surfaces on one colour scale, with contours."""
    axis = np.array(values["axis"])
    surfaces = {name: np.array(values["losses"][name]) for name in _SURFACES}
    low, high = min(s.min() for s in surfaces.values()), max(s.max() for s in surfaces.values())
    high = high if high > low else low + 1
    norm = Normalize(low, high)

    def draw(narrow: bool) -> Figure:
        width, side = 360 if narrow else 720, 190
        rows = len(surfaces) if narrow else 1
        total = 76 + rows * (side + 46)
        figure = Figure(figsize=(width / 72, total / 72))
        for number, (name, losses) in enumerate(surfaces.items()):
            left, bottom = (
                (44 if narrow else 44 + 228 * number),
                46 + (rows - 1 - number if narrow else 0) * (side + 46),
            )
            axes = figure.add_axes((left / width, bottom / total, side / width, side / total))
            axes.pcolormesh(axis, axis, losses.T, cmap="viridis", norm=norm, shading="gouraud", rasterized=True)
            if losses.max() > losses.min():
                axes.contour(
                    axis, axis, losses.T, levels=np.linspace(low, high, 12)[1:-1], colors="white", linewidths=0.8
                )
            axes.plot(0, 0, "+", color="white", ms=9, mew=1.6)
            axes.set_title(_SURFACES[name], fontsize=12.5, color=MUTED)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_locator(MaxNLocator(3))
        place = figure.add_axes((44 / width, 1 - 34 / total, 190 / width, 10 / total))
        place.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap="viridis", extent=(low, high, 0, 1))
        place.set_yticks([])
        place.xaxis.set_major_locator(MaxNLocator(4))
        figure.text(44 / width, 1 - 16 / total, "pretraining loss, nats", color=MUTED, fontsize=12, va="bottom")
        return figure

    return draw


def _rates_label(rows: list[dict[str, Any]]) -> str:
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row["type"], []).append(row["rate"])
    found = ", ".join(f"{kind} {min(rates):.3f} to {max(rates):.3f}" for kind, rates in kinds.items())
    return inert(f"Dropout rate over depth for each type of block: {found}. The table below has all numbers.")


def _landscape_label(values: dict[str, Any]) -> str:
    found = ", ".join(
        f"{_SURFACES[name]} {np.min(values['losses'][name]):.2f} to {np.max(values['losses'][name]):.2f}"
        for name in _SURFACES
    )
    return inert(f"Pretraining loss on a plane around the weights: {found} nats.")
