"""FLARE against its rivals on sib200: folds, runs, rows, and the tables of the README.

    python benchmarks/flare/run.py --data PATH [--work FOLDER] [--set primary] [--shard i/n]
    python benchmarks/flare/run.py [--set primary]                      the table, from rows that are there

PATH holds `sib200_topic/` and, for the set `gloss`, `tatoeba_eng/`. Resumable: what is finished is not repeated. Start
it once per core with --shard 1/2, 2/2: the processes divide the folds.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = {"deu": "deu_Latn", "ces": "ces_Latn", "dan": "dan_Latn"}
SOURCE, FOLDS, SEEDS, RATES, RESAMPLES = "eng", 5, 5, (1e-3, 3e-3), 10_000

LORA = {"method": "lora", "r": 8, "alpha": 16}
FLARE = LORA | {"method": "flare"}
RIVALS = {
    "LoRA on target rows": ("target", LORA, "english"),
    "translate-test, trained as long": ("source", LORA, "english"),
    "input-level fusion": ("both", LORA, "english"),
}
MEAN = "mean of two models' logits"
# name → (what is read, the adapter, the column of the source)
SETS = {
    "primary": {"FLARE": ("fused", FLARE, "english"), **RIVALS},
    "gloss": {
        "FLARE": ("fused", FLARE, "gloss"),
        "LoRA on target rows": RIVALS["LoRA on target rows"],
        "translate-test, trained as long": ("source", LORA, "gloss"),
        "input-level fusion": ("both", LORA, "gloss"),
    },
    "controls": {
        "FLARE": ("fused", FLARE, "english"),
        "another sentence as source": ("fused", FLARE, "shuffled"),
        "target as source": ("fused", FLARE, "itself"),
    },
    "exploratory": {
        "FLARE": ("fused", FLARE, "english"),
        **{f: ("fused", FLARE | {"fusion": f}, "english") for f in ("add", "mul", "mul_relu", "cross_attention")},
        "same layer": ("fused", FLARE | {"source_layer": "same"}, "english"),
        **{a: ("fused", FLARE | {"align": a}, "english") for a in ("relative", "pooled", "attention")},
    },
}


_ROWS: dict[str, dict] = {}  # name → row, as far as they were read


def read_sentences(data: Path, code: str) -> dict[int, dict]:
    """All rows of a language by sentence id, whatever official split they are in."""
    rows = {}
    for split in ("train", "dev", "test"):
        with gzip.open(data / "sib200_topic" / f"{code}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows |= {row["id"]: row for row in map(json.loads, file)}
    return rows


def glossaries(data: Path, languages: list[str]) -> dict:
    """A glossary a language, from the training split of Tatoeba."""
    from gloss import glossary

    made = {}
    for tag in languages:
        with gzip.open(data / "tatoeba_eng" / f"{tag}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["split"] == "train"]
        made[tag] = glossary((row["text"], row["eng"]) for row in rows)
    return made


def write_folds(data: Path, folder: Path, *, with_gloss: bool) -> None:
    """Fold k: test = part k, dev = part k + 1, train = the other three; the parts are the same in all languages."""
    done = folder / ("with_gloss" if with_gloss else "done")
    if done.exists():
        return
    rows = {tag: read_sentences(data, code) for tag, code in {SOURCE: "eng_Latn", **LANGUAGES}.items()}
    ids = sorted(rows[SOURCE])
    for tag, found in rows.items():
        if sorted(found) != ids or any(found[i]["label"] != rows[SOURCE][i]["label"] for i in ids):
            sys.exit(f"{tag} does not have the sentences and labels that {SOURCE} has")
    translate = glossaries(data, list(LANGUAGES)) if with_gloss else {}
    random.Random(0).shuffle(ids)
    parts = [ids[number::FOLDS] for number in range(FOLDS)]
    for number in range(FOLDS):
        dev = (number + 1) % FOLDS
        train = [i for other, part in enumerate(parts) if other not in (number, dev) for i in part]
        for split, chosen in {"train": train, "dev": parts[dev], "test": parts[number]}.items():
            others = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))  # the ids are in no order already
            for tag, found in rows.items():
                lines = []
                for i in chosen:
                    text = found[i]["text"]
                    line = {"id": i, "text": text, "label_name": found[i]["label_name"], "itself": text}
                    line |= {"english": rows[SOURCE][i]["text"], "shuffled": rows[SOURCE][others[i]]["text"]}
                    if tag in translate:
                        line["gloss"] = translate[tag](text)
                    lines.append(json.dumps(line, ensure_ascii=False))
                target = folder / str(number + 1) / f"{split}.{tag}.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                write(target, "\n".join(lines) + "\n")
    done.touch()


def english(work: Path, fold: int, seed: int) -> Path:
    """Step 1, trained and merged once; its scores are zero-shot and translate-test."""
    from graftlm import load_recipe, merge, run_recipe

    files = {tag: f"folds/{fold}/test.{tag}.jsonl" for tag in (SOURCE, *LANGUAGES)}
    recipe = load_recipe(
        work / "english.yaml",
        [
            f"name=fold{fold}.seed{seed}",
            f"seed={seed}",
            f"output.folder={json.dumps(str(work / 'english'))}",
            f"data.train=folds/{fold}/train.{SOURCE}.jsonl",
            f"data.dev=folds/{fold}/dev.{SOURCE}.jsonl",
            f"data.test={json.dumps(files)}",
        ],
    )
    run_recipe(recipe, progress=False)
    merged = recipe.folder / "merged"
    return merged if merged.is_dir() else merge(recipe.folder)


def name_of(parts: tuple, tag: str, fold: int, seed: int, rate: float) -> str:
    """A run's name says all of it, so that sets share runs."""
    read, adapter, column = parts
    settings = "-".join(str(adapter[key]) for key in ("fusion", "source_layer", "align") if key in adapter)
    return ".".join(filter(None, [read, settings, column, tag, f"fold{fold}", f"seed{seed}", f"rate{rate:g}"]))


