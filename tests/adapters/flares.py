"""A second implementation of FLARE: hooks on the bare model and loops over rows and tokens; it knows nothing of PEFT.

states = read(base, source)                      # what each layer's queries read from the source
with fused(base, architecture, weights, states, …):
    logits = base(**target).logits
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny import BOS, EOS, FIRST_WORD, PAD, VOCABULARY, tiny_batch, tiny_model

from graftlm.adapters.flare import FlareConfig

BERT, LLAMA, T5 = (
    ("attention.self.query", "attention.self.value"),
    ("self_attn.q_proj", "self_attn.v_proj"),
    ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"),
)
PLACES = {
    "bert": ("bert.encoder.layer.{}", BERT),
    "xlm-roberta": ("roberta.encoder.layer.{}", BERT),
    "roberta": ("roberta.encoder.layer.{}", BERT),
    "distilbert": ("distilbert.transformer.layer.{}", ("attention.q_lin", "attention.v_lin")),
    **dict.fromkeys(("llama", "gemma2", "gemma3", "qwen3", "mistral"), ("model.layers.{}", LLAMA)),
    **dict.fromkeys(("t5", "mt5"), ("transformer.encoder.block.{}", T5)),
}
ARCHITECTURES = tuple(PLACES)
LAYERS, R, ALPHA = 3, 4, 6


def path(architecture, layer, role):
    stem, pair = PLACES[architecture]
    return f"{stem.format(layer)}.{pair[role]}"


def backbone(model, architecture):
    return model.transformer.encoder if architecture in ("t5", "mt5") else model.base_model


def read(model, architecture, source):
    """Inputs of every layer's query projection and the last hidden state; a row at a time, without padding."""
    model.eval()
    rows = []
    for ids, mask in zip(source["source_input_ids"], source["source_attention_mask"], strict=True):
        kept = []
        handles = [
            model.get_submodule(path(architecture, layer, 0)).register_forward_pre_hook(
                lambda module, args, kept=kept: kept.append(args[0][0])
            )
            for layer in range(LAYERS)
        ]
        with torch.no_grad():
            last = backbone(model, architecture)(input_ids=ids[mask.bool()][None])[0][0]
        for handle in handles:
            handle.remove()
        rows.append([*kept, last])
    return rows


def phi(fusion, s, t):
    return {
        "add": lambda: s + t,
        "mul": lambda: s * t,
        "add_relu": lambda: s.clamp(min=0) + t.clamp(min=0),
        "mul_relu": lambda: s.clamp(min=0) * t.clamp(min=0),
    }[fusion]()


def update(weights, x, sources, mask, fusion, align):
    """φ token by token; `sources` holds one matrix a row."""
    out = torch.einsum("rd,btd->btr", weights["A"], x)
    fresh = out.clone()
    for row, x_s in enumerate(sources):
        s = torch.einsum("rd,sd->sr", weights["A"], x_s)
        columns = [column for column in range(x.shape[1]) if mask[row, column]]
        for i, column in enumerate(columns):
            t = out[row, column]
            if fusion == "cross_attention":
                scores = torch.stack([(weights["query"] @ t) @ (weights["key"] @ one) for one in s]) / math.sqrt(R)
                fresh[row, column] = sum(
                    p * (weights["value"] @ one) for p, one in zip(scores.softmax(0), s, strict=True)
                )
                continue
            if align == "position":
                partner = s[i] if i < len(s) else None
            elif align == "relative":
                partner = s[math.floor((i + 0.5) * len(s) / len(columns))]
            elif align == "pooled":
                partner = sum(s) / len(s)
            else:
                scores = torch.stack([t @ one for one in s]) / math.sqrt(R)
                partner = sum(p * one for p, one in zip(scores.softmax(0), s, strict=True))
            if partner is not None:
                fresh[row, column] = phi(fusion, partner, t)
    return ALPHA / R * torch.einsum("or,btr->bto", weights["B"], fresh)


@contextmanager
def fused(model, architecture, state, rows, mask, *, fusion="add_relu", source_layer="next", align="position"):
    """`state` is what `get_peft_model_state_dict` gives; `rows` what `read` gives, or None for plain LoRA."""
    handles = []
    known = ("lora_A", "lora_B", "lora_fusion_query", "lora_fusion_key", "lora_fusion_value")
    modules = dict(model.named_modules())
    stems = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in state if ".lora_" in key}
    for stem in stems:
        weights = {
            name.rsplit("_", 1)[-1]: state[key]
            for name in known
            if (key := f"base_model.model.{stem}.{name}.weight") in state
        }
        layer = next((n for n in range(LAYERS) for role in (0, 1) if stem == path(architecture, n, role)), None)

        def add(module, args, output, weights=weights, layer=layer):
            if layer is None or rows is None:
                return output + ALPHA / R * torch.einsum("or,rd,btd->bto", weights["B"], weights["A"], args[0])
            step = 1 if source_layer == "next" else 0
            sources = [row[layer + step] for row in rows]
            return output + update(weights, args[0], sources, mask, fusion, align)

        handles.append(modules[stem].register_forward_hook(add))
    assert handles
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def flare(architecture, task="sequence_classification", *, name="default", base=None, seed=1, dropout=0.0, **settings):
    """A tiny FLARE model whose adapter is random in every place."""
    base = base if base is not None else tiny_model(architecture, task, dropout=dropout)
    model = get_peft_model(base, FlareConfig(**{"r": R, "lora_alpha": ALPHA, **settings}), adapter_name=name)
    return randomised(model, name, seed)


def randomised(model, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key and f".{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(architecture, task="sequence_classification", source_length=5, seed=7):
    """A target batch with right padding, and sources that are shorter than some targets and longer than others."""
    batch = tiny_batch(architecture, task)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([source_length, source_length - 1, 3, source_length])
    ids = torch.randint(FIRST_WORD, VOCABULARY, (4, source_length), generator=generator)
    mask = (torch.arange(source_length) < lengths[:, None]).long()
    ids[:, 0] = BOS
    ids[torch.arange(4), lengths - 1] = EOS
    return batch | {"source_input_ids": ids.masked_fill(mask == 0, PAD), "source_attention_mask": mask}


def target_of(batch):
    return {name: value for name, value in batch.items() if not name.startswith("source_") and name != "fusion_mask"}


def left(ids, mask):
    """The same rows with their padding on the left."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def weights_of(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name)


def outputs(model, batch):
    """Logits without dropout and gradient."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    model.train(training)
    return out.logits if "logits" in out else out[0]
