"""Representations of source texts for FLARE: of the model itself, of another encoder, or from a cache on disk.

All three are called alike: texts in, ``(states, mask)`` out. `graftlm.FlareCollator` puts them into a batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.adapters.flare_source import SourceContext
from graftlm.adapters.flare_text import Text, marked, tokenised
from graftlm.errors import SetupError

_OF_ADAPTERS = ("lora_", "modules_to_save.", "pooler.")  # not what the source is read with
# of a configuration: what changes nothing that the source is read with
_OF_TASKS = ("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version", "use_cache")


class Encode(Protocol):
    """What turns texts into representations."""

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
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

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        inputs = _inputs(self._tokenizer, texts, self._max_length, self._model)
        states = SourceContext.of(self._model).states_of(self._model, **inputs)
        return _clean(torch.stack(states, 1), inputs["attention_mask"])

    def fingerprint(self) -> str:
        backbone = SourceContext.of(self._model).backbone(self._model)
        return _fingerprint(backbone, self._tokenizer, f"max_length={self._max_length}")


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
        SetupError: a tokenizer with language marks and no language, or one that it does not know, or the other way
            round.
    """

    def __init__(self, encoder: Any, tokenizer: Any, language: str | None = None, max_length: int | None = None):
        self.tokenizer, self.language = marked(tokenizer, language), language
        self.name: str | None = getattr(encoder, "name_or_path", None) or None  # hub id or folder
        pair = getattr(getattr(encoder, "config", None), "is_encoder_decoder", False)
        self._encoder = encoder.get_encoder() if pair and hasattr(encoder, "get_encoder") else encoder
        self._encoder.requires_grad_(False).eval()
        self._max_length = max_length

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        inputs = _inputs(marked(self.tokenizer, self.language), texts, self._max_length, self._encoder)
        return _clean(self.states(**inputs)[:, None], inputs["attention_mask"])

    @property
    def width(self) -> int:
        """Of its hidden states: the ``encoder_width`` of `graftlm.FlareConfig`."""
        return int(self._encoder.config.hidden_size)

    def states(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """The last hidden state of tokens, (batch, length, width); the encoder follows them to their device."""
        if next(self._encoder.parameters()).device != input_ids.device:
            self._encoder.to(input_ids.device)
        accepted = inspect.signature(self._encoder.forward).parameters  # not all know token types
        with torch.no_grad():
            return self._encoder(input_ids=input_ids, **{k: v for k, v in inputs.items() if k in accepted})[0]

    def attach(self, model: Any) -> None:
        """From now on a FLARE MT model reads ``source_input_ids`` with this encoder: tokens of the encoder's tokenizer.

        The encoder does not become part of the model: it is neither trained nor saved with it. Its name and language
        are, in the adapter's configuration, and the same encoder has to be attached again.

        Raises:
            SetupError: no adapter for the width of this encoder, or one that was trained with another encoder. Folders
                and hub ids are compared by their last part.
        """
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        widths = {name: getattr(each, "encoder_width", None) for name, each in getattr(bare, "peft_config", {}).items()}
        fitting = [bare.peft_config[name] for name, width in widths.items() if width == self.width]
        if not fitting:
            raise SetupError(
                "The model has no FLARE MT adapter for the width of this encoder.",
                found=", ".join(f"{name}: encoder_width={width}" for name, width in widths.items()) or "no adapter",
                allowed=f"encoder_width={self.width}",
                fix="get_peft_model(model, graftlm.FlareConfig(encoder_width=encoder_states.width, …)) first",
            )
        for config in fitting:
            known = config.encoder_name
            if known and self.name and Path(known).name != Path(self.name).name:
                raise SetupError(
                    "The adapter was trained with another encoder: the map from its width would be of no use.",
                    found=self.name,
                    allowed=known,
                    fix="attach that one; or delete encoder_name in adapter_config.json where it has another name now",
                )
        for config in fitting:
            if config.encoder_name is None:
                config.encoder_name, config.encoder_language = self.name, self.language
        SourceContext.of(bare).encoder = self

    def fingerprint(self) -> str:
        settings = f"language={self.language}, max_length={self._max_length}"
        return _fingerprint(self._encoder, marked(self.tokenizer, self.language), settings)


def _inputs(tokenizer: Any, texts: Sequence[Text], max_length: int | None, model: nn.Module) -> dict[str, Tensor]:
    found = tokenised(tokenizer, texts, max_length, padding=True, return_tensors="pt")
    device, accepted = next(model.parameters()).device, inspect.signature(model.forward).parameters
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: found[name].to(device) for name in names if name in found and name in accepted}


def _clean(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # to where a collator's tensors are: Trainer pins them, and moves them itself
    return states.masked_fill(mask[:, None, :, None] == 0, 0.0).cpu(), mask.cpu()


def _fingerprint(module: nn.Module, tokenizer: Any, settings: str) -> str:
    config = getattr(module, "config", None)
    kept = config.to_dict() if config is not None else {}
    kept = {key: value for key, value in kept.items() if key not in _OF_TASKS and not key.startswith("_")}
    about = [settings, json.dumps(kept, sort_keys=True, default=str), _vocabulary(tokenizer)]
    found = hashlib.blake2b("\n".join(about).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        bare = name.replace("base_layer.", "").replace("original_module.", "")
        if any(part in bare for part in _OF_ADAPTERS):
            continue
        found.update(f"{bare} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """How a tokenizer takes text; what changes from call to call, padding and truncation, is left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return json.dumps([type(tokenizer).__name__, sorted(words.items())])
