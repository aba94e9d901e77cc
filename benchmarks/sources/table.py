"""The README's tables, from the rows alone.

Truth and choice never share a seed: for each seed that is left out, a source's outcome is its accuracy with that seed,
and what "best on average" knows comes from other targets.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from graftlm.measure.ranking import ndcg, regret_at_k

PRIMARY, AGAINST = "esm-logme", ("textemb", "vocabulary overlap")
DRAWS = 200  # of the random ranker
RESAMPLES = 10_000
Outcomes = dict[str, dict[int, float]]  # source → seed → accuracy; "none" is no transfer


def outcomes_of(cells: list[dict]) -> dict[tuple[str, int], Outcomes]:
    """(target, rows) → source → seed → accuracy, of the sources and seeds that are whole."""
    found: dict[tuple[str, int], Outcomes] = {}
    for row in cells:
        found.setdefault((row["target"], row["n"]), {}).setdefault(row["source"], {})[row["seed"]] = row["accuracy"]
    whole = {}
    for key, sources in found.items():
        seeds = set.intersection(*(set(by_seed) for by_seed in sources.values()))
        if len(seeds) > 1:
            whole[key] = {name: {seed: by[seed] for seed in sorted(seeds)} for name, by in sources.items()}
    return whole


def quality(scores: dict[str, float], outcomes: Outcomes) -> tuple[list[float], list[float]]:
    """Regret@3 and NDCG, one of each a seed.

    The three sources that a ranker names are tried with the other seeds, the best of them is kept, and its accuracy is
    that with this seed; it is held against the source (or none) that is best with the other seeds, chosen alike.
    """
    names = sorted(scores)
    regrets, gains = [], []
    for seed in outcomes["none"]:
        held = {name: by_seed[seed] for name, by_seed in outcomes.items()}
        seen = {
            name: float(np.mean([value for other, value in by_seed.items() if other != seed]))
            for name, by_seed in outcomes.items()
        }
        top = sorted(names, key=lambda name: -scores[name])[:3]
        chosen, best = (max(some, key=lambda name: (seen[name], name)) for some in (top, [*names, "none"]))
        regrets.append(100 * (held[best] - held[chosen]) / held[best])
        gains.append(ndcg(np.array([scores[name] for name in names]), np.array([held[name] for name in names])))
    return regrets, gains


def in_sample_regret(scores: dict[str, float], outcomes: Outcomes) -> float:
    """Regret@3 as the paper has it: mean accuracies over all seeds, which also choose the best."""
    names = sorted(scores)
    means = {name: float(np.mean(list(by_seed.values()))) for name, by_seed in outcomes.items()}
    return regret_at_k(
        np.array([scores[name] for name in names]),
        np.array([means[name] for name in names]),
        min(3, len(names)),
        without_transfer=means["none"],
    )


def added(rankers: dict[str, dict[str, float]], truth: dict, target: str, rows: int) -> dict[str, dict[str, float]]:
    """The rankers that need outcomes of other targets, or none: best on average elsewhere, and random."""
    names = sorted(next(iter(rankers.values())))
    elsewhere = {name: [] for name in names}
    for (other, count), outcomes in truth.items():
        if other != target and count == rows:
            none = np.mean(list(outcomes["none"].values()))
            for name in set(names) & set(outcomes):
                elsewhere[name].append(np.mean(list(outcomes[name].values())) - none)
    best = {name: float(np.mean(gains)) if gains else 0.0 for name, gains in elsewhere.items()}
    rng = np.random.default_rng(0)
    drawn = {f"random {draw}": dict(zip(names, rng.normal(size=len(names)), strict=True)) for draw in range(DRAWS)}
    return {**rankers, "best on average": best, **drawn}


def noise_floor(truth: dict[tuple[str, int], Outcomes]) -> float:
    """Standard deviation of one cell's accuracy over its seeds, in points, pooled over all cells."""
    spread = [np.var(list(by_seed.values()), ddof=1) for outcomes in truth.values() for by_seed in outcomes.values()]
    return 100 * float(np.sqrt(np.mean(spread)))


