"""Bottleneck adapters of AdapterHub's `adapters` package, turned into ours."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.adapters import invertible
from graftlm.adapters.bottleneck import BottleneckConfig
from graftlm.adapters.checkpoint import PREFIX
from graftlm.adapters.tuner import places, width_of
from graftlm.architectures import describe
from graftlm.errors import ModelError

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter.safetensors", "pytorch_adapter.bin")
_IN_LAYER = re.compile(r".*\.(?:layer|layers|h|block)\.(\d+)\.(.+)\.adapter_(down\.0|up)\.(weight|bias)")
_AT_EMBEDDINGS = re.compile(r".*invertible_adapters\.[^.]+\.([FG])\.([02])\.(weight|bias)")
_ROLES = {"F0": "f_down", "F2": "f_up", "G0": "g_down", "G2": "g_up"}
# what our adapters are, in the words of that package; anything else computes something else
_FIXED = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
_INVERTIBLE = {"inv_adapter": (None, "nice"), "inv_adapter_reduction_factor": (None, 2)}


def convert_adapterhub(
    model: nn.Module, source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> BottleneckConfig:
    """Writes an adapter of AdapterHub's `adapters` package as one that `PeftModel.from_pretrained` loads.

    Pfeiffer's and Houlsby's adapters (`seq_bn`, `double_seq_bn`, with `_inv` their invertible parts, and the same under
    their older names) compute what `graftlm.BottleneckConfig` computes on models that norm after the residual sum, so
    the logits are equal. Their heads are another package's modules and are left out.

    Args:
        model: the model that the adapter is for, with any head; only its structure is read, so that it may be on meta.
        source: folder with `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`.
        target: folder that is written: for `PeftModel.from_pretrained`, `load_adapter`, or a recipe's
            `adapter.language_adapters`.

    Returns:
        The configuration that was written.

    Raises:
        ModelError: no such adapter, one of a kind that ours cannot be, or one that does not fit the model.

    Example:
        ::

            model = AutoModelForMaskedLM.from_pretrained("FacebookAI/xlm-roberta-base")
            graftlm.convert_adapterhub(model, "downloaded/de-wiki", "adapters/lang_de")
    """
    source = Path(source)
    described = _described(source)
    found = described["config"]
    _check_supported(found, source)
    kind = "houlsby" if found["mh_adapter"] else "pfeiffer"
    tensors = _tensors(source)
    invertible_part = found.get("inv_adapter") is not None
    layers = sorted({layer.index for layer in describe(model).layers})
    left_out = set(found.get("leave_out") or ())
    config = BottleneckConfig(
        kind=kind,
        bottleneck_size=_size(tensors, source),
        activation=found["non_linearity"].lower(),
        dropout=float(found.get("dropout", 0.0)),
        scaling=float(found.get("scaling", 1.0)),
        invertible=invertible_part,
        layers_to_transform=[index for index in layers if index not in left_out] if left_out else None,
        base_model_name_or_path=described.get("model_name") or None,
        inference_mode=True,
    )
    _refuse_pre_norm(model, config)
    written = _renamed(model, config, tensors, source)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    save_file(written, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(target))
    return config


def _described(source: Path) -> dict[str, Any]:
    try:
        described = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"there is no AdapterHub adapter here: {error}", found=source, allowed=_CONFIG) from error
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict) or "mh_adapter" not in config:
        raise ModelError(
            "this is no bottleneck adapter of AdapterHub's",
            found=f"{source / _CONFIG}: {described.get('peft_type') or 'without config.mh_adapter'}",
            allowed="seq_bn, seq_bn_inv, double_seq_bn, double_seq_bn_inv (Pfeiffer, Houlsby)",
        )
    return described


def _check_supported(found: Mapping[str, Any], source: Path) -> None:
    pfeiffer = not found["mh_adapter"]
    wanted = _FIXED | {"output_adapter": True, "original_ln_before": pfeiffer, "residual_before_ln": True}
    wrong = [key for key, value in wanted.items() if found.get(key, value) != value]
    wrong += [key for key, allowed in _INVERTIBLE.items() if found.get(key) not in allowed]
    if not isinstance(found.get("scaling", 1.0), int | float):
        wrong.append("scaling")
    if isinstance(found.get("reduction_factor"), Mapping):
        wrong.append("reduction_factor")
    if wrong:
        raise ModelError(
            "graftlm has no adapter that computes what this one computes",
            found=", ".join(f"{key}={found.get(key)!r}" for key in wrong) + f" in {source / _CONFIG}",
            allowed="Pfeiffer's and Houlsby's adapters with one constant scaling and one size, "
            "invertible parts of the kind nice with reduction 2",
        )


def _tensors(source: Path) -> dict[str, Tensor]:
    file = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
    if file is None:
        raise ModelError("the adapter has no weights", found=source, allowed=_WEIGHTS)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ModelError(f"the adapter's file cannot be read: {error}", found=file) from error


def _size(tensors: Mapping[str, Tensor], source: Path) -> int:
    sizes = {len(tensor) for name, tensor in tensors.items() if name.endswith("adapter_down.0.weight")}
    if len(sizes) != 1:
        raise ModelError("the adapter's layers are of one size", found=f"{source}: {sorted(sizes) or 'no layer'}")
    return sizes.pop()


def _refuse_pre_norm(model: nn.Module, config: BottleneckConfig) -> None:
    if any(place.norm is None for place in places(model, config) if place.part == "ffn"):
        raise ModelError(
            "adapters of models that norm before a sublayer are placed differently there and here",
            found=type(model).__name__,
            allowed="models that norm after the residual sum: BERT, RoBERTa, XLM-R, DistilBERT",
        )


def _renamed(
    model: nn.Module, config: BottleneckConfig, tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    here = {(place.layer.index, place.part): place.name for place in places(model, config)}
    names: dict[str, Tensor] = {}
    lost = []
    for name, tensor in tensors.items():
        if (match := _IN_LAYER.fullmatch(name)) is not None:
            layer, where, role, part = match.groups()
            place = here.get((int(layer), "attention" if "attention" in where else "ffn"))
            renamed = place and f"{place}.bottleneck_{role.removesuffix('.0')}.{part}"
        elif config.invertible and (match := _AT_EMBEDDINGS.fullmatch(name)) is not None:
            half, number, part = match.groups()
            renamed = f"{invertible.place_of(model)}.bottleneck_{_ROLES[half + number]}.{part}"
        else:
            renamed = None
        if renamed is None:
            lost.append(name)
        else:
            names[PREFIX + renamed] = tensor.contiguous()
    _check_fits(model, config, names, lost, source)
    return names


def _check_fits(
    model: nn.Module, config: BottleneckConfig, names: Mapping[str, Tensor], lost: list[str], source: Path
) -> None:
    width, size = width_of(model), config.size(width_of(model))
    shapes = {"down.weight": (size, width), "down.bias": (size,), "up.weight": (width, size), "up.bias": (width,)}
    needed = {
        f"{PREFIX}{place.name}.bottleneck_{leaf}": shape
        for place in places(model, config)
        for leaf, shape in shapes.items()
    }
    if config.invertible:
        at = invertible.place_of(model)
        needed |= {f"{PREFIX}{at}.{leaf}": shape for leaf, shape in invertible.leaves(width)}
    missing = sorted(needed.keys() - names.keys())
    wrong = [name for name, tensor in names.items() if name in needed and tuple(tensor.shape) != needed[name]]
    if lost or missing or wrong:
        counts = f"{len(lost)} without a place, {len(missing)} missing, {len(wrong)} of another shape"
        first = (lost or wrong or missing)[0]
        raise ModelError(
            "the adapter does not fit this model",
            found=f"{source}: {counts}; the first: {first.removeprefix(PREFIX)}",
            fix="the model that its adapter_config.json names under model_name, with any head",
        )
