"""`dropout:` in a recipe: what is set in the model that trains, and what the run folder says of it."""

import json

import pytest
from lms import save_language_model, texts, tokenizer
from small import classification_rows, small_folder, small_recipe
from torch import nn
from transformers import BertForMaskedLM

from graftlm.errors import ModelError, RecipeError
from graftlm.evaluation.report import write_report
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe
from graftlm.run import run_recipe
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.landscape import loss_landscape

FULL = "adapter={method: none}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_folder(tmp_path_factory.mktemp("dropout"), train=40)
    save_language_model(folder / "model", [row["text"] for row in classification_rows(40, 0)])
    return folder


def rates_in(model: nn.Module) -> dict[str, float]:
    return {
        n.removeprefix("bert."): m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and n != "dropout"
    }


def test_a_run_measures_sets_and_writes_down(folder):
    recipe = small_recipe(folder, FULL, "dropout=guided", "training.max_steps=4", "data.dev=null", "name=guided")
    prepared = prepare(recipe, recipe.folder, progress=False)
    rates, applied = prepared.dropout
    assert rates_in(prepared.trainer.model) == {row.module: row.new for row in applied.rows}
    assert sorted(rates_in(prepared.trainer.model).values()) == pytest.approx([0.1 * i / 9 for i in range(10)])
    assert not (recipe.folder / "dropout.json").exists()
    run_recipe(recipe, progress=False)
    written = json.loads((recipe.folder / "dropout.json").read_text())
    assert [row["module"] for row in written["applied"]] == [row.module for row in applied.rows]
    assert GuidedDropout.load(recipe.folder / "dropout.json").rates == rates.rates
    assert "dropout:" in (recipe.folder / "recipe.resolved.yaml").read_text()
    again = prepare(recipe, recipe.folder, progress=False)  # as a resumed run: read, not measured
    assert again.dropout[0].tensors == GuidedDropout.load(recipe.folder / "dropout.json").tensors


def test_rates_and_texts_from_files(folder):
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(30)))
    measured = GuidedDropout.estimate(
        folder / "model", texts(30), max_length=32, seed=0, progress=False, check_head=False
    )
    measured.save(folder / "rates.json")
    options = ("training.max_steps=2", "data.dev=null", FULL)
    shuffled = small_recipe(folder, *options, "dropout={schedule: shuffled, rates: rates.json}", "seed=3")
    model = prepare(shuffled, folder / "none", progress=False).trainer.model
    assert list(rates_in(model).values()) != list(measured.rates.values())
    wanted = {"embeddings.dropout": measured.using("shuffled", seed=3).rates["embeddings"]}
    assert rates_in(model)["embeddings.dropout"] == wanted["embeddings.dropout"]
    moved = shuffled.relocated(folder / "runs" / "deep")
    assert moved.dropout.rates == "../../rates.json"
    from_texts = small_recipe(folder, *options, "dropout={texts: more.jsonl, mean: 0.2}")
    with pytest.raises(ModelError, match="freshly initialised"):  # random words: it predicts them no better than chance
        prepare(from_texts, folder / "none", progress=False)
    assert from_texts.relocated(folder / "runs").dropout.texts.path == "../more.jsonl"


def test_a_run_measures_on_the_device_that_it_trains_on(folder, monkeypatch):
    estimate, devices = GuidedDropout.estimate, []

    def seen(*args, device, **kwargs):
        devices.append(device)
        return estimate(*args, device=device, **kwargs)

    monkeypatch.setattr(GuidedDropout, "estimate", seen)
    recipe = small_recipe(folder, FULL, "dropout=guided", "training.max_steps=2", "data.dev=null", "name=device")
    prepared = prepare(recipe, recipe.folder, progress=False)
    assert devices == [prepared.trainer.args.device]


