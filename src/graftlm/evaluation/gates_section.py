"""The report's part on neutral residues: how far each layer's gate is open on each language."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graftlm.errors import DataError
from graftlm.evaluation.pictures import ACCENT, INK, LINE, MUTED, SECOND, both_widths
from graftlm.evaluation.table import inert, language_name

FILE: Final = "gates.json"
SCHEMA: Final = "graftlm.gates/1"
_LOOKS = [(colour, style) for style in ("-", "--") for colour in (ACCENT, SECOND, INK, MUTED)]


def gates_section(folder: Path) -> dict[str, Any]:
    """What the template shows; every value is None where the folder has no such file.

    Raises:
        DataError: a file that is not what its name says.
    """
    path = folder / FILE
    if not path.is_file():
        return {"gates": None, "gates_picture": None}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", found=path) from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise DataError("a file of another kind", found=path, allowed=SCHEMA)
    by_language: dict[str, list[dict[str, Any]]] = {}
    for row in values["rows"]:
        by_language.setdefault(row["domain"], []).append(row)
    old = set(values["old"])
    names = {tag: language_name(tag) + (" (known before)" if tag in old else "") for tag in by_language}
    lines = {names[tag]: [_shown(row) for row in rows] for tag, rows in by_language.items()}
    picture = both_widths(gates_picture(lines, values["gate"]), "gates", _label(by_language, names))
    return {
        "gates": {
            "kind": values["gate"],
            "languages": list(names.values()),
            "rows": [_row(rows) for rows in zip(*by_language.values(), strict=True)],
            "tokens": ", ".join(f"{rows[0]['tokens']:,} of {names[tag]}" for tag, rows in by_language.items()),
        },
        "gates_picture": picture,
    }


def _shown(row: dict[str, Any]) -> float:
    return row["size"] if row["open"] is None else row["open"]


def _row(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {
        "layer": rows[0]["layer"],
        "open": ["" if row["open"] is None else f"{100 * row['open']:.1f}" for row in rows],
        "size": [f"{row['size']:.2e}" for row in rows],
    }


def gates_picture(lines: dict[str, list[float]], gate: str) -> Callable[[bool], Figure]:
    """Share of tokens with an open gate over depth, one line a language; without a gate the size of the residue."""

    def draw(narrow: bool) -> Figure:
        width, height = 360 if narrow else 720, 240
        head = 24 + 20 * -(-len(lines) // (1 if narrow else 3))
        total = height + head
        figure = Figure(figsize=(width / 72, total / 72))
        axes = figure.add_axes((66 / width, 50 / total, 1 - 82 / width, 1 - (50 + head) / total))
        for (name, values), (colour, style) in zip(lines.items(), _LOOKS * 4, strict=False):
            axes.plot(range(len(values)), values, style, marker="o", ms=5, lw=1.8, color=colour, label=inert(name))
        figure.legend(loc="upper left", bbox_to_anchor=(0, 1), ncols=1 if narrow else 3, borderpad=0, borderaxespad=0)
        axes.grid(axis="y", color=LINE, lw=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0, top=None if gate == "none" else 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("layer (0 = bottom)")
        axes.set_ylabel("mean size of the residue" if gate == "none" else "share of tokens, gate open")
        return figure

    return draw


def _label(by_language: dict[str, list[dict[str, Any]]], names: dict[str, str]) -> str:
    found = ", ".join(
        f"{names[tag]} {min(map(_shown, rows)):.2g} to {max(map(_shown, rows)):.2g}"
        for tag, rows in by_language.items()
    )
    return inert(f"How far the gates are open over depth: {found}. The table below has all numbers.")
