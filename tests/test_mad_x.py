"""MAD-X as a recipe: language adapters below, the task adapter above, against the stack made by hand."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from adapters.bottlenecks import reference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small import read_rows, save_language_adapter, save_model, small_folder, small_recipe
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import graftlm.prepare
from graftlm.errors import DataError, ModelError, RecipeError, SetupError
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe, shipped
from graftlm.run import evaluate, run_recipe

LANGUAGE_ADAPTERS = "language_adapters: {eng: ./lang/eng, deu: ./lang/deu}"
STACK = f"adapter={{method: bottleneck, bottleneck_size: 8, activation: gelu, {LANGUAGE_ADAPTERS}}}"
LANGUAGES = ("eng", "deu")
SHORT = ("training.epochs=2", "training.learning_rate=1e-2")


def stack_folder(folder: Path, **settings) -> Path:
    """Model, splits, recipe, and a language adapter for each of the two languages."""
    small_folder(folder)
    for seed, tag in enumerate(LANGUAGES):
        at = save_language_adapter(folder / "lang" / tag, folder / "model", seed=seed, activation="gelu", **settings)
        config = json.loads((at / "adapter_config.json").read_text())
        # as a run writes it: no path of a machine, which PEFT would look for at the hub
        (at / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "starter"}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run: the folder that holds recipe, model and runs."""
    folder = stack_folder(tmp_path_factory.mktemp("made"))
    run_recipe(small_recipe(folder, STACK, *SHORT), progress=False)
    return folder


def probabilities(folder: Path, language: str) -> torch.Tensor:
    said = [row for row in read_rows(folder / "predictions.jsonl") if row["language"] == language]
    return torch.tensor([row["scores"] for row in said])


def texts(made: Path, language: str) -> list[str]:
    return [row["text"] for row in read_rows(made / f"test.{language}.jsonl")]


def test_each_language_is_scored_with_its_own_adapter_below(made):
    """Against forward hooks on the bare model, which know neither PEFT nor stacks."""
    folder = made / "runs" / "small"
    head = load_file(folder / "adapter" / "adapter_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    base = AutoModelForSequenceClassification.from_pretrained(made / "model", num_labels=2).eval()
    names = {key.removeprefix("base_model.model."): tensor for key, tensor in head.items()}
    base.load_state_dict({key: tensor for key, tensor in names.items() if "bottleneck" not in key}, strict=False)
    for language, other in (LANGUAGES, LANGUAGES[::-1]):
        batch = tokenizer(texts(made, language), return_tensors="pt", padding=True)
        below = {tag: load_file(made / "lang" / tag / "adapter_model.safetensors") for tag in LANGUAGES}
        with torch.no_grad():
            with reference(base, [below[language], head], "pfeiffer", "bert", activation="gelu"):
                wanted = base(**batch).logits.softmax(-1)
            with reference(base, [below[other], head], "pfeiffer", "bert", activation="gelu"):
                swapped = base(**batch).logits.softmax(-1)
        torch.testing.assert_close(probabilities(folder, language), wanted, rtol=1e-3, atol=1e-4)
        assert (swapped - wanted).abs().max() > 1e-3, "the language adapter matters"


def test_only_the_task_adapter_moves_and_is_saved(made, tmp_path):
    recipe = small_recipe(made, STACK, "training.max_steps=2", f"output.folder={tmp_path}")
    prepared = prepare(recipe, tmp_path / "small", progress=False)
    model = prepared.loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared.trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".default." in name for name in moved)
    assert {".classifier." in name for name in moved} == {True, False}, "the head and the adapter"
    assert sum("lang_eng" in name for name in before) == sum("lang_deu" in name for name in before) == 12
    saved = made / "runs" / "small" / "adapter"
    assert [path for path in saved.iterdir() if path.is_dir()] == []
    assert not [name for name in load_file(saved / "adapter_model.safetensors") if "lang_" in name]


def test_a_loaded_run_swaps_by_hand(made):
    folder = made / "runs" / "small"
    english, tokenizer = load(folder, tokenizer=True)
    german = load(folder, language="deu")
    batch = tokenizer(texts(made, "deu"), return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = german(**batch).logits
        assert not torch.equal(english(**batch).logits, wanted)
        graftlm.stack(english, ["lang_deu", "default"])
        assert torch.equal(english(**batch).logits, wanted)
    torch.testing.assert_close(probabilities(folder, "deu"), wanted.softmax(-1), rtol=1e-3, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in german.parameters())
    with pytest.raises(DataError, match=r"swe(.|\n)*eng, deu(.|\n)*language-adapter.yaml"):
        load(folder, language="swe")


def test_scored_again_a_run_says_the_same_and_knows_no_other_language(made, tmp_path):
    folder = made / "runs" / "small"
    result = Result.read(folder)
    assert result.language_adapters == {"eng": "./lang/eng", "deu": "./lang/deu"}
    again = evaluate(folder, progress=False)
    assert [one.metrics for one in again.scores] == [one.metrics for one in result.scores]
    with pytest.raises(DataError, match="no language adapter for this language"):
        evaluate(folder, {"swe": str(made / "test.deu.jsonl")}, progress=False)
    card, report = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert 'graftlm.load("small", language="deu")' in card and "| German | ./lang/deu |" in card
    assert "over language adapters" in card and "over language adapters" in report
    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert resolved.path(resolved.adapter.language_adapters["deu"]).resolve() == (made / "lang" / "deu").resolve()


def test_a_run_that_crashed_goes_on_with_its_stack(made, tmp_path, monkeypatch):
    settings = (STACK, *SHORT, f"output.folder={tmp_path}")

    class TrainingClock(graftlm.prepare.TrainingClock):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 11:  # the first epoch's checkpoint is at 8
                raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run_recipe(small_recipe(made, *settings), progress=False)
    run_recipe(small_recipe(made, *settings), progress=False)
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "small" / name).read_bytes() == (made / "runs" / "small" / name).read_bytes(), name


