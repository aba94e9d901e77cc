"""Whole runs on tiny models: what the run folder holds, and that it is right by a second way of computing it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lms import save_language_model
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from small import (
    classification_rows,
    save_model,
    small_folder,
    small_recipe,
    words,
    write_rows,
)
from tiny import tiny_model, tiny_tokenizer

import graftlm.run
from graftlm.data import load_split
from graftlm.errors import MissingExtra, ModelError, RecipeError
from graftlm.evaluation.result import Result
from graftlm.folder import load, load_model, load_tokenizer
from graftlm.prepare import prepare, training_arguments
from graftlm.recipe import LANGUAGE_MODELLING, Recipe, load_recipe, shipped
from graftlm.run import evaluate, run_recipe
from graftlm.tasks import task_for

FISHER = "unfreezing={schedule: fisher, every_n_steps: 4, record_trace: 8}"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # subprocesses of these tests run with one, and are compared bit by bit
    yield
    torch.set_num_threads(before)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(recipe: Recipe) -> Result:
    return run_recipe(recipe, progress=False)


def predicted(folder: Path) -> list[tuple]:
    return [(row["language"], row["id"], row["prediction"]) for row in rows(folder / "predictions.jsonl")]


def by_hand(folder: Path, texts: list[str]) -> list[str]:
    """Predictions one text at a time, without Trainer, collator or decoding of ours."""
    model, tokenizer = load(folder, tokenizer=True)
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    return [model.config.id2label[number] for number in best]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run with tr(F), a dev split and both references."""
    folder = small_folder(tmp_path_factory.mktemp("made"))
    run(small_recipe(folder, FISHER, "references=[majority, standard]", "data.id=id", "licences.data=CC0-1.0"))
    return folder


def test_the_run_folder(made):
    folder = made / "runs" / "small"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "recipe.resolved.yaml",
        "data.sha256",
        "adapter",
        "result.json",
        "predictions.jsonl",
        "unfreezing.jsonl",
        "log.jsonl",
        "report.html",
        "README.md",
        "reference-standard",
    }, "nothing temporary is left, and no checkpoint"
    assert (folder / "recipe.yaml").read_text() == (made / "recipe.yaml").read_text()
    resolved = (folder / "recipe.resolved.yaml").read_text().splitlines()
    assert not [line for line in resolved if str(made) in line and "folder:" not in line], "no path of this machine"
    assert str(made) not in (folder / "adapter" / "adapter_config.json").read_text()
    assert {path.stat().st_mode & 0o777 for path in (folder / "adapter").iterdir()} == {0o644}


def test_the_scores_follow_from_the_predictions(made):
    folder = made / "runs" / "small"
    result = Result.read(folder)
    standard = rows(folder / "reference-standard" / "predictions.jsonl")
    train = [row["label"] for row in rows(made / "train.jsonl")]
    most = max(sorted(set(train)), key=train.count)
    assert [(score.language, score.n, score.is_source) for score in result.scores] == [
        ("eng", 30, True),
        ("deu", 30, False),
    ]
    for score in result.scores:
        said = [row for row in rows(folder / "predictions.jsonl") if row["language"] == score.language]
        source = rows(made / f"test.{score.language}.jsonl")
        assert [row["id"] for row in said] == [row["id"] for row in source]
        gold, guess = [row["label"] for row in source], [row["prediction"] for row in said]
        assert [row["label"] for row in said] == gold
        assert all(row["scores"][["blue", "red"].index(row["prediction"])] == max(row["scores"]) for row in said)
        accuracy = accuracy_score(gold, guess)
        assert score.metrics["accuracy"].value == pytest.approx(accuracy)
        assert score.metrics["macro_f1"].value == pytest.approx(f1_score(gold, guess, average="macro"))
        assert score.majority == pytest.approx(gold.count(most) / len(gold))
        theirs = accuracy_score(gold, [row["prediction"] for row in standard if row["language"] == score.language])
        assert score.standard.value == pytest.approx(theirs)
        assert score.gain.value == pytest.approx(accuracy - theirs)
    assert result.selected_on == ("eng",)
    assert result.licences.data == "CC0-1.0"
    assert result.cost.steps == 32
    assert result.cost.trace_seconds > 0
    assert result.cost.total_parameters > result.cost.trainable_parameters > 0


