"""Print the tables of the starter encoder's figures from result rows, as Markdown.

    python tables.py results.jsonl

Intervals (95 %): of accuracy, by resampling test sentences and seeds together, the same sentences in every arm; of the
masked-LM loss, Student's t over five maskings.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

DRAWS = 4000
T_FIVE = 2.776
LANGUAGES = ("eng", "deu", "fra", "spa", "por", "ces", "dan")
UNIGRAM = ("unigram_loss", "unigram_entropy")
ARMS = {
    "majority": "majority class",
    "character n-grams": "character n-grams + logistic regression",
    "frozen, random weights": "frozen, random weights + logistic regression",
    "random weights": "fine-tuned from random weights",
    "frozen": "**frozen + logistic regression**",
    "LoRA": "**LoRA (r = 8 on query, value)**",
    "fine-tuned": "**fine-tuned**",
}
TRAINED = ("frozen, random weights", "random weights", "LoRA", "fine-tuned")
Arm = np.ndarray


def read(path: Path) -> dict[str, list[dict]]:
    """Return the rows of each version of the weights, in the order of their first measurement."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    versions = {}
    for weights in dict.fromkeys(row["weights"] for row in rows if row["weights"]):
        kept = (row for row in rows if row["weights"] in (weights, None))
        latest = {(row["measure"], row["method"], row.get("language"), row["seed"]): row for row in kept}
        versions[weights] = list(latest.values())
    return versions


def hits(rows: list[dict], measure: str) -> dict[str, dict[str, Arm]]:
    """Return method → language → seeds × sentences, 1.0 where the answer was right."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["measure"] == measure and "correct" in row:
            found[row["method"]][row["language"]].append([float(bit) for bit in row["correct"]])
    return {
        method: {language: np.array(bits) for language, bits in languages.items()}
        for method, languages in found.items()
    }


def resampled(arm: Arm, seed: int = 0) -> np.ndarray:
    """Return bootstrap means; the n-th draw takes the same sentences for every arm with as many of them."""
    sentences = np.random.default_rng(seed).integers(arm.shape[1], size=(DRAWS, arm.shape[1]))
    seeds = np.random.default_rng(seed + 1 + arm.shape[0]).integers(arm.shape[0], size=(DRAWS, arm.shape[0]))
    return np.array([arm[chosen].mean(0)[columns].mean() for chosen, columns in zip(seeds, sentences, strict=True)])


def interval(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{low:.2f}–{high:.2f}".replace("0.", ".")


def cell(arm: Arm) -> str:
    return f"{arm.mean():.3f}".replace("0.", ".") + f" ({interval(resampled(arm))})"


def task_table(rows: list[dict], measure: str) -> None:
    arms = hits(rows, measure)
    languages = [language for language in LANGUAGES if language in arms["majority"]]
    print(f"\n| {measure} | " + " | ".join(languages) + " |\n|---|" + "---|" * len(languages))
    for method, name in ARMS.items():
        if set(languages) <= arms.get(method, {}).keys():
            seeds = min(len(arms[method][language]) for language in languages)
            name += f", {seeds} seed{'s' if seeds > 1 else ''}" if method in TRAINED else ""
            print(f"| {name} | " + " | ".join(cell(arms[method][language]) for language in languages) + " |")
    print(f"\n| {measure}: gain of | over | " + " | ".join(languages) + " |\n|---|---|" + "---|" * len(languages))
    for method in ("frozen", "LoRA", "fine-tuned"):
        baselines = ("character n-grams", "frozen, random weights" if method == "frozen" else "random weights")
        for baseline in baselines:
            if set(languages) <= arms.get(method, {}).keys() & arms.get(baseline, {}).keys():
                cells = []
                for language in languages:
                    ours, theirs = arms[method][language], arms[baseline][language]
                    draws = resampled(ours) - resampled(theirs)
                    low, high = np.percentile(draws, [2.5, 97.5])
                    cells.append(f"{ours.mean() - theirs.mean():+.3f} ({low:+.2f} to {high:+.2f})")
                print(f"| {method} | {baseline} | " + " | ".join(cells) + " |")


def masked_lm_table(rows: list[dict]) -> None:
    print("\n| held-out text | language | loss, nats | guessed | unigram model | difference | best unigram model |")
    print("|---" * 7 + "|")
    found = defaultdict(list)
    for row in rows:
        if row["measure"].startswith("mlm"):
            found[row["measure"].split()[1], row["language"]].append(row)
    for (source, language), group in found.items():
        losses = np.array([row["loss"] for row in group])
        spread = T_FIVE * losses.std(ddof=1) / len(losses) ** 0.5
        guessed, unigram, best = (np.mean([row[key] for row in group]) for key in ("accuracy", *UNIGRAM))
        values = f"{losses.mean():.2f} ± {spread:.2f} | {guessed:.2f} | {unigram:.2f}"
        print(f"| {source} | {language} | {values} | {losses.mean() - unigram:+.2f} | {best:.2f} |")


def retrieval_table(rows: list[dict]) -> None:
    forth, back = hits(rows, "retrieval from eng"), hits(rows, "retrieval to eng")
    print("\n| pairs of Tatoeba test | n | eng → X | X → eng | random weights, eng → X |\n|---|---|---|---|---|")
    for language, arm in forth["encoder"].items():
        other = forth["random weights"][language].mean()
        print(f"| {language} | {arm.shape[1]} | {cell(arm)} | {cell(back['encoder'][language])} | {other:.3f} |")


def versions_table(versions: dict[str, list[dict]]) -> None:
    """What does not need five seeds, for every version of the weights: frozen vectors and retrieval."""
    measures = (("sib200", "frozen"), ("messages", "frozen"), ("retrieval from eng", "encoder"))
    print("\n| version | | " + " | ".join(LANGUAGES) + " |\n|---|---|" + "---|" * len(LANGUAGES))
    for number, rows in enumerate(versions.values(), 1):
        for measure, method in measures:
            arms = hits(rows, measure).get(method, {})
            if arms:
                cells = (cell(arms[language]) if language in arms else "" for language in LANGUAGES)
                print(f"| {number} | {measure}, {method} | " + " | ".join(cells) + " |")


def main() -> None:
    versions = read(Path(sys.argv[1]))
    rows = list(versions.values())[-1]
    measures = {row["measure"] for row in rows}
    if any(measure.startswith("mlm") for measure in measures):
        masked_lm_table(rows)
    if "retrieval" in measures:
        retrieval_table(rows)
    for measure in ("sib200", "messages"):
        if measure in measures:
            task_table(rows, measure)
    versions_table(versions)


if __name__ == "__main__":
    main()
