"""The study of MAD-X stacks on sib200: novels, language adapters, folds, runs, rows, and the tables of the README.

    python benchmarks/bottleneck/run.py --data DATA [--work FOLDER] [--shard i/n]
    python benchmarks/bottleneck/run.py                                    the tables, from rows that are there

DATA is the folder with multilingual/sib200_topic and raw_text/adl_dan. Resumable: what is finished is not repeated.
Start it once per core; the processes divide the runs among them. Folds, rows and statistics are those of
benchmarks/unfreezing/run.py.
"""

import argparse
import gzip
import importlib.util
import json
import logging
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
NOVELS = {"eng": "eltec_eng", "deu": "eltec_deu", "fra": "eltec_fra", "por": "eltec_por", "ces": "eltec_ces"}
NOVELS |= {"dan": "adl_dan"}
PASSAGES = {"train": 300, "dev": 16}

_spec = importlib.util.spec_from_file_location("unfreezing_study", HERE.parent / "unfreezing" / "run.py")
if _spec is None or _spec.loader is None:
    sys.exit("benchmarks/unfreezing/run.py is missing")
driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver)
driver.LANGUAGES = {tag: f"{tag}_Latn" for tag in NOVELS}


def write_novels(data: Path, folder: Path) -> None:
    """Passages of novels in each language, drawn once (seed 0): text to train on, and text that is scored."""
    from graftlm.evaluation.record import write_text

    for tag, name in NOVELS.items():
        for split, count in PASSAGES.items():
            target = folder / f"{split}.{tag}.jsonl"
            if target.exists():
                continue
            with gzip.open(data / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
                texts = [json.loads(line)["text"] for line in file]
            chosen = random.Random(0).sample(texts, count)
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen]
            write_text(target, "".join(lines))


def language_recipe(work: Path, tag: str, overrides: list[str] | None = None):
    """The run that trains one language adapter."""
    from graftlm.recipe import load_recipe

    return load_recipe(
        work / "language.yaml",
        [
            f"name=language-{tag}",
            f"source={tag}",
            f"data.train=novels/train.{tag}.jsonl",
            f"data.test={{{tag}: novels/dev.{tag}.jsonl}}",
            f"output.folder={json.dumps(str(work / 'languages'))}",
            *(overrides or []),
        ],
    )


def train_languages(recipes: dict, state: Path) -> None:
    """Every language adapter, once; waits for those that another process trains."""
    from graftlm.study.runner import DONE, TAKEN, do_in_process, error_of, finished

    while left := [recipe for recipe in recipes.values() if not finished(recipe)]:
        for recipe in left:
            began = time.monotonic()
            code = do_in_process(recipe, state)
            if code == DONE:
                logging.info("%s (%.0f s)", recipe.name, time.monotonic() - began)
            elif code != TAKEN:
                sys.exit(f"{recipe.name}: {error_of(state, recipe.name)}")
        time.sleep(2)


def language_rows(recipes: dict) -> list[dict]:
    """What each language adapter learned of its text."""
    from graftlm.evaluation.result import Result

    rows = []
    for tag, recipe in recipes.items():
        result = Result.read(recipe.folder)
        (score,) = result.scores
        rows.append(
            {
                "language": tag,
                "metric": result.metric,
                "before": score.base.value if score.base else None,
                "after": result.primary(score).value,
                "change": score.change.model_dump() if score.change else None,
                "cost": result.cost.model_dump(),
                "versions": result.versions,
            }
        )
    return rows


def language_table(rows: list[dict], text: str = "novels") -> str:
    lines = [f"| {text}, held out | bits a byte of masked tokens, before | after | change, 95 % interval | seconds |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        found = row["change"]
        change = f"{-found['value']:+.2f} ({-found['high']:+.2f} to {-found['low']:+.2f})"
        seconds = row["cost"]["train_seconds"]
        lines.append(f"| {row['language']} | {row['before']:.2f} | {row['after']:.2f} | {change} | {seconds:.0f} |")
    return "\n".join(lines)


def by_language(rows: list[dict]) -> str:
    """Secondary: each arm against the first in each language, Holm's correction over all of them."""
    import numpy as np

    from graftlm.measure.statistics import holm, paired_bootstrap

    table, _, _ = driver.outcomes(rows)
    first, *others = table
    pairs = [(variant, tag) for variant in others for tag in NOVELS]
    found = [paired_bootstrap(table[v][tag], table[first][tag], resamples=driver.RESAMPLES) for v, tag in pairs]
    lines = [f"| against {first}, by language | difference | 95 % interval | p | p, Holm |", "|---|---|---|---|---|"]
    for (variant, tag), one, p in zip(pairs, found, holm(np.array([one.p for one in found])), strict=True):
        lines.append(driver._difference(f"{variant}, {tag}" + (" (chosen on)" if tag == "eng" else ""), one, p))
    return "\n".join(lines)


def tables(folder: Path) -> str:
    """All tables of the README, from the rows alone."""
    read = {
        name: [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("rows.languages.jsonl", "rows.study.jsonl")
        if (folder / name).is_file()
    }
    parts = [language_table(read["rows.languages.jsonl"])] if "rows.languages.jsonl" in read else []
    if rows := read.get("rows.study.jsonl"):
        parts += [driver.summary(rows), by_language(rows)]
    return "\n\n".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, help="the folder with multilingual/ and raw_text/")
    arguments.add_argument("--work", type=Path, default=HERE / "work", help="text and run folders (git ignores it)")
    arguments.add_argument("--shard", default="1/1")
    arguments.add_argument("--language", nargs="*", default=[], metavar="KEY=VALUE", help="for the language adapters")
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the recipe that all runs share")
    given = arguments.parse_args()
    if given.data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        work = given.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        for name in ("recipe.yaml", "language.yaml", "study.yaml"):
            shutil.copyfile(HERE / name, work / name)
        driver.write_folds(given.data / "multilingual" / "sib200_topic", work / "folds")
        write_novels(given.data / "raw_text", work / "novels")
        recipes = {tag: language_recipe(work, tag, given.language) for tag in NOVELS}
        train_languages(recipes, work / "languages.state")

        from graftlm.evaluation.record import write_text
        from graftlm.study.execute import Shard, execute
        from graftlm.study.plan import load_study

        languages = "".join(json.dumps(row) + "\n" for row in language_rows(recipes))
        write_text(HERE / "rows.languages.jsonl", languages)
        study = replace(load_study(work / "study.yaml", given.overrides), root=work / "studies")
        rows = HERE / "rows.study.jsonl"
        execute(study, Shard.parse(given.shard), after=lambda run: driver.append(study, run, rows))
        driver.collect(study, rows)
    print(tables(HERE) or "there are no rows yet: give --data to make them")


if __name__ == "__main__":
    main()
