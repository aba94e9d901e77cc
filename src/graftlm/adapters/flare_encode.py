"""Representations of source texts for FLARE: of the model itself, of another encoder, or from a cache on disk.

All three are called alike: texts in, ``(states, mask)`` out. `graftlm.FlareCollator` puts them into a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.adapters.flare_source import SourceContext
from graftlm.errors import SetupError

_OF_ADAPTERS = ("lora_", "modules_to_save.", "pooler.")  # not what the source is read with


class Encode(Protocol):
    """What turns texts into representations."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States, (batch, layers, length, width), zero at padding, and the mask of tokens, (batch, length)."""

    def fingerprint(self) -> str:
        """The same for the same representations of every text."""


class ModelStates:
    """What every layer of a FLARE model reads from source texts, with its adapters off.

    It is what the model computes itself from ``source_input_ids`` at each step; taken once, `graftlm.SourceCache` keeps
    it.

    Args:
        model: with a FLARE adapter, on the device where it is to be computed.
        tokenizer: of the model.
        max_length: longest text in tokens; None = as long as it is.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None):
        # a PeftModel, or the transformers model in it
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = _tokens(self._tokenizer, texts, self._max_length, self._model)
        states = SourceContext.of(self._model).states_of(self._model, **inputs)
        return _clean(torch.stack(states, 1), inputs["attention_mask"])

    def fingerprint(self) -> str:
        return _fingerprint(SourceContext.of(self._model).backbone(self._model), f"max_length={self._max_length}")


class EncoderStates:
    """The last hidden state of a frozen encoder, for FLARE MT (`graftlm.FlareConfig` with ``encoder_width``).

    Any encoder: NLLB's or M2M's, mT5's, XLM-R. It reads the target text, or whichever column the collator is given.

    Args:
        encoder: a transformers model, or an encoder-decoder, of which the encoder is taken. Its parameters are frozen
            and its dropout switched off.
        tokenizer: of the encoder.
        language: for tokenizers that mark the language of a text (NLLB, M2M): the mark of these texts, such as
            dan_Latn.
        max_length: longest text in tokens; None = as long as it is.

    Raises:
        SetupError: a tokenizer with language marks and no language, or the other way round.
    """

    def __init__(self, encoder: Any, tokenizer: Any, language: str | None = None, max_length: int | None = None):
        marks = getattr(tokenizer, "src_lang", None) is not None
        if marks != (language is not None):
            raise SetupError(
                "This tokenizer marks the language of a text, and has to be told which it is."
                if marks
                else "This tokenizer has no marks of languages.",
                found=f"{type(tokenizer).__name__}, language={language!r}",
                fix='language="dan_Latn", say' if marks else "leave language out",
            )
        if marks:
            tokenizer.src_lang = language
        pair = getattr(getattr(encoder, "config", None), "is_encoder_decoder", False)
        self._encoder = encoder.get_encoder() if pair and hasattr(encoder, "get_encoder") else encoder
        self._encoder.requires_grad_(False).eval()
        self._tokenizer, self._language, self._max_length = tokenizer, language, max_length

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = _tokens(self._tokenizer, texts, self._max_length, self._encoder)
        with torch.no_grad():
            last = self._encoder(**inputs)[0]
        return _clean(last[:, None], inputs["attention_mask"])

    def fingerprint(self) -> str:
        return _fingerprint(self._encoder, f"language={self._language}, max_length={self._max_length}")


def _tokens(tokenizer: Any, texts: Sequence[str], max_length: int | None, model: nn.Module) -> dict[str, Tensor]:
    found = tokenizer(
        list(texts), padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
    )
    device = next(model.parameters()).device
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


def _clean(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # to where a collator's tensors are: Trainer pins them, and moves them itself
    return states.masked_fill(mask[:, None, :, None] == 0, 0.0).cpu(), mask.cpu()


def _fingerprint(module: nn.Module, settings: str) -> str:
    found = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        bare = name.replace("base_layer.", "").replace("original_module.", "")
        if any(part in bare for part in _OF_ADAPTERS):
            continue
        found.update(f"{bare} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
