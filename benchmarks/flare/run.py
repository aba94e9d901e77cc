"""FLARE against its rivals on sib200: folds, runs, rows, and the tables of the README.

    python benchmarks/flare/run.py --data DATA [--work FOLDER] [--set primary] [--shard i/n]
    python benchmarks/flare/run.py [--set primary]                      the tables, from rows that are there
    python benchmarks/flare/run.py --data DATA --scale smoke            every set, tiny: does all of it go through?

DATA holds `multilingual/sib200_topic/` and, for the set `gloss`, `parallel_text/tatoeba_eng/`. Resumable: what is
finished is not repeated. Start it once per core with --shard 1/2, 2/2: the processes divide the folds.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = {"deu": "deu_Latn", "ces": "ces_Latn", "dan": "dan_Latn"}
SOURCE, PARTS, RESAMPLES = "eng", 5, 10_000


@dataclass(frozen=True)
class Scale:
    """How much of the study is done."""

    languages: tuple[str, ...] = tuple(LANGUAGES)
    folds: int = PARTS
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs: int = 4
    rows: int | None = None  # of train, and a quarter of it of dev and test; None: all


STUDY = Scale()
SCALES = {
    "study": STUDY,
    "smoke": Scale(("dan",), folds=1, seeds=1, rates=(1e-3,), epochs=1, rows=64),
}

LORA = {"method": "lora", "r": 8, "alpha": 16}
FLARE = LORA | {"method": "flare"}
RIVALS = {
    "LoRA on target rows": ("target", LORA, "english"),
    "translate-test, trained as long": ("source", LORA, "english"),
    "input-level fusion": ("both", LORA, "english"),
}
MEAN = "mean of two models' logits"
STEP_1 = "english"
# name → (what is read, the adapter, the column of the source)
EXPLORED = {
    **{f: ("fused", FLARE | {"fusion": f}, "english") for f in ("add", "mul", "mul_relu", "cross_attention")},
    "same layer": ("fused", FLARE | {"source_layer": "same"}, "english"),
    **{a: ("fused", FLARE | {"align": a}, "english") for a in ("relative", "pooled", "attention")},
}
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
    "exploratory": {"FLARE": ("fused", FLARE, "english"), **EXPLORED},
}

_ROWS: dict[str, dict] = {}  # name → row, as far as they were read


def read_sentences(data: Path, code: str) -> dict[int, dict]:
    """All rows of a language by sentence id, whatever official split they are in."""
    rows = {}
    for split in ("train", "dev", "test"):
        path = data / "multilingual" / "sib200_topic" / f"{code}.{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows |= {row["id"]: row for row in map(json.loads, file)}
    return rows


def glossaries(data: Path, languages: list[str]) -> dict:
    """A glossary a language, from the training split of Tatoeba."""
    from gloss import glossary

    made = {}
    for tag in languages:
        with gzip.open(data / "parallel_text" / "tatoeba_eng" / f"{tag}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["split"] == "train"]
        made[tag] = glossary((row["text"], row["eng"]) for row in rows)
    return made


def write_folds(data: Path, folder: Path, scale: Scale = STUDY, *, with_gloss: bool = False) -> None:
    """Fold k: test = part k, dev = part k + 1, train = the other three; the parts are the same in all languages.

    Glosses are in folds of their own: a run remembers the files that it was made from.
    """
    done = folder / "done"
    if done.exists():
        return
    codes = {SOURCE: "eng_Latn"} | {tag: LANGUAGES[tag] for tag in scale.languages}
    rows = {tag: read_sentences(data, code) for tag, code in codes.items()}
    ids = sorted(rows[SOURCE])
    for tag, found in rows.items():
        if sorted(found) != ids or any(found[i]["label"] != rows[SOURCE][i]["label"] for i in ids):
            sys.exit(f"{tag} does not have the sentences and labels that {SOURCE} has")
    translate = glossaries(data, list(scale.languages)) if with_gloss else {}
    random.Random(0).shuffle(ids)
    parts = [ids[number::PARTS] for number in range(PARTS)]
    for number in range(scale.folds):
        dev = (number + 1) % PARTS
        train = [i for other, part in enumerate(parts) if other not in (number, dev) for i in part]
        for split, whole in {"train": train, "dev": parts[dev], "test": parts[number]}.items():
            most = None if scale.rows is None else scale.rows if split == "train" else scale.rows // 4
            chosen = whole[:most]
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


def english(work: Path, fold: int, seed: int, scale: Scale) -> Path:
    """Step 1, trained and merged once; its scores are zero-shot and translate-test."""
    from graftlm import load_recipe, merge

    files = {tag: f"folds/{fold}/test.{tag}.jsonl" for tag in (SOURCE, *scale.languages)}
    recipe = load_recipe(
        work / "english.yaml",
        [
            f"name=fold{fold}.seed{seed}",
            f"seed={seed}",
            f"output.folder={json.dumps(str(work / 'english'))}",
            f"data.train=folds/{fold}/train.{SOURCE}.jsonl",
            f"data.dev=folds/{fold}/dev.{SOURCE}.jsonl",
            f"data.test={json.dumps(files)}",
            f"training.epochs={scale.epochs}",
        ],
    )
    seconds = run(recipe)
    merged = recipe.folder / "merged"
    made = merged if merged.is_dir() else merge(recipe.folder)
    name = f"{STEP_1}.{recipe.name}"
    if not (work / "rows" / f"{name}.json").exists():
        (work / "rows").mkdir(exist_ok=True)
        write(work / "rows" / f"{name}.json", json.dumps({"run": name, "seconds": seconds}) + "\n")
    return made


def run(recipe) -> float | None:
    """Does a run; processor seconds, or None where a part of it was done before."""
    from graftlm import run_recipe

    is_new, began = not recipe.folder.exists(), time.process_time()
    run_recipe(recipe, progress=False)
    return time.process_time() - began if is_new else None


def name_of(parts: tuple, tag: str, fold: int, seed: int, rate: float) -> str:
    """A run's name says all of it, so that sets share runs."""
    read, adapter, column = parts
    settings = "-".join(str(adapter[key]) for key in ("fusion", "source_layer", "align") if key in adapter)
    return ".".join(filter(None, [read, settings, column, tag, f"fold{fold}", f"seed{seed}", f"rate{rate:g}"]))


