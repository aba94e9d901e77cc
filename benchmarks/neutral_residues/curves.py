"""Learning against forgetting: each method's curve, and its forgetting where all have learned the same."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

import numpy as np

METHODS = ("neutral", "vanilla", "lora", "full")
ANCHOR = "full"  # in the sweep alone
MEASURED = ("forgot", "forgot_wiki", "kl")
PRIMARY, BELOW = 1.0, 0.9  # of what every method can learn


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The settings that no other one beats in both: more learned always costs more forgotten along them.

    >>> front([(1.0, 0.5), (2.0, 0.4), (1.5, 0.9), (3.0, 1.0)])
    [(2.0, 0.4), (3.0, 1.0)]
    """
    kept: list[tuple[float, float]] = []
    for learned, forgot in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or forgot < kept[-1][1]:
            kept.append((learned, forgot))
    return kept[::-1]


def forgetting_at(points: Sequence[tuple[float, float]], learned: float) -> float:
    """Forgetting at this much learning, between the neighbouring settings of the front by a straight line.

    Less learning than that of the front's first setting costs no more than it; NaN where nothing learns as much.

    >>> forgetting_at([(2.0, 0.4), (3.0, 1.0)], 2.5)
    0.7
    """
    found = front(points)
    x, y = (np.array(column) for column in zip(*found, strict=True))
    return float("nan") if learned > x[-1] else float(np.interp(learned, x, y))


def equal_learning(rows: Sequence[dict], language: str, level: float = PRIMARY) -> float:
    """What every method can learn: the smallest of the methods' largest gains in the sweep; or a share of it."""
    return level * min(max(row["learned"] for row in of(rows, language, method)) for method in METHODS)


def of(rows: Sequence[dict], language: str, method: str, stage: str = "sweep") -> list[dict]:
    return [r for r in rows if (r["language"], r["method"], r["stage"]) == (language, method, stage)]


def chosen(rows: Sequence[dict], language: str, method: str, level: float = PRIMARY) -> set[str]:
    """The two neighbours on a method's front around the equal learning, or the two nearest to it; for the seeds."""
    goal = equal_learning(rows, language, level)
    mine = of(rows, language, method)
    points = front([(row["learned"], row["forgot"]) for row in mine])
    first = min(max(bisect_left([learned for learned, _ in points], goal), 1), max(len(points) - 1, 1)) - 1
    return {row["setting"] for row in mine if (row["learned"], row["forgot"]) in points[first : first + 2]}


def interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over seeds."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def table(rows: Sequence[dict]) -> str:
    """Forgetting in bits per byte and KL at equal learning, and the differences over seeds, as Markdown."""
    out = []
    for language in dict.fromkeys(row["language"] for row in rows if row["stage"] == "sweep"):
        for level in (PRIMARY, BELOW):
            goal = equal_learning(rows, language, level)
            share = "" if level == PRIMARY else f" ({level:.0%} of it)"
            out += [f"\n{language}: at {goal:.3f} bits per byte learned{share}\n", "| method | forgot | on wiki | KL |"]
            out.append("| --- | --- | --- | --- |")
            for method in METHODS:
                mine = of(rows, language, method)
                cells = [forgetting_at([(r["learned"], r[key]) for r in mine], goal) for key in MEASURED]
                out.append(f"| {method} | " + " | ".join(f"{cell:+.4f}" for cell in cells) + " |")
            out += ["", *differences(rows, language, level)]
        out += explored(rows, language) + again(rows, language)
    return "\n".join(out + more(rows))


def more(rows: Sequence[dict]) -> list[str]:
    """One run a method: in languages that have no sweep, and with four times the tokens."""
    out = []
    for stage in ("more", "longer"):
        found = [row for row in rows if row["stage"] == stage]
        if found:
            out += ["", f"| {stage} | method | setting | learned | forgot | on wiki | KL |", "|" + " --- |" * 7]
        for row in sorted(found, key=lambda row: (row["language"], row["setting"], row["method"])):
            cells = [f"{row[key]:+.4f}" for key in ("learned", *MEASURED)]
            out.append(f"| {row['language']} | {row['method']} | {row['setting']} | " + " | ".join(cells) + " |")
    return out


