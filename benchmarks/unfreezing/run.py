"""The study of scheduled unfreezing on sib200: folds, runs, rows, and the table of the README.

    python benchmarks/unfreezing/run.py --data PATH/sib200_topic [--work FOLDER] [--shard i/n] [--study study.yaml]
    python benchmarks/unfreezing/run.py --rows rows.jsonl                  the table, from rows that are there

Resumable: what is finished is not repeated. Start it once per core; the processes divide the runs among them.
"""

import argparse
import gzip
import json
import logging
import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = {"eng": "eng_Latn", "deu": "deu_Latn", "fra": "fra_Latn", "spa": "spa_Latn", "por": "por_Latn"}
LANGUAGES |= {"ces": "ces_Latn"}
SOURCE = "eng"
FOLDS = 5
RESAMPLES = 10_000
FIRST = 0, {"training.learning_rate": 3e-3}


def read_sentences(data: Path, code: str) -> dict[int, dict]:
    """All rows of a language by sentence id, whatever official split they are in."""
    rows = {}
    for split in ("train", "dev", "test"):
        with gzip.open(data / f"{code}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows |= {row["id"]: row for row in map(json.loads, file)}
    return rows


def write_study(name: str, work: Path) -> None:
    """The study beside its recipe; one without folds of its own gets those of study.yaml."""
    text = (HERE / name).read_text(encoding="utf-8")
    if "\nfolds:" not in text:
        primary = (HERE / "study.yaml").read_text(encoding="utf-8")
        text += primary[primary.index("folds:") :]
    (work / name).write_text(text, encoding="utf-8")


def write_folds(data: Path, folder: Path) -> None:
    """Fold k: test = part k, dev = part k + 1, train = the other three; the parts are the same in all languages."""
    if (folder / str(FOLDS) / "done").exists():
        return
    rows = {tag: read_sentences(data, code) for tag, code in LANGUAGES.items()}
    ids = sorted(rows[SOURCE])
    for tag, found in rows.items():
        if sorted(found) != ids:
            sys.exit(f"{tag} does not have the sentences that {SOURCE} has")
        if any(found[i]["label"] != rows[SOURCE][i]["label"] for i in ids):
            sys.exit(f"{tag} has other labels than {SOURCE}")
    random.Random(0).shuffle(ids)
    parts = [ids[number::FOLDS] for number in range(FOLDS)]
    for number in range(FOLDS):
        target = folder / str(number + 1)
        target.mkdir(parents=True, exist_ok=True)
        dev = (number + 1) % FOLDS
        train = [i for other, part in enumerate(parts) if other not in (number, dev) for i in part]
        write_rows(target / f"train.{SOURCE}.jsonl", [rows[SOURCE][i] for i in train])
        write_rows(target / f"dev.{SOURCE}.jsonl", [rows[SOURCE][i] for i in parts[dev]])
        for tag in LANGUAGES:
            write_rows(target / f"test.{tag}.jsonl", [rows[tag][i] for i in parts[number]])
        (target / "done").touch()


def write_rows(path: Path, rows: list[dict]) -> None:
    keys = ("id", "text", "label_name")
    lines = [json.dumps({key: row[key] for key in keys}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def opened(path: Path) -> list[int]:
    """Positions of the layers (0 = bottom) in the order in which they opened."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line["position"] for line in lines if line["opened"]]


def row_of(study, run) -> dict:
    """A finished run as one line: what it scored, item by item in the order of the ids, and what it cost."""
    from graftlm.evaluation.folder import read_lines
    from graftlm.evaluation.result import Result
    from graftlm.study.execute import dev_score

    recipe = study.recipe_of(run)
    result = Result.read(recipe.folder)
    right: dict[str, dict[int, bool]] = {}
    for one in read_lines(recipe.folder / "predictions.jsonl"):
        right.setdefault(one["language"], {})[one["id"]] = one["prediction"] == one["label"]
    return {
        "study": study.name,
        "run": study.run_name(run),
        "variant": study.variants[run.variant].name,
        "fold": None if run.fold is None else run.fold + 1,
        "seed": run.seed,
        "tuned": study.tune[run.choice] if run.choice is not None else {},
        "trial": run.seed == study.seeds[0] and run.choice is not None,
        "dev": round(dev_score(recipe), 5),
        "ids": sorted(right[SOURCE]),
        "opened": opened(recipe.folder / "unfreezing.jsonl"),
        "right": {tag: "".join("01"[found[i]] for i in sorted(found)) for tag, found in right.items()},
        "cost": result.cost.model_dump(),
        "versions": result.versions,
        "created": result.created.isoformat(),
    }


def collect(study, path: Path) -> None:
    """Writes every finished run of the study to the rows, whole and in order."""
    from graftlm.evaluation.record import write_text
    from graftlm.study.execute import needed, tuned
    from graftlm.study.runner import finished

    runs = [chosen for run in needed(study) if (chosen := tuned(study, run)) and finished(study.recipe_of(chosen))]
    write_text(path, "".join(json.dumps(row_of(study, run)) + "\n" for run in runs))


def append(study, run, path: Path) -> None:
    """Adds one row, so that a study that is stopped loses nothing."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row_of(study, run)) + "\n")


def outcomes(rows: list[dict]):
    """variant → language → array (seeds, ids) of 0 and 1 over all folds, for seeds that are whole; seeds; the runs."""
    import numpy as np

    chosen: dict[tuple, dict] = {}
    for row in rows:
        key = row["variant"], row["fold"], row["seed"]
        best = chosen.get(key)
        if best is None or row["dev"] > best["dev"]:  # of trials the best on dev, of equal ones the first
            chosen[key] = row
    folds = sorted({row["fold"] for row in rows})
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    seeds = [
        seed
        for seed in sorted({row["seed"] for row in rows})
        if all((variant, fold, seed) in chosen for variant in variants for fold in folds)
    ]
    table = {}
    for variant in variants:
        table[variant] = {}
        for tag in LANGUAGES:
            lines = []
            for seed in seeds:
                by_id: dict[int, int] = {}
                for fold in folds:
                    row = chosen[variant, fold, seed]
                    by_id |= dict(zip(row["ids"], map(int, row["right"][tag]), strict=True))
                lines.append([by_id[i] for i in sorted(by_id)])
            table[variant][tag] = np.array(lines, dtype=float)
    return table, seeds, chosen


def summary(rows: list[dict]) -> str:
    """The README's tables: computed from the rows alone, with nothing but `graftlm.measure.statistics`."""
    import numpy as np

    from graftlm.measure.statistics import holm, noise_floor, paired_bootstrap

    table, seeds, chosen = outcomes(rows)
    first, *others = table
    targets = [tag for tag in LANGUAGES if tag != SOURCE]
    whole = {variant: np.mean([found[tag] for tag in targets], axis=0) for variant, found in table.items()}
    lines = [f"{len(seeds)} seeds, {whole[first].shape[1]} sentences, {len(targets)} languages without labels", ""]
    lines += ["| schedule | " + " | ".join(LANGUAGES) + " | mean of the five | s.d. over seeds | seconds a run |"]
    lines += ["|---" * (len(LANGUAGES) + 4) + "|"]
    for variant, found in table.items():
        cells = [f"{100 * found[tag].mean():.1f}" for tag in LANGUAGES]
        over_seeds = 100 * whole[variant].mean(axis=1)
        seconds = [row["cost"]["train_seconds"] for (name, _, seed), row in chosen.items() if name == variant]
        spread = f"{over_seeds.std(ddof=1):.2f}" if len(seeds) > 1 else "–"
        lines.append(
            f"| {variant} | {' | '.join(cells)} | {over_seeds.mean():.2f} | {spread} | {np.mean(seconds):.1f} |"
        )
    lines += ["", f"| against {first} | difference | 95 % interval | p | p, Holm |", "|---|---|---|---|---|"]
    main = [paired_bootstrap(whole[variant], whole[first], resamples=RESAMPLES) for variant in others]
    for variant, found, p in zip(others, main, holm(np.array([one.p for one in main])), strict=True):
        lines.append(_difference(f"**{variant}, mean of the five**", found, p))
    pairs = [(variant, tag) for variant in others for tag in LANGUAGES if len(others) == 2]  # the primary's detail
    single = [paired_bootstrap(table[v][tag], table[first][tag], resamples=RESAMPLES) for v, tag in pairs]
    for (variant, tag), found, p in zip(pairs, single, holm(np.array([one.p for one in single])), strict=True):
        lines.append(_difference(f"{variant}, {tag}" + (" (tuned on)" if tag == SOURCE else ""), found, p))
    lines += [
        "",
        "| order of opening | Kendall's τ with gradual's | between two runs, mean | first to last, by mean place |",
    ]
    lines += ["|---|---|---|---|"]
    for variant in table:
        orders = [row["opened"] for row in rows if row["variant"] == variant and row.get("opened")]
        if len({tuple(order) for order in orders}) > 1:
            lines.append(_order(variant, orders))
    trials = [row for row in rows if row.get("trial")]
    settings = list(dict.fromkeys(json.dumps(row["tuned"]) for row in trials))
    if len(settings) > 1:
        lines += ["", f"| first seed, mean of the five | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for values in settings if len(settings) > 1 else ():
        at, _, _ = outcomes([row for row in trials if row["tuned"] == json.loads(values)])
        means = [100 * np.mean([at[variant][tag] for tag in targets]) for variant in table]
        name = ", ".join(f"{key.split('.')[-1]} {value:g}" for key, value in json.loads(values).items())
        lines.append(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    if len(settings) > 1:
        lines += [
            "",
            f"| all seeds, fold by fold (what was tuned) | {' | '.join(table)} |",
            "|---" * (len(table) + 1) + "|",
        ]
        for fold in sorted({row["fold"] for row in rows}):
            cells = [_of_fold([chosen[variant, fold, seed] for seed in seeds], targets) for variant in table]
            lines.append(f"| {fold} | {' | '.join(cells)} |")
    floor = noise_floor(np.array([found.mean(axis=1) for found in whole.values()]))
    lines += ["", "Noise floor (two sets of seeds of one schedule): " + (f"{100 * floor:.2f} points" if floor else "–")]
    return "\n".join(lines)


def _of_fold(runs: list[dict], targets: list[str]) -> str:
    """Mean accuracy of a fold's runs, and the setting that was chosen for them."""
    right = [run["right"][tag].count("1") / len(run["right"][tag]) for run in runs for tag in targets]
    return f"{100 * sum(right) / len(right):.1f} ({', '.join(f'{value:g}' for value in runs[0]['tuned'].values())})"


def _order(variant: str, orders: list[list[int]]) -> str:
    """How like each other, and gradual's, the orders of opening are."""
    import numpy as np
    from scipy.stats import kendalltau

    places = np.argsort(orders, axis=1)  # run × layer → when it opened
    down = np.arange(places.shape[1])[::-1]
    pairs = [kendalltau(one, other).statistic for i, one in enumerate(places) for other in places[:i]]
    with_down = np.mean([kendalltau(one, down).statistic for one in places])
    mean = " ".join(map(str, places.mean(axis=0).argsort()))
    return f"| {variant} | {with_down:.2f} | {np.mean(pairs):.2f} | {mean} |"


def _difference(name: str, found, p: float) -> str:
    interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    return f"| {name} | {100 * found.value:+.2f} | {interval} | {found.p:.4f} | {p:.4f} |"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, help="the folder with eng_Latn.train.jsonl.gz and so on")
    arguments.add_argument("--work", type=Path, default=HERE / "work", help="folds and run folders (git ignores it)")
    arguments.add_argument("--study", default="study.yaml", help="a study's YAML in this folder")
    arguments.add_argument("--rows", type=Path, help="where the rows go; without --data they are only read")
    arguments.add_argument("--shard", default="1/1")
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the recipe that all runs share")
    given = arguments.parse_args()
    rows = given.rows or HERE / f"rows.{Path(given.study).stem}.jsonl"
    if given.data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        given.work.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / "recipe.yaml", given.work / "recipe.yaml")
        write_study(given.study, given.work)
        write_folds(given.data, given.work / "folds")

        from graftlm.study.compare import summarise
        from graftlm.study.execute import Shard, execute
        from graftlm.study.plan import load_study

        study = replace(load_study(given.work / given.study, given.overrides), root=given.work / "studies")
        execute(study, Shard.parse(given.shard), after=lambda run: append(study, run, rows))
        collect(study, rows)
        summarise(study)
    if not rows.is_file():
        sys.exit(f"there are no rows yet in {rows}; give --data PATH/sib200_topic to make them")
    found = read_rows(rows)
    if given.study == "exploratory.yaml":  # its runs are at the smaller rate and the first seed
        found = [row for row in read_rows(HERE / "rows.study.jsonl") if (row["seed"], row["tuned"]) == FIRST] + found
    print(summary(found))


if __name__ == "__main__":
    main()
