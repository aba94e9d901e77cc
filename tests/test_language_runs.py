"""MAD-X as one recipe: language adapters trained from the texts it names, against the same steps one by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from raw import chain
from small import classification_rows, small_recipe, write_rows
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import graftlm.prepare
from graftlm.check import check
from graftlm.cli import app
from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.language_runs import language_runs, placed
from graftlm.recipe import Recipe, load_recipe, shipped
from graftlm.run import evaluate, run_recipe
from graftlm.study import runner
from graftlm.study.claims import Claims

RECIPE = """\
name: small
model: ./model
source: eng
data:
  train: train.jsonl
  dev: dev.jsonl
  test: {eng: test.eng.jsonl, deu: test.deu.jsonl}
adapter:
  method: bottleneck
  kind: houlsby
  bottleneck_size: 4
  language_adapters:
    eng: {train: text/eng.jsonl, test: text/held-out.eng.jsonl}
    deu: {train: text/deu.txt, test: text/held-out.deu.jsonl}
  language_training:
    training.epochs: 2
    training: {max_length: 24, batch_size: 4}
    data.documents: lines
training: {epochs: 1, batch_size: 16, learning_rate: 1e-2, max_length: 32}
"""
TAGS = ("eng", "deu")


def write_folder(folder: Path) -> Path:
    tiny_model("bert", "masked_lm").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, (name, count) in enumerate({"train": 32, "dev": 8, "test.eng": 10, "test.deu": 10}.items()):
        write_rows(folder / f"{name}.jsonl", classification_rows(count, seed))
    for first, tag in ((0, "eng"), (30, "deu")):
        write_rows(folder / "text" / f"held-out.{tag}.jsonl", [{"text": text} for text in chain(4, 9, first=first)])
    write_rows(folder / "text" / "eng.jsonl", [{"text": text} for text in chain(8, 1)])
    (folder / "text" / "deu.txt").write_text("\n".join(chain(8, 2, first=30)) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    folder = write_folder(tmp_path_factory.mktemp("finished"))
    run_recipe(small_recipe(folder), progress=False)
    return folder


@pytest.fixture
def made(finished, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "made"))


def made_of(folder: Path) -> dict[str, bytes]:
    """What the three runs have learned and said."""
    adapters = [folder / f"language-{tag}" / "adapter" / "adapter_model.safetensors" for tag in TAGS]
    files = [*adapters, folder / "small" / "adapter" / "adapter_model.safetensors", folder / "small/predictions.jsonl"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def times(folder: Path) -> dict[str, int]:
    return {tag: (folder / f"language-{tag}" / "result.json").stat().st_mtime_ns for tag in TAGS}


def by_hand(folder: Path, tag: str, text: str, runs: Path) -> Recipe:
    """The language adapter as `graftlm train language-adapter.yaml …` makes it."""
    copied = Path(shutil.copy(shipped()["language-adapter"], folder / "language-adapter.yaml"))
    return load_recipe(
        copied,
        [
            f"name=language-{tag}",
            f"source={tag}",
            "model=./model",
            f"data.train=text/{text}",
            "data.dev=null",
            f"data.test={{{tag}: text/held-out.{tag}.jsonl}}",
            "data.documents=lines",
            "adapter.kind=houlsby",
            "training.epochs=2",
            "training.max_length=24",
            "training.batch_size=4",
            f"output.folder={json.dumps(str(runs))}",
        ],
    )


def test_one_recipe_makes_what_its_steps_make_one_by_one(finished, tmp_path):
    folder = write_folder(tmp_path / "steps")
    for tag, text in (("eng", "eng.jsonl"), ("deu", "deu.txt")):
        run_recipe(by_hand(folder, tag, text, folder / "runs"), progress=False)
    paths = "adapter.language_adapters={eng: runs/language-eng, deu: runs/language-deu}"
    run_recipe(small_recipe(folder, paths), progress=False)
    assert made_of(folder / "runs") == made_of(finished / "runs")
    german = Result.read(finished / "runs" / "language-deu").scores[0]
    assert german.language == "deu" and german.change is not None, "held-out text says what was learned"


def test_the_run_names_the_folders_and_is_found_by_them(made):
    folder = made / "runs" / "small"
    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert resolved.adapter.language_adapters == {tag: f"../language-{tag}" for tag in TAGS}
    lines = (folder / "recipe.resolved.yaml").read_text(encoding="utf-8").splitlines()
    assert "    deu: ../language-deu  # recipe.yaml:14" in lines and not any(
        "language_training" in line for line in lines
    )
    assert Result.read(folder).language_adapters == {tag: f"runs/language-{tag}" for tag in TAGS}
    model, tokenizer = load(folder, tokenizer=True, language="deu")
    batch = tokenizer(["w1 w2 w30 w31"], return_tensors="pt")
    with torch.no_grad():
        german = model(**batch).logits
        assert not torch.equal(load(folder, language="eng")(**batch).logits, german)
    scores = evaluate(folder, progress=False).scores
    assert [one.metrics for one in scores] == [one.metrics for one in Result.read(folder).scores]
    assert check(small_recipe(made)).steps == 2, "with language adapters that are there"


def test_what_is_finished_is_not_repeated_and_what_is_missing_is(made):
    before, said = times(made / "runs"), made_of(made / "runs")
    run_recipe(small_recipe(made), progress=False)
    assert times(made / "runs") == before
    shutil.rmtree(made / "runs" / "language-deu")
    run_recipe(small_recipe(made), progress=False)
    after = times(made / "runs")
    assert after["eng"] == before["eng"] and after["deu"] > before["deu"]
    assert made_of(made / "runs") == said


def test_a_run_that_was_stopped_in_a_language_goes_on_there(made, monkeypatch):
    said, english = made_of(made / "runs"), times(made / "runs")["eng"]
    for name in ("small", "language-deu"):
        shutil.rmtree(made / "runs" / name)

    class TrainingClock(graftlm.prepare.TrainingClock):
        def on_step_begin(self, args, state, control, **kwargs):
            if "language-deu" in args.output_dir and state.global_step == state.max_steps - 1:
                raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run_recipe(small_recipe(made), progress=False)
    assert not (made / "runs" / "small").exists()
    assert list((made / "runs" / "language-deu" / "checkpoints").glob("checkpoint-*"))
    run_recipe(small_recipe(made), progress=False)
    assert times(made / "runs")["eng"] == english
    assert made_of(made / "runs") == said


def test_another_text_or_other_settings_are_errors_that_name_the_language(made):
    with pytest.raises(
        RecipeError,
        match=r"^recipe\.yaml:13: the language adapter of eng: .*holds a run of another recipe\n"
        r"(.|\n)*learning_rate(.|\n)*output\.folder=ANOTHER_FOLDER, or delete .*language-eng",
    ):
        run_recipe(small_recipe(made, "adapter.language_training.training.learning_rate=1e-4"), progress=False)
    write_rows(made / "text" / "eng.jsonl", [{"text": text} for text in chain(8, 5)])
    with pytest.raises(DataError, match=r"the language adapter of eng: .* other data\n(.|\n)*text/eng\.jsonl"):
        run_recipe(small_recipe(made), progress=False)
    assert not runner.finished(small_recipe(made)), "a study's run complains as well"


def test_before_the_training_check_shows_what_is_trained_first(tmp_path):
    folder = write_folder(tmp_path)
    found = check(small_recipe(folder))
    alone = check(small_recipe(folder, "adapter.language_adapters={}"))
    assert found.steps == 2 and found.layers == alone.layers
    languages = {tag: check(one) for tag, one in language_runs(small_recipe(folder)).items()}
    assert list(found.language_adapters) == list(languages) == list(TAGS)
    for tag, one in found.language_adapters.items():
        assert (one.layers, one.steps, one.texts) == (languages[tag].layers, languages[tag].steps, languages[tag].texts)
    shown = CliRunner().invoke(app, ["check", str(folder / "recipe.yaml")])
    assert shown.exit_code == 0 and "language adapters, trained first" in shown.output
    assert not (folder / "runs").exists()
    assert not language_runs(small_recipe(folder, "adapter.language_adapters={}")), "the task adapter alone"


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        (
            "adapter.language_training={training.max_step: 5}",
            RecipeError,
            r"^override: adapter\.language_training: unknown key 'training\.max_step'; did you mean 'max_steps'",
        ),
        ("adapter.language_training={training.epochs: many}", RecipeError, r"training\.epochs.*'many'"),
        ("adapter.language_training={model: other}", RecipeError, r"model of a language adapter follows"),
        ("adapter.language_training.data.test.deu=x.jsonl", RecipeError, r"data\.test of a (.|\n)*data\.test\.deu"),
        ("adapter.language_training.adapter.kind=pfeiffer", RecipeError, r"adapter\.kind of a language adapter"),
        (
            "adapter.language_adapters.deu={train: text/deu.txt}",
            RecipeError,
            r"^override: the key 'adapter\.language_adapters\.deu\.test' is missing$",
        ),
        (
            "adapter.language_adapters.deu={train: text/deu.txt, test: text/deu.txt, dve: x}",
            RecipeError,
            r"^override: unknown key 'adapter\.language_adapters\.deu\.dve'; did you mean 'dev'\?\n"
            r"  allowed: train, test, dev\n",
        ),
        ("adapter.language_adapters.deu=5", RecipeError, r"deu: should be a valid string .*, or .*a mapping"),
        (
            "adapter.language_adapters.eng.train=text/none.jsonl",
            DataError,
            r"^recipe\.yaml:13: the language adapter of eng: data\.train: there is no such file(.|\n)*none\.jsonl",
        ),
        (
            "unfreezing={schedule: gradual, every_n_steps: 50}",
            RecipeError,
            r"^override: the schedule is longer than the run",
        ),
        ("adapter={method: lora, language_training: {seed: 1}}", RecipeError, "takes no language_training"),
    ],
)
def test_what_cannot_work_says_what_to_type(tmp_path, override, error, says):
    folder = write_folder(tmp_path)
    with pytest.raises(error, match=says):
        run_recipe(small_recipe(folder, override), progress=False)
    assert not (folder / "runs").exists(), "nothing has been trained in vain"


def test_the_runs_of_a_study_share_language_adapters_and_wait_for_each_other(made, tmp_path, monkeypatch):
    before, study = times(made / "runs"), tmp_path / "study"
    shutil.rmtree(made / "runs" / "language-eng")
    held = Claims(study / runner.CLAIMS).take("language-eng")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        held.give_back()

    monkeypatch.setattr(runner.time, "sleep", sleep)
    run = small_recipe(made, "name=run", "seed=1")
    assert not runner.finished(run)
    assert runner.do(run, study) == runner.DONE, runner.error_of(study, "run")
    assert len(waits) == 1 and runner.finished(run) and runner.finished(small_recipe(made))
    after = times(made / "runs")
    assert after["eng"] > before["eng"] and after["deu"] == before["deu"]
    assert not Claims(study / runner.CLAIMS).held("language-eng")


def test_texts_are_found_from_another_folder(tmp_path):
    recipe = small_recipe(write_folder(tmp_path / "here"))
    (tmp_path / "there").mkdir()
    moved = recipe.relocated(tmp_path / "there")
    text = moved.adapter.language_adapters["deu"]
    assert text.train.path == "../here/text/deu.txt" and text.test.path == "../here/text/held-out.deu.jsonl"
    assert [one.path(one.data.train.path).exists() for one in language_runs(moved).values()] == [True, True]
    assert placed(moved).path(placed(moved).adapter.language_folders["eng"]).resolve() == (
        tmp_path / "here" / "runs" / "language-eng"
    )
    (tmp_path / "there" / "copy.yaml").write_text(moved.resolved(), encoding="utf-8")
    assert load_recipe(tmp_path / "there" / "copy.yaml").adapter == moved.adapter
