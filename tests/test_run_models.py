"""The models of runs: in which precision they are read, what is new in them, and what is refused before training."""

import json
import re

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from small import by_hand, predicted, read_rows, run, small_folder, small_recipe
from tiny import ARCHITECTURES
from transformers.pytorch_utils import Conv1D

from graftlm.data import load_split
from graftlm.errors import ModelError, RecipeError
from graftlm.folder import load_model, load_tokenizer
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe, shipped
from graftlm.tasks import task_for


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
    texts = [row["text"] for row in read_rows(folder / "test.eng.jsonl")]
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
    texts = [row["text"] for row in read_rows(folder / "test.eng.jsonl")]
    said = [prediction for language, _, prediction in predicted(recipe.folder) if language == "eng"]
    assert by_hand(recipe.folder, texts) == said


def test_the_starter_model_takes_an_adapter(tmp_path):
    recipe = load_recipe(shipped()["demo"])
    task = task_for(recipe, load_split(recipe, recipe.data.train, "train"))
    loaded = load_model(recipe, task, load_tokenizer(recipe))
    assert "classifier" in loaded.fresh
    assert loaded.targets == ("query", "value")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_every_linear_module_of_every_layer(architecture, tmp_path):
    """And no head, no pooler: what stands in a numbered layer, by name."""
    recipe = small_recipe(
        small_folder(tmp_path, train=8, architecture=architecture), "adapter.target_modules=all-linear"
    )
    task = task_for(recipe, load_split(recipe, recipe.data.train, "train"))
    model = load_model(recipe, task, load_tokenizer(recipe)).model.base_model.model
    linears = torch.nn.Linear | Conv1D | LoraLayer
    outermost = [name for name, part in model.named_modules() if isinstance(part, linears) and "lora_" not in name]
    wanted = {name.removesuffix(".base_layer") for name in outermost if re.search(r"\.\d+\.", name)}
    assert {name for name, part in model.named_modules() if isinstance(part, LoraLayer)} == wanted
    assert len(wanted) >= 4 * 3


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
        ("training.precision=bf16", RecipeError, r"(?s)refuses.*precision=float32, or.*use_cpu: true"),
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
