"""Learning against forgetting as one picture: a panel a language, every method's settings, its front and its seeds."""

import math
from collections.abc import Sequence

from curves import METHODS, front, of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graftlm.errors import DataError
from graftlm.evaluation.pictures import ACCENT, INK, LINE, MUTED, PAPER, SECOND, one_width
from graftlm.evaluation.table import language_name

LOOKS = {  # told apart by shape as well as by colour
    "neutral": ("neutral residues", "o", ACCENT),
    "vanilla": ("vanilla adapter", "D", SECOND),
    "lora": ("LoRA", "s", INK),
    "full": ("full fine-tuning", "^", MUTED),
}
WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, BOTTOM = 560, 250, 64, 136, 70, 46, 48  # pixels
LABEL = 17  # from one label to the next
# blue and orange are two colours for everybody; on a page of either kind the picture brings its own paper
STYLE = """
svg { --paper: #fdfdfb; --ink: #1d2226; --muted: #5c666e; --line: #e3e5e4; --accent: #0072b2; --second: #b84f00; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15191c; --ink: #e6e9ea; --muted: #9aa5ab; --line: #2c3338; --accent: #56b4e9; --second: #f0a04b; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
"""


def picture(rows: Sequence[dict]) -> str:
    """A file of its own, SVG, for light and dark pages.

    Points are the settings of the sweep, filled where they are on the front; a large one with a cross is the mean over
    seeds with their range. A panel shows all fronts and seeds, and says how many settings lie outside of it.

    Raises:
        DataError: no run of the sweep.
    """
    languages = list(dict.fromkeys(row["language"] for row in rows if row["stage"] == "sweep"))
    if not languages:
        raise DataError("there is no run of the sweep to draw", fix="run.py --stages sweep")
    found = {language: panel(rows, language) for language in languages}
    drawn = str(one_width(lambda narrow: _figure(found), "learning-forgetting", label(found)))
    head, _, rest = drawn.partition(">")
    _, _, width, height = head.split('viewBox="')[1].split('"')[0].split()
    own = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head.replace('<svg', f'<svg {own}', 1)}><style>{STYLE}</style>{paper}{rest}\n"


def panel(rows: Sequence[dict], language: str) -> dict[str, dict[str, list]]:
    """Of each method that has run: settings and front as (learned, forgot); seeds as three of each: mean, low, high."""
    found = {}
    for method in METHODS:
        settings = [(row["learned"], row["forgot"]) for row in of(rows, language, method)]
        kept = [point for point in settings if all(map(math.isfinite, point))]
        if kept:
            runs = of(rows, language, method, "seeds")
            labels = dict.fromkeys(row["setting"] for row in runs)
            means = [_spread([row for row in runs if row["setting"] == setting]) for setting in labels]
            found[method] = {"settings": settings, "front": front(kept), "seeds": means}
    return found