def test_a_loaded_run_predicts_what_the_run_predicted(made):
    folder = made / "runs" / "small"
    texts = [row["text"] for language in ("eng", "deu") for row in rows(made / f"test.{language}.jsonl")]
    assert by_hand(folder, texts) == [prediction for _, _, prediction in predicted(folder)]


def test_the_model_is_the_checkpoint_that_was_best_on_dev(made):
    folder = made / "runs" / "small"
    scores = [row["eval_score"] for row in rows(folder / "log.jsonl") if "eval_score" in row]
    assert len(scores) == 4, "one an epoch"
    dev = rows(made / "dev.jsonl")
    guess = by_hand(folder, [row["text"] for row in dev])
    assert accuracy_score([row["label"] for row in dev], guess) == pytest.approx(max(scores))


def test_the_reference_is_the_same_recipe_with_everything_open(made):
    folder = made / "runs" / "small"
    ours, theirs = (load_recipe(path / "recipe.resolved.yaml") for path in (folder, folder / "reference-standard"))
    assert theirs.unfreezing.schedule == "standard"
    assert theirs.training == ours.training
    assert theirs.adapter == ours.adapter
    assert theirs.references.standard is None
    assert (theirs.path(theirs.data.train.path)).resolve() == (made / "train.jsonl").resolve()


def test_a_finished_run_is_read_and_not_repeated(made, monkeypatch, caplog):
    monkeypatch.setattr(graftlm.run, "prepare", None)  # would fail if it were called
    caplog.set_level("INFO", "graftlm")
    recipe = small_recipe(made, FISHER, "references=[majority, standard]", "data.id=id", "licences.data=CC0-1.0")
    assert run(recipe) == Result.read(recipe.folder)
    assert "finished already" in caplog.text

    report = recipe.folder / "report.html"
    report.unlink()
    run(recipe)
    assert report.is_file(), "what can be made from the finished run is made again"


