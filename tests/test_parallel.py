"""A recipe with pairs of texts: how they are joined, what each arm reads, a run of FLARE from end to end."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from small import classification_rows, save_model, small_folder, small_recipe, words, write_rows

from graftlm.check import check
from graftlm.cli import app
from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.parallel import load_pairs
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe, shipped
from graftlm.run import evaluate, run_recipe
from graftlm.study.plan import parse_variant, plan_study

RECIPE = """\
name: pairs
model: ./model
source: dan
data:
  train: train.jsonl
  dev: dev.jsonl
  test: {dan: test.dan.jsonl}
  id: id
  parallel:
    train: english/train.csv
    dev: english/dev.jsonl
    test: {dan: english/test.jsonl}
adapter: {method: flare, r: 4, alpha: 8}
training: {epochs: 3, batch_size: 8, learning_rate: 2e-2, max_length: 32}
"""
FILES = {"train": 48, "dev": 16, "test.dan": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Danish that says nothing of its label, and English, in another order, that does."""
    folder = tmp_path_factory.mktemp("pairs")
    save_model(folder / "model", initializer_range=0.5)  # a random model that tells words apart
    rng = random.Random(0)
    for seed, (name, count) in enumerate(FILES.items()):
        english = [row | {"id": number} for number, row in enumerate(classification_rows(count, seed))]
        danish = [
            {"id": row["id"], "text": " ".join(words(rng, "green", 4)), "english": row["text"], "label": row["label"]}
            for row in english
        ]
        write_rows(folder / f"{name}.jsonl", danish)
        rng.shuffle(english)
        ending = "csv" if name == "train" else "jsonl"
        write_rows(folder / "english" / f"{name.split('.')[0]}.{ending}", english)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def of(folder, *overrides):
    return small_recipe(folder, *overrides)


@pytest.mark.parametrize("overrides", [[], ["data.parallel={text: english}"]])
@pytest.mark.parametrize(("role", "name"), [("train", "train"), ("dev", "dev"), ("test", "test.dan")])
def test_files_joined_by_id_and_a_column_give_the_same_pairs(folder, overrides, role, name):
    recipe = of(folder, *overrides)
    source = {"train": recipe.data.train, "dev": recipe.data.dev, "test": recipe.data.test["dan"]}[role]
    split = load_pairs(recipe, source, role, "dan" if role == "test" else None)
    wanted = rows(folder, name)
    assert (split.ids, split.texts) == ([row["id"] for row in wanted], [row["text"] for row in wanted])
    assert split.sources == [(row["english"],) for row in wanted]


@pytest.mark.parametrize(
    ("read", "role", "columns"),
    [
        ("target", "train", ["text"]),
        ("source", "test", ["english"]),
        ("both", "train", ["text", "english"]),
        ("zero_shot", "train", ["english"]),
        ("zero_shot", "test", ["text"]),
    ],
)
def test_what_each_rival_reads(folder, read, role, columns):
    recipe = of(folder, "adapter.method=lora", f"data.parallel.read={read}")
    source = recipe.data.train if role == "train" else recipe.data.test["dan"]
    split = load_pairs(recipe, source, role, "dan")
    assert split.sources is None
    found = [split.texts, split.texts_b] if split.texts_b is not None else [split.texts]
    wanted = rows(folder, "train" if role == "train" else "test.dan")
    assert found == [[row[column] for row in wanted] for column in columns]
    assert split.labels == [row["label"] for row in wanted]


def test_the_two_texts_of_a_pair_have_a_source_each(folder, tmp_path):
    pairs = [{"a": "w1", "b": "w2", "c": "w3", "d": "w4", "label": colour} for colour in ("red", "blue")]
    write_rows(tmp_path / "train.jsonl", pairs)
    names = "data={train: train.jsonl, test: {dan: train.jsonl}, text: a, text_b: b, parallel: {text: c, text_b: d}}"
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml", [names])
    assert load_pairs(recipe, recipe.data.train, "train").sources == [("w3", "w4")] * 2
    rival = recipe.changed("adapter={method: lora}", "data.parallel.read=source")
    split = load_pairs(rival, rival.data.train, "train")
    assert (split.texts, split.texts_b) == (["w3"] * 2, ["w4"] * 2)


