"""graftlm rank and graftlm pool, as they are typed."""

import json

import pytest
from sources.test_rank import maps, rows
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import graftlm
from graftlm import GraftError, SourcePool
from graftlm.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a pool made by `pool add`, and a target."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("bert", "base").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for number, esm in enumerate(maps(4)):
        esm.save(folder / f"esm-{number}")
    done = run("pool", "add", folder / "pool", *[folder / f"esm-{number}" for number in range(4)])
    assert done.exit_code == 0 and "4 added" in done.stdout and "holds 4" in done.stdout
    text = "".join(json.dumps(row) + "\n" for row in rows())
    (folder / "target.jsonl").write_text(text)
    named = "".join(json.dumps(row | {"label": ["no", "yes"][row["label"]]}) + "\n" for row in rows())
    (folder / "named.jsonl").write_text(named)
    return folder


def test_rank_prints_what_the_function_returns(place):
    done = run("rank", place / "model", place / "target.jsonl", "--text", "text", "--pool", place / "pool", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    found = graftlm.rank_source_tasks(
        place / "model", rows(), text_column="text", label_column="label", pool=place / "pool"
    )
    assert [one["score"] for one in record["sources"]] == pytest.approx([one.score for one in found.sources], abs=1e-6)
    table = run("rank", place / "model", place / "target.jsonl", "--text", "text", "--pool", place / "pool", "--top", 2)
    assert found.sources[0].name in table.stdout and "2 more" in table.stdout and "not known" in table.stdout


def test_maps_are_scored_in_batches_where_that_is_asked_for(place):
    arguments = ("rank", place / "model", place / "target.jsonl", "--text", "text", "--pool", place / "pool", "--json")
    plain, batches = run(*arguments), run(*arguments, "--device", "cpu", "--maps-at-once", 3)
    assert batches.exit_code == 0, batches.output
    first, second = (
        [(one["name"], one["score"]) for one in json.loads(done.stdout)["sources"]] for done in (plain, batches)
    )
    assert [name for name, _ in first] == [name for name, _ in second]
    assert [score for _, score in first] == pytest.approx([score for _, score in second], abs=1e-8)
    refused = run(*arguments, "--device", "cuda:99")
    assert isinstance(refused.exception, GraftError) and "no such device" in str(refused.exception)


def test_labels_that_are_strings_are_numbered_where_asked(place):
    arguments = ("rank", place / "model", place / "named.jsonl", "--text", "text", "--pool", place / "pool", "--json")
    refused = run(*arguments)
    assert isinstance(refused.exception, GraftError) and "labels are strings" in str(refused.exception)
    encoded, plain = run(*arguments, "--encode"), run(*arguments[:2], place / "target.jsonl", *arguments[3:])
    scores = [[one["score"] for one in json.loads(done.stdout)["sources"]] for done in (encoded, plain)]
    assert scores[0] == scores[1]


def test_a_pool_is_listed_changed_and_verified(place, tmp_path):
    done = run("pool", "list", place / "pool")
    assert "org--task-0" in done.stdout and "4 maps for org/base, width 16" in done.stdout
    record = json.loads(run("pool", "list", place / "pool", "--json").stdout)
    assert len(record["entries"]) == 4 and record["entries"][0]["architecture"] == "linear"

    other = tmp_path / "pool"
    assert run("pool", "add", other, place / "esm-0", place / "esm-1").exit_code == 0
    assert run("pool", "verify", other).exit_code == 0
    again = run("pool", "add", other, place / "esm-0", place / "esm-2")
    assert again.exit_code == 1 and "1 added" in again.stdout and "1 skipped" in again.stderr
    assert run("pool", "add", other, place / "esm-0", "--replace").exit_code == 0
    assert run("pool", "remove", other, "org--task-0").exit_code == 0
    assert list(SourcePool.open(other).entries) == ["org--task-1", "org--task-2"]
    (other / "maps" / SourcePool.open(other).entries["org--task-1"].folder / "model.safetensors").write_bytes(b"x")
    broken = run("pool", "verify", other)
    assert broken.exit_code == 1 and "org--task-1" in broken.stderr and "1 with a problem" in broken.stdout
    (other / "index.parquet").unlink()
    rebuilt = run("pool", "verify", other, "--rebuild")
    assert rebuilt.exit_code == 1 and list(SourcePool.open(other).entries) == ["org--task-2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pool", "list", "{0}"), "no pool"),
        (("pool", "add", "{0}/pool", "{0}/nothing/at/all"), "neither a folder nor"),
        (("pool", "add", "{0}/pool", "hub"), "whose maps"),
        (("pool", "add", "{0}/pool", "org/never-downloaded"), "cannot be reached"),
        (("rank", "{0}", "{0}/none.jsonl", "--text", "text", "--pool", "{0}"), "no such file"),
        (("rank", "{0}", "org/never-downloaded", "--text", "text", "--pool", "{0}"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_done_is_an_error(arguments, message, tmp_path):
    done = run(*[one.format(tmp_path) for one in arguments])
    assert isinstance(done.exception, GraftError) and message in str(done.exception)


def test_a_pool_of_nothing_readable_is_not_made(tmp_path):
    (tmp_path / "esm").mkdir()
    done = run("pool", "add", tmp_path / "pool", tmp_path / "esm")
    assert done.exit_code == 1 and "no config.json" in done.stderr and not (tmp_path / "pool").exists()
