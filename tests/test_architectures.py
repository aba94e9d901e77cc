"""Layers, embeddings and head, held against what transformers itself reports while the model runs."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, ENCODER_DECODERS, TASKS, VOCABULARY, available, tiny_batch, tiny_model
from torch import nn

from graftlm.architectures import bare_name, describe
from graftlm.errors import ModelError

PAIRS = [(name, task) for name in ARCHITECTURES for task in TASKS if available(name, task)]


def others(name, **settings):
    """Architectures that graftlm's documentation does not list."""
    small = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64} | settings
    bert = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    bart = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    torch.manual_seed(0)
    if name == "electra":  # a projection from the embeddings' width to the layers' lies between the two
        return transformers.ElectraForSequenceClassification(
            transformers.ElectraConfig(**bert, embedding_size=8, **small)
        )
    if name == "albert":
        return transformers.AlbertForSequenceClassification(
            transformers.AlbertConfig(**(bert | {"embedding_size": 8} | small))
        )
    if name == "bart":  # unequal stacks; a norm of the embeddings that is registered after the layers
        layers = {"encoder_layers": 2, "decoder_layers": 3}
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**bart, **layers, **small))
    if name == "opt":  # the final norm is registered before the layers
        config = transformers.OPTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=16, **small
        )
        return transformers.OPTForCausalLM(config)
    raise ValueError(name)


