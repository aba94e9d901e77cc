"""`graftlm pool build` on tiny tasks: maps against their definition, nothing twice, what fails is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from small import classification_rows, small_folder, write_rows
from typer.testing import CliRunner

import graftlm
from graftlm.cli import app
from graftlm.errors import RecipeError
from graftlm.sources.embed import Embedder
from graftlm.study.execute import Shard
from graftlm.study.pool_build import build_pool, load_tasks, texts_of

TASKS = """\
name: built
recipe: recipe.yaml
pool: pool
map: {architecture: linear}
tasks:
  red or blue: {}
  green: {data.train: green.jsonl, data.dev: null, data.test: {eng: green.jsonl}}
"""
SHORT = ["training.max_steps=4", "training.arguments={use_cpu: true}"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    small_folder(tmp_path, train=24)
    write_rows(tmp_path / "green.jsonl", classification_rows(30, 7, ("green", "red")))
    (tmp_path / "tasks.yaml").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(old, new):
    file = Path("tasks.yaml")
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def stamps(pattern):
    return {path: path.stat().st_mtime_ns for path in Path("studies/built").rglob(pattern)}


def test_tasks_become_maps_of_a_pool_and_nothing_is_done_twice(folder, caplog):
    caplog.set_level("INFO", logger="graftlm")
    build = load_tasks("tasks.yaml", SHORT)
    built = build_pool(build)
    pool = graftlm.SourcePool.open("pool")
    assert list(pool.entries) == list(built.tasks) == ["red-or-blue", "green"] and not built.skipped + built.waiting
    assert (pool.base_model, pool.entries["red-or-blue"].task) == ("model", "red or blue")
    assert "accuracy" in built.tasks["green"] and "map of 30 texts" in built.tasks["green"]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines[1:]] == [
        "[1/2] red or blue · seed 0",
        "red or blue",
        "[2/2] green · seed 0",
        "green",
    ]

    run = build.study.scored()[1]
    texts = texts_of(build.study.recipe_of(run), 10_000)
    model, tokenizer = graftlm.load(build.study.recipe_of(run).folder, tokenizer=True)
    base = Embedder("model", max_length=32)(texts)
    tuned = Embedder(model, tokenizer=tokenizer, max_length=32, pooling="pooler")(texts)
    expected = graftlm.EmbeddingSpaceMap.fit(base, tuned, base_model="model", task="green")
    assert pool.load("green").weight == pytest.approx(expected.weight, abs=1e-5)
    assert np.abs(base - tuned).max() > 1e-3, "fine-tuning has moved something"

    before = stamps("*.safetensors") | stamps("result.json")
    assert build_pool(load_tasks("tasks.yaml", SHORT)).tasks == built.tasks
    assert stamps("*.safetensors") | stamps("result.json") == before

    results = stamps("result.json")
    changed("{architecture: linear}", "{architecture: identity_low_rank, rank: 2}")
    build_pool(load_tasks("tasks.yaml", SHORT))
    assert {one.architecture for one in graftlm.SourcePool.open("pool").entries.values()} == {"identity_low_rank"}
    assert stamps("result.json") == results, "maps are fitted anew, and the runs stay"
    assert not graftlm.SourcePool.open("pool").verify()


def test_shards_divide_the_tasks_and_the_last_one_has_all(folder):
    first, second = (build_pool(load_tasks("tasks.yaml", SHORT), Shard(number, 2)) for number in (1, 2))
    assert list(first.tasks) == ["red-or-blue"] and first.waiting == ("green",)
    assert list(second.tasks) == ["red-or-blue", "green"] and not second.waiting


def test_a_task_that_fails_is_named_and_the_others_go_on(folder):
    changed("green.jsonl, data.dev", "missing.jsonl, data.dev")
    done = CliRunner().invoke(app, ["pool", "build", "tasks.yaml", *SHORT])
    assert done.exit_code == 1 and "1 of 2 source tasks are in pool" in done.stdout
    assert "1 without a map" in done.stderr and "green: " in done.stderr and "missing.jsonl" in done.stderr
    changed("missing.jsonl, data.dev", "green.jsonl, data.dev")
    again = CliRunner().invoke(app, ["pool", "build", "tasks.yaml", *SHORT])
    assert again.exit_code == 0 and "2 of 2 source tasks are in pool" in again.stdout, again.stderr

    write_rows(
        folder / "target.jsonl", [row | {"label": int(row["label"] == "red")} for row in classification_rows(40, 3)]
    )
    arguments = ["rank", "model", "target.jsonl", "--text", "text", "--pool", "pool", "--json"]
    ranked = CliRunner().invoke(app, arguments)
    assert {one["name"] for one in json.loads(ranked.stdout)["sources"]} == {"red-or-blue", "green"}, ranked.stderr


def test_an_entry_of_another_task_is_not_replaced(folder):
    build_pool(load_tasks("tasks.yaml", SHORT))
    other = graftlm.SourcePool.open("pool")
    esm = other.load("green")
    other.add(
        graftlm.EmbeddingSpaceMap("model", "org/green", bias=esm.bias, weight=esm.weight), name="green", replace=True
    )
    built = build_pool(load_tasks("tasks.yaml", SHORT))
    assert "another task: org/green" in built.skipped[0].problem and list(built.tasks) == ["red-or-blue"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("map: {architecture: linear}", "map: {architecture: linear, rank: 3}", "low-rank map has a rank"),
        ("map: {architecture: linear}", "map: {archtecture: linear}", "tasks.yaml:4"),
        ("red or blue: {}", "red or blue: {model: starter}", "one base model"),
        ("red or blue: {}", "red or blue: {task: token_classification}", "texts with a label"),
        ("red or blue: {}", "red or blue: {training.epoch: 2}", "training.epoch"),
        ("recipe: recipe.yaml", "recipe: none.yaml", "none.yaml"),
        ("pool: pool\n", "", "pool"),
    ],
)
def test_what_makes_no_sense_is_an_error(folder, old, new, message):
    changed(old, new)
    with pytest.raises(RecipeError, match=message):
        load_tasks("tasks.yaml")


def test_texts_are_drawn_when_there_are_too_many(folder):
    recipe = load_tasks("tasks.yaml").study.recipe
    every, some = texts_of(recipe, 10_000), texts_of(recipe, 5)
    assert len(every) == 24 and len(some) == 5 and [text for text in every if text in some] == some
    assert os.fspath(recipe.folder) == "runs/small"
