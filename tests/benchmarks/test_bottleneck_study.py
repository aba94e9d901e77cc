"""The MAD-X study's files: recipes, arms, tables from rows, and the paper's recipe on data in the hub's layout."""

import gzip
import importlib.util
import json
from pathlib import Path

import datasets
import pytest
from hub import save_hub_set, save_xnli
from raw import chain
from tiny import tiny_model, tiny_tokenizer

from graftlm.language_runs import language_runs
from graftlm.recipe import differences, load_recipe
from graftlm.run import run_recipe
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


def test_the_papers_recipe_runs_on_the_hubs_layout(tmp_path):
    recipe = load_recipe(FOLDER / "paper.yaml")
    languages = list(recipe.data.test)
    assert languages == list(recipe.adapter.language_adapters) and len(languages) == 15
    xnli = save_xnli(tmp_path / "xnli", languages)
    pages = [{"text": text} for text in chain(8, 0)]
    wikis = {f"20231101.{tag}": {"train": datasets.Dataset.from_list(pages)} for tag in ("en", "de")}
    wikipedia = save_hub_set(tmp_path / "wikipedia", wikis)
    tiny_model("bert", "masked_lm").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def local(values: object) -> str:
        text = json.dumps(values).replace('"facebook/xnli"', json.dumps(str(xnli)))
        return text.replace('"wikimedia/wikipedia"', json.dumps(str(wikipedia)))

    values = recipe.values()
    two = {tag: values["adapter"]["language_adapters"][tag] for tag in ("en", "de")}
    result = run_recipe(
        recipe.changed(
            f"data={local(values['data'] | {'test': {tag: values['data']['test'][tag] for tag in two}})}",
            f"adapter.language_adapters={local(two)}",
            "adapter.language_training.training={max_steps: 2, max_length: 16, precision: float32}",
            f"model={json.dumps(str(tmp_path / 'model'))}",
            f"output.folder={json.dumps(str(tmp_path / 'runs'))}",
            "unfreezing={schedule: gradual, every_n_steps: 1}",
            "training.max_steps=6",
            "training.batch_size=8",
            "training.max_length=32",  # the tiny model has no more positions
        ),
        progress=False,
    )
    assert [score.language for score in result.scores] == ["en", "de"] and len(result.zero_shot) == 1
    german = load_recipe(tmp_path / "runs" / "language-de" / "recipe.resolved.yaml")
    assert (german.training.max_steps, german.training.batch_size, german.training.learning_rate) == (2, 64, 1e-4)
    assert german.adapter.invertible and german.adapter.reduction_factor == 2


def test_the_papers_study_is_the_papers():
    study = load_study(FOLDER / "paper-study.yaml")
    recipes = {study.variants[run.variant].name: study.recipe_of(run) for run in study.scored()}
    assert len(study.scored()) == 4 * 4
    every = {name: one.unfreezing.every_n_steps for name, one in recipes.items()}
    assert every == {"standard": "auto", "gradual": 800, "FUN": 50, "alone": "auto"}
    for name, one in recipes.items():
        training = one.training
        assert (training.epochs, training.batch_size, training.learning_rate) == (15, 128, 5e-4)
        assert (one.adapter.kind, one.adapter.reduction_factor) == ("pfeiffer", 16)
        runs = language_runs(one)
        assert len(runs) == (0 if name == "alone" else 15)
        assert all((run.training.max_steps, run.training.batch_size) == (250000, 64) for run in runs.values())
        assert all(run.folder.parent == one.folder.parent for run in runs.values()), "one for all runs of the study"
