"""Neutral residues where they cannot work: errors that say what to type, and models of other kinds."""

import copy

import pytest
import torch
from adapters.neutrals import adapted, outputs, randomised
from peft import PeftModel, get_peft_model
from tiny import tiny_batch, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
)

import graftlm
from graftlm.errors import ModelError, SetupError
from graftlm.new_tokens import extend_model

DOMAINS = [0, 1, 1, 0]
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 120,
}


def test_data_parallel_is_refused():
    """Its copies of a model, made as `torch.nn.DataParallel` makes them, on one device."""
    model, batch = adapted("llama", penalty_weight=3.0).train(), tiny_batch("llama", "causal_lm")
    copied = replicated(model)
    for labels in ({"domain": torch.tensor(DOMAINS)}, {}):
        with pytest.raises(SetupError, match=r"DataParallel(.|\n)*torchrun"):
            copied(**batch, **labels)
    model.peft_config["default"].penalty_weight = 0.0
    copied(**batch)


def replicated(model):
    modules = list(model.modules())
    number = {module: at for at, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, made in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            setattr(made, name, copies[number[child]])
        for name, parameter in module._parameters.items():
            setattr(made, name, parameter if parameter is None else parameter * 1)
    return copies[0]


def test_one_adapter_for_all_rows_of_a_batch():
    model, batch = adapted("llama").eval(), tiny_batch("llama", "causal_lm")
    with pytest.raises(SetupError, match=r"the same for all rows(.|\n)*disable_adapter"):
        model(**batch, adapter_names=["__base__"] * 4)


def test_a_base_without_rows_for_the_new_tokens(tmp_path):
    base = tiny_model("llama", "causal_lm", dropout=0.0)
    small = copy.deepcopy(base)
    rows = extend_model(base, {96: [5, 6], 97: [7, 8]})
    model = get_peft_model(base, graftlm.NeutralResiduesConfig(trainable_token_indices=rows))
    randomised(model).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"96 rows, and token 97(.|\n)*resize_token_embeddings\(98\)"):
        PeftModel.from_pretrained(small, tmp_path)
    for name in ("embed_tokens", "model.embed_tokens"):  # PEFT looks at the end of a name
        config = graftlm.NeutralResiduesConfig(trainable_token_indices={name: [5, 97]})
        with pytest.raises(ModelError, match="96 rows, and token 97"):
            get_peft_model(copy.deepcopy(small), config)
    small.resize_token_embeddings(98)
    batch = tiny_batch("llama", "causal_lm")
    batch["input_ids"][:, 1] = 97
    assert torch.equal(outputs(PeftModel.from_pretrained(small, tmp_path), batch), outputs(model, batch))


def test_experts_that_give_the_scores_of_their_router_too():
    settings = GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0)
    base = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    bare, batch = copy.deepcopy(base), {"input_ids": torch.arange(1, 13).reshape(2, 6)}
    model = get_peft_model(base, graftlm.NeutralResiduesConfig(gate="none"))
    assert torch.equal(outputs(model, batch), outputs(bare, batch))
    randomised(model)
    for layer, other in zip(bare.model.layers, model.base_model.model.model.layers, strict=True):
        w = {role: getattr(other.mlp, f"neutral_residues_{role}")["default"].weight for role in ("glu", "in", "out")}

        def added(module, args, output, w=w):
            u, v = args[0] @ w["glu"].T, args[0] @ w["in"].T
            return output[0] + (u * u.sigmoid() * v) @ w["out"].T, *output[1:]

        layer.mlp.register_forward_hook(added)
    torch.testing.assert_close(outputs(model, batch), outputs(bare, batch), rtol=1e-4, atol=1e-5)
    batch |= {"labels": batch["input_ids"], "domain": [0, 1]}
    model.train()(**batch).loss.backward()


def test_a_model_that_sees_is_refused_with_the_way_to_its_text_model():
    vision = {name: SMALL[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    settings = Gemma3Config(
        text_config=SMALL | {"query_pre_attn_scalar": 4},
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    model = Gemma3ForConditionalGeneration(settings).eval()
    with pytest.raises(ModelError, match="Gemma3ForCausalLM") as raised:
        get_peft_model(model, graftlm.NeutralResiduesConfig())
    names = {"model": model, "Gemma3ForCausalLM": Gemma3ForCausalLM}
    exec(raised.value.fix, names)
    batch = {"input_ids": torch.arange(1, 13).reshape(2, 6)}
    adapted_text = get_peft_model(names["text"], graftlm.NeutralResiduesConfig())
    assert torch.equal(outputs(adapted_text, batch), outputs(model, batch))
