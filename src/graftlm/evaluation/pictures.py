"""The report's pictures: matplotlib figures as inline SVG whose colours and fonts are the page's own.

A figure is drawn in marker colours that no colour map has; they become CSS variables, so that one picture serves
light, dark and paper. Each picture is drawn twice, for a wide page and for a phone, because text in a scaled picture
cannot be read.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from graftlm.evaluation.result import Result
from graftlm.evaluation.table import inert, language_name, metric_of

_VARIABLES = {
    "#010101": "ink",
    "#020202": "muted",
    "#030303": "line",
    "#040404": "accent",
    "#050505": "second",
    "#060606": "paper",
}
INK, MUTED, LINE, ACCENT, SECOND, PAPER = _VARIABLES
_STYLE = {
    "font.size": 13,
    "axes.labelsize": 12.5,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "graftlm",
}
MARGIN, RIGHT = 64, 14  # of the heat map and of the curves: their steps stand under one another
_RASTER_ABOVE = 4000  # cells of a heat map; more of them as paths would make the page heavy


@dataclass(frozen=True)
class Trace:
    """What unfreezing.jsonl says, as arrays: layers bottom first, steps in order."""

    layers: tuple[str, ...]
    steps: np.ndarray  # (steps,)
    values: np.ndarray  # (layers, steps), NaN where nothing was measured
    opened: dict[str, int]  # layer → step at which it was opened; layers that stayed frozen are missing
    kinds: tuple[str, ...]
    examples: tuple[int, ...]
    relative_error: float | None  # median standard error of a value, as a share of it

    @classmethod
    def of(cls, rows: Sequence[dict]) -> "Trace | None":
        """None where there are no rows."""
        if not rows:
            return None
        positions = {row["layer"]: row["position"] for row in rows}
        layers = tuple(sorted(positions, key=positions.__getitem__))
        steps = sorted({row["step"] for row in rows})
        values = np.full((len(layers), len(steps)), np.nan)
        opened: dict[str, int] = {}
        for row in rows:
            if row.get("trace") is not None:
                values[layers.index(row["layer"]), steps.index(row["step"])] = row["trace"]
            if row.get("opened") or row.get("open"):
                opened[row["layer"]] = min(row["step"], opened.get(row["layer"], row["step"]))
        measured = [row for row in rows if row.get("trace") is not None]
        kinds = tuple(sorted({str(row["kind"]) for row in measured if row.get("kind")}))
        examples = tuple(sorted({int(row["examples"]) for row in measured if row.get("examples")}))
        errors = [
            row["standard_error"] / row["trace"] for row in measured if row.get("standard_error") and row["trace"]
        ]
        error = float(np.median(errors)) if errors else None
        return cls(layers, np.array(steps), values, opened, kinds, examples, error)

    @property
    def measured(self) -> bool:
        """Whether there is anything to colour: a logarithm needs a value above 0."""
        return bool((np.nan_to_num(self.values) > 0).any())

    @property
    def numbered(self) -> bool:
        """Whether the layers are told by their numbers alone."""
        return all(re.fullmatch(r"layer\.\d+", name) for name in self.layers)

    @property
    def names(self) -> list[str]:
        """The layers as an axis shows them."""
        names = [name.removeprefix("layer.") if self.numbered else inert(name) for name in self.layers]
        return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]

    @property
    def margin(self) -> float:
        """Room to the left of the picture that the names take."""
        return max(MARGIN, 36 + 7 * max(map(len, self.names)))

    @property
    def worth_showing(self) -> bool:
        """Whether there is more to see than that everything trained from the first step."""
        return self.measured or len({self.opened.get(layer) for layer in self.layers}) > 1


def both_widths(draw: Callable[[bool], Figure], name: str, label: str) -> Markup:
    """The picture for a wide page and for a phone; the style sheet shows one of them.

    Args:
        draw: narrow → figure.
        name: prefix of all ids, unique on the page.
        label: what the picture shows, for those who do not see it.
    """
    return Markup("").join(_drawn(draw, narrow, name, width, label) for narrow, width in _WIDTHS)


def one_width(draw: Callable[[bool], Figure], name: str, label: str) -> Markup:
    """The picture as a phone shows it, for any page: to stand beside others."""
    return _drawn(draw, True, name, "small", label)


_WIDTHS = ((False, "wide"), (True, "narrow"))


def _drawn(draw: Callable[[bool], Figure], narrow: bool, name: str, css_class: str, label: str) -> Markup:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # the browser draws the text with its own fonts; matplotlib only measures it
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return _svg(draw(narrow), f"{name}-{css_class}", css_class, label)


def _svg(figure: Figure, prefix: str, css_class: str, label: str) -> Markup:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            plain = key.rpartition("}")[2]
            if plain == "id" or (plain == "href" and value.startswith("#")):
                value = value.replace("#", f"#{prefix}-") if plain == "href" else f"{prefix}-{value}"
            element.set(plain, value.replace("url(#", f"url(#{prefix}-"))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    _, _, width, height = root.get("viewBox", "").split()
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class": css_class}
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(re.sub("#0[1-6]0[1-6]0[1-6]", lambda found: f"var(--{_VARIABLES[found[0]]})", text))


def axes_in_pixels(
    narrow: bool, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """Axes with margins in pixels of the page (a picture is 360 or 720 wide)."""
    width = 360 if narrow else 720
    figure = Figure(figsize=(width / 72, height / 72))
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes(box)


def shortened(name: str, most: int = 24) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def language_rows(axes: Axes, names: Sequence[str], extent: Sequence[float], left: float, narrow: bool) -> None:
    """Axes with a row a language from the top down, wide enough for `extent`; names stand over those of the table."""
    axes.set_yticks(range(len(names)), names, ha="left")
    axes.tick_params(axis="y", pad=left)  # left edge of the names = left edge of the table below
    axes.set_ylim(len(names) - 0.5, -0.5)
    if extent:
        pad = 0.06 * (max(extent) - min(extent)) or 1
        axes.set_xlim(min(extent) - pad, max(extent) + pad)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", color=LINE, lw=0.8, zorder=0)
    axes.set_axisbelow(True)


def scores(result: Result) -> Callable[[bool], Figure]:
    """Dot plot of the primary metric per language with intervals, majority and standard training."""
    metric = metric_of(result.metric)
    scale = 100 if metric.percent else 1
    rows = result.ranked
    sources = sum(score.is_source for score in rows)

    def draw(narrow: bool) -> Figure:
        step = 34
        names = [inert(language_name(score.language)) + (" (source)" if score.is_source else "") for score in rows]
        names = [shortened(name) for name in names]
        left = 20 + 7 * max(map(len, names))
        figure, axes = axes_in_pixels(narrow, step * len(rows) + 84, left=left, right=16, top=34, bottom=50)
        extent = []
        for y, score in enumerate(rows):
            found = result.primary(score)
            if found.value is None:
                continue
            low, high = (found.value if end is None else end for end in (found.low, found.high))
            axes.plot(
                [scale * low, scale * high], [y, y], color=ACCENT, lw=2.5, alpha=0.45, solid_capstyle="round", zorder=2
            )
            axes.plot(scale * found.value, y, "o", ms=9, color=ACCENT, mec=PAPER, mew=1.2, zorder=4)
            extent += [low, high, found.value]
            if score.standard and score.standard.value is not None:
                axes.plot(scale * score.standard.value, y, "D", ms=7, mfc=PAPER, mec=SECOND, mew=1.6, zorder=3)
                extent.append(score.standard.value)
            if score.majority is not None:
                axes.plot([scale * score.majority] * 2, [y - 0.28, y + 0.28], color=MUTED, lw=2, zorder=1)
                extent.append(score.majority)
        handles = [axes.plot([], [], "o", ms=8, color=ACCENT, label="this run, 95 % interval")[0]]
        if any(score.standard for score in rows):
            handles += axes.plot([], [], "D", ms=6.5, mfc=PAPER, mec=SECOND, mew=1.6, ls="none", label="standard")
        if any(score.majority is not None for score in rows):
            handles += axes.plot([], [], "|", ms=11, mew=2, color=MUTED, ls="none", label="majority")
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, borderaxespad=0,
            handletextpad=0.1, columnspacing=1.2,
        )  # fmt: skip
        if 0 < sources < len(rows):
            axes.axhline(sources - 0.5, color=LINE, lw=1)
        language_rows(axes, names, [scale * value for value in extent], left, narrow)
        axes.set_xlabel(f"{metric.title}, %" if metric.percent else metric.title)
        return figure

    return draw


def heat_map(trace: Trace, last_step: int | None = None) -> Callable[[bool], Figure]:
    """tr(F), layer × step, on a log colour scale, with a mark where a layer was opened."""
    first, end = int(trace.steps[0]), max(last_step or 0, int(trace.steps[-1]) + 1)
    names, left = trace.names, trace.margin

    def draw(narrow: bool) -> Figure:
        count = len(names)
        row = max(9.0, min(26.0, 420 / count))
        bar = 62 if trace.measured else 30
        figure, axes = axes_in_pixels(narrow, row * count + 60 + bar, left=left, right=RIGHT, top=bar, bottom=50)
        if trace.measured:
            _cells(figure, axes, trace, end, narrow, bar)
        for y, layer in enumerate(trace.layers):
            opened = trace.opened.get(layer)
            if not trace.measured:
                axes.barh(y, end - first, left=first, height=0.86, color=LINE)
                if opened is not None:
                    axes.barh(y, end - opened, left=opened, height=0.86, color=ACCENT)
            elif opened is not None:
                _mark(axes, opened, y - 0.5, y + 0.5)
        every = max(1, round(count / 16))
        axes.set_yticks(range(0, count, every), names[::every])
        axes.set_ylim(-0.5, count - 0.5)
        axes.set_xlim(first, end)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True, steps=[1, 2, 5, 10]))
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("layer (0 = bottom)" if trace.numbered else "layer, bottom to top")
        return figure

    return draw


def _mark(axes: Axes, x: float, low: float, high: float) -> None:
    """A white bar in black: seen on every colour of the map, on light and on dark pages."""
    for colour, width in (("black", 3.6), ("white", 1.8)):
        axes.plot([x, x], [low, high], color=colour, lw=width, solid_capstyle="butt", zorder=5, clip_on=False)


def _edges(steps: np.ndarray, end: int) -> np.ndarray:
    """A cell lasts from its step to the next one, the last as long as the one before: later ones were not measured."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.append(steps, min(steps[-1] + width, max(end, steps[-1] + 1))).astype(float)