def arm(work: Path, base: Path, parts: tuple, tag: str, fold: int, seed: int, rate: float):
    """The recipe of one run of an arm."""
    from graftlm import load_recipe

    read, adapter, column = parts
    return load_recipe(
        work / "recipe.yaml",
        [
            f"name={json.dumps(name_of(parts, tag, fold, seed, rate))}",
            f"seed={seed}",
            f"source={tag}",
            f"model={json.dumps(str(base.resolve()))}",
            f"output.folder={json.dumps(str(work / 'arms'))}",
            f"data.train=folds/{fold}/train.{tag}.jsonl",
            f"data.dev=folds/{fold}/dev.{tag}.jsonl",
            f"data.test={json.dumps({tag: f'folds/{fold}/test.{tag}.jsonl'})}",
            f"data.parallel.text={column}",
            f"data.parallel.read={read}",
            f"adapter={json.dumps(adapter)}",
            f"training.learning_rate={rate}",
        ],
    )


def languages_of(parts: tuple) -> tuple[str, ...]:
    """Gold English alone is the same in every language."""
    return tuple(LANGUAGES)[-1:] if parts[0] == "source" and parts[2] == "english" else tuple(LANGUAGES)


def do(work: Path, which: str, folds: list[int]) -> None:
    """All runs of some folds: the rates with seed 0, then the other seeds with the chosen one."""
    from graftlm import run_recipe
    from graftlm.study.execute import dev_score

    for fold in folds:
        for seed in range(SEEDS):
            base = english(work, fold, seed)
            for parts in SETS[which].values():
                for tag in languages_of(parts):
                    rates = RATES if seed == 0 else (chosen(work, parts, tag, fold)[0],)
                    for rate in rates:
                        recipe = arm(work, base, parts, tag, fold, seed, rate)
                        run_recipe(recipe, progress=False)
                        note(work, recipe.name, dev_score(recipe), recipe.folder)


def note(work: Path, name: str, dev: float, folder: Path) -> None:
    """What a finished run says of its test sentences, as one small file."""
    target = work / "rows" / f"{name}.json"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    said = sorted(map(json.loads, lines), key=lambda row: row["id"])
    labels = json.loads((folder / "adapter" / "config.json").read_text(encoding="utf-8"))["id2label"]
    row = {
        "run": name,
        "dev": dev,
        "labels": [labels[key] for key in sorted(labels, key=int)],
        "ids": [one["id"] for one in said],
        "gold": [one["label"] for one in said],
        "scores": [one["scores"] for one in said],
    }
    write(target, json.dumps(row) + "\n")


