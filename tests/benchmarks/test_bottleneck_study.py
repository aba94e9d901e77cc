"""The MAD-X study's files: its recipes and arms, the folds of the unfreezing study, the tables from rows."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from graftlm.recipe import differences
from graftlm.study.plan import load_study

FOLDER = Path(__file__).parents[2] / "benchmarks" / "bottleneck"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"bottleneck_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study_file = script("run")


@pytest.fixture(scope="module")
def exploratory():
    return script("exploratory")


def test_the_arms_differ_in_what_they_are_named_for():
    study = load_study(FOLDER / "study.yaml")
    assert not study.tune and len(study.scored()) == 4 * 5 * 5
    recipes = {study.variants[run.variant].name: study.recipe_of(run) for run in study.scored() if run.seed == 0}
    assert list(recipes) == ["standard", "gradual", "FUN", "alone"]
    assert [one.unfreezing.schedule for one in recipes.values()] == ["standard", "gradual", "fisher", "standard"]
    for name, one in recipes.items():
        stacked = set() if name == "alone" else set(study_file.NOVELS)
        assert set(one.adapter.language_adapters) == stacked
        assert set(one.data.test) == set(study_file.NOVELS)
        assert (one.adapter.kind, one.adapter.reduction_factor, one.training.epochs) == ("pfeiffer", 16, 3)


def test_each_language_has_its_own_text_and_folder(tmp_path):
    (tmp_path / "language.yaml").write_text((FOLDER / "language.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for tag in study_file.NOVELS:
        recipe = study_file.language_recipe(tmp_path, tag)
        assert recipe.folder == tmp_path / "languages" / f"language-{tag}"
        assert recipe.data.train.path == f"novels/train.{tag}.jsonl" and list(recipe.data.test) == [tag]
        assert recipe.adapter.invertible and recipe.adapter.kind == "pfeiffer"


def test_the_tables_are_made_of_the_rows(tmp_path):
    def row(variant, seed, right):
        right = dict.fromkeys(study_file.NOVELS, right)
        cost = {"train_seconds": 1.0}
        return {
            "variant": variant,
            "fold": 1,
            "seed": seed,
            "dev": 0.5,
            "ids": [1, 2, 3, 4],
            "right": right,
            "cost": cost,
        }

    rows = [row("standard", seed, "1000") for seed in range(2)] + [row("alone", seed, "1110") for seed in range(2)]
    (tmp_path / "rows.study.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    change = {"value": 0.5, "low": 0.4, "high": 0.6}
    learned = {"language": "dan", "before": 6.0, "after": 5.5, "change": change, "cost": {"train_seconds": 61.2}}
    (tmp_path / "rows.languages.jsonl").write_text(json.dumps(learned) + "\n")
    found = study_file.tables(tmp_path)
    assert "| dan | 6.00 | 5.50 | -0.50 (-0.60 to -0.40) | 61 |" in found
    assert "| **alone, mean of the five** | +50.00 |" in found
    assert "| alone, dan | +50.00 |" in found


def test_the_rows_that_are_committed_give_the_tables_of_the_readme():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in study_file.tables(FOLDER).splitlines():
        assert line in readme, "python benchmarks/bottleneck/run.py prints the tables"


def test_the_exploratory_rows_give_the_tables_of_the_readme(exploratory):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in exploratory.tables(FOLDER).splitlines():
        assert line in readme, "python benchmarks/bottleneck/exploratory.py prints the tables"


def test_whole_books_of_a_testament_are_held_out_and_nothing_is_lost(exploratory, tmp_path):
    verses = [("MAT", 1), ("MAT", 1), ("MAT", 2), ("GAL", 1), ("EPH", 1), ("REV", 1)]
    for tag in exploratory.CODES:
        with gzip.open(tmp_path / f"{tag}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, (book, chapter) in enumerate(verses):
                file.write(json.dumps({"id": f"b.{book}.{chapter}.{number}", "text": f"v{number}"}) + "\n")
    exploratory.write_testaments(tmp_path, tmp_path / "out")
    for tag in exploratory.CODES:
        for split, texts in {"train": ["v0 v1", "v2", "v5"], "dev": ["v3", "v4"]}.items():
            rows = exploratory.driver.read_rows(tmp_path / "out" / f"{split}.{tag}.jsonl")
            assert [row["text"] for row in rows] == texts
    (tmp_path / "language.yaml").write_text((FOLDER / "language.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    recipe, theirs = exploratory.testament_recipe(tmp_path, "zul"), study_file.language_recipe(tmp_path, "zul")
    assert set(differences(recipe, theirs)) == {"data.train", "data.test.zul"}