@pytest.mark.parametrize("read", ["fused", "target"])
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda english: english[:-2], r"no partner in english/dev(.|\n)*id 1\d?( and 1 more of 16)?"),
        (lambda english: [*english, english[0]], r"not unique(.|\n)*2 times"),
        (lambda english: [row | ({"text": ""} if row["id"] == 7 else {}) for row in english], r"id 7: .*no partner"),
        (lambda english: [{"text": row["text"]} for row in english], r"no column 'id' to join by"),
        (lambda english: [{"id": row["id"]} for row in english], r"no column 'text' with the source-language text"),
    ],
)
def test_a_missing_partner_is_an_error_with_its_id(folder, tmp_path, read, change, wanted):
    english = sorted(rows(folder / "english", "dev"), key=lambda row: row["id"])
    write_rows(tmp_path / "english" / "dev.jsonl", change(english))
    for name in ("dev.jsonl", "recipe.yaml"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    method = "flare" if read == "fused" else "lora"
    recipe = of(tmp_path, f"adapter.method={method}", f"data.parallel.read={read}")
    with pytest.raises(DataError, match=wanted):
        load_pairs(recipe, recipe.data.dev, "dev")


@pytest.mark.parametrize("method", ["flare", "lora"])
def test_a_misspelled_target_module_is_an_error(folder, tmp_path, method):
    read = "fused" if method == "flare" else "target"
    recipe = of(
        folder, f"adapter={{method: {method}, target_modules: [query, value, keyy]}}", f"data.parallel.read={read}"
    )
    with pytest.raises(RecipeError, match=r"no module of this name(.|\n)*keyy(.|\n)*key, query, value"):
        prepare(recipe, tmp_path, progress=False)


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("side", ["both", "dev", "english/dev"])
def test_items_without_an_id_are_no_partners(folder, tmp_path, side, empty):
    """One on each side would be joined, whatever they say."""
    for name in ("dev", "english/dev"):
        found = rows(folder, name)
        blank = found[3] if name == "dev" else next(row for row in found if row["id"] == 5)
        if side in ("both", name):
            blank["id"] = empty
        elif side == "english/dev":
            found = [row for row in found if row["id"] != 5]
        write_rows(tmp_path / f"{name}.jsonl", found)
    (tmp_path / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
    with pytest.raises(DataError, match=rf"row \d+: an item without an id(.|\n)*data.id: {empty!r}"):
        load_pairs(of(tmp_path), of(tmp_path).data.dev, "dev")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.parallel=null"], "data.parallel says where"),
        (["adapter.method=lora"], r"method: lora reads target, source, both or zero_shot"),
        (["data.parallel.read=target"], "only with it"),
        (["data.id=null"], "data.id names the column"),
        (["data.dev=null"], "data.parallel.dev go together"),
        (["data.test={deu: test.dan.jsonl}"], "a file for each of deu"),
        (["data.parallel={dev: english/dev.jsonl}"], "all of them or none"),
        (["data.parallel={}"], "'text' is data.text itself"),
        (["data.text_b=english"], "data.parallel.text_b go together"),
        (["task=token_classification"], r"does not read data.parallel"),
        (["adapter.fusion=sum"], "'add_relu'"),
        (["adapter.kind=pfeiffer"], "flare takes no kind"),
    ],
)
def test_keys_that_do_not_fit_each_other(folder, overrides, wanted):
    with pytest.raises(RecipeError, match=wanted):
        of(folder, *overrides)


def test_a_run_of_flare(folder):
    recipe = of(folder)
    result = run_recipe(recipe, progress=False)
    made = recipe.folder
    said = [json.loads(line) for line in (made / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load(made, tokenizer=True)
    assert model.peft_config["default"].peft_type == "FLARE"
    apart = []
    for row, one in zip(rows(folder, "test.dan"), said, strict=True):
        target, source = (tokenizer(row[column], return_tensors="pt") for column in ("text", "english"))
        sources = {f"source_{key}": source[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            scores = model(**target, **sources).logits.softmax(-1)[0].tolist()
            alone = model(**target).logits.softmax(-1)[0].tolist()
        assert one["scores"] == pytest.approx(scores, abs=1e-4)
        apart.append(abs(scores[0] - alone[0]))
    assert max(apart) > 1e-3, "without its source it says something else"
    assert evaluate(made, progress=False).scores[0].metrics == result.scores[0].metrics
    with pytest.raises(DataError, match=r"source-language version(.|\n)*data.parallel.test: \{nor"):
        evaluate(made, {"nor": str(folder / "test.dan.jsonl")}, progress=False)
    resolved = load_recipe(made / "recipe.resolved.yaml")
    assert resolved.path(resolved.data.parallel.dev.path).is_file(), "paths are seen from the run folder"
    digests = (made / "data.sha256").read_text(encoding="utf-8")
    assert "english/train.csv" in digests and "test.dan.jsonl" in digests
    assert "FLARE" in (made / "report.html").read_text(encoding="utf-8")


def test_check_shows_both_texts(folder):
    found = check(of(folder, "name=checked"))
    first = rows(folder, "train")[0]
    assert first["text"] in found.example and first["english"] in found.example
    assert found.targets == ("query", "value")
    everywhere = check(of(folder, "name=checked", "adapter.target_modules=all-linear")).targets
    assert {name.rpartition(".")[2] for name in everywhere} == {"query", "key", "value", "dense"}


def test_a_merged_run_is_the_start_of_another(tmp_path, capsys):
    folder = small_folder(tmp_path, train=32)
    recipe = small_recipe(folder, "training.epochs=2")
    result = run_recipe(recipe, progress=False)
    app(["merge", str(recipe.folder)], standalone_mode=False)
    merged = recipe.folder / "merged"
    assert str(merged) in capsys.readouterr().out.replace("\n", "")
    still = ("training.max_steps=1", "training.learning_rate=1e-9")
    next_one = small_recipe(folder, f"model={merged}", "name=next", *still)
    again = run_recipe(next_one, progress=False)
    assert [one.metrics for one in again.scores] == [one.metrics for one in Result.read(recipe.folder).scores]
    assert result.cost.steps > again.cost.steps == 1


def test_the_command_in_the_docs_makes_five_recipes():
    page = Path(__file__).parents[1] / "docs/how-to/flare.md"
    command = re.search(r"\$ graftlm compare flare.yaml(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[::2] == ["--variant"] * 5
    study = plan_study(load_recipe(shipped()["flare"]), variants=dict(map(parse_variant, words[1::2])), seeds=1)
    made = [study.recipe_of(run) for run in study.scored()]
    assert [recipe.data.parallel.read for recipe in made] == ["fused", "target", "source", "both", "zero_shot"]