def arm(work: Path, base: Path, parts: tuple, tag: str, fold: int, seed: int, rate: float, scale: Scale = STUDY):
    """The recipe of one run of an arm."""
    from graftlm import load_recipe

    read, adapter, column = parts
    folds = f"{'glossed' if column == 'gloss' else 'folds'}/{fold}"
    return load_recipe(
        work / "recipe.yaml",
        [
            f"name={json.dumps(name_of(parts, tag, fold, seed, rate))}",
            f"seed={seed}",
            f"source={tag}",
            f"model={json.dumps(str(base.resolve()))}",
            f"output.folder={json.dumps(str(work / 'arms'))}",
            f"data.train={folds}/train.{tag}.jsonl",
            f"data.dev={folds}/dev.{tag}.jsonl",
            f"data.test={json.dumps({tag: f'{folds}/test.{tag}.jsonl'})}",
            f"data.parallel.text={column}",
            f"data.parallel.read={read}",
            f"adapter={json.dumps(adapter)}",
            f"training.learning_rate={rate}",
            f"training.epochs={scale.epochs}",
        ],
    )


def languages_of(parts: tuple, scale: Scale = STUDY) -> tuple[str, ...]:
    """Gold English alone is the same in every language."""
    return scale.languages[-1:] if parts[0] == "source" and parts[2] == "english" else scale.languages


def do(work: Path, which: str, folds: list[int], scale: Scale) -> None:
    """All runs of some folds: the rates with seed 0, then the other seeds with the chosen one."""
    from graftlm.study.execute import dev_score

    for fold in folds:
        for seed in range(scale.seeds):
            base = english(work, fold, seed, scale)
            for parts in SETS[which].values():
                for tag in languages_of(parts, scale):
                    rates = scale.rates if seed == 0 else (chosen(work, parts, tag, fold, scale)[0],)
                    for rate in rates:
                        recipe = arm(work, base, parts, tag, fold, seed, rate, scale)
                        seconds = run(recipe)
                        note(work, recipe.name, dev_score(recipe), recipe.folder, seconds)


def note(work: Path, name: str, dev: float, folder: Path, seconds: float | None) -> None:
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
        "seconds": seconds,
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
    return row_named(work, name_of(parts, tag, fold, seed, rate))


def row_named(work: Path, name: str) -> dict:
    if name not in _ROWS:
        _ROWS[name] = json.loads((work / "rows" / f"{name}.json").read_text(encoding="utf-8"))
    return _ROWS[name]


def chosen(work: Path, parts: tuple, tag: str, fold: int, scale: Scale = STUDY) -> tuple[float, dict]:
    """The rate with the best dev score with seed 0, of equal ones the smaller; and its row."""
    tried = [(rate, row_of(work, parts, tag, fold, 0, rate)) for rate in scale.rates]
    return max(tried, key=lambda one: (one[1]["dev"], -one[0]))


