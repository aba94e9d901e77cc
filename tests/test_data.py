"""Splits: files and hub folders to checked columns; every malformed row is named."""

import gzip
import json
import math
from pathlib import Path

import pytest
from small import write_rows

from graftlm.data import Answers, Labels, load_split
from graftlm.errors import DataError
from graftlm.recipe import Recipe, Source, load_recipe
from graftlm.starter import starter_path

TEXTS = ["a plain text", 'a "quoted", text', "Ünïcödé\u2028 – 多语言"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, ["yes", "no", "yes"], strict=True)]


@pytest.fixture
def recipe(tmp_path):
    def recipe(task: str = "classification", **data: object) -> Recipe:
        values = {"train": "x.jsonl", "test": {"eng": "x.jsonl"}, **data}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"name": "x", "task": task, "data": values}), encoding="utf-8")
        return load_recipe(path)

    return recipe


def read(recipe: Recipe, path: str, role: str = "train", **source: str):
    return load_split(recipe, Source(path=path, **source), role)


def refused(recipe: Recipe, path: str, role: str = "train", **source: str) -> str:
    with pytest.raises(DataError) as caught:
        read(recipe, path, role, **source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "folder/a.jsonl"])
def test_every_kind_of_file_gives_the_same_split(recipe, tmp_path, name):
    write_rows(tmp_path / name, ROWS)
    split = read(recipe(), name)
    assert split.texts == TEXTS
    assert split.labels == ["yes", "no", "yes"]
    assert split.ids == [0, 1, 2]
    assert split.texts_b is None
    assert split.origin == name


def test_a_spreadsheets_byte_order_mark_is_no_part_of_the_first_column(recipe, tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\r\nsome text,yes\r\n".encode())
    assert read(recipe(), "a.csv").texts == ["some text"]


def test_columns_and_ids(recipe, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"n": "q1", "premise": "p", "hypothesis": "h", "gold": 1, "rest": None}])
    split = read(recipe(text="premise", text_b="hypothesis", label="gold", id="n"), "a.jsonl")
    assert (split.ids, split.texts, split.texts_b, split.labels) == (["q1"], ["p"], ["h"], ["1"])


def test_a_folder_in_the_hubs_layout(recipe, tmp_path):
    """What `load_dataset("owner/name", config, split=…)` does for a hub id, from a local copy of such a repository."""
    hub = tmp_path / "hub"
    for config in ("eng", "deu"):
        write_rows(hub / config / "train.jsonl", [{"text": f"{config} one", "label": "b"}])
        write_rows(hub / config / "validation.jsonl", [{"text": f"{config} two", "label": "a"}])
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "validation"))
        for config in ("eng", "deu")
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert read(recipe(), "hub", config="deu").texts == ["deu one"]
    assert read(recipe(), "hub", role="dev", config="eng").texts == ["eng two"], "dev is the hub's validation"
    assert read(recipe(), "hub", role="test", config="eng", split="train").texts == ["eng one"]
    message = refused(recipe(), "hub", config="fra")
    assert "data.train" in message
    assert "fra" in message
    assert "eng" in message, "names the configurations that there are"
    message = refused(recipe(), "hub", role="test", config="eng")
    assert "split test" in message


def test_class_labels_of_the_hub_become_names(recipe, tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "hub").mkdir()
    made.to_parquet(tmp_path / "hub" / "train.parquet")
    split = read(recipe(), "hub")
    assert split.labels == ["pos", "neg"]
    assert Labels.of_training("classification", split).names == ("neg", "pos"), "the declared order, not the alphabet"

    hidden = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    hidden.to_parquet(tmp_path / "hub" / "test.parquet")
    assert "row 1" in refused(recipe(), "hub", role="test")


def test_a_hub_id_without_network_is_a_data_error(recipe):
    assert "cannot be loaded" in refused(recipe(), "nobody/nothing-of-this-name")


