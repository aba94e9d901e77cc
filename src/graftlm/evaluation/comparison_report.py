"""`study.html`: one file, no network, that answers a person's questions about a study in the order they come up."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from graftlm.evaluation import comparison_pictures as pictures
from graftlm.evaluation.comparison import Comparison, VariantResult, values_text
from graftlm.evaluation.comparison_table import (
    column_name,
    cost_table,
    differences_table,
    is_clear,
    notes,
    p_text,
    ratio_text,
    rows_of,
    scores_table,
    summary,
    tuning_table,
)
from graftlm.evaluation.folder import read_lines
from graftlm.evaluation.pictures import Trace, both_widths, heat_map, one_width
from graftlm.evaluation.record import write_text
from graftlm.evaluation.report import environment
from graftlm.evaluation.summary import count
from graftlm.evaluation.table import MISSING, inert, metric_of, number

FILE = "study.html"


def write_comparison_report(folder: str | Path) -> Path:
    """Writes ``study.html`` into a study's folder and returns its path.

    Reads ``study.json`` and, of the runs that it names, ``log.jsonl`` and ``unfreezing.jsonl``. All text is escaped;
    the page carries a content security policy that lets it load nothing.

    Raises:
        DataError: no comparison, or one of another schema version.
    """
    folder = Path(folder)
    path = folder / FILE
    write_text(path, environment().get_template("comparison.html.jinja").render(_page(folder)))
    return path


def _page(folder: Path) -> dict[str, Any]:
    comparison = Comparison.read(folder)
    metric = metric_of(comparison.metric)
    others = comparison.variants[1:]
    cost = pictures.cost(comparison)
    curves = _curves(comparison, folder)
    return {
        "comparison": comparison,
        "metric": metric,
        "setup": _setup(comparison),
        "summary": summary(comparison),
        "tiles": _tiles(comparison),
        "notes": notes(comparison),
        "first": comparison.variants[0].name,
        "differences_picture": both_widths(
            pictures.differences(comparison), "differences", _differences_label(comparison)
        )
        if comparison.differences
        else None,
        "differences": differences_table(comparison) if others else None,
        "clear": [
            is_clear(comparison.difference(variant.name, tag))
            for tag in sorted(rows_of(comparison), key=lambda tag: tag != comparison.main)
            for variant in others
            if comparison.difference(variant.name, tag) is not None
        ],
        "scores": scores_table(comparison),
        "cost_picture": both_widths(cost, "cost", _cost_label(comparison)) if cost else None,
        "cost": cost_table(comparison),
        "curves_picture": both_widths(
            pictures.curves(curves, comparison.metric), "curves", _curves_label(comparison, curves)
        )
        if curves
        else None,
        "traces": _traces(comparison, folder),
        "variants": [
            (variant.name, values_text(variant.values) or "the recipe as it is") for variant in comparison.variants
        ],
        "tuning": tuning_table(comparison),
        "failures": comparison.failures,
    }


def _setup(comparison: Comparison) -> str:
    seeds = max((len(variant.seeds) for variant in comparison.variants), default=0)
    parts = [
        comparison.model or "",
        f"{len(comparison.variants)} variants",
        f"{seeds} seed" + ("s" if seeds != 1 else ""),
        f"{comparison.folds} folds" if comparison.folds > 1 else "",
        f"{comparison.runs_finished} of {comparison.runs_planned} runs",
    ]
    return " · ".join(part for part in parts if part)


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(figure, unit, what it is): the first variant, what each other one adds, and what is noise."""
    metric = metric_of(comparison.metric)
    unit, points = ("%", "points") if metric.percent else ("", "")
    first = comparison.variants[0]
    score = comparison.score(first, comparison.main)
    where = column_name(comparison, comparison.main)
    tiles = [(number(score.score.value if score else None, metric), unit, f"{first.name}, {where}")]
    for variant in comparison.variants[1:][:3]:
        found = comparison.difference(variant.name, comparison.main)
        if found is not None:
            what = f"{variant.name}, Holm-corrected p {p_text(found.p_holm)}"
            tiles.append((number(found.value, metric, signed=True), points, what))
    floor = comparison.noise_floor.get(comparison.main)
    tiles.append(
        (MISSING if floor is None else f"±{number(floor, metric)}", points, "noise floor between sets of seeds")
    )
    return tiles


def _curves(comparison: Comparison, folder: Path) -> list[tuple[int, pictures.Curve]]:
    found = []
    for place, variant in enumerate(comparison.variants):
        logs = [read_lines(folder / run / "log.jsonl") for run in variant.runs]
        curve = pictures.Curve.of(variant.name, logs, f"eval_{comparison.metric}")
        if curve is not None:
            found.append((place, curve))
    return found


def _traces(comparison: Comparison, folder: Path) -> list[tuple[str, Markup]]:
    """(variant, heat map of its first run that has one), where there is more to see than that all layers trained."""
    made = []
    for place, variant in enumerate(comparison.variants):
        for run in variant.runs:
            trace = Trace.of(read_lines(folder / run / "unfreezing.jsonl"))
            if trace is not None and trace.worth_showing:
                label = inert(f"When each layer trained under {variant.name}, first run.")
                steps = _last_step(variant)
                made.append((variant.name, one_width(heat_map(trace, steps), f"trace{place}", label)))
            break
    return made


def _last_step(variant: VariantResult) -> int | None:
    return round(variant.cost.steps) if variant.cost and variant.cost.steps else None


def _differences_label(comparison: Comparison) -> str:
    metric = metric_of(comparison.metric)
    parts = [
        f"{one.variant} in {column_name(comparison, one.language)} {number(one.value, metric, signed=True)}"
        for one in comparison.differences
    ]
    return inert(
        f"Differences from {comparison.variants[0].name}: {', '.join(parts)}. The table below has the intervals."
    )


def _cost_label(comparison: Comparison) -> str:
    metric = metric_of(comparison.metric)
    base = comparison.variants[0].cost
    parts = []
    for variant in comparison.variants:
        score = comparison.score(variant, comparison.main)
        if score is not None and variant.cost is not None:
            ratio = ratio_text(variant.cost.train_seconds, base.train_seconds if base else None)
            parts.append(f"{variant.name} {number(score.score.value, metric)} in {ratio} of the time")
    return inert(f"Score against seconds of training: {', '.join(parts)}.")


def _curves_label(comparison: Comparison, curves: list[tuple[int, pictures.Curve]]) -> str:
    metric = metric_of(comparison.metric)
    parts = [
        f"{curve.name} from {number(curve.mean[0], metric)} to {number(curve.mean[-1], metric)}" for _, curve in curves
    ]
    return inert(f"Dev score over {count(len(curves[0][1].steps))} evaluations: {', '.join(parts)}.")
