"""Recipes with neutral residues and domain mixing: the stream, the gradient, what is measured, what is refused."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from adapters.neutrals import randomised, reference, weights_of
from adapters.test_injected_loss import gradients, predicting, term_by_hand
from raw import chain, raw_folder, raw_recipe
from small import write_rows
from tiny import FIRST_WORD, PAD, tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

import graftlm.prepare
import graftlm.trainer
from graftlm.check import check
from graftlm.cli import app
from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.neutral_run import penalty_size
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe
from graftlm.run import run_recipe

SETTINGS = (
    "mixing={share: 0.25, data: replay.jsonl}",
    "adapter={method: neutral_residues, penalty_weight: 20}",
)


def folder_of(path, task="causal_lm", architecture="llama"):
    folder = raw_folder(path, task, architecture, dropout=0.0)
    write_rows(folder / "replay.jsonl", [{"text": text} for text in chain(9, 5, first=30)])
    return folder


def recipe_of(folder, *overrides):
    return raw_recipe(folder, *SETTINGS, *overrides)


def recorded(seen):
    """Runs keep what they train on: (step, domains, ids)."""

    class Recorded(graftlm.trainer._InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append((self.state.global_step, inputs["domain"].tolist(), inputs["input_ids"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recorded


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, and the batches that it saw."""
    folder, seen = folder_of(tmp_path_factory.mktemp("neutral")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graftlm.trainer, "_InOrder", recorded(seen))
        run_recipe(recipe_of(folder, "training.eval_steps=5"), progress=False)
    return folder, seen


def test_the_share_is_exact_over_the_run_and_domains_are_those_of_the_texts(made):
    _, seen = made
    domains = [domain for _, batch, _ in seen for domain in batch]
    rows = [[token for token in ids if token != PAD] for _, _, batch in seen for ids in batch]
    new = [ids for ids, domain in zip(rows, domains, strict=True) if domain]
    assert abs(len(domains) - len(new) - 0.25 * len(domains)) <= 0.5
    times = Counter(tuple(ids) for ids in new)
    assert sum(count % 3 != 0 for count in times.values()) <= 1, "each new block once an epoch, but for rounding"
    first_old = FIRST_WORD + 30  # w30 is the first word of the old language
    for ids, domain in zip(rows, domains, strict=True):
        words = [token for token in ids if token >= FIRST_WORD]
        assert all((token < first_old) == bool(domain) for token in words)


def test_a_run_that_crashed_sees_the_rest_of_the_same_stream(made, tmp_path, monkeypatch):
    _, stream = made
    folder, seen = folder_of(tmp_path), []
    recipe = recipe_of(folder, "training.eval_steps=5")
    monkeypatch.setattr(graftlm.trainer, "_InOrder", recorded(seen))

    class TrainingClock(graftlm.prepare.TrainingClock):  # the same name: checkpoints list callbacks by it
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 13:
                raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run_recipe(recipe, progress=False)
    assert seen == stream[:13]
    seen.clear()
    run_recipe(recipe, progress=False)
    assert seen == stream[10:], "from the last checkpoint"


def test_the_gradient_of_a_run_is_that_of_the_loss_and_the_term(tmp_path):
    folder = folder_of(tmp_path)
    prepared = prepare(recipe_of(folder, "training.batch_size=16"), tmp_path / "run", progress=False)
    trainer, model = prepared.trainer, randomised(prepared.loaded.model)
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < int(batch["domain"].sum()) < 16
    items = 3 * int(predicting(batch).sum())  # of an optimizer step that has more batches
    trainer.compute_loss(model.train(), dict(batch), num_items_in_batch=torch.tensor(items)).backward()
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights_of(model).items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with reference(base, weights, "llama") as seen:
        logits = base(**inputs).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    share = model.peft_config["default"].original_share
    term = term_by_hand(seen, predicting(batch), batch["domain"], share=share)
    (loss / items + 20 / 3 * term).backward()
    found = gradients(model)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-3, atol=1e-6)


