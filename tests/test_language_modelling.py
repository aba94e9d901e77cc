"""Whole runs on raw text with tiny models: scores, the base beside them, forgetting, resuming, what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from lms import lm
from processes import group
from raw import byte_tokenizer, chain, raw_folder, raw_recipe
from safetensors.torch import load_file
from small import read_rows, run, save_model, write_rows
from tiny import ENCODERS, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer

import graftlm.prepare
import graftlm.trainer
from graftlm.check import check
from graftlm.errors import DataError, ModelError, RecipeError
from graftlm.evaluation.bits_per_byte import bits_per_byte, token_losses, windows
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.language_modelling import logits_at
from graftlm.measure.likelihood import IGNORED
from graftlm.run import evaluate


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # results are compared bit by bit
    yield
    torch.set_num_threads(before)


def texts_of(folder: Path, name: str) -> list[str]:
    return [row["text"] for row in read_rows(folder / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished causal run with a dev split and an old language."""
    folder = raw_folder(tmp_path_factory.mktemp("made"), "causal_lm", "llama")
    run(raw_recipe(folder))
    return folder


def bits_alone(model, tokenizer, text: str) -> float:
    """Bits of a document, one prefix at a time; for documents that fit into a window."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)[ids[end]] for end in range(1, len(ids))]
    return -float(sum(rows)) / math.log(2)


def test_the_scores_are_those_of_the_loaded_model_and_of_the_base(made):
    folder = made / "runs" / "causal_lm"
    result = Result.read(folder)
    assert (result.task, result.metric, result.source) == ("causal_lm", "bits_per_byte", "dan")
    model, tokenizer = load(folder, tokenizer=True)
    base = AutoModelForCausalLM.from_pretrained(made / "model").eval()
    said = read_rows(folder / "predictions.jsonl")
    for score in result.scores:
        texts = texts_of(made, f"test.{score.language}")
        size = sum(len(text.encode()) for text in texts)
        assert score.n == len(texts)
        for one, value in ((model, score.metrics["bits_per_byte"]), (base, score.base)):
            ours = bits_per_byte(one, tokenizer, texts, max_length=24, stride=8)
            assert value.value == pytest.approx(ours["bits_per_byte"].value, rel=1e-5)
        written = [row for row in said if row["language"] == score.language]
        assert [row["label"] for row in written] == [len(text.encode()) for text in texts]
        short = [(row, text) for row, text in zip(written, texts, strict=True) if len(text.split()) < 23]
        assert short
        for row, text in short:
            nats, found, tokens = row["prediction"]
            assert (found, tokens) == (len(text.encode()), len(text.split()))
            assert nats / math.log(2) == pytest.approx(bits_alone(model, tokenizer, text), rel=1e-5)
        total = sum(row["prediction"][0] for row in written) / math.log(2)
        assert score.metrics["bits_per_byte"].value == pytest.approx(total / size)
        assert score.change.value == pytest.approx(score.base.value - score.metrics["bits_per_byte"].value)
        assert score.majority is None


def test_it_learns_the_new_language_and_forgets_of_the_old_one(made):
    result = Result.read(made / "runs" / "causal_lm")
    new, old = result.scores
    assert new.is_source and not old.is_source
    assert new.change.low > 0, "paired with the base, over documents"
    assert result.forgetting == {"eng": old.change}
    assert old.change.high < 0


def test_the_checkpoint_is_the_one_that_needs_the_fewest_bits_on_dev(made):
    folder = made / "runs" / "causal_lm"
    scores = [row["eval_bits_per_byte"] for row in read_rows(folder / "log.jsonl") if "eval_bits_per_byte" in row]
    assert len(scores) == 3
    model, tokenizer = load(folder, tokenizer=True)
    ours = bits_per_byte(model, tokenizer, texts_of(made, "dev"), max_length=24, stride=8)
    assert ours["bits_per_byte"].value == pytest.approx(min(scores), rel=1e-5)
    assert Result.read(folder).selected_on == ("dan",)


def test_the_report_and_the_card_say_what_was_learned_and_forgotten(made):
    folder = made / "runs" / "causal_lm"
    page, card = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    result = Result.read(folder)
    old = result.scores[1]
    for text in (page, card):
        assert "was trained on raw text in Danish" in text
        assert (
            f"In English, which it knew before, it needs {old.metrics['bits_per_byte'].value:.3f} bits per byte" in text
        )
        assert f"{-old.change.value:.3f} more than before" in text
        assert "abels" not in text.replace("names the labels", "").replace("names of the labels", "").replace(
            "label_", ""
        )
    assert "What did it lose?" in page
    assert f"{old.base.value:.3f}" in page
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "recipe.resolved.yaml",
        "data.sha256",
        "adapter",
        "result.json",
        "predictions.jsonl",
        "log.jsonl",
        "report.html",
        "README.md",
    }, "the blocks are gone with the checkpoints"


def test_evaluate_scores_again_and_on_other_text(made, tmp_path, monkeypatch):
    folder = made / "runs" / "causal_lm"
    again, result = evaluate(folder, progress=False), Result.read(folder)
    assert again.scores == result.scores
    assert again.forgetting == result.forgetting
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", [{"text": text} for text in texts_of(made, "test.dan")[:4]])
    (score,) = evaluate(folder, {"fra": "other.jsonl"}, progress=False).scores
    assert (score.language, score.n) == ("fra", 4)
    assert score.base is not None


# ---------------------------------------------------------------- resuming


def test_a_run_that_crashed_sees_the_rest_of_the_same_stream(tmp_path, monkeypatch):
    """In the second of three epochs, between two checkpoints, with dropout, dynamic masks and tr(F) deciding."""
    settings = ("unfreezing={schedule: fisher, every_n_steps: 4}", "training.eval_steps=5", "training.masking=0.3")
    whole, broken = (raw_folder(tmp_path / name, "masked_lm", "bert") for name in ("whole", "broken"))
    seen: list[list] = []

    class Recorded(graftlm.trainer._InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append([self.state.global_step, inputs["input_ids"].tolist(), inputs["labels"].tolist()])
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(graftlm.trainer, "_InOrder", Recorded)
    run(raw_recipe(whole, *settings))
    stream, seen = seen, []
    assert len(stream) > 24

    class TrainingClock(graftlm.prepare.TrainingClock):  # the same name: checkpoints list callbacks by it
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 18:
                raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run(raw_recipe(broken, *settings))
    assert stream[:18] == seen
    seen.clear()
    run(raw_recipe(broken, *settings))
    assert seen[0][0] == 15, "from the last checkpoint"
    assert stream[15:] == seen
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl", "unfreezing.jsonl"):
        ours, theirs = ((folder / "runs" / "masked_lm" / name).read_bytes() for folder in (broken, whole))
        if name == "unfreezing.jsonl":
            ours, theirs = (
                [{**row, "seconds": 0} for row in map(json.loads, one.splitlines())] for one in (ours, theirs)
            )
        assert ours == theirs, name


# ---------------------------------------------------------------- architectures and methods


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("xlm-roberta", ()),
        ("modernbert", ("adapter.target_modules=[Wqkv]",)),
        ("gemma2", ("adapter={method: none}",)),
        ("gpt2", ("unfreezing={schedule: gradual}", "references=[standard]")),
        ("qwen3", ("training.gradient_accumulation_steps=2",)),
    ],
)
def test_every_kind_of_model_runs(architecture, settings, tmp_path, recwarn):
    task = "masked_lm" if architecture in ("xlm-roberta", "modernbert") else "causal_lm"
    folder = raw_folder(tmp_path, task, architecture)
    recipe = raw_recipe(folder, "training.max_steps=6", "data.dev=null", *settings)
    result = run(recipe)
    score = result.primary(result.scores[0])
    assert 0 < score.low < score.value < score.high
    assert result.scores[0].change.value != 0
    assert (result.scores[0].gain is not None) == ("references=[standard]" in settings)
    model, tokenizer = load(recipe.folder, tokenizer=True)
    ours = bits_per_byte(model, tokenizer, texts_of(folder, "test.dan"), task=task, max_length=24, stride=8)
    assert ours[result.metric].value == pytest.approx(score.value, rel=1e-4)


def test_step_0_equals_the_base(tmp_path):
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    result = run(raw_recipe(folder, "training.max_steps=1", "training.learning_rate=1e-30", "data.dev=null"))
    for score in result.scores:
        assert score.change.value == pytest.approx(0, abs=1e-9)


def test_check_shows_the_text_and_one_example(made, tmp_path):
    found = check(raw_recipe(made))
    train = texts_of(made, "train")
    first = found.texts[0]
    assert (first.split, first.language, first.items) == ("train", "dan", len(train))
    assert first.tokens_per_word == 1
    assert first.characters_per_token == pytest.approx(sum(map(len, train)) / sum(len(text.split()) for text in train))
    assert (first.unknown, first.truncated) == (0, 0)
    tokens = [len(text.split()) + 1 for text in train]
    assert first.windows == sum(1 + max(0, math.ceil((n - 23) / 22)) for n in tokens)
    assert found.example.startswith("[BOS] w")
    assert found.label.split()[:2] == train[0].split()[:2]
    assert found.steps == 3 * math.ceil(first.windows / 8)
    scored = list(windows(texts_of(made, "test.dan"), tiny_tokenizer(), "causal_lm", max_length=24, stride=8))
    assert found.texts[2].windows == len(scored)
    assert {one.tokens_per_word for one in found.texts} == {1}, "context counts once"
    assert all(any(label != IGNORED for label in window.labels) for window in scored)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_check_takes_its_step_in_the_precision_of_the_run(precision, made, monkeypatch):
    seen: list[bool] = []
    forward = torch.nn.Linear.forward

    def watched(self, given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, given)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    check(raw_recipe(made, f"training.precision={precision}", "training.arguments={use_cpu: true}"))
    assert seen and set(seen) == {precision == "bf16"}


def test_check_counts_hidden_tokens_too(tmp_path):
    found = check(raw_recipe(raw_folder(tmp_path, "masked_lm", "bert")))
    assert {one.tokens_per_word for one in found.texts} == {1}


def test_two_processes_read_one_stream(tmp_path):
    """Batches of the same blocks as one process with twice the batch sees, in float32: the same to rounding."""
    folder = raw_folder(tmp_path, "masked_lm", "bert", dropout=0.0)
    settings = [
        "data.dev=null",
        "training.max_steps=4",
        "training.arguments={optim: sgd}",
        "training.learning_rate=0.5",
    ]
    command = ("-m", "graftlm", "train", "recipe.yaml", "training.batch_size=4", *settings)
    for done in group(*command, folder=folder, processes=2):
        assert done.returncode == 0, done.stderr[-3000:]
    alone = raw_recipe(
        folder, "name=alone", "training.batch_size=4", "training.gradient_accumulation_steps=2", *settings
    )
    run(alone)
    file = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(folder / "runs/masked_lm" / file), load_file(alone.folder / file)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what is refused


def test_a_model_of_the_other_kind(tmp_path):
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    with pytest.raises(ModelError, match=r"(?s)causal_lm does not fit.*bert, an encoder.*task=masked_lm"):
        run(raw_recipe(folder, "task=causal_lm"))
    folder = raw_folder(tmp_path / "decoder", "causal_lm", "llama")
    with pytest.raises(ModelError, match=r"(?s)masked_lm does not fit.*llama, a decoder.*task=causal_lm"):
        run(raw_recipe(folder, "task=masked_lm"))
    tiny_model("t5", "base").save_pretrained(folder / "model")
    with pytest.raises(ModelError, match=r"(?s)does not fit.*t5, an encoder-decoder"):
        run(raw_recipe(folder))


def test_an_encoder_that_was_saved_without_its_head(tmp_path):
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    save_model(folder / "bare", "bert")
    with pytest.raises(ModelError, match=r"(?s)no language-model head.*without cls"):
        run(raw_recipe(folder, "model=./bare"))


def test_a_tokenizer_without_a_mask_token(tmp_path):
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    tiny_model("bert", "masked_lm", vocab_size=257).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    with pytest.raises(ModelError, match="no mask token"):
        run(raw_recipe(folder))


def test_text_that_is_refused_names_its_place(tmp_path):
    folder = raw_folder(tmp_path, "causal_lm", "gpt2")
    write_rows(folder / "short.jsonl", [{"text": "w1 w2"}, {"text": "w1"}])
    write_rows(folder / "column.jsonl", [{"body": text} for text in chain(2, 0)])
    (folder / "empty.jsonl").write_text("")
    for file, expected in {
        "short": "short.jsonl, row 2: a document of fewer than two tokens",
        "column": "column.jsonl, row 1: there is no column 'text'",
        "empty": "empty.jsonl: there is no text in it",
    }.items():
        for key in ("data.train", "data.test.dan"):
            with pytest.raises(DataError) as caught:
                run(raw_recipe(folder, f"{key}={file}.jsonl"))
            assert expected in str(caught.value)
    assert not (folder / "runs").exists() or not list((folder / "runs").rglob("*.json"))
    with pytest.raises(RecipeError, match="sets this itself"):
        run(raw_recipe(folder, "training.arguments={label_smoothing_factor: 0.1}"))


@pytest.mark.parametrize("architecture", [*ENCODERS, "electra"])
def test_logits_of_masked_places_alone_give_the_same_gradient(architecture):
    model = lm(architecture).double().eval()
    batch = tiny_batch("bert", "masked_lm")
    labels = batch.pop("labels")
    places = labels != IGNORED
    assert 0 < places.sum() < places.numel()

    def gradients(outputs, targets):
        token_losses("masked_lm", outputs.logits, targets)[0].sum().backward()
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return found

    whole = gradients(model(**batch), labels)
    with logits_at(model, places):
        few = model(**batch)
    assert few.logits.shape[:2] == (1, places.sum())
    for one, other in zip(gradients(few, labels[places][None]), whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert model(**batch).logits.shape[:2] == places.shape  # the hook is gone


def test_a_masked_lm_trains_on_the_logits_of_masked_tokens_alone_and_learns_the_same(tmp_path, monkeypatch):
    calls: list[int] = []

    def counted(model, places):
        calls.append(int(places.sum()))
        return logits_at(model, places)

    monkeypatch.setattr(graftlm.trainer, "logits_at", counted)
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    settings = ("training.max_steps=4", "data.dev=null", "training.gradient_accumulation_steps=2")
    few = raw_recipe(folder, "name=few", *settings)
    run(few)
    assert len(calls) == 8
    monkeypatch.setattr(graftlm.trainer._InOrder, "compute_loss", Trainer.compute_loss)
    whole = raw_recipe(folder, "name=whole", *settings)
    run(whole)
    assert len(calls) == 8
    one, other = (load_file(recipe.folder / "adapter" / "adapter_model.safetensors") for recipe in (few, whole))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