def outcomes(work: Path, which: str, scale: Scale = STUDY) -> tuple[dict, list[str]]:
    """Arm → (seeds, sentences) of right or wrong, the mean over languages; and lines on what the base does."""
    import numpy as np

    logs: dict[str, dict] = {}
    gold: dict[int, str] = {}
    for name, parts in SETS[which].items():
        for tag in scale.languages:
            run_tag = tag if tag in languages_of(parts, scale) else languages_of(parts, scale)[0]
            for fold in range(1, scale.folds + 1):
                rate = chosen(work, parts, run_tag, fold, scale)[0]
                for seed in range(scale.seeds):
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
            [np.mean([max(one := found[tag, seed][i], key=one.get) == gold[i] for tag in scale.languages]) for i in ids]
            for seed in range(scale.seeds)
        ]
        tables[name] = np.array(right, dtype=float)
    return tables, [f"{scale.seeds} seeds, {len(ids)} sentences, {len(scale.languages)} languages", ""]


def summary(work: Path, which: str, scale: Scale = STUDY) -> str:
    """The README's table: FLARE minus each other arm, the best of them first."""
    import numpy as np

    from graftlm.measure.statistics import holm, paired_bootstrap

    tables, lines = outcomes(work, which, scale)
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
        difference = f"{100 * tables[name].mean():.2f} | {100 * one.value:+.2f}"
        lines.append(f"| {name} | {difference} | {interval} | {one.p:.4f} | {p:.4f} |")
    return "\n".join(lines)


def costs(work: Path, which: str, scale: Scale = STUDY) -> str:
    """Processor seconds of a run, and the hours of all runs of the study at that price."""
    places = [(fold, seed) for fold in range(1, scale.folds + 1) for seed in range(scale.seeds)]
    found = {"step 1": [row_named(work, f"{STEP_1}.fold{fold}.seed{seed}") for fold, seed in places]}
    planned = {"step 1": STUDY.folds * STUDY.seeds}
    for name, parts in SETS[which].items():
        planned[name] = len(languages_of(parts)) * STUDY.folds * (len(STUDY.rates) + STUDY.seeds - 1)
        found[name] = [
            row_of(work, parts, tag, fold, seed, rate)
            for tag in languages_of(parts, scale)
            for fold, seed in places
            for rate in (scale.rates if seed == 0 else (chosen(work, parts, tag, fold, scale)[0],))
        ]
    lines = ["| arm | processor seconds a run | runs of the study | hours |", "|---" * 4 + "|"]
    total = 0.0
    for name, rows in found.items():
        if known := [row["seconds"] for row in rows if row["seconds"] is not None]:
            median = statistics.median(known)
            total += median * planned[name] / 3600
            lines.append(f"| {name} | {median:.0f} | {planned[name]} | {median * planned[name] / 3600:.1f} |")
    return "\n".join([*lines, f"| all | | {sum(planned.values())} | {total:.1f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with multilingual/ and parallel_text/")
    parser.add_argument("--work", type=Path, help="folds, runs and rows (git ignores it); default: work/, by scale")
    parser.add_argument("--set", choices=SETS, help="default: primary; all of them with --scale smoke")
    parser.add_argument("--shard", default="1/1", metavar="I/N")
    parser.add_argument("--scale", choices=SCALES, default="study")
    given = parser.parse_args()
    scale = SCALES[given.scale]
    work = given.work or HERE / "work" / ("" if scale == STUDY else given.scale)
    every = tuple(SETS) if given.scale == "smoke" else ("primary",)
    for which in (given.set,) if given.set else every:
        if given.data is not None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            work.mkdir(parents=True, exist_ok=True)
            for name in ("english.yaml", "recipe.yaml"):
                shutil.copyfile(HERE / name, work / name)
            write_folds(given.data, work / "folds", scale)
            if which == "gloss":
                write_folds(given.data, work / "glossed", scale, with_gloss=True)
            part, parts = map(int, given.shard.split("/"))
            do(work, which, list(range(1, scale.folds + 1))[part - 1 :: parts], scale)
        show(work, which, scale)


def show(work: Path, which: str, scale: Scale) -> None:
    """Prints the tables of a set; the rows of the study go beside this file."""
    rows = HERE / f"rows.{which}.jsonl"
    if rows.is_file() and scale == STUDY:
        _ROWS.update({row["run"]: row for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())})
    try:
        print(f"## {which}\n\n{summary(work, which, scale)}\n\n{costs(work, which, scale)}\n")
    except FileNotFoundError as error:
        sys.exit(f"not all runs are there yet: {Path(error.filename).stem} is missing; give --data DATA to make them")
    if scale == STUDY:
        write(rows, "".join(json.dumps(_ROWS[name]) + "\n" for name in sorted(_ROWS)))


if __name__ == "__main__":
    main()
