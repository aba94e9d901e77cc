"""Invertible adapters at the embeddings (MAD-X)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from graftlm.adapters.layer import AdapterLayer, new_linear
from graftlm.architectures import describe
from graftlm.errors import ModelError

_ROLES = ("bottleneck_f_down", "bottleneck_f_up", "bottleneck_g_down", "bottleneck_g_up")


class Invertible(AdapterLayer):
    r"""An invertible function of the embeddings, undone in front of the output matrix.

    With the two halves of an embedding e = (e₁, e₂):

    .. math:: o_1 = e_1 + F(e_2), \quad o_2 = e_2 + G(o_1); \qquad
              e_2 = o_2 - G(o_1), \quad e_1 = o_1 - F(e_2)

    F and G are bottlenecks U φ(D x + b_D) + b_U of width d/2 and size d/4; U = 0 at the start, so step 0 equals the
    base model. The layers get o; what enters the output matrix of a language model (after BERT's transform and norm) is
    taken back to e. Models whose embeddings come from more than one module (GPT-2, encoder-decoders) have none.

    Source: Pfeiffer et al., *MAD-X*, arXiv 2005.00052, Section 3.3 (NICE coupling, Dinh et al., arXiv 1410.8516).

    Differs from the paper in: U is zero at the start; φ is the configuration's `activation`.
    """

    adapter_layer_names = _ROLES
    other_param_names = ("bottleneck_activation",)

    def __init__(self, base_layer: nn.Module, output: nn.Module | None):
        super().__init__(base_layer)
        for role in _ROLES:
            setattr(self, role, nn.ModuleDict())
        self.bottleneck_activation = nn.ModuleDict()
        self._handle = output.register_forward_pre_hook(self._before_output) if output is not None else None

    def update_layer(self, adapter: str, config: Any, width: int) -> None:
        """Adds one adapter."""
        for name, (_, shape) in zip(_ROLES, _shapes(width).items(), strict=True):
            getattr(self, name)[adapter] = new_linear(*reversed(shape), zero=name.endswith("up"))
        self.bottleneck_activation[adapter] = ACT2FN[config.activation]
        self._move_adapter_to_device_of_base_layer(adapter)

    def release(self) -> None:
        """Leaves the output matrix alone again."""
        if self._handle is not None:
            self._handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        e = self.base_layer(*args, **kwargs)
        for adapter in self.active_here:
            first, second = e.chunk(2, dim=-1)
            first = first + self._part("f", adapter, second)
            e = torch.cat([first, second + self._part("g", adapter, first)], dim=-1)
        return e

    def inverse(self, o: Tensor) -> Tensor:
        """What `forward` does to the embeddings, undone: (…, d) → (…, d)."""
        for adapter in reversed(self.active_here):
            first, second = o.chunk(2, dim=-1)
            second = second - self._part("g", adapter, first)
            o = torch.cat([first - self._part("f", adapter, second), second], dim=-1)
        return o

    def _part(self, part: str, adapter: str, x: Tensor) -> Tensor:
        down, up = getattr(self, f"bottleneck_{part}_down")[adapter], getattr(self, f"bottleneck_{part}_up")[adapter]
        h = self._cast_input_dtype(x, down.weight.dtype)
        return up(self.bottleneck_activation[adapter](down(h))).to(x.dtype)

    def _before_output(self, module: nn.Module, args: tuple) -> tuple:
        return (self.inverse(args[0]), *args[1:])


def place_of(model: nn.Module) -> str:
    """Path of the one module that gives the embeddings.

    Raises:
        ModelError: more than one, or none.
    """
    found = describe(model).embeddings
    if len(found) != 1:
        raise ModelError(
            "An invertible adapter needs one module that gives the embeddings.",
            found=", ".join(found) or "none",
            allowed="models such as BERT, XLM-R, ModernBERT, Llama",
            fix="BottleneckConfig(…, invertible=False)",
        )
    return found[0]


def output_of(model: nn.Module) -> nn.Module | None:
    """The output matrix of a language model; None where there is none."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if callable(ask) else None


def check_output(model: nn.Module, saved: Iterable[str]) -> None:
    """Refuse a trained copy of the output matrix: PEFT would copy the way back to e with it.

    Raises:
        ModelError: `modules_to_save` names the output matrix.
    """
    output = output_of(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if output is not None and module is output and any(name.endswith(end) for end in saved):
            raise ModelError(
                "The output matrix cannot be trained beside an invertible adapter.",
                found=f"modules_to_save: {name}",
                fix="leave it out of modules_to_save",
            )


def leaves(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of one adapter."""
    for name, (rows, columns) in _shapes(width).items():
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)


def _shapes(width: int) -> dict[str, tuple[int, int]]:
    if width % 4:
        raise ModelError(
            "An invertible adapter splits the embeddings in halves and those again.",
            found=f"width {width}",
            allowed="a multiple of 4",
        )
    half, size = width // 2, width // 4
    return {name: (size, half) if name.endswith("down") else (half, size) for name in _ROLES}
