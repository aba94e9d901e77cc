"""The paper's recipe, against a tiny model and data in the hub's layout: no network."""

import json
import shutil
from pathlib import Path

import pytest
from lms import save_language_model
from small import classification_rows, small_recipe, write_rows

from graftlm.run import run_recipe
from graftlm.study.plan import load_study

PAPER = Path(__file__).parents[3] / "benchmarks" / "guided_dropout" / "paper.yaml"


@pytest.mark.skipif(not PAPER.exists(), reason="the benchmarks are not part of this copy")
def test_the_paper_recipe_runs(tmp_path):
    rows = classification_rows(48, 0)
    pairs = [
        {"idx": i, "sentence1": row["text"], "sentence2": row["text"], "label": row["label"]}
        for i, row in enumerate(rows)
    ]
    texts = [{"text": row["text"]} for row in classification_rows(96, 1)] + [{"text": ""}]
    for repository, config, split, content in (
        ("nyu-mll/glue", "rte", "train", pairs),
        ("nyu-mll/glue", "rte", "validation", pairs[:20]),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", texts),
    ):
        write_rows(tmp_path / repository / config / f"{split}.jsonl", content)
        splits = ("train", "validation") if config == "rte" else ("validation",)
        files = "".join(f"  - {{split: {one}, path: {config}/{one}.jsonl}}\n" for one in splits)
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        (tmp_path / repository / "README.md").write_text(card)
    save_language_model(tmp_path / "model", [row["text"] for row in texts[:-1]])
    shutil.copy(PAPER, tmp_path / "recipe.yaml")
    recipe = small_recipe(tmp_path, "model=./model", "training.max_length=32", "training.learning_rate=1e-3")
    result = run_recipe(recipe, progress=False)
    assert result.scores[0].n == 20
    assert result.cost.steps == 3 * 3  # 48 rows in batches of 18, three epochs
    written = json.loads((recipe.folder / "dropout.json").read_text())
    assert len(written["applied"]) == 10
    assert written["settled"]["examples"] <= 96
    assert max(row["new"] for row in written["applied"]) == pytest.approx(0.1)
    values = recipe.values()
    assert (values["training"]["epochs"], values["training"]["batch_size"]) == (3.0, 18)
    schedule = written["schedule"]
    assert (schedule["name"], schedule["linear_in"]) == ("guided", "rank")
    assert (schedule["upper"], schedule["lower"], schedule["mean"]) == (0.1, 0.0, None)


@pytest.mark.skipif(not PAPER.exists(), reason="the benchmarks are not part of this copy")
def test_the_papers_study_has_its_controls_and_takes_another_task():
    other = ("data.train.config=cola", "data.test.eng.config=cola", "data.text=sentence", "data.text_b=null")
    study = load_study(PAPER.with_name("paper-study.yaml"), (*other, 'data.train.split="train[:50%]"'))
    recipes = {study.variants[run.variant].name: study.recipe_of(run) for run in study.scored()}
    assert [one.dropout and one.dropout.schedule for one in recipes.values()] == ["guided", "shuffled", "uniform", None]
    assert len(study.scored()) == 4 * 5
    for recipe in recipes.values():
        assert (recipe.data.text, recipe.data.text_b, recipe.data.train.split) == ("sentence", None, "train[:50%]")
