"""The tables of the study of guided dropout, from its rows."""

from collections.abc import Iterator

import numpy as np
from plan import EXPLORATORY, PRIMARY, SECONDARY, TOGETHER, Amount

from graftlm.measure.statistics import crossed, estimate, holm, resample_items, seed_weights


def outcomes(rows: list[dict], task: str, arm: str) -> dict[int, np.ndarray]:
    """seed → right or wrong of every test item."""
    kept = [r for r in rows if (r["task"], r["arm"]) == (task, arm)]
    return {r["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: r["n"]] for r in kept}


def compare(rows: list[dict], first: str, second: str, tasks: list[str], resamples: int = 10_000):
    """Mean difference over tasks, with a crossed bootstrap over the seeds and the items of each task."""
    values, draws, most = [], [], 0
    for number, task in enumerate(tasks):
        a, b = (outcomes(rows, task, arm) for arm in (first, second))
        seeds = sorted(a.keys() & b.keys())
        if len(seeds) < 2:
            return None
        most = max(most, len(seeds))
        difference = np.array([a[seed].astype(float) - b[seed] for seed in seeds])
        statistics = [lambda w, row=row: w @ row / len(row) for row in difference]
        weights = seed_weights(len(seeds), resamples, number)
        draws.append(crossed(resample_items(statistics, difference.shape[1], resamples, number), weights))
        values.append(difference.mean())
    return estimate(float(np.mean(values)), np.mean(draws, axis=0)), most


def table(rows: list[dict]) -> Iterator[str]:
    """A table for the runs of stages that are compared with each other, see `TOGETHER`."""
    for stages in TOGETHER:
        if together := [row for row in rows if row["stage"] in stages]:
            yield from _table(" and ".join(stages), together)


def _table(stage: str, rows: list[dict]) -> Iterator[str]:
    [amount] = {Amount(row["share"], row["epochs"]) for row in rows}
    tasks = sorted({row["task"] for row in rows})
    arms = [arm for arm in (*PRIMARY, *SECONDARY, *EXPLORATORY) if outcomes(rows, tasks[0], arm)]
    yield f"{stage}, {amount.share:.0%} of the rows, {amount.epochs} epochs"
    yield "accuracy, mean ± standard deviation over seeds"
    yield "| arm | " + " | ".join(tasks) + " | mean | seeds |"
    yield "| --- |" + " --- |" * (len(tasks) + 2)
    for arm in arms:
        found = [[100 * v.mean() for v in outcomes(rows, task, arm).values()] for task in tasks]
        cells = [f"{np.mean(one):.1f} ± {np.std(one, ddof=1) if len(one) > 1 else 0:.1f}" for one in found]
        mean, seeds = np.mean([np.mean(one) for one in found]), min(map(len, found))
        yield f"| {arm} | {' | '.join(cells)} | {mean:.2f} | {seeds} |"
    yield ""
    compared = {arm: compare(rows, "guided", arm, tasks) for arm in arms[1:]}
    compared = {arm: one for arm, one in compared.items() if one}
    family = [arm for arm in compared if arm in SECONDARY]
    corrected = dict(zip(family, holm(np.array([compared[arm][0].p for arm in family])), strict=True)) if family else {}
    yield "| guided minus | points | 95 % interval | p | Holm | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for arm, (one, seeds) in compared.items():
        after = f"{corrected[arm]:.3f}" if arm in corrected else "–"
        points = f"{100 * one.value:+.2f} | {100 * one.low:+.2f} to {100 * one.high:+.2f}"
        yield f"| {arm} | {points} | {one.p:.3f} | {after} | {seeds} |"
    yield ""
    for task in tasks:
        if one := compare(rows, "guided", "shuffled", [task]):
            interval = f"{100 * one[0].low:+.2f} to {100 * one[0].high:+.2f}"
            yield f"- {task}, guided minus shuffled: {100 * one[0].value:+.2f} ({interval})"
    yield ""