def test_another_recipe_in_the_folder_is_an_error_that_says_what_differs(made):
    with pytest.raises(RecipeError, match=r"(?s)another recipe.*seed: 7 \(there: 0\).*name=ANOTHER_NAME"):
        run(
            small_recipe(
                made, FISHER, "references=[majority, standard]", "data.id=id", "licences.data=CC0-1.0", "seed=7"
            )
        )
    (made / "runs" / "mine").mkdir()
    (made / "runs" / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(RecipeError, match="holds no run"):
        run(small_recipe(made, "name=mine"))


def test_evaluate_scores_again_and_writes_nothing(made, tmp_path, monkeypatch):
    folder = made / "runs" / "small"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again, result = evaluate(folder, progress=False), Result.read(folder)
    assert again.scores == result.scores
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", [row | {"id": "x"} for row in rows(made / "test.deu.jsonl")[:7]])
    other = evaluate(folder, {"fra": "other.jsonl"}, progress=False)
    assert [(score.language, score.n, score.gain) for score in other.scores] == [("fra", 7, None)]
    gold, guess = zip(
        *[(row["label"], row["prediction"]) for row in rows(folder / "predictions.jsonl")[30:37]], strict=True
    )
    assert other.scores[0].metrics["accuracy"].value == pytest.approx(accuracy_score(gold, guess))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_crashed_goes_on_from_its_checkpoint_bit_by_bit(made, tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    settings = (FISHER, "data.id=id")

    class TrainingClock(graftlm.prepare.TrainingClock):  # the same name: checkpoints list callbacks by it
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 19:  # between the checkpoints at 16 and 24, with all three layers open since 8
                raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run(small_recipe(folder, *settings))
    run_folder = folder / "runs" / "small"
    assert not (run_folder / "result.json").exists()
    # a checkpoint that was being written when the power went
    (run_folder / "checkpoints" / "checkpoint-18").mkdir()
    (run_folder / "checkpoints" / "checkpoint-18" / "trainer_state.json").write_text('{"epoch": 2.')

    result = run(small_recipe(folder, *settings))
    whole = made / "runs" / "small"
    assert result.cost.steps == 32
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (run_folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert decisions(run_folder) == decisions(whole)


def decisions(folder: Path) -> list[dict]:
    return rows(folder / "unfreezing.jsonl")


STOP_AT = """
import os, signal, sys
import graftlm.prepare
class TrainingClock(graftlm.prepare.TrainingClock):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
graftlm.prepare.TrainingClock = TrainingClock
sys.argv[0] = "graftlm"
from graftlm.cli import main
main()
"""


def test_ctrl_c_and_the_same_command_again_give_the_same_bits(made, tmp_path):
    """A real SIGINT in a real process between two of FUN's choices, then the command a user types again."""
    folder = small_folder(tmp_path)
    command = ["train", "recipe.yaml", FISHER, "data.id=id"]
    stopped = subprocess.run(
        [sys.executable, "-c", STOP_AT, *command], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped at step 6 of 32" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (folder / "runs/small/checkpoints/checkpoint-6").is_dir()

    again = subprocess.run(
        [sys.executable, "-m", "graftlm", *command], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert "going on from step 6 of 32" in again.stderr
    assert "32/32" in again.stderr, "a progress bar"
    whole = made / "runs" / "small"
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (folder / "runs/small" / name).read_bytes() == (whole / name).read_bytes(), name
    assert decisions(folder / "runs/small") == decisions(whole)
    seconds = Result.read(folder / "runs/small").cost.train_seconds
    state = [row["train_runtime"] for row in rows(folder / "runs/small/log.jsonl") if "train_runtime" in row]
    assert seconds > max(state), "both sessions are counted"


def test_two_processes_under_accelerate_launch(tmp_path):
    folder = small_folder(tmp_path)
    # accelerate starts several processes with torch's launcher only under --multi_gpu; without a GPU they speak gloo
    launch = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch.split(),
        "-m",
        "graftlm",
        "train",
        "recipe.yaml",
    ]
    command += [FISHER, "references=[standard]", "data.id=id"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: runs/small/report.html") == 1, "one process speaks"
    run_folder = folder / "runs" / "small"
    result = Result.read(run_folder)
    assert result.cost.steps == 16, "two devices share an epoch"
    assert all(score.gain is not None for score in result.scores)
    said = predicted(run_folder)
    source = [(language, row["id"]) for language in ("eng", "deu") for row in rows(folder / f"test.{language}.jsonl")]
    assert [entry[:2] for entry in said] == source, "each item once, in order"
    texts = [row["text"] for language in ("eng", "deu") for row in rows(folder / f"test.{language}.jsonl")]
    assert by_hand(run_folder, texts) == [entry[2] for entry in said]
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------- tasks: each shipped recipe, on tiny data


def _write_task_data(folder: Path, recipe: Recipe) -> None:
    """Small files under the names that a shipped recipe gives its splits."""
    import random

    rng = random.Random(0)

    def row(number: int) -> dict:
        if recipe.task in LANGUAGE_MODELLING:
            return {"text": " ".join(words(rng, "red", 20))}
        colour = ("red", "blue")[number % 2]
        tokens = words(rng, colour, 5)
        context = words(rng, "green", 4) + words(rng, "red", 2) + words(rng, "green", 4)
        start = len(" ".join(context[:4])) + 1
        found = {"text": [" ".join(context[4:6])], "answer_start": [start]}
        return {
            "classification": {
                "text": " ".join(tokens),
                "label": colour,
                "category": colour,
                "id": f"i{number}",
                "index_id": number,
            },
            "multi_label": {"text": " ".join(tokens), "labels": f"{colour}|all" if number % 4 else colour},
            "regression": {"sentence1": " ".join(tokens), "sentence2": "w1", "score": float(number % 2)},
            "token_classification": {
                "tokens": (mixed := [rng.choice(words(rng, one, 1)) for one in ("red", "blue", "blue", "red")]),
                "tags": ["B-RED" if int(word[1:]) < 20 else "O" for word in mixed],
            },
            "question_answering": {
                "id": f"q{number}",
                "question": "w55",
                "context": " ".join(context),
                "answers": found,
            },
        }[recipe.task]

    sources = {"train": recipe.data.train, "dev": recipe.data.dev} | recipe.data.test
    if parallel := recipe.data.parallel:
        sources |= {"source of train": parallel.train} | {f"source of {key}": one for key, one in parallel.test.items()}
    sources |= {"mixing": recipe.mixing.data} if recipe.mixing else {}
    for number, (split, source) in enumerate(sources.items()):
        if source.is_file():
            count = 96 if split.endswith("train") else 16
            write_rows(folder / source.path.removeprefix("starter:"), [row(i) for i in range(count)])
        else:  # a hub data set, as the folder of its repository
            for name in ("train", "validation", "test"):
                write_rows(
                    folder / source.path / (source.config or "") / f"{name}.jsonl",
                    [row(i) for i in range(16 if name == "test" else 96)],
                )
        assert number < 20


@pytest.mark.parametrize("name", sorted(shipped()))
def test_each_shipped_recipe_runs(name, tmp_path):
    text = shipped()[name].read_text(encoding="utf-8").replace("starter:", "")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    original = load_recipe(tmp_path / "recipe.yaml")
    _write_task_data(tmp_path, original)
    hub = original.data.train.config is not None
    raw = original.task in LANGUAGE_MODELLING
    starter = original.adapter.method == "bottleneck" and not raw  # a random model's attention hardly mixes tokens
    if hub:  # the repository's card, which says where each configuration lies
        parts = filter(None, (original.data, original.data.parallel))
        configs = {source.config for part in parts for source in (part.train, *part.test.values())}
        card = "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - {{split: {part}, path: {config}/{part}.jsonl}}\n" for part in ("train", "validation", "test")
            )
            for config in sorted(configs)
        )
        (tmp_path / original.data.train.path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    if original.dropout:  # measured on a language model, which has to have learned something
        texts = [row["text"] for row in rows(tmp_path / original.data.train.path.removeprefix("starter:"))]
        save_language_model(tmp_path / "model", texts)
    elif raw:
        architecture = {"masked_lm": "bert", "causal_lm": "llama"}[original.task]
        tiny_model(architecture, original.task).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    else:
        save_model(tmp_path / "model", max_position_embeddings=64)
    languages = original.adapter.language_adapters.values()
    for path in (source.path for text in languages for source in (text.train, text.test)):
        write_rows(tmp_path / path, [{"text": "Hier steht ein Satz."}, {"text": "Here is a sentence."}])
    recipe = small_recipe(
        tmp_path,
        "model=starter" if starter else "model=./model",
        "training.max_length=24",
        "training.stride=6",
        "training.batch_size=8",
        "training.epochs=3" if starter else "training.epochs=5",
        "training.learning_rate=1e-2" if starter else "training.learning_rate=3e-2",
        *(["adapter.language_training={training.max_steps: 1, training.max_length: 24}"] if languages else []),
    )
    result = run(recipe)
    folder = recipe.folder
    assert (folder / ("model" if recipe.adapter.method == "none" else "adapter")).is_dir()
    assert [score.language for score in result.scores] == list(recipe.data.test)
    wanted = recipe.references.standard is not None
    assert all((score.gain is not None) == wanted for score in result.scores)
    said = rows(folder / "predictions.jsonl")
    assert len(said) == 16 * len(recipe.data.test)
    source = result.scores[0]
    if recipe.task == "question_answering":
        contexts = [row["context"] for row in _gzip_rows(tmp_path / recipe.data.test["eng"].path)]
        assert all(row["prediction"] in context for row, context in zip(said, contexts, strict=False))
        assert source.metrics["f1"].value is not None
    elif recipe.task == "regression":
        gold, guess = ([row[key] for row in said[:16]] for key in ("label", "prediction"))
        by_torch = torch.corrcoef(torch.tensor([gold, guess]))[0, 1]
        assert source.metrics["pearson"].value == pytest.approx(float(by_torch), abs=1e-4)
    elif recipe.task in LANGUAGE_MODELLING:
        assert source.change.low > 0, "twenty words are enough for all texts"
        assert set(result.forgetting or ()) == set(recipe.data.old)
    else:
        assert result.primary(source).value > (source.majority or 0), "words tell the classes apart"
    loaded = load(folder)
    assert not loaded.training
    again = evaluate(folder, progress=False)
    assert [one.metrics for one in again.scores] == [one.metrics for one in result.scores]


def _gzip_rows(path: Path) -> list[dict]:
    import gzip

    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# ---------------------------------------------------------------- models


def test_weights_are_float32_whatever_the_file_holds(tmp_path):
    folder = small_folder(tmp_path, dtype=torch.bfloat16)
    recipe = small_recipe(folder)
    saved = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    task = task_for(recipe, prepare(recipe, tmp_path / "x", progress=False).splits.train)
    model = load_model(recipe, task, load_tokenizer(recipe)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_whatever_begins_random_is_trained_and_saved(tmp_path):
    """DistilBERT's head has two modules and PEFT saves one of them: the other would be random again after loading."""
    folder = small_folder(tmp_path, architecture="distilbert")
    with pytest.raises(RecipeError, match=r"(?s)'distilbert'.*q_lin.*adapter\.target_modules=\["):
        run(small_recipe(folder))
    recipe = small_recipe(folder, "adapter.target_modules=[q_lin, v_lin]", "training.epochs=1")
    run(recipe)
    saved = load_file(recipe.folder / "adapter" / "adapter_model.safetensors")
    assert any("pre_classifier.weight" in name for name in saved)
    texts = [row["text"] for row in rows(folder / "test.eng.jsonl")]
    said = [prediction for language, _, prediction in predicted(recipe.folder) if language == "eng"]
    torch.manual_seed(12345)
    assert by_hand(recipe.folder, texts) == said
    assert by_hand(recipe.folder, texts) == said


def test_a_decoder_without_padding_token_classifies(tmp_path):
    folder = small_folder(tmp_path, architecture="llama")
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    recipe = small_recipe(folder, "training.epochs=2")
    run(recipe)
    texts = [row["text"] for row in rows(folder / "test.eng.jsonl")]
    said = [prediction for language, _, prediction in predicted(recipe.folder) if language == "eng"]
    assert by_hand(recipe.folder, texts) == said


def test_the_starter_model_takes_an_adapter(tmp_path):
    recipe = load_recipe(shipped()["demo"])
    task = task_for(recipe, load_split(recipe, recipe.data.train, "train"))
    loaded = load_model(recipe, task, load_tokenizer(recipe))
    assert "classifier" in loaded.fresh
    assert loaded.targets == ("query", "value")


@pytest.mark.parametrize(
    ("override", "error", "expected"),
    [
        ("model=./none", ModelError, "no such model folder"),
        ("model=.", ModelError, "holds no model"),
        ("model=nobody/no-such-model", ModelError, "cannot be loaded"),
        ("adapter.target_modules=[qeury]", RecipeError, r"(?s)no module of this name.*qeury.*query"),
        ("training.max_length=500", ModelError, "positions"),
        ("training.arguments={learning_rat: 1}", RecipeError, "did you mean 'learning_rate'"),
        ("training.arguments={num_train_epochs: 1}", RecipeError, "write training.epochs"),
        ("training.arguments={optim: adamw_of_my_own}", RecipeError, "refuses"),
        (
            "unfreezing={schedule: gradual, every_n_steps: 11}",
            RecipeError,
            r"(?s)longer than the run.*every_n_steps=auto",
        ),
        ("unfreezing={schedule: gradual, every_n_steps: 33}", RecipeError, r"(?s)in a run of 32 steps.*up to 10"),
        ("output.report_to=[nothing]", RecipeError, "no such tracker"),
        ("task=masked_lm", ModelError, r"(?s)no language-model head.*without cls"),
    ],
)
def test_what_is_refused_before_training(tmp_path, override, error, expected):
    folder = small_folder(tmp_path, train=64)
    with pytest.raises(error, match=expected):
        run(small_recipe(folder, override))
    assert not list((folder / "runs").rglob("checkpoint-*"))


def test_a_checkpoint_without_its_layers_is_refused(tmp_path):
    folder = small_folder(tmp_path)
    from safetensors.torch import save_file

    file = folder / "model" / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if "layer.1." not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"(?s)partly random.*layer\.1\."):
        run(small_recipe(folder))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = small_folder(tmp_path)
    model = folder / "model"
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    mapping = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": mapping}))
    with pytest.raises(ModelError, match="trust_remote_code is off"):
        run(small_recipe(folder))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- training


def test_the_automatic_interval_takes_half_of_the_run(tmp_path):
    folder = small_folder(tmp_path)
    for schedule, every in {"gradual": 32 // (2 * 3), "lpft": 32 // 2}.items():
        prepared = prepare(small_recipe(folder, f"unfreezing={{schedule: {schedule}}}"), tmp_path / "x", progress=False)
        assert prepared.steps == 32
        assert prepared.every_n_steps == every


def test_planned_steps_are_those_that_trainer_takes(tmp_path):
    folder = small_folder(tmp_path, train=43)
    for overrides in (["training.epochs=1.5"], ["training.gradient_accumulation_steps=4"], ["training.max_steps=3"]):
        recipe = small_recipe(folder, "data.dev=null", "training.epochs=2", "training.batch_size=4", *overrides)
        prepared = prepare(recipe, tmp_path / overrides[0], progress=False)
        prepared.trainer.train()
        assert prepared.steps == prepared.trainer.state.global_step


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """transformers#47688: sequence classification's gradient came out multiplied by the accumulation steps."""
    folder = small_folder(tmp_path, train=16, dropout=0.0)
    weights = []
    for batch, accumulation in ((8, 1), (4, 2)):
        recipe = small_recipe(
            folder,
            f"training.batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.learning_rate=0.5",
            "training.arguments={optim: sgd, max_grad_norm: 0.0}",
            "data.dev=null",
        )
        prepared = prepare(recipe, tmp_path / str(batch), progress=False)
        prepared.trainer.train()
        weights.append({name: p.detach().clone() for name, p in prepared.loaded.model.named_parameters()})
    moved = [name for name in weights[0] if "lora_B" in name]
    assert moved
    assert all(float(weights[0][name].abs().max()) > 0 for name in moved)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-6, rtol=1e-5)


def test_without_dev_the_last_weights_count_and_nothing_was_selected(tmp_path):
    folder = small_folder(tmp_path)
    recipe = small_recipe(folder, "data.dev=null", "training.epochs=1", "references=[]")
    result = run(recipe)
    assert result.selected_on == ()
    assert all(score.majority is None for score in result.scores)


def test_a_standard_run_has_no_gain_over_itself(tmp_path, caplog):
    caplog.set_level("INFO", "graftlm")
    folder = small_folder(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    result = run(small_recipe(folder, "references=[standard]", "training.epochs=1"))
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C means again what it meant before"
    assert [score.gain for score in result.scores] == [None, None]
    assert "standard training itself" in caplog.text


def test_trackers_are_those_that_the_recipe_names(tmp_path, monkeypatch):
    class Tracker(transformers.TrainerCallback):
        rows = 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            Tracker.rows += 1

    from transformers.integrations import integration_utils

    folder = small_folder(tmp_path)
    missing = small_recipe(folder, "output.report_to=wandb")
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(MissingExtra, match="pip install wandb"):
        training_arguments(missing, tmp_path / "x", progress=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    run(small_recipe(folder, "training.epochs=1", "name=untracked"))
    assert Tracker.rows == 0
    run(missing.changed("training.epochs=1"))
    assert Tracker.rows > 0


# ---------------------------------------------------------------- the hub


def test_nothing_is_sent_unless_the_recipe_asks(tmp_path, monkeypatch):
    import huggingface_hub

    sent: list[tuple] = []

    def create_repo(self, repo_id, *, private, exist_ok):
        sent.append(("create", repo_id, private))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}
        sent.append(("upload", repo_id, names))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    folder = small_folder(tmp_path)
    run(small_recipe(folder, "training.epochs=1"))
    assert sent == []
    run(
        small_recipe(
            folder, "training.epochs=1", "name=shared", "output.push_to_hub=me/topics", "references=[standard]"
        )
    )
    assert [entry[:2] for entry in sent] == [("create", "me/topics"), ("upload", "me/topics")]
    assert sent[0][2] is True, "private unless told otherwise"
    assert sent[1][2] == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "report.html",
        "result.json",
        "recipe.yaml",
        "recipe.resolved.yaml",
    }, "the predictions stay here"


def test_the_tiny_pieces_are_what_these_tests_think():
    assert tiny_tokenizer()("w1 w2")["input_ids"][1:3] == tiny_tokenizer().convert_tokens_to_ids(["w1", "w2"])
    assert len(tiny_model("bert", "base").encoder.layer) == 3
    assert {row["label"] for row in classification_rows(20, 0)} == {"red", "blue"}