def _cells(figure: Figure, axes: Axes, trace: Trace, end: int, narrow: bool, bar: float) -> None:
    # a decision that needed no measurement is no gap in the measurements
    columns = ~np.isnan(trace.values).all(axis=0)
    values, edges = trace.values[:, columns], _edges(trace.steps[columns], end)
    values = np.ma.masked_where(~(np.nan_to_num(values) > 0), values)
    low, high = float(values.min()), float(values.max())
    norm = LogNorm(low if low < high else low / 10, high)
    axes.set_facecolor(LINE)
    rows = np.arange(len(trace.layers) + 1) - 0.5
    mesh = axes.pcolormesh(
        edges, rows, values, cmap="viridis", norm=norm, edgecolors="none", rasterized=values.size > _RASTER_ABOVE
    )
    mesh.set_gid("cells")
    width, height = figure.get_size_inches() * 72
    left = trace.margin
    inside = width - left - RIGHT
    place = figure.add_axes((left / width, 1 - 34 / height, inside * (0.62 if narrow else 0.42) / width, 10 / height))
    scale = figure.colorbar(mesh, cax=place, orientation="horizontal")
    scale.outline.set_visible(False)
    place.xaxis.set_major_locator(LogLocator(numticks=5))
    place.xaxis.set_minor_locator(NullLocator())
    place.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power(x)))
    figure.text(left / width, 1 - 16 / height, "tr(F) per example, log scale", color=MUTED, fontsize=12, va="bottom")
    if trace.opened:
        x = (left + inside) / width
        figure.text(x, 1 - 16 / height, "unfrozen", color=MUTED, fontsize=12, va="bottom", ha="right")
        mark = figure.add_axes((x - 76 / width, 1 - 19 / height, 12 / width, 16 / height))
        mark.axis("off")
        _mark(mark, 0, 0, 1)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(x: float) -> str:
    """A tick of a log axis: 10⁻³."""
    exponent = np.log10(x)
    return f"10{str(round(exponent)).translate(_SUPERSCRIPT)}" if abs(exponent - round(exponent)) < 1e-6 else f"{x:.2g}"


