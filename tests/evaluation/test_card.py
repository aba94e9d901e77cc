"""The model card: its front matter as the hub's own reader sees it, code that runs, text that stays text."""

import json
import re

import pytest
import torch
from evaluation.made_up_run import made_up_result, make_run
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from graftlm.evaluation.card import write_card
from graftlm.evaluation.result import Licences


def card_of(folder, result=None, peft_type="LORA"):
    make_run(folder, result)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    return write_card(folder).read_text(encoding="utf-8")


def code_in(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_hub_reads_the_front_matter(tmp_path):
    data = ModelCard(card_of(tmp_path, made_up_result(model="xlm-roberta-base"))).data
    assert data.language == ["eng", "deu", "fra", "spa", "por", "ces"]
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-classification", "apache-2.0")
    assert data.base_model == "xlm-roberta-base"
    assert data.metrics == ["accuracy", "f1"]


@pytest.mark.parametrize(
    ("model", "on_the_hub"),
    [
        ("starter", False),
        ("./mine", False),
        ("/models/mine", False),
        ("a/b/c", False),
        ("owner/name-1.5", True),
        ("gpt2", True),
    ],
)
def test_only_a_hub_id_is_named_as_base_model(tmp_path, model, on_the_hub):
    text = card_of(tmp_path, made_up_result(model=model))
    assert (ModelCard(text).data.base_model == model) is on_the_hub
    assert ("from peft import" in text) is on_the_hub, "PEFT alone cannot find a model that is not on the hub"


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("CC0-1.0", ("cc0-1.0", None)), ("My own: v2", ("other", "My own: v2")), (None, (None, None))],
)
def test_licences(tmp_path, licence, expected):
    text = card_of(tmp_path, made_up_result(licences=Licences(model="MIT", data=None, weights=licence)))
    data = ModelCard(text, ignore_metadata_errors=True).data
    assert (data.license, data.get("license_name")) == expected
    assert "| pretrained model | MIT |\n| training data | unknown |" in text
    assert "look before you hand these files on" in text


@pytest.mark.parametrize(("peft_type", "needed"), [("LORA", False), ("BOTTLENECK", True)])
def test_the_code_says_whether_graftlm_must_be_imported(tmp_path, peft_type, needed):
    with_graftlm, with_peft = code_in(card_of(tmp_path, made_up_result(model="gpt2"), peft_type))
    assert with_graftlm.startswith("import graftlm")
    assert with_peft.startswith("import graftlm") is needed
    for code in (with_graftlm, with_peft):
        compile(code, "card", "exec")


def test_the_code_for_peft_loads_what_a_run_writes(tmp_path, monkeypatch):
    model = tiny_model("bert", "base")
    model.save_pretrained(tmp_path / "owner" / "base")
    labelled = {"num_labels": 3, "id2label": {0: "red", 1: "blue", 2: "green"}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "owner" / "base", **labelled)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    make_run(tmp_path, made_up_result(model="owner/base"))
    text = write_card(tmp_path).read_text(encoding="utf-8")

    monkeypatch.chdir(tmp_path)  # where "owner/base" is a folder
    names = {}
    exec(code_in(text)[1], names)
    batch = names["tokenizer"](["w1 w2 w3"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(**batch).logits, model(**batch).logits)
    assert names["model"].config.id2label[2] == "green"


def test_full_fine_tuning_is_loaded_with_transformers(tmp_path):
    make_run(tmp_path)
    (tmp_path / "model").mkdir()
    text = write_card(tmp_path).read_text(encoding="utf-8")
    assert ModelCard(text).data.library_name == "transformers"
    assert 'AutoModelForSequenceClassification.from_pretrained("model")' in code_in(text)[1]


def test_scores_and_limits_are_told(tmp_path):
    text = card_of(tmp_path)
    assert "| German | 64.1 [57.9, 70.3] |" in text
    assert "zero-shot" in text and "one run (seed 0)" in text and "labels in English" in text
    assert "can no longer do was not measured" in text


def test_hostile_names_do_not_leave_their_place(tmp_path):
    hostile = 'x/"```\n---\n<script>alert(1)</script>[a](javascript:b)\u202e'
    result = made_up_result(model=hostile, source="<img src=x>", licences=Licences(weights=hostile))
    text = card_of(tmp_path, result)
    assert ModelCard(text, ignore_metadata_errors=True).data.license_name == hostile
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "<img" not in body and "\u202e" not in body
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    assert body.count("```") == 2 * len(code_in(text)) == 2
