"""A second implementation of neutral residues: forward hooks on the bare model that know nothing of PEFT.

with reference(base, weights, "llama", gate="relu") as seen:
    logits = base(**batch).logits
    seen["r"]  # the gated output of each layer, bottom first
"""

from __future__ import annotations

import re
from contextlib import contextmanager

import torch
from adapters.bottlenecks import PLACES, outputs, randomised, weights_of
from peft import get_peft_model
from tiny import tiny_model

from graftlm.adapters.neutral_config import NeutralResiduesConfig

__all__ = ["adapted", "outputs", "randomised", "reference", "weights_of"]
_LAYER = re.compile(r"base_model\.model\.(.*?(?:layer|layers|h|block)\.\d+)\..*neutral_residues_(\w+)\.weight")


@contextmanager
def reference(model, weights, architecture, *, gate="relu"):
    layers, seen, handles = {}, {"r": [], "z": []}, []
    for key, tensor in weights.items():
        if (match := _LAYER.fullmatch(key)) is not None:
            layers.setdefault(match[1], {})[match[2]] = tensor

    def residue(w, n):
        n = n.to(w["out"].dtype)
        u, v = n @ w["glu"].T, n @ w["in"].T
        r = (u * torch.sigmoid(u) * v) @ w["out"].T
        if gate != "none":
            z = (n * w["gate"][0]).sum(-1, keepdim=True)
            seen["z"].append(z)
            r = (
                r
                * {
                    "relu": z.clamp(min=0),
                    "sigmoid": 1 / (1 + (-z).exp()),
                    "elu": z.clamp(min=0) + z.clamp(max=0).expm1(),
                }[gate]
            )
        seen["r"].append(r)
        return r

    def hook(path, function, *, pre=False):
        module = model.get_submodule(path)
        handles.append((module.register_forward_pre_hook if pre else module.register_forward_hook)(function))

    for path, w in layers.items():
        _, _, ffn, _ = PLACES[architecture]
        keep = {}
        entry = f"{path}.{ffn.format(ffn=2 if 'decoder' in path else 1)}" if ffn else f"{path}.intermediate"
        end = f"{path}.output.dropout" if ffn is None else entry
        if architecture in ("gemma2", "gemma3"):
            end = f"{path}.post_feedforward_layernorm"
        hook(entry, lambda module, args, keep=keep: keep.__setitem__("n", args[0]), pre=True)
        hook(end, lambda module, args, f, keep=keep, w=w: f + residue(w, keep["n"]).to(f.dtype))
    assert handles
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def adapted(architecture, task="causal_lm", *, seed=1, name="default", base=None, **settings):
    """A tiny model with blocks whose weights are random in every place."""
    base = base if base is not None else tiny_model(architecture, task, dropout=0.0)
    model = get_peft_model(base, NeutralResiduesConfig(**settings), adapter_name=name)
    return randomised(model, name, seed)
