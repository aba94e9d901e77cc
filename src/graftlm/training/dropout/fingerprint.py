"""A small mark of a model's backbone, by which a published measurement knows the model that it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import ModelError, SetupError
from graftlm.training.dropout.sites import canonical

_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_SAMPLED = 65_536
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Fingerprint:
    """Sizes from the configuration, and one number a tensor.

    The number is the projection of up to 65,536 evenly spaced elements on a fixed direction, divided by their norm:
    rounding to bfloat16 moves it by about a thousandth, other weights by about 1.
    """

    name: str
    config: Mapping[str, str | int]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, float]

    @classmethod
    def of(cls, backbone: Any, tensors: Iterable[str]) -> Fingerprint:
        """Of the named tensors; names start at the backbone."""
        parameters = _parameters(backbone)
        chosen = {name: parameters[name] for name in tensors}
        return cls(
            str(backbone.config.name_or_path).rstrip("/").rpartition("/")[2],
            _config(backbone),
            {name: tuple(tensor.shape) for name, tensor in chosen.items()},
            {name: _projection(tensor) for name, tensor in chosen.items()},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """From what `dataclasses.asdict` made of it, after a way through JSON."""
        shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        return cls(values["name"], values["config"], shapes, values["weights"])

    def check(self, backbone: nn.Module, check: str = "weights") -> None:
        """Whether `backbone` is the model of this fingerprint.

        Raises:
            ModelError: it is not; the message names what differs.
        """
        if check not in ("weights", "config"):
            raise SetupError("unknown check of a model", found=repr(check), allowed="weights, config")
        config = _config(backbone)
        skipped = {"vocab_size"} if check == "config" or _more_words(self.config, config) else set()
        differing = [
            f"{key}: {config.get(key)!r} (measured: {value!r})"
            for key, value in self.config.items()
            if config.get(key) != value and key not in skipped
        ]
        if differing:
            only_words = all(one.startswith("vocab_size") for one in differing)
            raise ModelError(
                "the rates were measured on another model",
                found=f"{'; '.join(differing)}; they came from {self.name or 'a model without a name'}",
                fix="check='config' for the same model with fewer words"
                if only_words
                else "GuidedDropout.estimate on the pretrained form of this model",
            )
        if check == "config":
            return
        parameters = _parameters(backbone)
        wanted = [name for name in self.weights if not (name.startswith("decoder.") and encoder_alone(backbone))]
        missing = [name for name in wanted if name not in parameters]
        other = [name for name in wanted if name in parameters and not self._same(name, parameters[name])]
        if missing or other:
            raise ModelError(
                "the rates were measured on other weights",
                found=f"{len(missing)} tensors are missing and {len(other)} of {len(self.weights)} differ, "
                f"such as {[*missing, *other][0]}",
                fix="load the checkpoint that was measured; check='config' for one that was trained further since",
            )

    def _same(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is the measured one, up to rounding and to rows that were added behind it."""
        shape = tuple(self.shapes[name])
        if tensor.ndim != len(shape) or tensor.shape[1:] != shape[1:] or len(tensor) < shape[0]:
            return False
        return abs(_projection(tensor[: shape[0]]) - self.weights[name]) <= _TOLERANCE


def encoder_alone(backbone: Any) -> bool:
    """Whether it is an encoder that was pretrained with a decoder, such as T5's, without that."""
    return not hasattr(backbone, "decoder") and hasattr(backbone, "encoder")


def _more_words(measured: Mapping[str, str | int], found: Mapping[str, str | int]) -> bool:
    """Whether tokens were added, which come behind those that were there."""
    before, now = measured.get("vocab_size"), found.get("vocab_size")
    return isinstance(before, int) and isinstance(now, int) and now > before


def _config(backbone: Any) -> dict[str, str | int]:
    config = backbone.config
    values = {key: getattr(config, key, None) for key in _SIZES}
    return {key: value for key, value in values.items() if isinstance(value, str | int)}


def _parameters(backbone: nn.Module) -> dict[str, Tensor]:
    return {canonical(name): parameter.detach() for name, parameter in backbone.named_parameters()}


def _projection(tensor: Tensor) -> float:
    flat = tensor.reshape(-1)[:: max(1, math.ceil(tensor.numel() / _SAMPLED))].double().cpu()
    direction = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 1.618033988749895 + 1) * math.sqrt(2)
    norm = float(flat.norm())
    return round(float(flat @ direction) / norm, 5) if norm > 0 else 0.0
