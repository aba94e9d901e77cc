"""The study page's pictures: differences per language, score against cost, and how training went."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graftlm.evaluation.comparison import Comparison
from graftlm.evaluation.comparison_table import column_name, rows_of
from graftlm.evaluation.pictures import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAPER,
    SECOND,
    axes_in_pixels,
    language_rows,
    shortened,
)
from graftlm.evaluation.table import inert, metric_of

# told apart by shape as well as by colour; more variants than styles share one
_STYLES = (("o", ACCENT), ("D", SECOND), ("s", INK), ("^", MUTED), ("v", ACCENT), ("P", SECOND), ("X", INK))
_NAME = 22  # letters of a variant's name in a picture


def _style(number: int) -> tuple[str, str]:
    return _STYLES[number % len(_STYLES)]


def _short(name: str) -> str:
    return shortened(inert(name), _NAME)


def _legend(figure: Figure, handles: Sequence, narrow: bool) -> None:
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=3 if narrow else 4, borderpad=0,
        borderaxespad=0, handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip


def _legend_height(count: int, narrow: bool) -> int:
    return 12 + 22 * -(-count // (3 if narrow else 4))


def differences(comparison: Comparison) -> Callable[[bool], Figure]:
    """Each variant minus the first, per language, with its interval; a band as wide as the noise floor."""
    metric = metric_of(comparison.metric)
    scale = 100 if metric.percent else 1
    tags = sorted(rows_of(comparison), key=lambda tag: tag != comparison.main)
    others = comparison.variants[1:]

    def draw(narrow: bool) -> Figure:
        step = max(34, 18 * len(others) + 12)
        names = [inert(column_name(comparison, tag)) for tag in tags]
        names = [shortened(name) for name in names]
        left = 24 + 7 * max(map(len, names))
        top = _legend_height(len(others) + 1, narrow)
        figure, axes = axes_in_pixels(narrow, step * len(tags) + top + 50, left=left, right=16, top=top, bottom=50)
        extent = [0.0]
        for y, tag in enumerate(tags):
            floor = comparison.noise_floor.get(tag)
            if floor:
                axes.barh(y, 2 * scale * floor, left=-scale * floor, height=0.86, color=LINE, alpha=0.75, zorder=0)
                extent += [floor, -floor]
            for number, variant in enumerate(others):
                found = comparison.difference(variant.name, tag)
                if found is None or found.value is None:
                    continue
                marker, colour = _style(number)
                place = y + (number - (len(others) - 1) / 2) * 18 / step
                low, high = (found.value if end is None else end for end in (found.low, found.high))
                axes.plot(
                    [scale * low, scale * high], [place] * 2, color=colour, lw=2.4, alpha=0.5, solid_capstyle="round"
                )
                axes.plot(scale * found.value, place, marker, ms=8, color=colour, mec=PAPER, mew=1.2, zorder=4)
                extent += [low, high, found.value]
        axes.axvline(0, color=MUTED, lw=1.2, zorder=1)
        if comparison.main == tags[0] and len(tags) > 1:
            axes.axhline(0.5, color=LINE, lw=1)
        handles = [
            axes.plot([], [], _style(number)[0], ms=7, color=_style(number)[1], label=_short(variant.name))[0]
            for number, variant in enumerate(others)
        ]
        if any(comparison.noise_floor.get(tag) for tag in tags):
            handles.append(axes.plot([], [], "s", ms=10, color=LINE, label="noise floor")[0])
        _legend(figure, handles, narrow)
        language_rows(axes, names, [scale * value for value in extent], left, narrow)
        unit = "points" if metric.percent else metric.title
        axes.set_xlabel(f"{unit} better than {_short(comparison.variants[0].name)}")
        return figure

    return draw


def cost(comparison: Comparison) -> Callable[[bool], Figure] | None:
    """Main score against seconds of training; None where no variant has both."""
    metric = metric_of(comparison.metric)
    scale = 100 if metric.percent else 1
    points = []
    for number, variant in enumerate(comparison.variants):
        score = comparison.score(variant, comparison.main)
        seconds = variant.cost.train_seconds if variant.cost else None
        value = score.score.value if score else None
        if score is not None and value is not None and seconds is not None:
            ends = [scale * (value if end is None else end) for end in (score.score.low, score.score.high)]
            seeds = [scale * one for one in score.by_seed if one is not None]
            points.append((number, variant.name, seconds, scale * value, ends, seeds))
    if not points:
        return None

    def draw(narrow: bool) -> Figure:
        top = _legend_height(len(points), narrow)
        figure, axes = axes_in_pixels(narrow, 250 + top, left=64, right=16, top=top, bottom=50)
        for number, name, seconds, value, ends, seeds in points:
            marker, colour = _style(number - 1) if number else ("o", MUTED)
            axes.plot([seconds] * 2, ends, color=colour, lw=2.4, alpha=0.4, zorder=2)
            axes.plot([seconds] * len(seeds), seeds, "_", ms=9, mew=1.4, color=colour, alpha=0.8, zorder=3)
            axes.plot(
                seconds, value, marker, ms=9, color=colour, mec=PAPER, mew=1.2, zorder=4,
                label=_short(name), ls="none",
            )  # fmt: skip
        _legend(figure, axes.get_legend_handles_labels()[0], narrow)
        longest = max(seconds for _, _, seconds, *_ in points)
        axes.set_xlim(0, 1.12 * longest)  # from 0: a saving looks as large as it is
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=LINE, lw=0.8)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_axisbelow(True)
        axes.set_xlabel("seconds of training a run")
        title = metric.title + (", %" if metric.percent else "")
        axes.set_ylabel(title)
        return figure

    return draw


@dataclass(frozen=True)
class Curve:
    """One variant's dev score over steps: mean over its runs, and the range of the middle 80 % of them."""

    name: str
    steps: np.ndarray  # (steps,)
    mean: np.ndarray  # (steps,)
    low: np.ndarray  # (steps,)
    high: np.ndarray  # (steps,)

    @classmethod
    def of(cls, name: str, logs: Sequence[Sequence[dict]], key: str) -> "Curve | None":
        """From the runs' logs; only steps at which every run was scored. None where there are none."""
        series = [{row["step"]: row[key] for row in log if row.get(key) is not None} for log in logs]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        if len(steps) < 2:
            return None
        values = np.array([[one[step] for step in steps] for one in series], dtype=float)
        low, high = np.quantile(values, [0.1, 0.9], axis=0)
        return cls(name, np.array(steps), values.mean(axis=0), low, high)


def curves(found: Sequence[tuple[int, Curve]], metric_name: str) -> Callable[[bool], Figure]:
    """Dev score over steps, one line a variant; `found` has the variants' numbers."""
    metric = metric_of(metric_name)
    scale = 100 if metric.percent else 1

    def draw(narrow: bool) -> Figure:
        top = _legend_height(len(found), narrow)
        figure, axes = axes_in_pixels(narrow, 230 + top, left=64, right=16, top=top, bottom=50)
        for number, curve in found:
            marker, colour = _style(number - 1) if number else ("o", MUTED)
            axes.fill_between(curve.steps, scale * curve.low, scale * curve.high, color=colour, alpha=0.13, lw=0)
            axes.plot(
                curve.steps, scale * curve.mean, color=colour, lw=2, marker=marker, ms=5, label=_short(curve.name)
            )
        _legend(figure, axes.get_legend_handles_labels()[0], narrow)
        axes.margins(x=0.02, y=0.06)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=LINE, lw=0.8)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("dev " + metric.title + (", %" if metric.percent else ""))
        return figure

    return draw
