"""The grouping of what trains, held against the autograd graph, which knows nothing of names."""

from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tiny import ARCHITECTURES, TASKS, available, tiny_batch, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.errors import SetupError
from graftlm.training.layers import trainable_layers

PAIRS = [(name, task) for name in ARCHITECTURES for task in TASKS if available(name, task)]
PEFT_TASKS = {
    "base": TaskType.FEATURE_EXTRACTION,
    "sequence_classification": TaskType.SEQ_CLS,
    "token_classification": TaskType.TOKEN_CLS,
    "question_answering": TaskType.QUESTION_ANS,
    "causal_lm": TaskType.CAUSAL_LM,
    "seq2seq_lm": TaskType.SEQ_2_SEQ_LM,
}


def adapted(architecture, task, mode, **settings):
    model = tiny_model(architecture, task, dropout=0.0)
    if mode == "full":
        return model
    # not "all-linear": with a task type that takes heads too, which PEFT then cannot wrap a second time
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    ]
    task_type = PEFT_TASKS.get(task) if mode == "lora with a task type" else None
    conv = architecture == "gpt2"
    return get_peft_model(
        model, LoraConfig(task_type=task_type, r=2, target_modules=targets, fan_in_fan_out=conv, **settings)
    )


def reached(tensor, model):
    """Ids of the trainable parameters that `tensor` depends on."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not tensor.requires_grad:
        return set()
    gradients = torch.autograd.grad(tensor.sum(), trainable, retain_graph=True, allow_unused=True)
    return {id(p) for p, gradient in zip(trainable, gradients, strict=True) if gradient is not None}


def truth(model, batch):
    """What each layer adds to the set of parameters that its stack's hidden state depends on."""
    output = model.eval()(**batch, output_hidden_states=True)
    seen, groups, embeddings = set(), {}, set()
    kinds = {"encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states", "layer": "hidden_states"}
    for stack, key in kinds.items():
        states = getattr(output, key, None)
        if states is None:
            continue
        embeddings |= reached(states[0], model)
        seen |= reached(states[0], model)
        for index, state in enumerate(states[1:]):
            groups[f"{stack}.{index}"] = reached(state, model) - seen
            seen |= groups[f"{stack}.{index}"]
    return embeddings, groups


@pytest.mark.parametrize("mode", ["full", "lora with a task type", "lora without one"])
@pytest.mark.parametrize(("architecture", "task"), PAIRS)
def test_groups_are_what_the_graph_says(architecture, task, mode):
    model = adapted(architecture, task, mode)
    found = trainable_layers(model)
    named = dict(model.named_parameters())
    groups = {name: {id(parameter) for _, parameter in entries} for name, entries in found.parameters.items()}
    head = {id(parameter) for _, parameter in found.head}

    # every trainable parameter in exactly one place, under its own name
    entries = [*found.head, *(entry for group in found.parameters.values() for entry in group)]
    assert all(named[name] is parameter for name, parameter in entries)
    assert sorted(name for name, _ in entries) == sorted(n for n, p in named.items() if p.requires_grad)
    assert sum(p.numel() for _, p in entries) == sum(p.numel() for p in named.values() if p.requires_grad)

    below, expected = truth(model, tiny_batch(architecture, task))
    assert tuple(name for name in found.names if name != "embeddings") == tuple(expected)
    top = found.names[-1]
    for name, parameters in expected.items():
        if name == top:  # the stack reports its last hidden state after the final norm, which is the head's
            assert groups[top] <= parameters and parameters - groups[top] <= head
        else:
            assert groups[name] == parameters, name
    assert groups.get("embeddings", set()) == below - {id(named[name]) for name in found.tied}
    assert ("embeddings" in found.names) == (found.names[0] == "embeddings") == bool(groups.get("embeddings"))


@pytest.mark.parametrize(("architecture", "task"), PAIRS)
def test_a_tied_output_matrix_is_head_and_said_to_be_tied(architecture, task):
    model = tiny_model(architecture, task)
    found = trainable_layers(model)
    output, words = model.get_output_embeddings(), model.get_input_embeddings().weight
    is_tied = output is not None and output.weight is words
    assert is_tied == (task in ("masked_lm", "causal_lm", "seq2seq_lm") and architecture not in UNTIED)
    assert [parameter for name, parameter in model.named_parameters() if name in found.tied] == [words] * is_tied
    assert any(parameter is words for _, parameter in found.head) == is_tied


