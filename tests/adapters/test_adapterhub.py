"""Adapters that AdapterHub's package saved, converted: the logits are those that it computed (adapterhub/make.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small import small_folder, small_recipe
from tiny import tiny_model
from transformers import AutoModelForMaskedLM

import graftlm
from graftlm.errors import ModelError
from graftlm.prepare import prepare

FOLDER = Path(__file__).parent / "adapterhub"
CASES = ("bert-pfeiffer-inv", "bert-houlsby", "xlm-roberta-left-out", "distilbert-houlsby-inv")


def base(case):
    return AutoModelForMaskedLM.from_pretrained(FOLDER / case / "model").eval()


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_other_package(case, tmp_path):
    computed = load_file(FOLDER / case / "computed.safetensors")
    config = graftlm.convert_adapterhub(base(case), FOLDER / case / "adapter", tmp_path)
    model = PeftModel.from_pretrained(base(case), tmp_path).eval()
    with torch.no_grad():
        found = model(input_ids=computed["input_ids"]).logits
        with model.disable_adapter():
            bare = model(input_ids=computed["input_ids"]).logits
    torch.testing.assert_close(bare, computed["without"])
    torch.testing.assert_close(found, computed["logits"])
    assert (found - bare).abs().max() > 0.1
    assert (config.kind, config.invertible) == ("houlsby" if "houlsby" in case else "pfeiffer", "inv" in case)
    assert config.layers_to_transform == ([0, 2] if "left-out" in case else None)


def test_a_model_without_weights_is_enough(tmp_path):
    case = CASES[0]
    config = base(case).config
    with torch.device("meta"):
        empty = AutoModelForMaskedLM.from_config(config)
    graftlm.convert_adapterhub(empty, FOLDER / case / "adapter", tmp_path / "empty")
    graftlm.convert_adapterhub(base(case), FOLDER / case / "adapter", tmp_path / "full")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "empty" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_it_is_a_language_adapter_for_a_recipe(tmp_path):
    folder = small_folder(tmp_path, hidden_size=16)
    case = "bert-houlsby"
    graftlm.convert_adapterhub(tiny_model("bert", "masked_lm"), FOLDER / case / "adapter", folder / "lang")
    below = "adapter={method: bottleneck, kind: houlsby, language_adapters: {eng: ./lang, deu: ./lang}}"
    prepared = prepare(small_recipe(folder, below), folder / "runs", progress=False)
    assert prepared.loaded.model.base_model.stacked("default") == ["lang_eng", "default"]


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FOLDER / CASES[0] / "adapter", tmp_path / "copy"))


def changed(folder, **values):
    described = json.loads((folder / "adapter_config.json").read_text())
    described["config"] |= values
    (folder / "adapter_config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inv_adapter": "glow"}, "inv_adapter='glow'"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"scaling": "learned"}, "scaling='learned'"),
        ({"is_parallel": True}, "is_parallel=True"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln"),
        ({"original_ln_before": False}, "original_ln_before=False"),
        ({"leave_out": [1]}, "4 without a place"),
        ({"inv_adapter": None}, "8 without a place"),
    ],
)
def test_what_ours_do_not_compute_is_refused(values, says, copy, tmp_path):
    changed(copy, **values)
    with pytest.raises(ModelError, match=says):
        graftlm.convert_adapterhub(base(CASES[0]), copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit(copy, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"another shape|missing"):
        graftlm.convert_adapterhub(tiny_model("bert", "masked_lm", hidden_size=32), copy, out)
    with pytest.raises(ModelError, match="norm before a sublayer"):
        graftlm.convert_adapterhub(tiny_model("llama", "causal_lm"), copy, out)
    with pytest.raises(ModelError, match="no AdapterHub adapter here"):
        graftlm.convert_adapterhub(base(CASES[0]), tmp_path, out)
    tensors = load_file(copy / "adapter.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, copy / "adapter.safetensors")
    with pytest.raises(ModelError, match="1 missing"):
        graftlm.convert_adapterhub(base(CASES[0]), copy, out)
    (copy / "adapter.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        graftlm.convert_adapterhub(base(CASES[0]), copy, out)
    (copy / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        graftlm.convert_adapterhub(base(CASES[0]), copy, out)
    assert not out.exists()