def curves(
    log: Sequence[dict], metric_name: str, steps: tuple[int, int] | None = None, left: float = MARGIN
) -> Callable[[bool], Figure] | None:
    """Training and dev loss, and under it the dev score, over steps; None where the log has neither."""
    metric = metric_of(metric_name)
    training = _series(log, "loss")
    dev_loss = _series(log, "eval_loss")
    dev_score = _series(log, f"eval_{metric_name}", 100 if metric.percent else 1)
    panels = [panel for panel in ([training, dev_loss], [dev_score]) if any(len(series[0]) for series in panel)]
    if not panels:
        return None
    end = steps or (0, max(int(series[0].max()) for panel in panels for series in panel if len(series[0])))

    def draw(narrow: bool) -> Figure:
        height, gap = 130, 34
        total = 26 + height * len(panels) + gap * (len(panels) - 1) + 46
        width = 360 if narrow else 720
        figure = Figure(figsize=(width / 72, total / 72))
        for number, panel in enumerate(panels):
            bottom = 46 + (len(panels) - 1 - number) * (height + gap)
            axes = figure.add_axes((left / width, bottom / total, 1 - (left + RIGHT) / width, height / total))
            title = "loss" if panel[0] is training else f"dev {metric.title}" + (", %" if metric.percent else "")
            for series, colour, name in zip(panel, (SECOND, ACCENT), ("training", "dev"), strict=False):
                if len(series[0]):
                    colour = ACCENT if panel[0] is dev_score else colour
                    marker: dict[str, Any] = {"marker": "o", "ms": 5} if name == "dev" or panel[0] is dev_score else {}
                    axes.plot(*series, color=colour, lw=2, label=name, clip_on=False, **marker)
            axes.text(0, 1.06, title, transform=axes.transAxes, color=MUTED, fontsize=12)
            if sum(len(series[0]) > 0 for series in panel) > 1:
                axes.legend(
                    loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2, borderaxespad=0, borderpad=0.2,
                    handlelength=1.4, columnspacing=1.2,
                )  # fmt: skip
            axes.set_xlim(*end)
            axes.margins(y=0.12)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True, steps=[1, 2, 5, 10]))
            axes.grid(axis="y", color=LINE, lw=0.8)
            axes.tick_params(axis="y", labelcolor=MUTED)
            axes.tick_params(axis="x", labelbottom=number == len(panels) - 1)
        axes.set_xlabel("optimizer step")
        return figure

    return draw


def _series(log: Sequence[dict], key: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], scale * row[key]) for row in log if math.isfinite(row.get(key, math.nan)) and "step" in row]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)
