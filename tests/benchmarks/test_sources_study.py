"""The transfer study's plan and tables, on outcomes that are made up; its paper.yaml, run on small local data."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from small import save_model
from typer.testing import CliRunner

from graftlm import SourcePool
from graftlm.cli import app
from graftlm.study.pool_build import load_tasks

FOLDER = Path(__file__).parents[2] / "benchmarks" / "sources"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


@pytest.fixture
def study(monkeypatch):
    """The study's modules, without leaving their short names behind."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import plan
    import table

    yield plan, table
    for name in ("plan", "table", "tasks"):
        sys.modules.pop(name, None)


SEEDS = (0, 1, 2)


def cells(outcomes, target="t", rows=200):
    return [
        {"target": target, "n": rows, "source": source, "seed": seed, "accuracy": value}
        for source, values in outcomes.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]


OUTCOMES = {
    "none": (0.5, 0.5, 0.5),
    "a": (0.8, 0.8, 0.8),
    "b": (0.6, 0.6, 0.6),
    "c": (0.4, 0.4, 0.4),
    "d": (0.3, 0.3, 0.9),  # the best of all with one seed, and bad with the others
}


def test_a_ranker_that_names_the_best_has_no_regret_and_one_that_does_not_has(study):
    _, table = study
    truth = table.outcomes_of(cells(OUTCOMES))["t", 200]
    good, poor = {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0}, {"a": 6.0, "b": 7.0, "c": 9.0, "d": 8.0}
    assert table.quality(good, truth)[0] == [0.0, 0.0, 0.0]
    # b, c and d are tried: d leads them with seeds 0, 2 and with 1, 2 (at .6, as b does: names break ties)
    assert table.quality(poor, truth)[0] == pytest.approx([62.5, 62.5, 25.0])
    assert table.in_sample_regret(poor, truth) == pytest.approx(25.0)
    assert table.quality(good, truth)[1][0] == pytest.approx(1.0, abs=1e-6)


def test_cells_with_one_seed_are_no_truth(study):
    _, table = study
    rows = [row for row in cells(OUTCOMES) if row["seed"] == 0 or row["source"] != "b"]
    assert table.outcomes_of(rows) == {}
    assert "no target" in table.table(rows, [])


def test_noise_and_agreement(study):
    _, table = study
    rng = np.random.default_rng(0)
    noisy = {name: tuple(0.5 + 0.02 * rng.normal(size=3)) for name in ["none", *map(str, range(300))]}
    truth = table.outcomes_of(cells(noisy))
    assert table.noise_floor(truth) == pytest.approx(2.0, rel=0.1)
    assert abs(table.agreement(truth["t", 200])) < 0.1
    assert table.agreement(
        table.outcomes_of(cells({k: v for k, v in OUTCOMES.items() if k != "d"}))["t", 200]
    ) == pytest.approx(1)


def test_the_difference_is_paired_and_its_interval_holds_it(study):
    _, table = study
    first = {target: [[1.0, 2.0, 3.0]] for target in "abcdef"}
    second = {target: [[2.0, 3.0, 4.0], [4.0, 5.0, 6.0]] for target in "abcdef"}
    assert table.difference(first, second) == pytest.approx((-2.0, -2.0, -2.0))


def test_the_table_shows_every_target_and_ranker(study):
    _, table = study
    rows = [*cells(OUTCOMES), *cells(OUTCOMES, target="u")]
    good, poor = {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0}, {"a": 6.0, "b": 7.0, "c": 9.0, "d": 8.0}
    rankers = {"esm-logme": good, "textemb": poor, "vocabulary overlap": poor}
    scores = [
        {"target": target, "n": 200, "ranker": name, "scores": found}
        for target in "tu"
        for name, found in rankers.items()
    ]
    text = table.table(rows, scores)
    lines = text.splitlines()
    assert "| regret@3 | t | u | mean | as in the paper | NDCG |" in lines
    for name in (*rankers, "best on average", "random"):
        assert any(line.startswith(f"| {name} |") for line in lines), name
    assert "| esm-logme | 0.00 | 0.00 | 0.00 | 0.00 |" in text and "against textemb, regret@3: -50.000" in text


