"""The FLARE study's files on made-up sentences: folds, glosses, recipes, and the table against sums by hand."""

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from graftlm.parallel import load_pairs
from graftlm.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks" / "flare"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


def module(name):
    spec = importlib.util.spec_from_file_location(f"flare_study_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


driver, gloss = module("run"), module("gloss")
LABELS = ("blue", "green", "red")
LEXICON = {f"ord{number}": f"word{number}" for number in range(12)}


def sentences(count, seed, length=4):
    rng = random.Random(seed)
    for _ in range(count):
        chosen = [rng.choice(list(LEXICON)) for _ in range(length)]
        yield " ".join(chosen), " ".join(LEXICON[word] for word in chosen)


@pytest.fixture
def data(tmp_path):
    pairs = list(sentences(50, 0))
    for code in ("eng_Latn", *driver.LANGUAGES.values()):
        for split, start in (("train", 0), ("dev", 30), ("test", 40)):
            path = tmp_path / "multilingual" / "sib200_topic" / f"{code}.{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"id": i, "text": pairs[i][code == "eng_Latn"], "label": i % 3, "label_name": LABELS[i % 3]}
                for i in range(start, min(start + 30, 50) if split == "train" else start + 10)
            ]
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for tag in driver.LANGUAGES:
        path = tmp_path / "parallel_text" / "tatoeba_eng" / f"{tag}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": text, "eng": eng, "split": "train"} for text, eng in sentences(80, 1)]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path


def test_ibm_model_1_finds_a_dictionary_and_sums_to_one():
    pairs = list(sentences(80, 1))
    table = gloss.model_1(pairs)
    assert all(sum(found.values()) == pytest.approx(1) for found in table.values())
    translate = gloss.glossary(pairs)
    for text, english in sentences(20, 2):
        assert translate(text) == english
    assert translate("Ord3 Peter!") == "word3 peter !"