def test_result_log_adapter_gates_and_report(made):
    folder = made[0] / "runs" / "causal_lm"
    result = Result.read(folder)
    assert result.scores[0].change.low > 0 and set(result.forgetting) == {"eng"} and result.closed_gates == ()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["penalty"] >= 0 for row in log if "loss" in row) and any(row.get("penalty", 0) > 0 for row in log)
    gates = json.loads((folder / "gates.json").read_text(encoding="utf-8"))
    assert [(row["domain"], row["layer"]) for row in gates["rows"]] == [
        (language, f"model.layers.{layer}.mlp") for language in ("dan", "eng") for layer in range(3)
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Where does the adapter speak?" in page and "English (known before)" in page
    assert f"{100 * gates['rows'][0]['open']:.1f}" in page
    assert "neutral residues" in page
    mix = prepare(recipe_of(made[0]), folder / "again", progress=False).trainer.train_dataset
    tokens = Counter()
    for row in map(mix.__getitem__, range(3 * len(mix))):
        tokens[row["domain"]] += sum(label != -100 for label in row["labels"][1:])
    share = load(folder).peft_config["default"].original_share
    assert share == pytest.approx(tokens[0] / tokens.total()) and share != 0.25


def test_a_gate_that_stays_closed_is_named_without_a_penalty_too(tmp_path, caplog):
    folder = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():  # what its gate reads is zero
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    model.save_pretrained(folder / "model")
    recipe = raw_recipe(folder, "adapter={method: neutral_residues, penalty_weight: 0}", "training.max_steps=3")
    with pytest.warns(UserWarning, match=r"so that these learn nothing: model\.layers\.1\.mlp"):
        result = run_recipe(recipe, progress=False)
    assert result.closed_gates == ("model.layers.1.mlp",)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("model.layers.1.mlp; a smaller training.learning_rate" in message for message in said)
    for page in ("report.html", "README.md"):
        assert "opens the gates of one layer" in (recipe.folder / page).read_text(encoding="utf-8")


def test_every_setting_reaches_the_adapter(tmp_path):
    settings = "penalty: l1, original_share: 0.5, activation: relu, layers_to_transform: [0, 2], gate: sigmoid"
    recipe = recipe_of(folder_of(tmp_path), f"adapter={{method: neutral_residues, {settings}}}")
    assert recipe.changed().adapter == recipe.adapter
    config = prepare(recipe, tmp_path / "run", progress=False).loaded.model.peft_config["default"]
    assert (config.penalty, config.original_share, config.activation) == ("l1", 0.5, "relu")
    assert config.layers_to_transform == [0, 2] and config.size["blocks"] == 2
    default = recipe_of(tmp_path).adapter
    assert (default.activation, default.original_share, default.layers_to_transform) == ("silu", "auto", None)
    found = prepare(recipe_of(tmp_path, "adapter.original_share=null"), tmp_path / "run", progress=False)
    assert found.loaded.model.peft_config["default"].original_share is None
    with pytest.raises(RecipeError, match="original_share"):
        recipe_of(tmp_path, "adapter.original_share=1.5")


def test_check_shows_the_size_the_penalty_and_both_texts(tmp_path):
    folder = folder_of(tmp_path)
    found = check(recipe_of(folder))
    assert [row.split for row in found.texts] == ["train", "mixing", "dev", "test", "test"]
    assert found.texts[1].items == 9 and found.texts[1].language == "eng"
    added = sum(found.layers.values())
    assert found.size["added"] == added and abs(found.size["share"] - 0.2) < 0.02
    assert found.penalty.weight == 20 and found.penalty.term > 0 and found.penalty.gradients > 0
    twice = check(recipe_of(folder, "adapter.penalty_weight=40")).penalty
    assert twice.term == pytest.approx(found.penalty.term) and twice.loss == pytest.approx(found.penalty.loss)
    assert twice.gradients == pytest.approx(2 * found.penalty.gradients, rel=1e-3)
    shown = CliRunner().invoke(app, ["check", str(folder / "recipe.yaml"), *SETTINGS])
    assert "penalty:" in shown.output and "hidden units" in shown.output, shown.output
    assert not found.advice and "advice:" not in shown.output
    assert check(raw_recipe(folder, SETTINGS[0])).penalty is None  # LoRA with replay


def test_dropout_does_not_pass_for_the_gradient_of_the_penalty(tmp_path):
    folder = raw_folder(tmp_path, "causal_lm", "gpt2", dropout=0.1)
    write_rows(folder / "replay.jsonl", [{"text": text} for text in chain(9, 5, first=30)])
    small, large = (check(recipe_of(folder, f"adapter.penalty_weight={weight}")).penalty for weight in (0.01, 10))
    assert large.gradients == pytest.approx(1000 * small.gradients, rel=0.05)


def test_a_penalty_without_originals_cannot_be_measured(tmp_path):
    prepared = prepare(recipe_of(folder_of(tmp_path)), tmp_path / "run", progress=False)
    new = [row for row in map(prepared.trainer.train_dataset.__getitem__, range(60)) if row["domain"]]
    prepared.trainer.get_train_dataloader = lambda: [prepared.trainer.data_collator(new[:8])]
    with pytest.raises(DataError, match=r"no sequence of the original domain(.|\n)*mixing\.share"):
        penalty_size(prepared.trainer, prepared.recipe)


@pytest.mark.parametrize(("weight", "says"), [(0.01, "hardly counts"), (1e4, "outweighs the loss")])
def test_check_says_what_to_type(weight, says, tmp_path):
    folder = folder_of(tmp_path)
    shown = CliRunner().invoke(
        app, ["check", str(folder / "recipe.yaml"), *SETTINGS, f"adapter.penalty_weight={weight}"]
    )
    said = " ".join(shown.output.split())
    override = re.search(rf"advice: the penalty {says}.*(adapter\.penalty_weight=\S+): sweep", said)[1]
    found = check(recipe_of(folder, override, "data.old=[]"))
    assert found.penalty.gradients == pytest.approx(1, rel=0.06)
    assert found.advice == ("what is forgotten of the old language is not measured; to measure it: data.old=[eng]",)


@pytest.mark.filterwarnings("ignore:.*gates that no token")  # of a random model, which sees a few tokens
def test_the_page_shows_a_recipe_and_a_trainer(tmp_path):
    page = Path(__file__).parents[1] / "docs/how-to/neutral-residues.md"
    blocks = re.findall(r"```(yaml|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(blocks[0][1], encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.mixing.share == 0.1 and recipe.data.old == ("eng",) and recipe.adapter.method == "neutral_residues"
    rows = [{"input_ids": list(range(5, 9 + number % 3))} for number in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    names = {"base": tiny_model("llama", "causal_lm"), "tokenizer": tiny_tokenizer(), "args": arguments}
    names |= {"french": rows, "english": rows, "max_steps": 2, "batch_size": 4}
    exec(blocks[1][1], names)
    names["trainer"].train()
    assert ["penalty" in row for row in names["trainer"].state.log_history if "loss" in row] == [True, True]
    batch = names["collator"]([names["mix"][place] for place in range(4)])
    names |= {"labels": batch.pop("domain"), "batch": batch, "model": names["model"].train()}
    exec(blocks[2][1], names)
    assert all(p.grad is not None for p in names["model"].parameters() if p.requires_grad)


def test_what_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    with pytest.raises(RecipeError, match="there is none; write mixing"):
        raw_recipe(folder, SETTINGS[1])
    with pytest.raises(RecipeError, match=r"write task: causal_lm and mixing.* or adapter\.penalty_weight: 0"):
        raw_recipe(folder, SETTINGS[1], "task=classification", "data.old=[]")
    with pytest.raises(RecipeError, match="there is none"):
        raw_recipe(folder, SETTINGS[1], "mixing={share: 0, data: replay.jsonl}")
    assert raw_recipe(folder, "adapter={method: neutral_residues, penalty_weight: 0}").mixing is None
    with pytest.raises(RecipeError, match=r"less than half a sequence of the run(.|\n)*mixing\.share="):
        prepare(recipe_of(folder, "mixing.share=0.001"), tmp_path / "run", progress=False)
    with pytest.raises(RecipeError, match=r"the text of data\.test\.eng too"):
        recipe_of(folder, "mixing.data=test.eng.jsonl")
    assert [source.path for source in recipe_of(folder).sources()][-1] == "replay.jsonl"
    with pytest.raises(DataError, match=r"mixing\.data: there is no such file"):
        prepare(recipe_of(folder, "mixing.data=other.jsonl"), tmp_path / "run", progress=False)