def test_a_plan_leaves_out_what_shares_sentences(study):
    plan, _ = study
    cells = [cell.split("/") for cell in plan.PLAN.cells()]
    pairs = {(target, source) for _, target, _, _, source in cells}
    assert ("sst5", "sst2") not in pairs and ("sst5", "mr") not in pairs and ("trec", "sst2") in pairs
    assert all(target != source for target, source in pairs) and ("trec", "none") in pairs
    assert [cell[3] for cell in cells] == sorted(cell[3] for cell in cells), "seed by seed"
    assert len(set(map(tuple, cells))) == len(cells)


def hub_layout(folder, configs):
    """A data set as the hub lays it out: config → classes; words w0 … are of class 0, w20 … of class 1 and so on."""
    card = ["---", "configs:"]
    for config, classes in configs.items():
        names = [f"class {number}" for number in range(classes)]
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        card += [f"- config_name: {config}", "  data_files:"]
        for split, count in (("train", 36), ("test", 12)):
            rows = [
                {"text": f"w{20 * (n % classes) % 60 + n % 13} w{n % 7} w{n}", "label": n % classes}
                for n in range(count)
            ]
            (folder / config).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(folder / config / f"{split}-0.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def test_the_papers_commands_build_a_pool_and_rank_with_it(tmp_path, monkeypatch):
    """The commands in paper.yaml, with a tiny BERT for mBERT, few steps, and small data under the hub's names."""
    for name in ("paper.yaml", "paper-recipe.yaml"):
        shutil.copy(FOLDER / name, tmp_path)
    hub_layout(tmp_path / "stanfordnlp" / "imdb", {"plain_text": 2})
    hub_layout(tmp_path / "fancyzhx" / "ag_news", {"default": 4})
    hub_layout(tmp_path / "cardiffnlp" / "tweet_eval", {"sentiment": 3, "emotion": 4})
    model = save_model(tmp_path / "mbert")
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / "paper.yaml").read_text(encoding="utf-8")
    build, fetch, rank = re.findall(r"^#   graftlm (.*)$", text, re.MULTILINE)
    assert fetch.startswith("pool add pools/paper hub"), "what needs the hub itself is not run"

    small = [f"model={model}", "training.max_steps=4", "training.batch_size=8", "training.max_length=32"]
    command = build.replace("benchmarks/sources/", "").split()
    done = CliRunner().invoke(app, [*command, *small, "training.arguments={max_grad_norm: 1.0, use_cpu: true}"])
    assert done.exit_code == 0 and "3 of 3 source tasks are in pools/paper" in done.stdout, done.output
    pool = SourcePool.open("pools/paper")
    assert list(pool.entries) == ["imdb", "ag-news", "tweet-sentiment"] and not pool.verify()
    details = pool.load("ag-news").details
    assert pool.entries["ag-news"].architecture == "linear" and pool.entries["ag-news"].rows == 36
    assert details["pooling"] == "pooler" and details["lm_adapter"] == "none" and details["lm_learning_rate"] == 2e-5

    command = rank.replace("google-bert/bert-base-multilingual-uncased", "mbert").split()
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert {one["name"] for one in record["sources"]} == set(pool.entries) and record["classes"] == 4


def test_the_papers_settings_are_the_papers():
    build = load_tasks(FOLDER / "paper.yaml")
    assert build.base_model == "google-bert/bert-base-multilingual-uncased" and build.settings.method == "sgd"
    recipe = build.study.recipe_of(build.study.scored()[2])
    assert recipe.data.train.config == "sentiment" and recipe.adapter.method == "none"
    training = recipe.training
    assert (training.epochs, training.batch_size, training.learning_rate, training.weight_decay) == (3, 32, 2e-5, 0.01)
    assert (training.max_length, build.settings.max_texts) == (128, 10_000)


def test_the_readme_shows_the_tables_of_the_rows(study, monkeypatch):
    _, table = study
    monkeypatch.setattr(table, "DRAWS", 1)  # of the random ranker, whose lines are left out: they take a minute
    rows = {
        name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("cells", "scores")
    }
    shown = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in filter(None, table.table(**rows).splitlines()):
        assert line in shown or line.startswith("| random")
