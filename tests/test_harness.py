"""A run as a model of lm-evaluation-harness: what is handed on, and, where it is installed, what it computes."""

import builtins
import math
import sys
import types

import pytest
import torch
from raw import raw_folder, raw_recipe

import graftlm
from graftlm.errors import DataError, MissingExtra, SetupError
from graftlm.evaluation.bits_per_byte import bits_per_byte
from graftlm.folder import load
from graftlm.run import run_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = raw_folder(tmp_path_factory.mktemp("made"), "causal_lm", "llama")
    recipe = raw_recipe(folder, "training.max_steps=3", "data.dev=null")
    run_recipe(recipe, progress=False)
    return recipe.folder


class HFLM:
    def __init__(self, **arguments):
        self.arguments = arguments


@pytest.fixture
def harness(monkeypatch):
    """The part of the interface that is used: lm_eval.models.huggingface.HFLM(pretrained=…, tokenizer=…)."""
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.models.huggingface"].HFLM = HFLM


def test_the_loaded_run_is_handed_on(made, harness):
    found = graftlm.lm_eval_model(made, batch_size=4, device="cpu").arguments
    assert {key: found[key] for key in ("backend", "batch_size")} == {"backend": "causal", "batch_size": 4}
    model, tokenizer = load(made, tokenizer=True)
    ids = tokenizer("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found["pretrained"](**ids).logits, model(**ids).logits)
    assert not found["pretrained"].training
    assert found["tokenizer"].get_vocab() == tokenizer.get_vocab()


def test_a_missing_extra_says_what_to_install(made, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install \"graftlm\[lm-eval\]\""):
        graftlm.lm_eval_model(made)


def test_what_is_no_causal_run_is_refused(harness, tmp_path):
    with pytest.raises(DataError, match="no run here"):
        graftlm.lm_eval_model(tmp_path)
    folder = raw_folder(tmp_path, "masked_lm", "bert")
    recipe = raw_recipe(folder, "training.max_steps=1", "data.dev=null")
    run_recipe(recipe, progress=False)
    with pytest.raises(SetupError, match=r"(?s)likelihood.*task: masked_lm"):
        graftlm.lm_eval_model(recipe.folder)


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_the_harness_computes_what_we_compute(made):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    # the tiny tokenizer ends every text with a token of its own, which the harness would score too
    model = graftlm.lm_eval_model(made, batch_size=2, device="cpu", max_length=24, add_bos_token=False)
    texts = ["w1 w2 w3 w4", "w5 w6 w8 w9 w10", "w1 w3"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    theirs = model.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = bits_per_byte(*load(made, tokenizer=True), texts, max_length=24, stride=8)
    size = sum(len(text.encode()) for text in texts)
    assert -sum(theirs) / math.log(2) / size == pytest.approx(ours["bits_per_byte"].value, rel=1e-4)