def test_starter_files_and_no_way_out(recipe):
    split = read(recipe(id="id"), "starter:messages/dev.eng.jsonl")
    assert len(split) >= 100
    assert len(set(split.ids)) == len(split)
    assert "starter:messages/dev.eng.jsonl" in refused(recipe(), "starter:messages/dev.xyz.jsonl"), (
        "lists what there is"
    )
    with pytest.raises(DataError, match="leads out"):
        starter_path("starter:../errors.py")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a", "label": "x"}\n{"text": ', ["a.jsonl, line 2", "not JSON"]),
        ('["a"]\n', ["a.jsonl, line 1", "one JSON object"]),
        ("\n\n", ["a.jsonl", "no row"]),
        ('{"text": "a", "lable": "x"}', ["a.jsonl, row 1", "no column 'label'", "text, lable", "data.label"]),
        ('{"text": "a", "label": "x"}\n{"text": " ", "label": "x"}', ["a.jsonl, row 2", "'text' is empty"]),
        ('{"text": null, "label": "x"}', ["a.jsonl, row 1", "not text", "None"]),
        ('{"text": 3, "label": "x"}', ["a.jsonl, row 1", "not text", "3"]),
        ('{"text": "a", "label": null}', ["a.jsonl, row 1", "no label"]),
        ('{"text": "a", "label": NaN}', ["a.jsonl, row 1", "no label"]),
        ('{"text": "a", "label": ""}', ["a.jsonl, row 1", "no label"]),
        ('{"text": "a", "label": 0.5}', ["a.jsonl, row 1", "0.5", "task: regression"]),
        ('{"text": "a", "label": ["x"]}', ["a.jsonl, row 1", "name or a whole number"]),
    ],
)
def test_malformed_rows_are_named(recipe, tmp_path, content, expected):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    message = refused(recipe(), "a.jsonl")
    for part in expected:
        assert part in message