def _spread(runs: Sequence[dict]) -> tuple[tuple[float, float, float], ...]:
    columns = [[row[key] for row in runs] for key in ("learned", "forgot")]
    return tuple((sum(column) / len(column), min(column), max(column)) for column in columns)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as needed for `gap` between neighbours, in their order.

    >>> apart([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    groups: list[tuple[float, list[int]]] = []  # middle, who stands there
    for number in sorted(range(len(places)), key=places.__getitem__):
        middle, members = places[number], [number]
        while groups and middle - groups[-1][0] < gap * (len(members) + len(groups[-1][1])) / 2:
            members = groups.pop()[1] + members
            middle = sum(places[one] for one in members) / len(members)
        groups.append((middle, members))
    moved = list(places)
    for middle, members in groups:
        for at, number in enumerate(members):
            moved[number] = middle + gap * (at - (len(members) - 1) / 2)
    return moved


def label(found: dict[str, dict]) -> str:
    """The picture in words."""
    parts = []
    for language, methods in found.items():
        fronts = [
            f"{LOOKS[method][0]} from {x0:.2f} learned and {y0:+.3f} forgotten to {x1:.2f} and {y1:+.3f}"
            for method, points in methods.items()
            for (x0, y0), (x1, y1) in [(points["front"][0], points["front"][-1])]
        ]
        parts.append(f"{language_name(language)}: {'; '.join(fronts)}")
    return f"Bits per byte learned against bits per byte forgotten. {'. '.join(parts)}."


def _figure(found: dict[str, dict]) -> Figure:
    height = TOP + len(found) * PANEL + (len(found) - 1) * GAP + BOTTOM
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    box = (LEFT / WIDTH, 1 - (LEFT + RIGHT) / WIDTH)
    for number, (language, methods) in enumerate(found.items()):
        low = height - TOP - PANEL - number * (PANEL + GAP)
        axes = figure.add_axes((box[0], low / height, box[1], PANEL / height))
        _draw(axes, methods)
        axes.text(0, 1 + 10 / PANEL, language_name(language), transform=axes.transAxes, fontsize=14, weight="bold")
        axes.set_ylabel("bits per byte forgotten")
    axes.set_xlabel("bits per byte learned in the new language")
    said = ["Lower right is better. Hollow: another setting of the method beats it."]
    if any(points["seeds"] for methods in found.values() for points in methods.values()):
        said.append("Large, with a cross: mean over seeds, and their range.")
    for line, text in enumerate(said):
        y = 1 - (16 + 17 * line) / height
        figure.text(LEFT / WIDTH, y, text, color=MUTED, fontsize=12, va="center", ha="left")
    return figure


def _draw(axes: Axes, methods: dict[str, dict]) -> None:
    for method, points in methods.items():
        _, marker, colour = LOOKS[method]
        others = [point for point in points["settings"] if point not in points["front"]]
        axes.plot(*_columns(points["front"]), "-", marker=marker, ms=5, lw=1.8, color=colour, zorder=3)
        axes.plot(*_columns(others), marker, ms=5, mfc=PAPER, mec=colour, mew=1.1, alpha=0.8, zorder=2)
        for (x, *x_range), (y, *y_range) in points["seeds"]:
            axes.plot(x_range, [y, y], color=colour, lw=1.4, zorder=4)
            axes.plot([x, x], y_range, color=colour, lw=1.4, zorder=4)
            axes.plot(x, y, marker, ms=8.5, color=colour, mec=PAPER, mew=1.2, zorder=5)
    within = [point for points in methods.values() for point in points["front"]]
    for points in methods.values():
        within += [(x, y) for xs, ys in points["seeds"] for x in xs for y in ys]
    for values, limit in zip(
        zip(*within, (within[0][0], 0.0), strict=True), (axes.set_xlim, axes.set_ylim), strict=True
    ):
        room = 0.06 * (max(values) - min(values)) or 0.1
        limit(min(values) - room, max(values) + room)
    axes.axhline(0, color=MUTED, lw=1, zorder=1)
    axes.grid(axis="y", color=LINE, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="y", labelcolor=MUTED)
    _say_what_is_outside(axes, methods)
    _name(axes, methods)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _say_what_is_outside(axes: Axes, methods: dict[str, dict]) -> None:
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    settings = [point for points in methods.values() for point in points["settings"]]
    outside = sum(not (left <= x <= right and low <= y <= high) for x, y in settings)
    if outside:
        text = f"{outside} of {len(settings)} settings lie outside"
        axes.text(
            1, 1 + 10 / PANEL, text, transform=axes.transAxes, fontsize=12, color=MUTED, ha="right", va="baseline"
        )


def _name(axes: Axes, methods: dict[str, dict]) -> None:
    """Names to the right of the panel, each at the height of its front's end."""
    low, high = axes.get_ylim()
    gap = LABEL * (high - low) / PANEL
    ends = {method: points["front"][-1] for method, points in methods.items()}
    for (method, end), y in zip(ends.items(), apart([y for _, y in ends.values()], gap), strict=True):
        name, _, colour = LOOKS[method]
        line = {"arrowstyle": "-", "color": colour, "lw": 0.8, "alpha": 0.6, "shrinkA": 2}
        axes.annotate(
            name, end, (1.04, y), textcoords=axes.get_yaxis_transform(), color=colour, fontsize=13, va="center",
            annotation_clip=False, arrowprops=line,
        )  # fmt: skip
