"""`report.html`: one file, no network, that answers a person's questions about a run in the order they come up."""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from graftlm.evaluation import pictures
from graftlm.evaluation.dropout_section import dropout_section
from graftlm.evaluation.folder import read_lines, read_settings
from graftlm.evaluation.gates_section import gates_section
from graftlm.evaluation.record import write_text
from graftlm.evaluation.result import Interval, Result
from graftlm.evaluation.summary import count, leaves_zero_out, setup, summary, with_unit
from graftlm.evaluation.table import MISSING, inert, language_name, metric_of, number, visible

FILE = "report.html"

_KINDS = {
    "sampled": "labels drawn from the model's own predictions, squared gradient per example",
    "mode": "the model's most probable label, squared gradient per example",
    "empirical": "gold labels, squared gradient per example",
    "exact": "expectation over all labels, squared gradient per example",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Reads only what lies there: ``result.json``, and where they exist ``unfreezing.jsonl``, ``log.jsonl`` and
    ``recipe.resolved.yaml``. All text from them is escaped; the page carries a content security policy that lets it
    load nothing.

    Raises:
        DataError: no result, a result of another schema version, or a line that is not JSON.
    """
    folder = Path(folder)
    path = folder / FILE
    write_text(path, environment().get_template("report.html.jinja").render(_page(folder)))
    return path


@functools.cache  # and with it the compiled templates
def environment() -> jinja2.Environment:
    """Templates in which all text is escaped and control characters are shown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftlm", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    return environment


def _page(folder: Path) -> dict[str, Any]:
    result = Result.read(folder)
    settings = list(read_settings(folder))
    values = {setting["key"]: setting["value"] for setting in settings}
    trace = pictures.Trace.of(read_lines(folder / "unfreezing.jsonl"))
    if trace and not trace.worth_showing:
        trace = None
    log = read_lines(folder / "log.jsonl")
    steps = result.cost.steps or None
    start = int(trace.steps[0]) if trace else 0
    drawn = pictures.both_widths
    left = trace.margin if trace else pictures.MARGIN
    curve = pictures.curves(log, result.metric, (start, steps) if steps else None, left)
    return {
        "result": result,
        "metric": metric_of(result.metric),
        "setup": setup(result, values),
        "summary": " ".join(summary(result)),
        "tiles": _tiles(result),
        "scores": _scores(result),
        "scores_picture": drawn(pictures.scores(result), "scores", _scores_label(result)) if result.scores else None,
        "has": {
            name: any(getattr(score, name) is not None for score in result.scores)
            for name in ("majority", "standard", "gain", "base")
        },
        "forgetting": [
            (language_name(key), *_parts(value, result, signed=True))
            for key, value in (result.forgetting or {}).items()
        ],
        "trace": trace,
        "trace_picture": drawn(pictures.heat_map(trace, steps), "trace", _trace_label(trace)) if trace else None,
        "selected_on": [language_name(tag) for tag in result.selected_on],
        "is_lora": values.get("adapter.method") == "lora",
        "trace_kind": ", ".join(_kind(kind) for kind in trace.kinds) if trace else "",
        **dropout_section(folder),
        **gates_section(folder),
        "curves_picture": drawn(curve, "curves", _curves_label(log, result)) if curve else None,
        "cost": _cost(result),
        "chosen": [setting for setting in settings if setting["origin"] != "default"],
        "defaults": [setting for setting in settings if setting["origin"] == "default"],
    }


def _kind(kind: str) -> str:
    return f"{kind} ({_KINDS[kind]})" if kind in _KINDS else kind


def _tiles(result: Result) -> list[tuple[str, str, str]]:
    """(figure, unit, what it is), the few numbers that a reader takes along."""
    metric = metric_of(result.metric)
    unit = "%" if metric.percent else ""
    tiles = []
    for score in result.scores:
        if score.is_source:
            tiles.append(
                (number(result.primary(score).value, metric), unit, f"{language_name(score.language)}, the source")
            )
    known = [score for score in result.zero_shot if result.primary(score).value is not None]
    if known:
        mean = statistics.fmean(value for s in known if (value := result.primary(s).value) is not None)
        without = "beside it" if any(score.base for score in known) else "without labels"
        name = (
            f"mean of {count(len(known))} languages {without}" if len(known) > 1 else language_name(known[0].language)
        )
        tiles.append((number(mean, metric), unit, name))
    gains = [score.gain.value for score in known if score.gain and score.gain.value is not None]
    if gains:
        tiles.append(
            (
                number(statistics.fmean(gains), metric, signed=True),
                "points" if metric.percent else "",
                "there, over standard training",
            )
        )
    tiles.append((*_seconds(result.cost.train_seconds), f"of training on {result.cost.device}"))
    return tiles


def _seconds(seconds: float | None) -> tuple[str, str]:
    if seconds is None:
        return MISSING, ""
    if seconds < 120:
        return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}", "s"
    if seconds < 7200:
        return f"{seconds / 60:.1f}", "min"
    return f"{seconds / 3600:.1f}", "h"