def test_a_finished_run_notices_that_a_language_adapter_was_trained_again(made, tmp_path):
    run_folder = Path(shutil.copytree(made, tmp_path / "copy")) / "runs" / "small"
    again = small_recipe(tmp_path / "copy", STACK, *SHORT)
    assert run_recipe(again, progress=False) == Result.read(run_folder)
    save_language_adapter(tmp_path / "copy" / "lang" / "deu", made / "model", seed=9, activation="gelu")
    with pytest.raises(DataError, match=r"other data(.|\n)*lang/deu/adapter_model\.safetensors"):
        run_recipe(again, progress=False)


def test_an_invertible_language_adapter_and_a_schedule(tmp_path):
    folder = stack_folder(tmp_path, invertible=True)
    recipe = small_recipe(folder, STACK, *SHORT, "unfreezing={schedule: gradual, every_n_steps: 2}")
    run_recipe(recipe, progress=False)
    opened = [row["layer"] for row in read_rows(recipe.folder / "unfreezing.jsonl") if row["opened"]]
    assert opened == ["layer.2", "layer.1", "layer.0"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = load(recipe.folder, language="deu")
    with torch.no_grad():
        found = model(**tokenizer(texts(folder, "deu"), return_tensors="pt", padding=True)).logits.softmax(-1)
    torch.testing.assert_close(probabilities(recipe.folder, "deu"), found, rtol=1e-3, atol=1e-5)


def spoil(made: Path) -> None:
    """Adapters that no stack can have: another method, another base's width, a file cut short, one without a tensor."""
    base = AutoModelForMaskedLM.from_pretrained(made / "model")
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained(made / "lora")
    save_language_adapter(made / "wide", save_model(made / "wide-model", hidden_size=32), activation="gelu")
    for name in ("cut", "short"):
        shutil.copytree(made / "lang" / "deu", made / name)
    file = made / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    file = made / "short" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("adapter.language_adapters={eng: ./lang/eng}", RecipeError, r"none for 'deu'(.|\n)*name=language-deu"),
        ("adapter.language_adapters={deu: ./lang/deu}", RecipeError, r"none for 'eng'(.|\n)*data\.train=TEXT"),
        ("adapter.language_adapters.deu=./nowhere", ModelError, r"no such folder(.|\n)*graftlm train language-adapter"),
        ("adapter.language_adapters.deu=./model", ModelError, "the folder holds no adapter"),
        ("adapter.language_adapters.deu=./lora", ModelError, r"LORA(.|\n)* is no bottleneck adapter"),
        (
            "adapter.language_adapters.deu=hub/none",
            ModelError,
            r"cannot be loaded(.|\n)*hub/none(.|\n)*language-adapter",
        ),
        ("adapter.language_adapters.deu=./wide", ModelError, r"another width(.|\n)*width 32(.|\n)*allowed: 16"),
        ("adapter.language_adapters.deu=./cut", ModelError, r"cannot be read"),
        ("adapter.language_adapters.deu=./short", ModelError, r"lacks 1 of the 12"),
        ("adapter.kind=houlsby", SetupError, "different places"),
        ("adapter={language_adapters: {eng: ./lang/eng}}", RecipeError, r"takes no language_adapters(.|\n)*bottleneck"),
        ("adapter.language_adapters={e: ./lang/eng}", RecipeError, "no language tag"),
    ],
)
def test_what_cannot_work_says_what_to_type(made, override, error, says):
    if not (made / "lora").exists():
        spoil(made)
    with pytest.raises(error, match=says):
        prepare(small_recipe(made, STACK, override), made / "runs" / "other", progress=False)


def test_the_commands_that_are_shown_make_recipes(made):
    page = Path(__file__).parents[1] / "docs" / "how-to" / "mad-x.md"
    shown = [
        line[2:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("$ graftlm train lang")
    ]
    shown.append(small_recipe(made, STACK).adapter.how_to_make("pt-BR"))
    made_of_them = [load_recipe(shipped()["language-adapter"], shlex.split(line)[3:]) for line in shown]
    assert [one.source for one in made_of_them] == ["eng", "deu", "pt-BR"]
    for one in made_of_them:
        assert one.name == f"language-{one.source}" and list(one.data.test) == [one.source] and one.data.dev is None


def test_a_language_adapter_is_not_trained_over_another(made):
    with pytest.raises(RecipeError, match="trains a language adapter"):
        small_recipe(made, STACK, "task=masked_lm")