def test_malformed_files_are_named(recipe, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é", "label": "x"}'.encode("latin-1"))
    assert "latin.jsonl: the file is not UTF-8" in refused(recipe(), "latin.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text("{}", encoding="utf-8")
    assert "plain.jsonl.gz: the file is not whole gzip" in refused(recipe(), "plain.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": "x"}\n' * 500)[:-20])
    assert "cut.jsonl.gz: the file is not whole gzip" in refused(recipe(), "cut.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "a.parquet: this is not parquet" in refused(recipe(), "a.parquet")
    (tmp_path / "a.csv").write_text("text,label\nHello, world,x\n", encoding="utf-8")
    assert "a.csv, line 2" in refused(recipe(), "a.csv")
    (tmp_path / "short.csv").write_text("text,label\nHello\n", encoding="utf-8")
    assert "short.csv, line 2" in refused(recipe(), "short.csv")
    assert "no such file" in refused(recipe(), "none.jsonl")
    assert "no such file" in refused(recipe(), "./no/such/folder")
    assert "hub data sets" in refused(recipe(), "a.csv", split="train")


def test_labels_come_from_training_and_unknown_ones_are_refused(recipe, tmp_path):
    numbers = [{"text": "a", "label": number} for number in (10, 9, 2, 9)]
    train = read(recipe(), write_rows(tmp_path / "train.jsonl", numbers).name)
    labels = Labels.of_training("classification", train)
    assert labels.names == ("2", "9", "10"), "numbers by value"
    assert labels.ids == {"2": 0, "9": 1, "10": 2}
    test = read(recipe(), write_rows(tmp_path / "test.csv", [*numbers, {"text": "b", "label": 3}]).name, "test")
    with pytest.raises(DataError, match=r"test\.csv, row 5.*\n.*'3'\n.*2, 9, 10"):
        labels.check("classification", test)
    one = read(recipe(), write_rows(tmp_path / "one.jsonl", numbers[:1]).name)
    with pytest.raises(DataError, match="at least two labels"):
        Labels.of_training("classification", one)


def test_regression_labels_are_finite_numbers(recipe, tmp_path):
    write_rows(tmp_path / "a.csv", [{"text": "a", "label": "0.25"}, {"text": "b", "label": -3}])
    assert read(recipe("regression"), "a.csv").labels == [0.25, -3.0]
    for bad in ("NaN", '"x"', "null", "true", "1e999", "[1]"):
        rows = f'{{"text": "a", "label": 1}}\n{{"text": "a", "label": {bad}}}'
        (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
        message = refused(recipe("regression"), "b.jsonl")
        assert "b.jsonl, row 2" in message
        assert "finite number" in message


def test_multi_label(recipe, tmp_path):
    write_rows(tmp_path / "a.csv", [{"text": "a", "label": "joy|fear"}, {"text": "b", "label": ""}])
    split = read(recipe("multi_label", label_separator="|"), "a.csv")
    assert split.labels == [["joy", "fear"], []]
    assert Labels.of_training("multi_label", split).names == ("fear", "joy")
    assert "label_separator" in refused(recipe("multi_label"), "a.csv")


def test_token_classification(recipe, tmp_path):
    tokens = recipe("token_classification", text="tokens", label="tags")
    write_rows(tmp_path / "a.jsonl", [{"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]}])
    split = read(tokens, "a.jsonl")
    assert (split.texts, split.labels) == ([["Ann", "left"]], [["B-PER", "O"]])
    for row, expected in [
        ({"tokens": ["Ann"], "tags": ["O", "O"]}, "1 words, 2 labels"),
        ({"tokens": "Ann left", "tags": ["O", "O"]}, "not a list of words"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["Ann"], "tags": "O"}, "not a list of labels"),
    ]:
        write_rows(tmp_path / "b.jsonl", [row])
        message = refused(tokens, "b.jsonl")
        assert expected in message
        assert "b.jsonl, row 1" in message


def test_question_answering(recipe, tmp_path):
    columns = {"text": "question", "text_b": "context", "label": "answers"}
    row = {"question": "who?", "context": "Ann met Bob.", "answers": {"text": ["Bob"], "answer_start": [8]}}
    write_rows(tmp_path / "a.jsonl", [row, row | {"answers": {"text": [], "answer_start": []}}])
    squad = recipe("question_answering", **columns)
    assert read(squad, "a.jsonl").labels == [Answers(("Bob",), (8,)), Answers((), ())]

    write_rows(tmp_path / "b.jsonl", [row | {"answers": "Bob", "start": 8}])
    assert read(recipe("question_answering", **columns, answer_start="start"), "b.jsonl").labels[0].starts == (8,)
    assert read(squad, "b.jsonl", "test").labels == [Answers(("Bob",))], "a test needs no positions"
    assert "position of the answer" in refused(squad, "b.jsonl", "train")

    write_rows(tmp_path / "c.jsonl", [row | {"answers": {"text": ["Bob"], "answer_start": [7]}}])
    assert "c.jsonl, row 1: the answer does not stand at its position" in refused(squad, "c.jsonl")
    write_rows(tmp_path / "d.jsonl", [row | {"answers": 3}])
    assert "holds no answers" in refused(squad, "d.jsonl")
    assert "text_b: context" in refused(recipe("question_answering", text="question"), "a.jsonl")


def test_nothing_is_lost_between_parquet_and_nan(recipe, tmp_path):
    """A missing label in a parquet column of numbers arrives as NaN or None, never as a class."""
    for missing in (None, math.nan):
        write_rows(tmp_path / "a.parquet", [{"text": "a", "label": missing}])
        assert "a.parquet, row 1" in refused(recipe(), "a.parquet")


@pytest.mark.parametrize("path", sorted(Path(starter_path("messages")).glob("*.jsonl")), ids=lambda path: path.name)
def test_the_starter_messages_are_readable(recipe, path):
    assert len(read(recipe(id="id"), f"starter:messages/{path.name}")) > 0