UNTIED = ("llama", "qwen3", "mistral")  # transformers' default for these configurations


def test_only_what_trains_now_is_grouped():
    model = tiny_model("bert")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.pooler.requires_grad_(False)
    found = trainable_layers(model)
    assert found.names == ("layer.0", "layer.2")
    assert [name for name, _ in found.head] == ["classifier.weight", "classifier.bias"]
    assert found.tied == ()


PEFT_METHODS = {
    "DoRA": peft.LoraConfig(use_dora=True, r=2, target_modules=["query", "dense"]),
    "AdaLoRA": peft.AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["query", "value"]),
    "IA3": peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["query", "value"], use_cayley_neumann=False),
    "VeRA": peft.VeraConfig(r=2, target_modules=["query", "value"]),
    "layer norms": peft.LNTuningConfig(target_modules=["LayerNorm"]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of its own LN tuning
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_other_methods_of_peft(method):
    model = get_peft_model(tiny_model("bert", dropout=0.0), PEFT_METHODS[method])
    found = trainable_layers(model)
    groups = {name: {id(parameter) for _, parameter in entries} for name, entries in found.parameters.items()}
    below, expected = truth(model, tiny_batch("bert"))
    expected = {"embeddings": below, **expected} if below else expected
    assert groups == expected
    assert sum(len(group) for group in found.parameters.values()) + len(found.head) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    "config", [peft.PromptTuningConfig(num_virtual_tokens=2), peft.PrefixTuningConfig(num_virtual_tokens=2)]
)
def test_prompts_are_no_layers(config):
    config.task_type = TaskType.SEQ_CLS
    with pytest.raises(SetupError, match="prompt_encoder"):
        trainable_layers(get_peft_model(tiny_model("bert"), config))


@pytest.mark.parametrize("layer", [1, 2])
def test_an_adapter_in_some_layers_only(layer):
    model = adapted("llama", "causal_lm", "lora with a task type", layers_to_transform=[layer], layers_pattern="layers")
    assert trainable_layers(model).names == (f"layer.{layer}",)


def test_of_two_adapters_the_active_one_counts():
    model = adapted("bert", "sequence_classification", "lora with a task type")
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"]))
    model.set_adapter("second")
    found = trainable_layers(model)
    assert all(".second." in name for entries in found.parameters.values() for name, _ in entries)
    assert sum(p.numel() for _, p in found.parameters["layer.0"]) == 3 * (16 + 16)


def test_an_adapter_on_the_word_embeddings_is_the_bottom_group():
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["wpe", "c_attn"], fan_in_fan_out=True, r=2))
    found = trainable_layers(model)
    assert found.names == ("embeddings", "layer.0", "layer.1", "layer.2")
    assert all("wpe.lora_embedding" in name for name, _ in found.parameters["embeddings"])


def test_other_wrappers():
    plain = trainable_layers(adapted("xlm-roberta", "sequence_classification", "lora with a task type"))
    for wrap, prefix in ((nn.DataParallel, "module."), (partial(torch.compile, backend="eager"), "_orig_mod.")):
        model = adapted("xlm-roberta", "sequence_classification", "lora with a task type")
        found = trainable_layers(wrap(model))
        assert found.names == plain.names
        for name in found.names:
            assert [key for key, _ in found.parameters[name]] == [prefix + key for key, _ in plain.parameters[name]]
        assert [name for name, _ in found.head] == [prefix + name for name, _ in plain.head]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.readout = nn.Linear(2, 2)


def test_an_own_model_whose_layers_are_named():
    found = trainable_layers(Own(), layers=["blocks.*"])
    assert found.names == ("embeddings", "layer.0", "layer.1", "layer.2")
    assert [name for name, _ in found.head] == ["readout.weight", "readout.bias"]


@pytest.mark.parametrize("what", ["classifier", "nothing"])
def test_no_trainable_layer_is_an_error_that_says_what_trains(what):
    model = tiny_model("bert").requires_grad_(False)
    if what == "classifier":
        model.classifier.requires_grad_(True)
    with pytest.raises(SetupError) as caught:
        trainable_layers(model)
    message = str(caught.value)
    assert ("classifier.weight, classifier.bias" if what == "classifier" else "nothing is trainable") in message
    assert "get_peft_model" in message and "requires_grad_(True)" in message