def test_folds_have_every_sentence_once_and_every_source(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gloss", gloss)
    driver.write_folds(data, tmp_path / "folds")
    driver.write_folds(data, tmp_path / "glossed", with_gloss=True)
    seen = []
    for fold in range(1, 6):
        files = {split: tmp_path / f"glossed/{fold}/{split}.dan.jsonl" for split in ("train", "dev", "test")}
        lines = {split: file.read_text(encoding="utf-8").splitlines() for split, file in files.items()}
        rows = {split: list(map(json.loads, found)) for split, found in lines.items()}
        ids = [{row["id"] for row in found} for found in rows.values()]
        assert set.union(*ids) == set(range(50)) and sum(map(len, ids)) == 50
        seen += [row["id"] for row in rows["test"]]
        for row in rows["train"]:
            english = " ".join(LEXICON[word] for word in row["text"].split())
            assert (row["english"], row["gloss"], row["itself"]) == (english, english, row["text"])
        assert sum(row["shuffled"] == row["english"] for row in rows["train"]) < 3
        assert sorted(row["shuffled"] for row in rows["train"]) == sorted(row["english"] for row in rows["train"])
        for split, found in rows.items():  # runs that both sets share read the same bytes
            plain = [{key: value for key, value in row.items() if key != "gloss"} for row in found]
            shared = (tmp_path / f"folds/{fold}/{split}.dan.jsonl").read_text(encoding="utf-8").splitlines()
            assert list(map(json.loads, shared)) == plain
    assert sorted(seen) == list(range(50))
    (tmp_path / "recipe.yaml").write_bytes((FOLDER / "recipe.yaml").read_bytes())
    for which in driver.SETS.values():
        for parts in which.values():
            recipe = driver.arm(tmp_path, tmp_path, parts, "dan", 2, 0, 1e-3)
            split = load_pairs(recipe, recipe.data.train, "train")
            assert len(split) == 30 and (split.sources is not None) == (parts[0] == "fused")
            assert ("glossed/" in recipe.data.train.path) == (parts[2] == "gloss")
    names = {
        driver.name_of(parts, tag, fold, seed, rate)
        for parts in driver.SETS["primary"].values()
        for tag in driver.languages_of(parts)
        for fold in range(1, 6)
        for seed in range(5)
        for rate in (driver.STUDY.rates if seed == 0 else driver.STUDY.rates[:1])
    }
    assert len(names) == 300, "the budget of the README"


def test_the_table_follows_from_the_rows(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "rows").mkdir()
    kept = {}
    for arm, parts in driver.SETS["primary"].items():
        for tag in driver.languages_of(parts):
            for fold in range(1, 6):
                for seed in range(5):
                    for rate in driver.STUDY.rates:
                        scores = rng.dirichlet(np.ones(3), size=10)
                        ids = list(range(10 * fold, 10 * fold + 10))
                        name = driver.name_of(parts, tag, fold, seed, rate)
                        row = {
                            "run": name,
                            "dev": rate,
                            "seconds": 90.0 if seed else None,  # None: a run that was stopped between
                            "labels": LABELS,
                            "ids": ids,
                            "gold": [LABELS[i % 3] for i in ids],
                        }
                        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps(row | {"scores": scores.tolist()}))
                        if rate == max(driver.STUDY.rates):  # the better one on dev
                            kept[arm, tag, fold, seed] = scores
    driver._ROWS.clear()
    tables, _ = driver.outcomes(tmp_path, "primary")
    driver._ROWS.clear()
    two = ("LoRA on target rows", "translate-test, trained as long")

    def right(arm, seed, item):
        total = 0
        for tag in driver.LANGUAGES:
            fold, place = divmod(item, 10)
            last = [
                kept[one, "dan" if one == two[1] else tag, fold, seed][place]
                for one in (two if arm == driver.MEAN else (arm,))
            ]
            total += LABELS[int(np.prod(last, axis=0).argmax())] == LABELS[item % 3]
        return total / 3

    assert tables.keys() == {*driver.SETS["primary"], driver.MEAN}
    for arm, table in tables.items():
        assert table.shape == (5, 50)
        assert table == pytest.approx(np.array([[right(arm, seed, i) for i in range(10, 60)] for seed in range(5)]))
    for fold in range(1, 6):
        for seed in range(5):
            name = f"english.fold{fold}.seed{seed}"
            (tmp_path / "rows" / f"{name}.json").write_text(json.dumps({"run": name, "seconds": 36.0}))
    priced = driver.costs(tmp_path, "primary").splitlines()
    assert "| step 1 | 36 | 25 | 0.2 |" in priced and "| FLARE | 90 | 90 | 2.2 |" in priced
    assert priced[-1] == "| all | | 325 | 7.8 |"
    lines = driver.summary(tmp_path, "primary").splitlines()
    driver._ROWS.clear()
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "minus" not in line]
    assert shown == sorted(set(tables) - {"FLARE"}, key=lambda name: -tables[name].mean())


def test_the_tiny_scale_is_a_part_of_the_study(data, tmp_path):
    scale = driver.SCALES["smoke"]
    assert set(scale.languages) <= set(driver.LANGUAGES) and set(scale.rates) <= set(driver.STUDY.rates)
    assert scale.folds == scale.seeds == 1
    driver.write_folds(data, tmp_path / "whole")
    driver.write_folds(data, tmp_path / "tiny", driver.Scale(("dan",), folds=1, rows=8))
    assert [folder.name for folder in (tmp_path / "tiny").iterdir() if folder.is_dir()] == ["1"]
    for split, count in (("train", 8), ("dev", 2), ("test", 2)):
        whole, tiny = (
            (tmp_path / name / f"1/{split}.dan.jsonl").read_text().splitlines() for name in ("whole", "tiny")
        )
        ids = [[json.loads(line)["id"] for line in lines] for lines in (whole, tiny)]
        assert ids[1] == ids[0][:count]


def test_the_arms_that_are_priced_are_those_of_the_study(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "run", driver)
    cost = module("cost")
    assert set(driver.SETS["primary"]) <= set(cost.ARMS)
    driver.write_folds(data, tmp_path / "folds")
    (tmp_path / "recipe.yaml").write_bytes((FOLDER / "recipe.yaml").read_bytes())
    for name, parts in cost.ARMS.items():
        recipe = driver.arm(tmp_path, tmp_path, parts, "eng" if name == "step 1" else "dan", 1, 0, 1e-3)
        assert len(load_pairs(recipe, recipe.data.train, "train")) == 30
        assert getattr(recipe.adapter, "source_cache", False) == (name == "FLARE, cached")


def test_the_papers_recipe_is_one():
    recipe = load_recipe(FOLDER / "paper.yaml")
    assert (recipe.adapter.method, recipe.data.parallel.read) == ("flare", "fused")
