"""Whole runs on tiny models: what the run folder holds, and that it is right by a second way of computing it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from processes import python
from sklearn.metrics import accuracy_score, f1_score
from small import by_hand, classification_rows, predicted, read_rows, run, small_folder, small_recipe, write_rows
from tiny import tiny_model, tiny_tokenizer

import graftlm.run
from graftlm.errors import MissingExtra, RecipeError
from graftlm.evaluation.result import Result
from graftlm.prepare import prepare, training_arguments
from graftlm.recipe import load_recipe
from graftlm.run import evaluate

FISHER = "unfreezing={schedule: fisher, every_n_steps: 4, record_trace: 8}"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # subprocesses of these tests run with one, and are compared bit by bit
    yield
    torch.set_num_threads(before)


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
    standard = read_rows(folder / "reference-standard" / "predictions.jsonl")
    train = [row["label"] for row in read_rows(made / "train.jsonl")]
    most = max(sorted(set(train)), key=train.count)
    assert [(score.language, score.n, score.is_source) for score in result.scores] == [
        ("eng", 30, True),
        ("deu", 30, False),
    ]
    for score in result.scores:
        said = [row for row in read_rows(folder / "predictions.jsonl") if row["language"] == score.language]
        source = read_rows(made / f"test.{score.language}.jsonl")
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
    texts = [row["text"] for language in ("eng", "deu") for row in read_rows(made / f"test.{language}.jsonl")]
    assert by_hand(folder, texts) == [prediction for _, _, prediction in predicted(folder)]


def test_the_model_is_the_checkpoint_that_was_best_on_dev(made):
    folder = made / "runs" / "small"
    scores = [row["eval_score"] for row in read_rows(folder / "log.jsonl") if "eval_score" in row]
    assert len(scores) == 4, "one an epoch"
    dev = read_rows(made / "dev.jsonl")
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
    write_rows(tmp_path / "other.jsonl", [row | {"id": "x"} for row in read_rows(made / "test.deu.jsonl")[:7]])
    other = evaluate(folder, {"fra": "other.jsonl"}, progress=False)
    assert [(score.language, score.n, score.gain) for score in other.scores] == [("fra", 7, None)]
    gold, guess = zip(
        *[(row["label"], row["prediction"]) for row in read_rows(folder / "predictions.jsonl")[30:37]], strict=True
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
    return read_rows(folder / "unfreezing.jsonl")


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
    stopped = python("-c", STOP_AT, *command, folder=folder)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped at step 6 of 32" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (folder / "runs/small/checkpoints/checkpoint-6").is_dir()

    again = python("-m", "graftlm", *command, folder=folder)
    assert again.returncode == 0, again.stderr
    assert "going on from step 6 of 32" in again.stderr
    assert "32/32" in again.stderr, "a progress bar"
    whole = made / "runs" / "small"
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (folder / "runs/small" / name).read_bytes() == (whole / name).read_bytes(), name
    assert decisions(folder / "runs/small") == decisions(whole)
    seconds = Result.read(folder / "runs/small").cost.train_seconds
    state = [row["train_runtime"] for row in read_rows(folder / "runs/small/log.jsonl") if "train_runtime" in row]
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
    tests = [(language, row) for language in ("eng", "deu") for row in read_rows(folder / f"test.{language}.jsonl")]
    source = [(language, row["id"]) for language, row in tests]
    assert [entry[:2] for entry in said] == source, "each item once, in order"
    texts = [row["text"] for _, row in tests]
    assert by_hand(run_folder, texts) == [entry[2] for entry in said]
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".")]


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
