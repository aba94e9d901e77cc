"""A second implementation of bottleneck adapters: forward hooks on the bare model that know nothing of PEFT.

    with reference(base, weights, "pfeiffer", "bert"):
        logits = base(**batch).logits

`weights` is what `get_peft_model_state_dict` gives, or a list of such for a stack, bottom first.
"""

from __future__ import annotations

import re
from contextlib import contextmanager

import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny import tiny_model
from torch.nn import functional
from transformers.activations import ACT2FN

from graftlm.adapters.bottleneck import BottleneckConfig

# Per layer: what ends the attention, what ends the FFN, the whole FFN, the norm of the sum after it.
BERT = ("attention.output.dropout", "output.dropout", None, "output.LayerNorm")
LLAMA = ("self_attn.o_proj", "mlp.down_proj", "mlp", None)
T5 = ("layer.0.SelfAttention.o", "layer.{ffn}.DenseReluDense.wo", "layer.{ffn}.DenseReluDense", None)
PLACES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "distilbert": ("attention.out_lin", "ffn.lin2", "ffn", "output_layer_norm"),
    "modernbert": ("attn.Wo", "mlp.Wo", "mlp", None),
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "gpt2": ("attn.c_proj", "mlp.c_proj", "mlp", None),
    "t5": T5,
    "mt5": T5,
}
KINDS = ("pfeiffer", "houlsby", "parallel")


def pairs(everywhere):
    """(architecture, kind): one kind on every architecture, all kinds where the structures differ."""
    different = ("bert", "distilbert", "llama", "t5")
    return [(one, kind) for one in PLACES for kind in KINDS if kind == everywhere or one in different]


_LAYER = re.compile(
    r"base_model\.model\.(.*?(?:layer|layers|h|block)\.\d+)\.(.*?\.?)bottleneck_(down|up)\.(weight|bias)"
)


def layers_of(weights):
    """{layer path: {"attention" or "ffn": {"down.weight": tensor, …}}}"""
    found = {}
    for key, tensor in weights.items():
        if (match := _LAYER.fullmatch(key)) is not None:
            path, inside, role, part = match.groups()
            sublayer = "attention" if "attention" in inside or "att" in inside.lower() else "ffn"
            found.setdefault(path, {}).setdefault(sublayer, {})[f"{role}.{part}"] = tensor
    return found


@contextmanager
def reference(model, weights, kind, architecture, *, activation="relu", scaling=1.0):
    stack = [layers_of(one) for one in (weights if isinstance(weights, list) else [weights])]
    handles = []

    def update(w, h):
        inner = functional.linear(h.to(w["down.weight"].dtype), w["down.weight"], w["down.bias"])
        return (scaling * functional.linear(ACT2FN[activation](inner), w["up.weight"], w["up.bias"])).to(h.dtype)

    def hook(path, function, *, pre=False):
        module = model.get_submodule(path)
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        handles.append(register(function))

    def at_output(ws):
        """f ← f + A(f); each of a stack reads the one below and is added to f"""

        def act(module, args, f):
            value = f
            for w in ws:
                value = f + update(w, value)
            return value

        return act

    def at_norm(ws, keep):
        def act(module, args, normed):
            (s,) = args  # s = x + f
            f, value = keep["f"], None
            for w in ws:
                value = f + update(w, normed if value is None else value)
            return functional.layer_norm(s - f + value, module.normalized_shape, module.weight, module.bias, module.eps)

        return act

    paths = sorted({path for one in stack for path in one})
    for path in paths:
        attention, ffn_end, ffn, norm = PLACES[architecture]
        last = 2 if "decoder" in path else 1
        ffn_end, ffn = (name and f"{path}.{name.format(ffn=last)}" for name in (ffn_end, ffn))
        ws = [one[path]["ffn"] for one in stack if "ffn" in one.get(path, {})]
        if kind == "houlsby":
            hook(f"{path}.{attention}", at_output([one[path]["attention"] for one in stack]))
            hook(ffn_end, at_output(ws))
        elif kind == "pfeiffer" and norm:
            keep = {}
            hook(ffn_end, lambda module, args, f, keep=keep: keep.__setitem__("f", f))
            hook(f"{path}.{norm}", at_norm(ws, keep))
        elif kind == "pfeiffer":
            hook(ffn_end, at_output(ws))
        elif ffn is None:  # parallel in BERT: the FFN's input is the intermediate module's
            keep = {}
            hook(f"{path}.intermediate", lambda module, args, keep=keep: keep.__setitem__("x", args[0]), pre=True)
            hook(ffn_end, lambda m, args, f, keep=keep, ws=ws: f + sum(update(w, keep["x"]) for w in ws))
        else:
            hook(ffn, lambda module, args, f, ws=ws: f + sum(update(w, args[0]) for w in ws))
    assert handles
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def adapted(architecture, task="sequence_classification", *, seed=1, name="default", base=None, **settings):
    """A tiny model with an adapter whose weights are random in every place."""
    settings = {"bottleneck_size": 5, **settings}
    base = base if base is not None else tiny_model(architecture, task, dropout=0.0)
    model = get_peft_model(base, BottleneckConfig(**settings), adapter_name=name)
    return randomised(model, name, seed)


def randomised(model, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if f".{name}." in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name)


def outputs(model, batch):
    """Logits, or hidden states, as one tensor; no dropout, no gradient."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    model.train(training)
    return out.logits if "logits" in out else out[0]
