"""A comparison as tables: for the terminal, and `study.md` for a paper or an issue."""

import statistics

from graftlm.evaluation.comparison import MEAN, Comparison, Difference, VariantResult
from graftlm.evaluation.result import Interval
from graftlm.evaluation.table import MISSING, ScoreTable, interval_text, language_name, markdown_text, metric_of, number

SELECTED = "*"  # behind a language that a choice was made on


def column_name(comparison: Comparison, language: str) -> str:
    """A language's name, with what a reader must know of it."""
    if language == MEAN:
        return "mean without labels"
    parts = ", source" if language == comparison.source else ""
    return language_name(language) + parts + (SELECTED if language in comparison.selected_on else "")


def rows_of(comparison: Comparison) -> list[str]:
    """The languages, source first, then the mean where there is one."""
    known = {one.language for variant in comparison.variants for one in variant.scores}
    return [*comparison.languages, *([MEAN] if MEAN in known else [])]


def p_text(p: float | None) -> str:
    """A p-value with as many digits as mean something.

    >>> p_text(0.0432), p_text(0.0002), p_text(None)
    ('0.043', '< 0.001', '–')
    """
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_clear(difference: Difference | None) -> bool:
    """Whether the corrected p is below 0.05."""
    return difference is not None and difference.p_holm is not None and difference.p_holm < 0.05


def scores_table(comparison: Comparison) -> ScoreTable:
    """Language × variant: mean over seeds with its interval."""
    metric = metric_of(comparison.metric)
    rows = []
    for tag in rows_of(comparison):
        cells = [comparison.score(variant, tag) for variant in comparison.variants]
        majority = next((one.majority for one in cells if one and one.majority is not None), None)
        texts = [interval_text(one.score, metric) if one else MISSING for one in cells]
        rows.append((column_name(comparison, tag), *texts, number(majority, metric)))
    columns = ("language", *(variant.name for variant in comparison.variants), "majority")
    if all(row[-1] == MISSING for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    unit = f"{metric.title}, percent" if metric.percent else metric.title
    return ScoreTable(columns, tuple(rows), 0, f"{unit}: mean over seeds, 95 % interval {_covers(comparison)}.")


def _covers(comparison: Comparison) -> str:
    """What an interval covers."""
    if any(len(variant.seeds) > 1 for variant in comparison.variants):
        return "over seeds and test items (crossed bootstrap)"
    return "over test items; with one seed it says nothing of other seeds"


def differences_table(comparison: Comparison) -> ScoreTable:
    """Each other variant against the first, the main language or mean first."""
    metric = metric_of(comparison.metric)
    tags = sorted(rows_of(comparison), key=lambda tag: tag != comparison.main)
    rows = []
    for tag in tags:
        for variant in comparison.variants[1:]:
            found = comparison.difference(variant.name, tag)
            if found is None:
                continue
            shown = Interval(value=found.value, low=found.low, high=found.high)
            rows.append(
                (
                    f"{variant.name}, {column_name(comparison, tag)}",
                    interval_text(shown, metric, signed=True),
                    p_text(found.p),
                    p_text(found.p_holm),
                    number(comparison.noise_floor.get(tag), metric),
                )
            )
    unit = "Points; " if metric.percent else ""
    caption = (
        f"{unit}positive is better than {comparison.variants[0].name}; paired over the same seeds and items."
        " Holm's correction is over all rows of the mean, and over all other rows. Noise: what two sets of seeds of"
        " one variant stay below in 95 % of cases."
    )
    return ScoreTable(("variant, language", "difference", "p", "p, Holm", "noise"), tuple(rows), 0, caption)


def cost_table(comparison: Comparison) -> ScoreTable:
    """What each variant gains, and at what cost."""
    metric = metric_of(comparison.metric)
    base = comparison.variants[0].cost
    rows = []
    for variant in comparison.variants:
        cost, score = variant.cost, comparison.score(variant, comparison.main)
        if cost is None:
            continue
        seconds = MISSING if cost.train_seconds is None else f"{cost.train_seconds:.1f}"
        ratio = ratio_text(cost.train_seconds, base.train_seconds if base else None)
        memory = MISSING if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 1e9:.2f}"
        rows.append(
            (
                variant.name,
                number(score.score.value if score else None, metric),
                number(score.spread if score else None, metric),
                str(len(variant.seeds)),
                seconds,
                ratio,
                memory,
                f"{cost.trainable_parameters:,}",
            )
        )
    name = column_name(comparison, comparison.main).removesuffix(SELECTED)
    columns = ("variant", name, "s.d.", "seeds", "seconds", "ratio", "GB", "trainable")
    caption = (
        "s.d.: over seeds. Seconds: mean wall clock of a run's training, and its ratio to the first variant; they are"
        " comparable where the runs had the machine in the same way. GB: peak memory."
    )
    return ScoreTable(columns, tuple(rows), 0, caption)


def ratio_text(value: float | None, base: float | None) -> str:
    """How many times as much, two decimals."""
    return MISSING if value is None or not base else f"{value / base:.2f}"