def stream(model, batch):
    """{stack: the hidden state below each layer} as the model itself reports them."""
    output = model.eval()(**batch, output_hidden_states=True)
    kinds = {"layer": "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
    reported = {stack: getattr(output, key, None) for stack, key in kinds.items()}
    return {stack: states for stack, states in reported.items() if states is not None}


def check_against_the_stream(model, batch):
    """Layer i of a stack reads hidden state i, and the layers run in the order that `describe` gives."""
    order, inputs = [], {}

    def note(layer):
        def hook(_, args, kwargs):
            order.append(layer)
            inputs[layer.short] = args[0] if args else kwargs["hidden_states"]

        return hook

    architecture = describe(model)
    handles = [layer.module.register_forward_pre_hook(note(layer), with_kwargs=True) for layer in architecture.layers]
    states = stream(model, batch)
    for handle in handles:
        handle.remove()
    assert order == list(architecture.layers)
    by_stack = {stack: [layer for layer in architecture.layers if layer.stack == stack] for stack in states}
    assert sum(map(len, by_stack.values())) == len(architecture.layers)
    for stack, layers in by_stack.items():
        assert [layer.index for layer in layers] == list(range(len(states[stack]) - 1))
        for layer in layers:
            assert torch.equal(inputs[layer.short], states[stack][layer.index]), layer.name
            assert model.get_submodule(layer.name) is layer.module
    return architecture


def check_partition(model, architecture):
    """Every parameter is in a layer, the embeddings or the head; only an output matrix is in two of them."""
    roles = {
        "layers": [path for layer in architecture.layers for path in (layer.name, *layer.also)],
        "embeddings": architecture.embeddings,
        "head": architecture.head,
    }
    ids = {
        role: {id(parameter) for path in paths for parameter in model.get_submodule(path).parameters()}
        for role, paths in roles.items()
    }
    assert set.union(*ids.values()) == {id(parameter) for parameter in model.parameters()}
    output = model.get_output_embeddings()
    tied = ids["embeddings"] & {id(parameter) for parameter in ([] if output is None else output.parameters())}
    assert ids["embeddings"] & ids["head"] == tied
    assert not ids["layers"] & (ids["embeddings"] | ids["head"])
    assert {id(parameter) for parameter in model.get_input_embeddings().parameters()} <= ids["embeddings"]
    return tied


@pytest.mark.supports("Layers in order", "{task}")
@pytest.mark.parametrize(("architecture", "task"), PAIRS)
def test_layers_are_those_of_the_hidden_states_and_nothing_is_left_over(architecture, task):
    model = tiny_model(architecture, task, num_layers=2 if architecture == "modernbert" else 3)
    found = check_against_the_stream(model, tiny_batch(architecture, task))
    check_partition(model, found)
    assert found.family == model.config.model_type
    two_stacks = architecture in ENCODER_DECODERS and task != "token_classification"  # T5's token head: encoder only
    assert {layer.stack for layer in found.layers} == ({"encoder", "decoder"} if two_stacks else {"layer"})


@pytest.mark.parametrize("num_layers", [1, 2, 3, 12])
@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2"])
def test_any_depth(architecture, num_layers):
    # T5's layers hold lists of 2 (encoder) and 3 (decoder) sublayers: the same lengths as the stacks'
    found = describe(tiny_model(architecture, num_layers=num_layers))
    stacks = ("encoder", "decoder") if architecture == "t5" else ("layer",)
    assert [layer.short for layer in found.layers] == [f"{s}.{i}" for s in stacks for i in range(num_layers)]


def test_encoder_and_decoder_of_different_depths():
    model = tiny_model("t5", "seq2seq_lm", num_decoder_layers=1)
    found = describe(model)
    assert [layer.short for layer in found.layers] == ["encoder.0", "encoder.1", "encoder.2", "decoder.0"]
    assert [layer.also for layer in found.layers] == [(), (), ("encoder.final_layer_norm",), ()]
    assert found.head == ("decoder.final_layer_norm", "lm_head")


@pytest.mark.parametrize("name", ["electra", "bart", "opt"])
def test_architectures_that_no_list_names(name):
    model = others(name)
    task = {"electra": "sequence_classification", "bart": "seq2seq_lm", "opt": "causal_lm"}[name]
    batch = tiny_batch({"bart": "t5", "opt": "gpt2"}.get(name, "bert"), task, num_labels=2)
    check_partition(model, check_against_the_stream(model, batch))


def test_a_pair_of_berts_as_encoder_and_decoder():
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    encoder = transformers.BertConfig(**small, num_hidden_layers=2)
    decoder = transformers.BertConfig(**small, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    found = describe(transformers.EncoderDecoderModel(config))
    assert [layer.name for layer in found.layers] == [
        "encoder.encoder.layer.0",
        "encoder.encoder.layer.1",
        "decoder.bert.encoder.layer.0",
        "decoder.bert.encoder.layer.1",
    ]


class Wrapped(nn.Module):
    """What DDP and DataParallel look like from outside, and FSDP1 with another name for what is inside."""

    def __init__(self, module, name="module"):
        super().__init__()
        self.add_module(name, module)


def compiled(model):
    return torch.compile(model, backend="eager")  # the wrapper is what matters; inductor takes seconds to import


def lora(model, task_type=None):
    conv = model.config.model_type == "gpt2"
    return get_peft_model(model, LoraConfig(task_type=task_type, fan_in_fan_out=conv, target_modules=TARGETS))


TARGETS = ["query", "q_proj", "q_lin", "Wqkv", "c_attn", "q"]
WRAPPERS = {
    "lora with a task type": lambda m: lora(m, "SEQ_CLS"),
    "lora without one": lora,
    "module.": Wrapped,
    "FSDP1": lambda m: Wrapped(m, "_fsdp_wrapped_module"),
    "DataParallel": nn.DataParallel,
    "torch.compile": compiled,
    "all of them": lambda m: Wrapped(compiled(lora(m, "SEQ_CLS"))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrappers_change_nothing_but_the_prefix(architecture, wrapper):
    model = tiny_model(architecture)
    bare = describe(model)
    wrapped = WRAPPERS[wrapper](model)
    found = describe(wrapped)
    assert [layer.module for layer in found.layers] == [layer.module for layer in bare.layers]
    assert [layer.short for layer in found.layers] == [layer.short for layer in bare.layers]
    assert [bare_name(layer.name) for layer in found.layers] == [layer.name for layer in bare.layers]
    assert all(wrapped.get_submodule(layer.name) is layer.module for layer in found.layers)
    assert [bare_name(name) for name in found.embeddings] == list(bare.embeddings)
    assert [bare_name(name) for name in found.head] == list(bare.head)
    assert found.family == bare.family


def test_inside_distributed_data_parallel():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model("bert")
        found = describe(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert [layer.name for layer in found.layers] == [f"module.bert.encoder.layer.{index}" for index in range(3)]


class Own(nn.Module):
    """Somebody's own model: no config, names that no library uses."""

    def __init__(self, depth=11):
        super().__init__()
        self.readout = nn.Linear(4, 2)
        self.words = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth))

    def forward(self, ids):
        hidden = self.words(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.readout(hidden.mean(1))


def test_an_unknown_model_says_what_was_looked_for_and_what_to_type():
    with pytest.raises(ModelError) as caught:
        describe(Own())
    message = str(caught.value)
    assert "Own" in message and "blocks (11)" in message and "num_hidden_layers" in message
    assert 'layers=["blocks.*"]' in message


@pytest.mark.parametrize("patterns", [["blocks.*"], ["re:blocks[.][0-9]+"], ["bl*ks.*"], ["**ks.*"]])
def test_naming_the_layers_of_an_own_model_works(patterns):
    own = Own()
    for model, prefix in ((own, ""), (Wrapped(own), "module."), (compiled(own), "_orig_mod.")):
        found = describe(model, layers=patterns)
        # numbers count as numbers: block 10 comes after block 9, not after block 1
        assert [layer.name for layer in found.layers] == [f"{prefix}blocks.{index}" for index in range(11)]
        assert found.embeddings == (f"{prefix}words",)
        assert found.head == (f"{prefix}readout",)
        assert found.family == "custom"


def test_patterns_are_taken_in_the_order_given():
    found = describe(Own(3), layers=["blocks.2", "blocks.0"])
    assert [layer.name for layer in found.layers] == ["blocks.2", "blocks.0"]
    assert found.head == ("readout", "blocks.1")


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["block.*"], "blocks[.]"),  # near miss: names that exist are shown
        (["blocks.*", "blocks.0.0"], "inside another"),
        (["re:blocks.("], "regular expression"),
        ([], "empty"),
        ("blocks.*", r"\['blocks.\*'\]"),  # a bare string would be read letter by letter
    ],
)
def test_patterns_that_cannot_be_right(patterns, said):
    with pytest.raises(ModelError, match=said):
        describe(Own(), layers=patterns)


def test_albert_runs_one_layer_many_times_and_that_is_said():
    with pytest.raises(ModelError, match="share their parameters: 3 layers are run from 1 set"):
        describe(others("albert"))
    separate = describe(others("albert", num_hidden_groups=3))  # as many sets of weights as layers: nothing is shared
    assert len(separate.layers) == 3


def test_the_same_module_twice_in_a_stack_is_refused():
    model = tiny_model("bert")
    model.bert.encoder.layer[2] = model.bert.encoder.layer[0]
    with pytest.raises(ModelError, match="3 layers are run from 2 set"):
        describe(model)


def test_two_stacks_that_are_no_encoder_and_decoder_have_to_be_named():
    model = tiny_model("bert")
    model.towers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ModelError, match=r"bert.encoder.layer \(3\), towers \(3\)") as caught:
        describe(model)
    assert 'layers=["bert.encoder.layer.*"] or layers=["towers.*"]' in str(caught.value)
    assert len(describe(model, layers=["bert.encoder.layer.*"]).layers) == 3


def test_describing_changes_nothing():
    model = tiny_model("t5", "seq2seq_lm")
    before = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    describe(model)
    assert {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()} == before
    assert model.training