def write(path: Path, text: str) -> None:
    """A whole file or none: other processes read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def row_of(work: Path, parts: tuple, tag: str, fold: int, seed: int, rate: float) -> dict:
    """A run's row, by its name."""
    name = name_of(parts, tag, fold, seed, rate)
    if name not in _ROWS:
        _ROWS[name] = json.loads((work / "rows" / f"{name}.json").read_text(encoding="utf-8"))
    return _ROWS[name]


def chosen(work: Path, parts: tuple, tag: str, fold: int) -> tuple[float, dict]:
    """The rate with the best dev score with seed 0, of equal ones the smaller; and its row."""
    tried = [(rate, row_of(work, parts, tag, fold, 0, rate)) for rate in RATES]
    return max(tried, key=lambda one: (one[1]["dev"], -one[0]))


def outcomes(work: Path, which: str) -> tuple[dict, list[str]]:
    """Arm → (seeds, sentences) of right or wrong, the mean over languages; and lines on what the base does."""
    import numpy as np

    logs: dict[str, dict] = {}
    gold: dict[int, str] = {}
    for name, parts in SETS[which].items():
        for tag in LANGUAGES:
            run_tag = tag if tag in languages_of(parts) else languages_of(parts)[0]
            for fold in range(1, FOLDS + 1):
                rate = chosen(work, parts, run_tag, fold)[0]
                for seed in range(SEEDS):
                    row = row_of(work, parts, run_tag, fold, seed, rate)
                    gold |= dict(zip(row["ids"], row["gold"], strict=True))
                    found = logs.setdefault(name, {}).setdefault((tag, seed), {})
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
            [np.mean([max(one := found[tag, seed][i], key=one.get) == gold[i] for tag in LANGUAGES]) for i in ids]
            for seed in range(SEEDS)
        ]
        tables[name] = np.array(right, dtype=float)
    return tables, [f"{SEEDS} seeds, {len(ids)} sentences, {len(LANGUAGES)} languages", ""]


def summary(work: Path, which: str) -> str:
    """The README's table: FLARE minus each other arm, the best of them first."""
    import numpy as np

    from graftlm.measure.statistics import holm, paired_bootstrap

    tables, lines = outcomes(work, which)
    flare = tables.pop("FLARE")
    lines += [
        f"FLARE: {100 * flare.mean():.2f}",
        "",
        "| FLARE minus | accuracy there | difference | 95 % interval | p | p, Holm |",
    ]
    lines += ["|---" * 6 + "|"]
    ordered = sorted(tables, key=lambda name: -tables[name].mean())
    found = [paired_bootstrap(flare, tables[name], resamples=RESAMPLES) for name in ordered]
    for name, one, p in zip(ordered, found, holm(np.array([one.p for one in found])), strict=True):
        interval = f"{100 * one.low:+.2f} to {100 * one.high:+.2f}"
        cells = [
            name,
            f"{100 * tables[name].mean():.2f}",
            f"{100 * one.value:+.2f}",
            interval,
            f"{one.p:.4f}",
            f"{p:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with sib200_topic/ and tatoeba_eng/")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folds, runs and rows (git ignores it)")
    parser.add_argument("--set", choices=SETS, default="primary")
    parser.add_argument("--shard", default="1/1", metavar="I/N")
    given = parser.parse_args()
    which = given.set
    if given.data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        given.work.mkdir(parents=True, exist_ok=True)
        for name in ("english.yaml", "recipe.yaml"):
            shutil.copyfile(HERE / name, given.work / name)
        write_folds(given.data, given.work / "folds", with_gloss=which == "gloss")
        part, parts = map(int, given.shard.split("/"))
        do(given.work, which, list(range(1, FOLDS + 1))[part - 1 :: parts])
    rows = HERE / f"rows.{which}.jsonl"
    if rows.is_file():
        _ROWS.update({row["run"]: row for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())})
    try:
        print(summary(given.work, which))
    except FileNotFoundError as error:
        sys.exit(f"not all runs are there yet: {Path(error.filename).stem} is missing; give --data PATH to make them")
    write(rows, "".join(json.dumps(_ROWS[name]) + "\n" for name in sorted(_ROWS)))


if __name__ == "__main__":
    main()
