"""The tables of the FLARE study's README, from rows."""

import statistics
from dataclasses import replace

import numpy as np
from plan import PRIMARY, SETS, STUDY, Job, Scale, jobs, tag_of
from rows import Rows

from graftlm.measure.statistics import holm, paired_bootstrap

MEAN = "mean of two models' logits"
RESAMPLES = 10_000


def outcomes(rows: Rows, which: str, scale: Scale = STUDY) -> dict[str, np.ndarray]:
    """Arm → (seeds, sentences) of right or wrong, the mean over languages."""
    size = scale.of(which)
    logs: dict[str, dict] = {}
    gold: dict[int, str] = {}
    for name, parts in SETS[which].items():
        for tag in size.languages:
            for seed in range(size.seeds):
                found = logs.setdefault(name, {}).setdefault((tag, seed), {})
                for fold in size.folds:
                    row = rows[Job(name, parts, tag_of(parts, tag), fold, seed)]
                    gold |= dict(zip(row["ids"], row["gold"], strict=True))
                    for item, scores in zip(row["ids"], row["scores"], strict=True):
                        found[item] = dict(zip(row["labels"], np.log(np.maximum(scores, 1e-9)), strict=True))
    two = ("LoRA on target rows", "translate-test, trained as long")
    if set(two) <= logs.keys():  # a mean of logits and a mean of log probabilities have the same best label
        logs[MEAN] = {
            key: {i: {label: p + logs[two[1]][key][i][label] for label, p in one.items()} for i, one in found.items()}
            for key, found in logs[two[0]].items()
        }
    ids = sorted(gold)
    tables = {}
    for name, found in logs.items():
        right = [
            [np.mean([max(one := found[tag, seed][i], key=one.get) == gold[i] for tag in size.languages]) for i in ids]
            for seed in range(size.seeds)
        ]
        tables[name] = np.array(right, dtype=float)
    return tables


def summary(rows: Rows, which: str, scale: Scale = STUDY) -> str:
    """FLARE minus each other arm, the best of them first."""
    tables = outcomes(rows, which, scale)
    flare = tables.pop("FLARE")
    seeds, sentences = flare.shape
    lines = [
        f"seeds: {seeds}, sentences: {sentences}, languages: {', '.join(scale.of(which).languages)}",
        f"FLARE: {100 * flare.mean():.2f}",
        "",
        "| FLARE minus | accuracy there | difference | 95 % interval | p | p, Holm |",
        "|---" * 6 + "|",
    ]
    ordered = sorted(tables, key=lambda name: -tables[name].mean())
    found = [paired_bootstrap(flare, tables[name], resamples=RESAMPLES) for name in ordered]
    for name, one, p in zip(ordered, found, holm(np.array([one.p for one in found])), strict=True):
        interval = f"{100 * one.low:+.2f} to {100 * one.high:+.2f}"
        difference = f"{100 * tables[name].mean():.2f} | {100 * one.value:+.2f}"
        lines.append(f"| {name} | {difference} | {interval} | {one.p:.4f} | {p:.4f} |")
    return "\n".join(lines)


def by_language(rows: Rows, which: str, scale: Scale = STUDY) -> str:
    """Accuracy of each arm in each language, mean and standard deviation over seeds."""
    tags = scale.of(which).languages
    found = {tag: outcomes(rows, which, replace(scale, languages=(tag,))) for tag in tags}
    lines = ["| accuracy | " + " | ".join(tags) + " |", "|---" * (1 + len(tags)) + "|"]
    for name in found[tags[0]]:
        seeds = [100 * found[tag][name].mean(1) for tag in tags]
        spread = [one.std(ddof=1) if len(one) > 1 else float("nan") for one in seeds]
        cells = [f"{one.mean():.1f} ± {sd:.1f}" for one, sd in zip(seeds, spread, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates(rows: Rows, which: str, scale: Scale = STUDY) -> str:
    """What was chosen in each language."""
    chosen = {f"{job.arm}, {job.tag}": rows.chosen(job.parts, job.tag) for job in jobs(which, scale) if job.rate}
    return "Learning rates: " + "; ".join(f"{name} {rate:g}" for name, rate in chosen.items())


def costs(rows: Rows, which: str, scale: Scale = STUDY) -> str:
    """Processor seconds of a run, and hours; runs that are shared with the primary set are counted there."""
    own = [job for job in jobs(which, scale) if which == "primary" or job.parts not in (None, *PRIMARY.values())]
    lines = ["| arm | runs | processor seconds a run | hours |", "|---" * 4 + "|"]
    total = 0.0
    for name in dict.fromkeys(job.arm for job in own):
        found = [rows[job]["seconds"] for job in own if job.arm == name]
        if known := [seconds for seconds in found if seconds is not None]:
            median = statistics.median(known)
            total += len(found) * median / 3600
            lines.append(f"| {name} | {len(found)} | {median:.0f} | {len(found) * median / 3600:.2f} |")
    return "\n".join([*lines, f"| all | {len(own)} | | {total:.2f} |"])