def test_a_file_keeps_its_schedule_unless_the_recipe_says_otherwise(folder):
    """Through the resolved recipe too, which writes every key."""
    measured = GuidedDropout.estimate(folder / "model", texts(30), progress=False, check_head=False)
    measured.using(upper=0.5, lower=0.3).save(folder / "high.json")
    options = ("training.max_steps=2", "data.dev=null", FULL)
    rank = {row["block"]: row["rank"] for row in measured.rows()}["embeddings"]
    for more, lowest, highest, place in (
        ("", 0.3, 0.5, 9 - rank),
        (", upper: 0.4", 0.3, 0.4, 9 - rank),
        (", schedule: reversed", 0.3, 0.5, rank),
    ):
        recipe = small_recipe(folder, *options, f"dropout={{rates: high.json{more}}}")
        (folder / "again.yaml").write_text(recipe.resolved())
        for one in (recipe, load_recipe(folder / "again.yaml")):
            found = rates_in(prepare(one, folder / "none", progress=False).trainer.model)
            wanted = [lowest + (highest - lowest) * i / 9 for i in range(10)]
            assert sorted(found.values()) == pytest.approx(wanted)
            assert found["embeddings.dropout"] == pytest.approx(wanted[place])


def test_lora_dropouts(folder):
    recipe = small_recipe(folder, "dropout={target: adapters}", "training.max_steps=2", "data.dev=null")
    model = prepare(recipe, folder / "none", progress=False).trainer.model
    found = sorted(m.p for n, m in model.named_modules() if "lora_dropout." in n)
    assert found == pytest.approx([0.1 * i / 5 for i in range(6)])


@pytest.mark.parametrize(
    ("architecture", "query", "value"),
    [("bert", "attention.self.query", "attention.self.value"), ("llama", "self_attn.q_proj", "self_attn.v_proj")],
)
def test_the_report_of_a_run_shows_the_adapters(folder, architecture, query, value):
    if not (model := folder / f"model-{architecture}").exists():
        save_language_model(model, [row["text"] for row in classification_rows(40, 0)], architecture)
    recipe = small_recipe(
        folder,
        f"model=./{model.name}",
        "dropout={target: adapters}",
        "training.max_steps=2",
        "data.dev=null",
        f"name={architecture}",
    )
    run_recipe(recipe, progress=False)
    applied = json.loads((recipe.folder / "dropout.json").read_text())["applied"]
    assert [row["new"] for row in sorted(applied, key=lambda row: row["score"])] == pytest.approx(
        [0.1 * i / 5 for i in range(5, -1, -1)]
    )
    page = (recipe.folder / "report.html").read_text()
    assert "6 blocks; the measured rate" in page
    for row in applied:
        assert f"{row['block']}</bdi></th><td>{row['score']:.2e}</td><td>{row['rank']}</td><td>{row['new']:.4f}" in page
    assert page.count(f"{query}</bdi>") == page.count(f"{value}</bdi>") == 3
    assert "ffn_output" not in page


def test_a_model_without_its_head_stops_the_run_before_it_begins(tmp_path):
    folder = small_folder(tmp_path)
    with pytest.raises(ModelError, match=r"freshly initialised(?s:.*)cls\.predictions"):
        run_recipe(small_recipe(folder, "dropout=guided"), progress=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout: {schedul: guided}", "schedul"),
        ("dropout: random", "guided"),
        ("dropout: {upper: 1.5}", "upper"),
        ("dropout: {texts: {path: a.jsonl, splitt: b}}", "splitt"),
        ("dropout: {rates: r.json, texts: a.jsonl, max_examples: 7}", "delete texts and max_examples, or rates"),
    ],
)
def test_mistakes_in_the_key(tmp_path, text, message):
    from small import RECIPE

    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}{text}\n")
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:\d+(?s:.*){message}"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_report_shows_rates_and_landscape(folder):
    recipe = small_recipe(folder, FULL, "dropout=shuffled", "training.max_steps=2", "data.dev=null", "name=shown")
    run_recipe(recipe, progress=False)
    page = (recipe.folder / "report.html").read_text()
    assert "Which dropout was set where?" in page
    assert "Schedule: shuffled; mean rate 0.0500." in page
    assert "encoder.layer.2.ffn_output" in page
    assert "How steep is the pretraining loss" not in page
    model = BertForMaskedLM.from_pretrained(folder / "model")
    rates = GuidedDropout.load(recipe.folder / "dropout.json")
    found = loss_landscape(model, texts(4), rates, tokenizer=tokenizer(), points=3, progress=False)
    found.save(recipe.folder / "landscape.json")
    page = write_report(recipe.folder).read_text()
    assert "How steep is the pretraining loss" in page
    assert f"{found.radius['top']:.1f} for the half with the most information" in page
    assert page.count('role="img"') % 2 == 0
