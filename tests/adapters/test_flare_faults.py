"""What went wrong in the authors' release, fault by fault: padding, checkpointing, attention, positions, writing."""

import copy

import pytest
import torch
from adapters.flares import ARCHITECTURES, flare, left, outputs, pair, path, target_of
from tiny import DECODERS, ENCODER_DECODERS, tiny_model
from torch.utils.checkpoint import checkpoint

import graftlm
from graftlm.errors import DataError, SetupError

WRITERS = tuple(name for name in DECODERS if name in ARCHITECTURES)
# What these models do with padding on the left, whatever the adapter: positions that count it, a head that reads
# the first token, decoder inputs that are shifted from it.
ABSOLUTE = ("bert", "distilbert")
TARGET_ON_THE_RIGHT = ("roberta", "xlm-roberta", "t5", "mt5")


def with_left_padding(batch, *, target=True):
    found = dict(batch)
    found["source_input_ids"], found["source_attention_mask"] = left(
        batch["source_input_ids"], batch["source_attention_mask"]
    )
    if target:
        found["input_ids"], found["attention_mask"] = left(batch["input_ids"], batch["attention_mask"])
    return found


@pytest.mark.supports("FLARE", "padding left and right")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_one_is_a_batch_of_many_with_padding_on_either_side(architecture):
    model, batch = flare(architecture, align="relative"), pair(architecture)
    many = outputs(model, batch)
    if architecture not in ABSOLUTE:
        padded = with_left_padding(batch, target=architecture not in TARGET_ON_THE_RIGHT)
        torch.testing.assert_close(outputs(model, padded), many, rtol=1e-4, atol=1e-5)
    for row in range(4):
        t, s = batch["attention_mask"][row].bool(), batch["source_attention_mask"][row].bool()
        one = {
            "input_ids": batch["input_ids"][row, t][None],
            "source_input_ids": batch["source_input_ids"][row, s][None],
        }
        torch.testing.assert_close(outputs(model, one), many[row : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"align": "position"}, {"align": "pooled"}, {"align": "attention"}, {"fusion": "cross_attention"}]
)
@pytest.mark.parametrize("architecture", ["roberta", "llama", "t5"])
def test_padding_counts_in_no_alignment(architecture, settings):
    model, batch = flare(architecture, **settings), pair(architecture)
    many = outputs(model, batch)
    padded = with_left_padding(batch, target=architecture not in TARGET_ON_THE_RIGHT)
    torch.testing.assert_close(outputs(model, padded), many, rtol=1e-4, atol=1e-5)
    t, s = batch["attention_mask"][1].bool(), batch["source_attention_mask"][1].bool()
    assert not t.all() and not s.all()
    one = {"input_ids": batch["input_ids"][1, t][None], "source_input_ids": batch["source_input_ids"][1, s][None]}
    torch.testing.assert_close(outputs(model, one), many[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_source_passes_the_same_norm_as_the_target(architecture):
    """The target as its own source, read where the lowest layer reads: S + T is twice T, as with twice the α."""
    batch = target_of(pair(architecture))
    twice = {f"source_{name}": batch[name] for name in ("input_ids", "attention_mask")}
    found = []
    for alpha in (3, 6):
        model = flare(architecture, fusion="add", source_layer="same", lora_alpha=alpha)
        lowest = tuple(f"base_model.model.{path(architecture, 0, role)}." for role in (0, 1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and not name.startswith(lowest):
                    parameter.zero_()
        found.append(outputs(model, batch | (twice if alpha == 3 else {})))
    assert (found[1] - outputs(model, batch | twice)).abs().max() > 1e-4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("align", ["position", "pooled", "attention"])
def test_what_stands_at_padding_changes_nothing(align):
    model, batch = flare("xlm-roberta", align=align), pair("xlm-roberta")
    wanted = outputs(model, batch)
    spoilt = batch["source_input_ids"].masked_fill(batch["source_attention_mask"] == 0, 50)
    torch.testing.assert_close(outputs(model, batch | {"source_input_ids": spoilt}), wanted)


@pytest.mark.parametrize("architecture", ["xlm-roberta", "llama"])
def test_a_row_without_any_source_token_has_plain_lora(architecture):
    model, batch = flare(architecture), pair(architecture)
    batch["source_attention_mask"][1] = 0
    plain, found = outputs(model, target_of(batch)), outputs(model, batch)
    torch.testing.assert_close(found[1], plain[1])
    assert (found[0] - plain[0]).abs().max() > 1e-4
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.supports("FLARE", "gradient checkpointing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_gives_the_same_gradients(architecture):
    first, second = pair(architecture), pair(architecture, source_length=6, seed=11)
    gradients = []
    for use_reentrant in (None, False, True):
        model = flare(architecture).train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        one = model(**first).loss
        two = model(**second).loss  # a later call must not take the place of the first one's source
        outputs(model, target_of(first))
        (one + 2 * two).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "lora_B" in name)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def no_pass(model, batch):
    """Nothing between forward and backward."""


def evaluation(model, batch):
    """Of plain LoRA."""
    outputs(model, target_of(batch))


def training(model, batch):
    """Of plain LoRA."""
    model(**target_of(batch))


@pytest.mark.parametrize("between", [no_pass, evaluation, training])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_loses_the_source_is_an_error(use_reentrant, between):
    model, batch = flare("llama").train(), pair("llama")
    model.enable_input_require_grads()
    layer = model.base_model.model.model.layers[1]
    forward = layer.forward

    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(lambda *inner: forward(*inner, **kwargs), *args, use_reentrant=use_reentrant)

    layer.forward, model.config.use_cache = checkpointed, False
    model(**target_of(batch)).loss.backward()  # before the first source it is right as it is
    loss = model(**batch).loss
    between(model, batch)
    with pytest.raises(SetupError, match=r"its source is gone(.|\n)*gradient_checkpointing=True"):
        loss.backward()


def test_checkpointing_keeps_states_that_were_given():
    """As a cache gives them; two calls of one backward pass have their own."""
    batches = [pair("llama"), pair("llama", source_length=6, seed=11)]
    gradients = []
    for use_reentrant in (None, False, True):
        model = flare("llama").train()
        context = graftlm.adapters.flare.SourceContext.of(model.base_model.model)
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        losses = []
        for batch in batches:
            ids, mask = batch["source_input_ids"], batch["source_attention_mask"]
            states = torch.stack(context.states_of(model.base_model.model, input_ids=ids, attention_mask=mask), 1)
            given = target_of(batch) | {"source_states": states, "source_attention_mask": mask}
            losses.append(model(**given).loss)
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain = flare("llama").train()
    sum(plain(**batch).loss for batch in batches).backward()
    gradients.append({name: p.grad for name, p in plain.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.supports("FLARE", "eager = SDPA")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eager_and_sdpa_are_the_same(architecture):
    batch = pair(architecture)
    try:
        bases = [tiny_model(architecture, dropout=0.0, attn_implementation=name) for name in ("eager", "sdpa")]
    except ValueError as error:
        pytest.skip(str(error))
    found = [outputs(flare(architecture, base=base), batch) for base in bases]
    assert [base.config._attn_implementation for base in bases] == ["eager", "sdpa"]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_target_as_its_own_source_is_not_plain_lora():
    model, batch = flare("bert"), target_of(pair("bert"))
    twice = {f"source_{name}": batch[name] for name in ("input_ids", "attention_mask")}
    assert (outputs(model, batch | twice) - outputs(model, batch)).abs().max() > 1e-3


def test_the_source_is_read_without_dropout_and_gradient_and_nothing_is_left_changed():
    model, batch = flare("llama", dropout=0.5).train(), pair("llama")
    frozen = [p for name, p in model.named_parameters() if "lora_" in name and "layers.0" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    context = model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant["default"].context
    state = torch.get_rng_state()
    sources = {name: value for name, value in batch.items() if name.startswith("source_")}
    records = [context.read(model.base_model.model, target_of(batch), **sources) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(records[0].states, records[1].states, strict=True):
        assert torch.equal(one, other) and not one.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == before
    model(**batch)
    assert not any(p.requires_grad for p in frozen) and context.current is None


def writer(architecture, **settings):
    return flare(architecture, "causal_lm", task_type="CAUSAL_LM", **settings).eval()


@pytest.mark.parametrize("align", ["position", "relative"])
@pytest.mark.parametrize("architecture", WRITERS)
def test_in_training_the_prompt_is_fused_as_in_generate(architecture, align):
    """Answers of any length, padded on the left: the prompt's logits are those without an answer."""
    model, batch = writer(architecture, align=align), pair(architecture, "causal_lm")
    sources = {name: value[:1] for name, value in batch.items() if name.startswith("source_")}
    prompt = batch["input_ids"][:1]
    wanted = outputs(model, {"input_ids": prompt, **sources})
    for answer, padding in ((3, 0), (6, 2)):
        ids = torch.cat([prompt.new_zeros(1, padding), prompt, prompt.new_full((1, answer), 9)], 1)
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        fuse = mask * (torch.arange(ids.shape[1]) < padding + prompt.shape[1])
        found = outputs(
            model, {"input_ids": ids, "attention_mask": mask, "fusion_mask": fuse, "labels": ids.clone(), **sources}
        )
        torch.testing.assert_close(found[:, padding : padding + prompt.shape[1]], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.supports("FLARE", "generate")
@pytest.mark.parametrize("architecture", WRITERS)
def test_generating_equals_a_full_forward_token_by_token(architecture):
    model, batch = writer(architecture, align="relative"), with_left_padding(pair(architecture, "causal_lm"))
    batch.pop("labels")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    more = {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**batch, **settings, **more)
    assert torch.equal(model.generate(**batch, **settings, use_cache=False), found.sequences)
    plain = model.generate(**target_of(batch), **settings, **more)
    assert (plain.logits[0] - found.logits[0]).abs().max() > 1e-3
    length = batch["input_ids"].shape[1]
    for step, logits in enumerate(found.logits):
        written = torch.ones(4, step, dtype=torch.long)
        full = batch | {
            "input_ids": found.sequences[:, : length + step],
            "attention_mask": torch.cat([batch["attention_mask"], written], 1),
            "fusion_mask": torch.cat([batch["attention_mask"], 0 * written], 1),
        }
        torch.testing.assert_close(outputs(model, full)[:, -1], logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "more", [{"prefill_chunk_size": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("align", ["position", "relative"])
def test_a_prompt_that_is_read_in_parts_is_fused_as_a_whole(align, more):
    model, batch = writer("llama", align=align), with_left_padding(pair("llama", "causal_lm"))
    batch.pop("labels")
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    whole, parts = (model.generate(**batch, **settings, **extra) for extra in ({}, more))
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.supports("FLARE", "generate")
@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_an_encoder_decoder_fuses_in_its_encoder_while_it_generates(architecture):
    model = flare_pair(architecture)
    batch = pair(architecture, "seq2seq_lm")
    batch.pop("labels")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    for step, logits in enumerate(found.logits):
        full = batch | {"decoder_input_ids": found.sequences[:, : step + 1]}
        torch.testing.assert_close(outputs(model, full)[:, -1], logits, rtol=1e-3, atol=1e-4)
    plain = outputs(model, target_of(batch) | {"decoder_input_ids": found.sequences[:, :1]})
    assert (plain[:, -1] - found.logits[0]).abs().max() > 1e-3


def test_a_call_that_goes_on_from_a_cache_takes_no_source():
    """A loop by hand: the source with the prompt, then none; each token as in a full forward."""
    model, batch = writer("llama", align="relative"), pair("llama", "causal_lm")
    batch = {name: value[:1] for name, value in batch.items() if name != "labels"}
    sources = {name: value for name, value in batch.items() if name.startswith("source_")}
    prompt = batch["input_ids"]
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        with pytest.raises(DataError, match=r"7 tokens in past_key_values(.|\n)*generate"):
            model(input_ids=token, past_key_values=copy.deepcopy(first.past_key_values), **sources)
        second = model(input_ids=token, past_key_values=first.past_key_values)
        half = model(input_ids=prompt[:, :4], use_cache=True, **sources)
        with pytest.raises(DataError, match="together with the whole prompt"):
            model(input_ids=prompt[:, 4:], past_key_values=half.past_key_values, **sources)
    whole = torch.cat([prompt, token], 1)
    fuse = (torch.arange(8) < 7).long()[None]
    wanted = outputs(model, {"input_ids": whole, "fusion_mask": fuse, **sources})[:, -1]
    torch.testing.assert_close(second.logits[:, -1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("align", ["relative", "pooled", "attention"])
def test_generating_in_two_parts_is_generating_at_once(align):
    model, batch = writer("llama", align=align), with_left_padding(pair("llama", "causal_lm"))
    batch.pop("labels")
    sources = {name: value for name, value in batch.items() if name.startswith("source_")}
    settings = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, **settings)
    first = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, **settings)
    written = torch.ones(4, 3, dtype=torch.long)
    mask, fuse = (torch.cat([batch["attention_mask"], part], 1) for part in (written, 0 * written))
    more = {"input_ids": first.sequences, "attention_mask": mask, **sources, **settings}
    more |= {"max_new_tokens": 2, "min_new_tokens": 2}
    with pytest.raises(DataError, match=r"goes on from a KV cache(.|\n)*no fusion_mask"):
        model.generate(past_key_values=copy.deepcopy(first.past_key_values), **more)
    for cache in ({"past_key_values": first.past_key_values}, {}):  # a second turn without a cache is read anew
        second = model.generate(**more, **cache, fusion_mask=fuse)
        assert torch.equal(second.sequences, whole.sequences)
        torch.testing.assert_close(second.logits, whole.logits[3:], rtol=1e-4, atol=1e-5)


def flare_pair(architecture):
    return flare(architecture, "seq2seq_lm", task_type="SEQ_2_SEQ_LM").eval()


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_beams_and_several_answers_keep_their_own_source(architecture):
    writes = architecture == "llama"
    model = writer(architecture) if writes else flare_pair(architecture)
    batch = pair(architecture, "causal_lm" if writes else "seq2seq_lm")
    batch = with_left_padding(batch) if writes else batch
    batch.pop("labels")
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    settings["pad_token_id"] = 0
    many = model.generate(**batch, **settings)
    for row in range(4):
        one = model.generate(**{name: value[row : row + 1] for name, value in batch.items()}, **settings)
        assert torch.equal(one[:, -3:], many[2 * row : 2 * row + 2, -3:])


def test_generate_asks_for_the_prompts_mask_and_leaves_nothing_behind():
    model, batch = writer("llama"), pair("llama", "causal_lm")
    sources = {name: value for name, value in batch.items() if name.startswith("source_")}
    with pytest.raises(DataError, match="tokens of the prompt"):
        model.generate(input_ids=batch["input_ids"], **sources)
    with pytest.raises(DataError, match="source that is not there"):
        model.generate(input_ids=batch["input_ids"], source_attention_mask=batch["source_attention_mask"])
    context = graftlm.adapters.flare.SourceContext.of(model.base_model.model)
    assert context.prompt is context.current is None
    assert copy.deepcopy(model).base_model.model is not model.base_model.model
