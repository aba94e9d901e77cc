"""Which base models FLARE takes: PEFT's layers for quantised weights, models of several stacks, target modules."""

import ast
import re
from pathlib import Path

import peft
import pytest
import torch
from adapters.flares import flare, outputs, pair, randomised, target_of
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from tiny import tiny_model
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

import graftlm
from graftlm.adapters.flare import asks_variants
from graftlm.errors import ModelError


def test_of_a_model_that_sees_the_text_model_is_asked_for(tmp_path):
    """The advice is followed: what it loads is the same model of text, and has FLARE."""
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    text = {"vocab_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4}
    vision = {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=sizes | text, vision_config=sizes | vision, mm_tokens_per_image=4)
    whole, batch = Gemma3ForConditionalGeneration(config), target_of(pair("llama", "causal_lm"))
    with pytest.raises(ModelError, match="images or sounds") as error:
        get_peft_model(whole, graftlm.FlareConfig(r=2))
    mapping = ast.literal_eval(re.search(r"key_mapping=(\{.*\})", str(error.value))[1])
    whole.save_pretrained(tmp_path)
    alone, loading = Gemma3ForCausalLM.from_pretrained(tmp_path, key_mapping=mapping, output_loading_info=True)
    assert not loading["missing_keys"]
    torch.testing.assert_close(outputs(alone, batch), outputs(whole, batch))
    assert get_peft_model(alone, graftlm.FlareConfig(r=2, task_type="CAUSAL_LM")).peft_config


def with_layers(config, kind):
    """PEFT puts its layer for quantised weights around plain ones, which compute the same."""
    config._register_custom_module({torch.nn.Linear: kind})
    return config


@pytest.mark.parametrize("kind", [AwqLoraLinear, AqlmLoraLinear])
def test_layers_that_would_have_plain_lora_in_silence_are_refused(kind):
    base, lora = tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ModelError, match=rf"plain LoRA here(.|\n)*{kind.__name__}(.|\n)*bitsandbytes"):
        get_peft_model(base, with_layers(graftlm.FlareConfig(r=2), kind))
    assert not base._forward_pre_hooks
    plain = get_peft_model(tiny_model("llama"), with_layers(lora, kind))
    assert torch.isfinite(outputs(plain, target_of(pair("llama")))).all(), "PEFT's own LoRA works there"


def test_layers_of_quantised_weights_that_ask_for_variants_are_fused():
    batch, config = pair("llama"), graftlm.FlareConfig(r=4, lora_alpha=6)
    model = randomised(get_peft_model(tiny_model("llama", dropout=0.0), with_layers(config, GPTQLoraLinear)))
    kinds = {type(module) for module in model.modules() if hasattr(module, "lora_A")}
    assert kinds == {GPTQLoraLinear}
    torch.testing.assert_close(outputs(model, batch), outputs(flare("llama"), batch))


@pytest.mark.parametrize(("file", "kind"), [("bnb", "Linear8bitLt"), ("bnb", "Linear4bit"), ("hqq", "HqqLoraLinear")])
def test_layers_whose_packages_are_not_here_are_not_refused(file, kind):
    """Their forward alone, from PEFT's source."""
    source = (Path(peft.__file__).parent / "tuners" / "lora" / f"{file}.py").read_text(encoding="utf-8")
    (found,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == kind]
    (forward,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "forward"]
    names = {"torch": torch}
    exec(compile("from __future__ import annotations\n" + ast.unparse(forward), file, "exec"), names)
    assert asks_variants(type(kind, (), {"forward": names["forward"]})())