def explored(rows: Sequence[dict], language: str) -> list[str]:
    """The exploratory runs, below those of the sweep that they are held against."""
    mine = [row for row in rows if (row["language"], row["stage"]) == (language, "exploratory")]
    out = ["", "| neutral residues | setting | learned | forgot | on wiki | KL |", "|" + " --- |" * 6] if mine else []
    for setting in sorted({row["setting"] for row in mine}):
        swept = [
            row | {"method": "as in the sweep"} for row in of(rows, language, "neutral") if row["setting"] == setting
        ]
        for row in swept + [row for row in mine if row["setting"] == setting]:
            cells = ["–" if row[key] is None else f"{row[key]:+.4f}" for key in ("learned", *MEASURED)]
            out.append(f"| {row['method']} | {setting} | " + " | ".join(cells) + " |")
    return out


def again(rows: Sequence[dict], language: str) -> list[str]:
    """The setting that was tried again: its own learning and forgetting, beside the others' at the primary level."""
    mine = {row["seed"]: row for row in rows if (row["language"], row["stage"]) == (language, "again")}
    if len(mine) < 2:
        return []
    learned, forgot = (np.array([row[key] for row in mine.values()]) for key in ("learned", "forgot"))
    spread = f"{learned.min():.3f} to {learned.max():.3f} over {len(mine)} seeds"
    name, level = next(iter(mine.values()))["method"], equal_learning(rows, language)
    out = ["", f"{name}: learned {learned.mean():.3f} ({spread}), forgot {forgot.mean():+.4f}; at {level:.3f} learned"]
    for method in METHODS[1:]:
        theirs = seeds(rows, language, method, PRIMARY, "forgot", on_front)
        if shared := sorted(theirs.keys() & mine.keys()):
            pairs = [theirs[seed] - mine[seed]["forgot"] for seed in shared]
            low, high = interval(pairs)
            other = np.mean([theirs[seed] for seed in shared])
            out.append(
                f"- {method} forgot {other:+.4f}, {np.mean(pairs):+.4f} more ({low:+.4f} to {high:+.4f}); "
                f"ratio {1 - np.mean(pairs) / other:.2f}"
            )
    return out


def on_line(points: Sequence[tuple[float, float]], goal: float) -> float:
    """On the line through two points, beyond them too.

    >>> on_line([(1.0, 0.1), (2.0, 0.3)], 2.5)
    0.4
    """
    (x0, y0), (x1, y1) = sorted(points)
    return y0 + (y1 - y0) * (goal - x0) / (x1 - x0) if x1 > x0 else y0


def on_front(points: Sequence[tuple[float, float]], goal: float) -> float:
    """Between two points where neither is beaten by the other, and the nearest one beyond them.

    >>> on_front([(1.0, 0.1), (2.0, 0.3)], 2.5), on_front([(1.0, 0.1), (0.9, 0.3)], 0.95)
    (0.3, 0.1)
    """
    x, y = zip(*front(points), strict=True)
    return float(np.interp(goal, x, y))


READINGS = {"on the line through two settings": on_line, "without extrapolation": on_front}


def differences(rows: Sequence[dict], language: str, level: float) -> Iterator[str]:
    """The other methods minus neutral residues, paired by seed."""
    for key, unit in (("forgot", "bits per byte"), ("kl", "nats of KL a token")):
        for words, read in READINGS.items():
            ours = seeds(rows, language, "neutral", level, key, read)
            for method in METHODS[1:]:
                theirs = seeds(rows, language, method, level, key, read)
                shared = sorted(ours.keys() & theirs.keys())
                if len(shared) > 1:
                    pairs = [theirs[seed] - ours[seed] for seed in shared]
                    low, high = interval(pairs)
                    share = np.mean([ours[seed] for seed in shared]) / np.mean([theirs[seed] for seed in shared])
                    yield (
                        f"- {method} − neutral: {np.mean(pairs):+.4f} {unit} ({low:+.4f} to {high:+.4f}), "
                        f"{len(shared)} seeds; ratio {share:.2f} ({words})"
                    )


def seeds(
    rows: Sequence[dict],
    language: str,
    method: str,
    level: float,
    key: str,
    read: Callable[[Sequence[tuple[float, float]], float], float] = on_line,
) -> dict[int, float]:
    """Forgetting or KL at equal learning of each seed, from its runs of the two chosen settings."""
    goal, keep = equal_learning(rows, language, level), chosen(rows, language, method, level)
    mine = [row for row in of(rows, language, method, "seeds") if row["setting"] in keep]
    found = {}
    for seed in sorted({row["seed"] for row in mine}):
        points = [(row["learned"], row[key]) for row in mine if row["seed"] == seed]
        if len(points) == 2:
            found[seed] = read(points, goal)
    return found