def tuning_table(comparison: Comparison) -> ScoreTable | None:
    """What tuning chose; None where nothing was tuned."""
    tuned = [(variant, one) for variant in comparison.variants for one in variant.tuned]
    if not tuned:
        return None
    keys = list(dict.fromkeys(key for _, one in tuned for key in one.values))
    folded = any(one.fold is not None for _, one in tuned)
    columns = ("variant", *(["fold"] if folded else []), *(key.rpartition(".")[2] for key in keys), "dev score")
    rows = [
        (
            variant.name,
            *([str(one.fold)] if folded else []),
            *(str(one.values.get(key, MISSING)) for key in keys),
            MISSING if one.dev is None else f"{one.dev:.3f}",
        )
        for variant, one in tuned
    ]
    return ScoreTable(columns, tuple(rows), 0, "Chosen by the dev score, in the source language; equal budgets.")


def notes(comparison: Comparison) -> list[str]:
    """What a reader must not miss: languages that choices were made on, noise, runs that are missing or failed."""
    metric = metric_of(comparison.metric)
    lines = []
    if comparison.selected_on:
        chosen = ", ".join(language_name(tag) for tag in comparison.selected_on)
        lines.append(f"{SELECTED} Choices (checkpoint, tuned settings) were made on labels in {chosen}.")
    floor = comparison.noise_floor.get(comparison.main)
    if floor is not None:
        unit = " points" if metric.percent else ""
        lines.append(
            f"Noise floor: two sets of {_seeds(comparison)} seeds of one variant differ by up to"
            f" {number(floor, metric)}{unit} ({column_name(comparison, comparison.main).removesuffix(SELECTED)})."
        )
    else:
        lines.append("Noise floor: unknown, there is one seed only; add --seeds 3 or more.")
    if missing := comparison.runs_planned - comparison.runs_finished:
        lines.append(
            f"Not complete: {comparison.runs_finished} of {comparison.runs_planned} runs are finished, {missing} are"
            " not; seeds of which a run is missing are left out."
        )
    lines += [f"Failed: {failure.run}: {failure.error.splitlines()[0]}" for failure in comparison.failures]
    return lines


def _seeds(comparison: Comparison) -> int:
    return min(len(variant.seeds) for variant in comparison.variants if len(variant.seeds) > 1)


def summary(comparison: Comparison) -> str:
    """What came out, in a few sentences."""
    metric = metric_of(comparison.metric)
    first = comparison.variants[0]
    where = "the mean over the languages without labels" if comparison.main == MEAN else language_name(comparison.main)
    base = comparison.score(first, comparison.main)
    unit = " %" if metric.percent else ""
    sentences = []
    if base is not None and base.score.value is not None:
        sentences.append(f"{first.name} reaches {number(base.score.value, metric)}{unit} {metric.title} in {where}.")
    for variant in comparison.variants[1:]:
        found = comparison.difference(variant.name, comparison.main)
        if found is None or found.value is None:
            continue
        points = " points" if metric.percent else ""
        side = "better" if found.value > 0 else "worse"
        verdict = f"{side} than it beyond chance" if is_clear(found) else "not told apart from it"
        sentences.append(
            f"{variant.name} is {verdict}: {number(found.value, metric, signed=True)}{points}"
            + (
                f" (95 % interval {number(found.low, metric, signed=True)} to {number(found.high, metric, signed=True)}"
                f", Holm-corrected p {p_text(found.p_holm)})."
                if found.low is not None
                else "."
            )
        )
    return " ".join(sentences)


def clear_languages(comparison: Comparison, variant: VariantResult) -> tuple[int, int]:
    """In how many languages the variant is better, and worse, than the first with a corrected p below 0.05."""
    found = [comparison.difference(variant.name, tag) for tag in comparison.languages]
    clear = [one.value for one in found if one is not None and one.value is not None and is_clear(one)]
    return sum(value > 0 for value in clear), sum(value < 0 for value in clear)


def mean_gain(comparison: Comparison, variant: VariantResult) -> float | None:
    """Mean difference over the languages without labels."""
    found = [comparison.difference(variant.name, tag) for tag in comparison.languages if tag != comparison.source]
    values = [one.value for one in found if one is not None and one.value is not None]
    return statistics.fmean(values) if values else None


def tables(comparison: Comparison) -> list[tuple[str, ScoreTable]]:
    """All tables with their titles, in the order of a reader's questions."""
    made = [("Scores", scores_table(comparison))]
    if len(comparison.variants) > 1 and comparison.differences:
        made.append((f"Against {comparison.variants[0].name}", differences_table(comparison)))
    made.append(("Gain and cost", cost_table(comparison)))
    tuning = tuning_table(comparison)
    return made + ([("Tuned", tuning)] if tuning else [])


def markdown(comparison: Comparison) -> str:
    """`study.md`."""
    parts = [f"# {markdown_text(comparison.name)}", markdown_text(summary(comparison))]
    parts += ["\n".join(f"- {markdown_text(line)}" for line in notes(comparison))]
    parts += [f"## {markdown_text(title)}\n\n{table}" for title, table in tables(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"
