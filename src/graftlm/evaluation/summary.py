"""What came out of a run, in sentences, and what it was made with, in a line."""

import statistics
from collections.abc import Mapping, Sequence

from graftlm.evaluation.result import Interval, Result, Score
from graftlm.evaluation.table import MISSING, language_name, metric_of, number

_METHODS = {
    "lora": "LoRA",
    "bottleneck": "bottleneck adapter",
    "flare": "FLARE",
    "neutral_residues": "neutral residues",
}


def setup(result: Result, values: Mapping[str, str]) -> str:
    """Model, adapter and schedule in a line; what is not known is left out."""
    parts = [result.model or values.get("model", "")]
    if (method := values.get("adapter.method")) == "none":
        parts.append("full fine-tuning")
    elif method:
        title = _METHODS.get(method, method)
        if (encoder := values.get("adapter.source_encoder", "null")) != "null":
            title += f" MT with {encoder}"
        title += " over language adapters" if result.language_adapters else ""
        parts.append(f"{title}, r = {values['adapter.r']}" if "adapter.r" in values else title)
    if schedule := values.get("unfreezing.schedule"):
        every = values.get("unfreezing.every_n_steps", "auto")
        parts.append(f"{schedule} unfreezing" + (f" every {every} steps" if every.isdigit() else ""))
    return " · ".join(part for part in [*parts, f"seed {result.seed}"] if part)


def with_unit(value: float | None, result: Result, *, signed: bool = False) -> str:
    metric = metric_of(result.metric)
    text = number(value, metric, signed=signed)
    if text == MISSING or not metric.percent:
        return text
    return f"{text} points" if signed else f"{text} %"


def summary(result: Result) -> list[str]:
    """What came out, in sentences: what was learned, what became of other languages, what has gone wrong."""
    of_raw_text = any(score.base is not None for score in result.scores)
    return [*(_language_model(result) if of_raw_text else _labelled(result)), *_closed_gates(result)]


def _labelled(result: Result) -> list[str]:
    """The source language, best and worst elsewhere, gain over standard training."""
    metric = metric_of(result.metric)
    task = result.task.replace("_", " ")
    source = next((score for score in result.scores if score.is_source), None)
    taught = f"{result.model or 'The model'} learned {task} from labels in {language_name(result.source)}"
    if source is not None and result.primary(source).value is not None:
        taught += f" and reaches {with_unit(result.primary(source).value, result)} {metric.title} there"
    sentences = [taught + "."]
    known = [score for score in result.ranked if not score.is_source and result.primary(score).value is not None]
    if known:
        named = [f"{language_name(s.language)} ({with_unit(result.primary(s).value, result)})" for s in known]
        if len(known) == 1:
            sentences.append(f"Without a label in it, it reads {named[0]}.")
        else:
            mean = statistics.fmean(value for s in known if (value := result.primary(s).value) is not None)
            sentences.append(
                f"In {count(len(known))} languages without labels it averages {with_unit(mean, result)}:"
                f" best in {named[0]}, worst in {named[-1]}."
            )
    if weak := [score for score in result.ranked if _like_majority(score, result)]:
        languages = _list([language_name(score.language) for score in weak])
        where = "no language is it" if 1 < len(weak) == len(result.scores) else f"{languages} it is not"
        sentences.append(f"In {where} clearly better than always giving the most frequent label.")
    gains = [score.gain for score in known if score.gain and score.gain.value is not None]
    if gains:
        mean = statistics.fmean(gain.value for gain in gains if gain.value is not None)
        where = "the languages without labels" if len(known) > 1 else language_name(known[0].language)
        sentence = f"Against standard training the gain in {where} is {with_unit(mean, result, signed=True)}"
        sentence += " on average" if len(gains) > 1 else ""
        sentences.append(f"{sentence}; {_clear(gains)}.")
    return sentences


def _language_model(result: Result) -> list[str]:
    """What a language model learned from raw text, and what it forgot."""
    metric, source = metric_of(result.metric), language_name(result.source)
    sentences = [f"{result.model or 'The model'} was trained on raw text in {source}."]
    old = set(result.forgetting or ())
    for score in result.ordered:
        value, base, change = result.primary(score), score.base, score.change
        if value.value is None or base is None or base.value is None or change is None or change.value is None:
            continue
        moved = with_unit(abs(change.value), result)
        what = f"{moved} fewer" if change.value >= 0 else f"{moved} more"
        sentences.append(
            f"In {language_name(score.language)}{', which it knew before,' if score.language in old else ''} it needs"
            f" {with_unit(value.value, result)} {metric.title}, {what} than before; {_clear([change])}."
        )
    return sentences


def _closed_gates(result: Result) -> list[str]:
    if not (closed := result.closed_gates):
        return []
    layers = f"{count(len(closed))} layer{'s' if len(closed) > 1 else ''}"
    names = ", ".join(closed[:6]) + (", …" if len(closed) > 6 else "")
    return [f"No token of the new language's test text opens the gates of {layers}, which do nothing there: {names}."]


def _like_majority(score: Score, result: Result) -> bool:
    low = result.primary(score).low
    return score.majority is not None and low is not None and low <= score.majority


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _clear(gains: Sequence[Interval]) -> str:
    """In how many languages the paired interval leaves zero out, and on which side."""
    bounded = [gain for gain in gains if gain.low is not None and gain.high is not None]
    above, below = sum((gain.low or 0) > 0 for gain in bounded), sum((gain.high or 0) < 0 for gain in bounded)
    if len(gains) == 1:
        return "its 95 % interval " + ("lies above zero" if above else "lies below zero" if below else "includes zero")
    if not above and not below:
        every = "both" if len(gains) == 2 else f"all {count(len(gains))}"
        return f"its 95 % interval includes zero in {every}"
    sides = [f"above zero in {above}"] * bool(above) + [f"below zero in {below}"] * bool(below)
    return f"its 95 % interval lies {' and '.join(sides)} of {len(gains)} languages"


def leaves_zero_out(gain: Interval) -> bool:
    return gain.low is not None and gain.high is not None and (gain.low > 0 or gain.high < 0)


def count(n: int) -> str:
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return words[n] if n < len(words) else str(n)