def agreement(outcomes: Outcomes) -> float:
    """Mean Spearman correlation of the sources' outcomes between two seeds: what any ranking can reach at most."""
    names = sorted(set(outcomes) - {"none"})
    seeds = sorted(outcomes["none"])
    ranks = {seed: np.argsort(np.argsort([outcomes[name][seed] for name in names])) for seed in seeds}
    found = [np.corrcoef(ranks[one], ranks[two])[0, 1] for one, two in combinations(seeds, 2)]
    return float(np.mean(found))


def table(cells: list[dict], scores: list[dict]) -> str:
    """All targets, all rankers; then the primary differences."""
    truth = outcomes_of(cells)
    return "\n".join(_lines(truth, scores)) if truth else "no target has two whole seeds yet"


def _lines(truth: dict[tuple[str, int], Outcomes], scores: list[dict]) -> Iterator[str]:
    yield f"noise floor: {noise_floor(truth):.2f} points of accuracy between seeds of one cell"
    for rows in sorted({count for _, count in truth}):
        targets = [target for target, count in truth if count == rows]
        regrets: dict[str, dict[str, list[float]]] = {}
        gains: dict[str, dict[str, list[float]]] = {}
        plain: dict[str, list[float]] = {}
        for target in targets:
            outcomes = truth[target, rows]
            given = {row["ranker"]: row["scores"] for row in scores if (row["target"], row["n"]) == (target, rows)}
            given = {name: {s: v for s, v in found.items() if s in outcomes} for name, found in given.items()}
            if not given:
                continue
            for name, found in added(given, truth, target, rows).items():
                name = name.split()[0] if name.startswith("random ") else name
                regret, gain = quality(found, outcomes)
                regrets.setdefault(name, {}).setdefault(target, []).append(regret)
                gains.setdefault(name, {}).setdefault(target, []).append(gain)
                plain.setdefault(name, []).append(in_sample_regret(found, outcomes))
        ceiling = np.mean([agreement(truth[target, rows]) for target in targets])
        yield from ["", f"{rows} rows; agreement of two seeds on the order of sources: Spearman {ceiling:.2f}", ""]
        yield "| regret@3 | " + " | ".join(targets) + " | mean | as in the paper | NDCG |"
        yield "|---" * (len(targets) + 4) + "|"
        for name, found in regrets.items():
            each = [float(np.mean(found[target])) if target in found else np.nan for target in targets]
            gain = np.mean([np.mean(one) for one in gains[name].values()])
            shown = " | ".join(f"{value:.2f}" for value in each)
            yield f"| {name} | {shown} | {np.nanmean(each):.2f} | {np.mean(plain[name]):.2f} | {gain:.3f} |"
        yield ""
        for other in AGAINST:
            if PRIMARY in regrets and other in regrets:
                for what, found, sign in (("regret@3", regrets, -1), ("NDCG", gains, 1)):
                    value, low, high = difference(found[PRIMARY], found[other])
                    yield (
                        f"{rows} rows, {PRIMARY} against {other}, {what}: {value:+.3f} ({low:+.3f} to {high:+.3f}), "
                        f"{'higher' if sign > 0 else 'lower'} is better"
                    )


def difference(first: dict[str, list], second: dict[str, list]) -> tuple[float, float, float]:
    """Mean paired difference over targets and seeds, with the interval of a bootstrap that draws both."""
    paired = np.array([np.mean(first[target], axis=0) - np.mean(second[target], axis=0) for target in sorted(first)])
    rng = np.random.default_rng(0)
    targets = rng.integers(len(paired), size=(RESAMPLES, len(paired)))
    seeds = rng.integers(paired.shape[1], size=(RESAMPLES, paired.shape[1]))
    drawn = paired[targets[:, :, None], seeds[:, None, :]].mean(axis=(1, 2))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(paired.mean()), float(low), float(high)