def _parts(interval: Interval | None, result: Result, *, signed: bool = False) -> tuple[str, str]:
    """Value and interval as the two cells of a table."""
    metric = metric_of(result.metric)
    if interval is None or interval.value is None:
        return MISSING, ""
    value = number(interval.value, metric, signed=signed)
    if interval.low is None or interval.high is None:
        return value, ""
    return value, f"{number(interval.low, metric, signed=signed)} to {number(interval.high, metric, signed=signed)}"


def _scores(result: Result) -> list[dict[str, Any]]:
    metric = metric_of(result.metric)
    others = [
        name
        for name in dict.fromkeys(name for score in result.scores for name in score.metrics)
        if name != result.metric
    ]
    several_splits = len({score.split for score in result.scores}) > 1
    return [
        {
            "name": language_name(score.language),
            "tag": score.language + (f", {score.split}" if several_splits else ""),
            "is_source": score.is_source,
            "n": f"{score.n:,}".replace(",", "\u202f"),
            "value": _parts(result.primary(score), result),
            "others": [
                (
                    metric_of(name).title,
                    number(score.metrics[name].value if name in score.metrics else None, metric_of(name)),
                )
                for name in others
            ],
            "majority": number(score.majority, metric),
            "standard": _parts(score.standard, result)[0],
            "gain": _parts(score.gain, result, signed=True),
            "certain": score.gain is not None and leaves_zero_out(score.gain),
            "base": _parts(score.base, result)[0],
            "change": _parts(score.change, result, signed=True),
        }
        for score in result.ranked
    ]


def _cost(result: Result) -> list[tuple[str, str, str]]:
    """(what, figure, remark)."""
    cost = result.cost
    rows = [("training", " ".join(_seconds(cost.train_seconds)), f"{cost.steps:,} optimizer steps")]
    if cost.trace_seconds:
        share = f"{100 * cost.trace_seconds / cost.train_seconds:.1f} % of training" if cost.train_seconds else ""
        rows.append(("of it for Fisher traces", " ".join(_seconds(cost.trace_seconds)), share))
    if cost.source_cache_seconds is not None:
        size = f"{(cost.source_cache_bytes or 0) / 1e6:.1f} MB on disk"
        rows.append(("source cache, before training", " ".join(_seconds(cost.source_cache_seconds)), size))
    if cost.evaluation_seconds is not None:
        rows.append(("evaluation", " ".join(_seconds(cost.evaluation_seconds)), ""))
    trainable = (
        f"{100 * cost.trainable_parameters / cost.total_parameters:.2f} % of {cost.total_parameters:,}"
        if cost.total_parameters
        else ""
    )
    rows.append(("trainable parameters", f"{cost.trainable_parameters:,}", trainable))
    if cost.peak_memory_bytes is not None:
        rows.append(("peak memory", f"{cost.peak_memory_bytes / 1e9:.2f} GB", ""))
    rows.append(("device", cost.device, ""))
    return rows


def _scores_label(result: Result) -> str:
    shown = ", ".join(
        f"{language_name(s.language)} {with_unit(result.primary(s).value, result)}" for s in result.ranked
    )
    return inert(
        f"Dot plot of {metric_of(result.metric).title} per language: {shown}. The table below has all numbers."
    )


def _trace_label(trace: pictures.Trace) -> str:
    order = sorted(trace.opened, key=lambda layer: (trace.opened[layer], -trace.layers.index(layer)))
    opened = ", ".join(f"{layer} at step {trace.opened[layer]}" for layer in order)
    what = "Heat map of the Fisher trace" if trace.measured else "Chart of frozen and unfrozen layers"
    steps = f"{trace.steps[0]} to {trace.steps[-1]}"
    return inert(f"{what}, {len(trace.layers)} layers by steps {steps}. Unfrozen: {opened or 'none'}.")


def _curves_label(log: Sequence[dict], result: Result) -> str:
    parts = []
    for key, name in (
        ("loss", "training loss"),
        ("eval_loss", "dev loss"),
        (f"eval_{result.metric}", f"dev {metric_of(result.metric).title}"),
    ):
        found = [row[key] for row in log if row.get(key) is not None]
        if found:
            parts.append(f"{name} from {found[0]:.3g} to {found[-1]:.3g}")
    return inert(f"Curves over optimizer steps: {', '.join(parts)}.")
