"""The unfreezing study's files: the paper's recipe on local data in the hub's layout, the driver on made-up folds."""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest
from hub import save_xnli
from small import save_model

from graftlm.recipe import load_recipe
from graftlm.run import run_recipe
from graftlm.study.plan import load_study

FOLDER = Path(__file__).parents[2] / "benchmarks" / "unfreezing"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)

spec = importlib.util.spec_from_file_location("unfreezing_study", FOLDER / "run.py")
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)


def test_the_papers_recipe_runs_on_the_hubs_layout(tmp_path):
    recipe = load_recipe(FOLDER / "paper.yaml")
    local = save_xnli(tmp_path / "xnli", list(recipe.data.test))
    model = save_model(tmp_path / "model")
    values = recipe.values()
    moved = json.loads(json.dumps(values["data"]).replace('"facebook/xnli"', json.dumps(str(local))))
    small = recipe.changed(
        f"data={json.dumps(moved)}",
        f"model={json.dumps(str(model))}",
        f"output.folder={json.dumps(str(tmp_path / 'runs'))}",
        "unfreezing={schedule: gradual, every_n_steps: 1}",
        "training.max_steps=6",
        "training.batch_size=8",
        "training.max_length=32",  # the tiny model has no more positions
    )
    result = run_recipe(small, progress=False)
    assert {score.language for score in result.scores} == set(recipe.data.test) and len(result.zero_shot) == 14
    assert all(score.n == 9 and score.majority == pytest.approx(1 / 3) for score in result.scores)


def test_the_papers_study_is_the_papers():
    study = load_study(FOLDER / "paper-study.yaml")
    recipes = {study.variants[run.variant].name: study.recipe_of(run) for run in study.scored()}
    assert len(study.scored()) == 3 * 4
    assert {name: one.unfreezing.every_n_steps for name, one in recipes.items()} == {
        "standard": "auto",
        "gradual": 800,
        "FUN": 50,
    }
    for one in recipes.values():
        training = one.training
        assert (training.epochs, training.batch_size, training.learning_rate, training.warmup_steps) == (
            15,
            128,
            5e-4,
            0,
        )
        assert (one.adapter.r, one.adapter.alpha, one.adapter.target_modules) == (8, 8, ("query", "value"))


@pytest.fixture
def sib(tmp_path):
    """Forty sentences in the six languages, split as the official files are."""
    folder = tmp_path / "sib200_topic"
    folder.mkdir()
    rng = random.Random(1)
    ids = rng.sample(range(1000), 40)
    for code in driver.LANGUAGES.values():
        for split, some in (("train", ids[:28]), ("dev", ids[28:32]), ("test", ids[32:])):
            rows = [{"id": i, "text": f"{code} {i}", "label": i % 3, "label_name": f"c{i % 3}"} for i in some]
            with gzip.open(folder / f"{code}.{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_every_sentence_is_tested_once_and_never_trained_on_or_chosen_by_in_its_fold(sib, tmp_path):
    driver.write_folds(sib, tmp_path / "folds")
    tested = []
    for fold in range(1, 6):
        read = {}
        for path in (tmp_path / "folds" / str(fold)).glob("*.jsonl"):
            read[path.name] = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        train, dev = set(read["train.eng.jsonl"]), set(read["dev.eng.jsonl"])
        test = {tuple(ids) for name, ids in read.items() if name.startswith("test.")}
        assert len(test) == 1, "the same sentences in all languages"
        (ids,) = test
        assert not train & dev and not (train | dev) & set(ids)
        assert len(train) == 24 and len(dev) == 8 and len(train | dev | set(ids)) == 40
        tested += ids
        assert set(read) == {"train.eng.jsonl", "dev.eng.jsonl"} | {f"test.{tag}.jsonl" for tag in driver.LANGUAGES}
    assert sorted(tested) == sorted(set(tested)) and len(tested) == 40


def test_the_table_is_made_of_the_chosen_runs_alone():
    def row(variant, fold, seed, dev, right, trial=False):
        ids = list(range(10 * fold, 10 * fold + 4))
        right = dict.fromkeys(driver.LANGUAGES, right)
        cost = {"train_seconds": 1.0}
        return {
            "variant": variant, "fold": fold, "seed": seed, "dev": dev, "ids": ids, "right": right, "cost": cost,
            "trial": trial, "tuned": {},
        }  # fmt: skip

    rows = [
        row("standard", 1, 0, 0.5, "1000", trial=True),
        row("standard", 1, 0, 0.6, "1100", trial=True),  # better on dev: this one counts
        row("standard", 1, 0, 0.6, "0000", trial=True),  # equal, and named later
        row("standard", 2, 0, 0.6, "1111"),
        row("gradual", 1, 0, 0.5, "1111"),
        row("gradual", 2, 0, 0.5, "1111"),
        row("standard", 1, 1, 0.5, "0000"),  # a seed of which runs are missing
    ]
    table, seeds, _ = driver.outcomes(rows)
    assert seeds == [0]
    assert table["standard"]["deu"].tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]]
    assert table["gradual"]["ces"].mean() == 1
    assert "| **gradual, mean of the five** | +25.00 |" in driver.summary(rows)


def test_the_rows_that_are_committed_give_the_table_of_the_readme():
    rows = FOLDER / "rows.study.jsonl"
    found = driver.summary([json.loads(line) for line in rows.read_text().splitlines()])
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in found.splitlines():
        assert line in readme, "python benchmarks/unfreezing/run.py prints the table"
