"""Gaussian dropout that is on in training and off otherwise, for hidden states and for attention probabilities."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from graftlm.errors import ModelError

ATTENTION = "graftlm_gaussian"


class GaussianDropout(nn.Dropout):
    r"""Multiplies each element by noise from :math:`N(1, p / (1 - p))` in training; the identity in evaluation.

    Mean and variance of the factor are those of dropout with rate p.

    Source: Srivastava et al. 2014, Section 10.

    Differs from the release of arXiv 2406.14005 in: there the noise is applied in evaluation too, which handicaps the
    baseline.

    Example:
        >>> layer = GaussianDropout(0.5).eval()
        >>> layer(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return gaussian_noise(input, self.p) if self.training else input


def gaussian_noise(x: Tensor, p: float) -> Tensor:
    """x times noise with mean 1 and variance p / (1 − p)."""
    if has_torch_function_unary(x):  # what watches dropout can watch this as well
        return handle_torch_function(gaussian_noise, (x,), x, p)
    return x * (1 + (p / (1 - p)) ** 0.5 * torch.randn_like(x)) if p > 0 else x


class _InsteadOfDropout(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not nn.functional.dropout:
            return function(*args, **kwargs)
        names = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = names["input"], names.get("p", 0.5)
        return gaussian_noise(x, p) if names.get("training", True) else x


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """The model family's own eager attention, its dropout replaced."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ModelError("this model has no eager attention to put Gaussian noise into", found=type(module).__name__)
    if not (module.training and kwargs.get("dropout")):
        return eager(module, query, key, value, attention_mask, **kwargs)
    with _InsteadOfDropout():
        return eager(module, query, key, value, attention_mask, **kwargs)


def use_gaussian_attention(model: Any) -> None:
    """Switches a transformers model to attention with Gaussian noise on its probabilities."""
    if model.config._attn_implementation != ATTENTION:
        before = model.config._attn_implementation
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)
        model._graftlm_attention_before = before


def use_usual_attention(model: Any) -> None:
    """Takes `use_gaussian_attention` back."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation(getattr(model, "_graftlm_attention_before", "eager"))
