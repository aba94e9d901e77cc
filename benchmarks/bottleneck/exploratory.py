"""Exploratory: Ewe, Wolof and Zulu under the study's runs of its first seed, language adapters from New Testaments.

    python benchmarks/bottleneck/exploratory.py --data DATA [--work FOLDER]
    python benchmarks/bottleneck/exploratory.py                          the tables, from rows that are there

DATA is the folder with parallel_text/bible_nt and multilingual/sib200_topic; the work folder is that of `run.py`, which
has trained the runs already. Resumable: what is finished is not repeated.
"""

import argparse
import gzip
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
CODES = {"ewe": "ewe_Latn", "wol": "wol_Latn", "zul": "zul_Latn"}
HELD_OUT = ("GAL", "EPH")
ARMS = ("standard", "gradual", "FUN", "alone")
KEPT = "standard, English kept"
CHECKED = "dan"  # scored here as well, against what the study's runs said of it
BATCH, LENGTH = 16, 128

_spec = importlib.util.spec_from_file_location("bottleneck_study", HERE / "run.py")
if _spec is None or _spec.loader is None:
    sys.exit("benchmarks/bottleneck/run.py is missing")
primary = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(primary)
driver = primary.driver


def write_testaments(data: Path, folder: Path) -> None:
    """A chapter is a document; whole books are held out."""
    from graftlm.evaluation.record import write_text

    for tag in CODES:
        chapters: dict[tuple[str, str], list[str]] = {}
        with gzip.open(data / f"{tag}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                _, book, chapter, _ = row["id"].split(".")
                chapters.setdefault((book, chapter), []).append(row["text"])
        for split in ("train", "dev"):
            texts = [" ".join(one) for (book, _), one in chapters.items() if (book in HELD_OUT) == (split == "dev")]
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            write_text(folder / f"{split}.{tag}.jsonl", "".join(lines))


def testament_recipe(work: Path, tag: str):
    """The study's run for a language adapter, on another text."""
    text = [f"data.train=testaments/train.{tag}.jsonl", f"data.test={{{tag}: testaments/dev.{tag}.jsonl}}"]
    return primary.language_recipe(work, tag, text)


def predictions(model, tokenizer, texts: list[str]) -> list[str]:
    """The label of each text, in the study's precision."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    said = [""] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in chosen], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            best = model(**batch).logits.argmax(-1).tolist()
        for i, number in zip(chosen, best, strict=True):
            said[i] = model.config.id2label[number]
    return said


def score(work: Path, tests: dict[str, dict[int, dict]], arm: str, fold: int) -> list[dict]:
    """One run of the study in every language: which sentences of the fold's test part were right."""
    import graftlm

    model, tokenizer = graftlm.load(work / "studies" / "primary" / "runs" / f"{arm}.fold{fold}.seed0", tokenizer=True)
    ids = sorted(row["id"] for row in driver.read_rows(work / "folds" / str(fold) / "test.eng.jsonl"))

    def right(tag: str) -> str:
        rows = [tests[tag][i] for i in ids]
        said = predictions(model, tokenizer, [row["text"] for row in rows])
        return "".join("01"[one == row["label_name"]] for one, row in zip(said, rows, strict=True))

    rows = []
    if arm == ARMS[0]:
        rows.append({"variant": KEPT, "right": {tag: right(tag) for tag in CODES}})
    found = {}
    for tag in (CHECKED, *CODES):
        if arm != "alone":
            name = f"lang_{tag}"
            if name not in model.peft_config:
                model.load_adapter(str(work / "languages" / f"language-{tag}" / "adapter"), name)
            graftlm.stack(model, [name, "default"], inference_mode=True)
        found[tag] = right(tag)
    rows.append({"variant": arm, "right": {tag: found[tag] for tag in CODES}, "checked": {CHECKED: found[CHECKED]}})
    return [{"study": "exploratory", "fold": fold, "seed": 0, "ids": ids} | row for row in rows]


def constant(work: Path, tests: dict[str, dict[int, dict]], fold: int) -> dict:
    """Always the most frequent label of the fold's training part."""
    labels = [row["label_name"] for row in driver.read_rows(work / "folds" / str(fold) / "train.eng.jsonl")]
    most = max(sorted(set(labels)), key=labels.count)
    ids = sorted(row["id"] for row in driver.read_rows(work / "folds" / str(fold) / "test.eng.jsonl"))
    right = {tag: "".join("01"[tests[tag][i]["label_name"] == most] for i in ids) for tag in CODES}
    return {"study": "exploratory", "fold": fold, "seed": 0, "ids": ids, "variant": "majority", "right": right}


def agreement(rows: list[dict]) -> tuple[int, int]:
    """Danish sentences on which these predictions and the study's own are alike, and all of them."""
    study = {
        (row["variant"], row["fold"]): row for row in driver.read_rows(HERE / "rows.study.jsonl") if not row["seed"]
    }
    pairs = [
        pair
        for row in rows
        if "checked" in row
        for pair in zip(row["checked"][CHECKED], study[row["variant"], row["fold"]]["right"][CHECKED], strict=True)
    ]
    return sum(one == other for one, other in pairs), len(pairs)


def tables(folder: Path) -> str:
    """All tables of the README's exploratory part, from the rows alone."""
    read = {name: folder / f"rows.{name}.jsonl" for name in ("testaments", "exploratory")}
    found = {name: driver.read_rows(path) for name, path in read.items() if path.is_file()}
    parts = [primary.language_table(found["testaments"], "New Testament")] if "testaments" in found else []
    if "testaments" in found:
        parts.append(cut_table(found["testaments"]))
    if "exploratory" in found:
        parts.append(summary(found["exploratory"]))
    return "\n\n".join(parts)


def cut_table(rows: list[dict]) -> str:
    """How the starter's tokenizer takes the sentences."""
    lines = ["| sib200 in | tokens a word | sentences cut at 128 tokens |", "|---|---|---|"]
    lines += [f"| {row['language']} | {row['tokens_a_word']:.2f} | {100 * row['cut']:.1f} % |" for row in rows]
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """Accuracies, and differences against the first arm; intervals are over sentences alone."""
    import numpy as np

    from graftlm.measure.statistics import holm, paired_bootstrap

    outcomes: dict[str, dict[str, dict[int, int]]] = {}
    for row in rows:
        for tag in CODES:
            by_id = outcomes.setdefault(row["variant"], {}).setdefault(tag, {})
            by_id |= dict(zip(row["ids"], map(int, row["right"][tag]), strict=True))
    arrays = {
        arm: {tag: np.array([[by_id[i] for i in sorted(by_id)]], dtype=float) for tag, by_id in one.items()}
        for arm, one in outcomes.items()
    }
    whole = {arm: np.mean(list(one.values()), axis=0) for arm, one in arrays.items()}
    shown = [arm for arm in (*ARMS, KEPT, "majority") if arm in arrays]
    lines = [f"1 seed, {whole[shown[0]].shape[1]} sentences", "", f"| arm | {' | '.join(CODES)} | mean of the three |"]
    lines.append("|---" * (len(CODES) + 2) + "|")
    for arm in shown:
        cells = [f"{100 * arrays[arm][tag].mean():.1f}" for tag in CODES]
        lines.append(f"| {arm} | {' | '.join(cells)} | {100 * whole[arm].mean():.2f} |")
    first, *others = shown
    against = [paired_bootstrap(whole[arm], whole[first], resamples=driver.RESAMPLES) for arm in others]
    lines += ["", f"| against {first} | difference | 95 % interval | p | p, Holm |", "|---|---|---|---|---|"]
    for arm, one, p in zip(others, against, holm(np.array([one.p for one in against])), strict=True):
        lines.append(driver._difference(f"{arm}, mean of the three", one, p))
    alike, all_of_them = agreement(rows)
    lines += ["", f"Check: {alike} of {all_of_them} Danish sentences are right or wrong as in the study's own runs"]
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, help="the folder with multilingual/ and parallel_text/")
    arguments.add_argument("--work", type=Path, default=HERE / "work", help="that of run.py")
    given = arguments.parse_args()
    if given.data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        work = given.work.absolute()
        write_testaments(given.data / "parallel_text" / "bible_nt", work / "testaments")
        recipes = {tag: testament_recipe(work, tag) for tag in CODES}
        primary.train_languages(recipes, work / "languages.state")

        from transformers import AutoTokenizer

        from graftlm.evaluation.record import write_text

        sentences = given.data / "multilingual" / "sib200_topic"
        tests = {tag: driver.read_sentences(sentences, code) for tag, code in CODES.items()}
        tests[CHECKED] = driver.read_sentences(sentences, f"{CHECKED}_Latn")
        learned = primary.language_rows(recipes)
        tokenizer = AutoTokenizer.from_pretrained(recipes["ewe"].folder / "adapter")
        for row in learned:
            texts = [one["text"] for one in tests[row["language"]].values()]
            counts = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            row["tokens_a_word"] = sum(n - 2 for n in counts) / sum(len(text.split()) for text in texts)
            row["cut"] = sum(n > LENGTH for n in counts) / len(counts)
        write_text(HERE / "rows.testaments.jsonl", "".join(json.dumps(row) + "\n" for row in learned))
        rows = HERE / "rows.exploratory.jsonl"
        there = {(row["variant"], row["fold"]) for row in driver.read_rows(rows)} if rows.is_file() else set()
        for fold in range(1, driver.FOLDS + 1):
            made = [constant(work, tests, fold)] if ("majority", fold) not in there else []
            for arm in ARMS:
                made += score(work, tests, arm, fold) if (arm, fold) not in there else []
            with rows.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
            logging.info("fold %d", fold)
    print(tables(HERE) or "there are no rows yet: give --data to make them")


if __name__ == "__main__":
    main()
