"""Representations of source texts for FLARE: of the model itself, of another encoder, or from a cache on disk.

All three are called alike: texts in, ``(states, mask)`` out. `graftlm.FlareCollator` puts them into a batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.adapters.flare_source import SourceContext
from graftlm.errors import SetupError

_OF_ADAPTERS = ("lora_", "modules_to_save.", "pooler.")  # not what the source is read with
# of a configuration: what changes nothing that the source is read with
_OF_TASKS = ("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version", "use_cache")

Text = str | tuple[str, ...]  # a text, or the two of a pair


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
        inputs = _tokens(self._tokenizer, texts, self._max_length, self._model)
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
        pair = getattr(getattr(encoder, "config", None), "is_encoder_decoder", False)
        self._encoder = encoder.get_encoder() if pair and hasattr(encoder, "get_encoder") else encoder
        self._encoder.requires_grad_(False).eval()
        self._max_length = max_length

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        inputs = _tokens(marked(self.tokenizer, self.language), texts, self._max_length, self._encoder)
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

        The encoder does not become part of the model: it is neither trained nor saved with it.
        """
        SourceContext.of(model.get_base_model() if hasattr(model, "get_base_model") else model).encoder = self

    def fingerprint(self) -> str:
        settings = f"language={self.language}, max_length={self._max_length}"
        return _fingerprint(self._encoder, marked(self.tokenizer, self.language), settings)


def has_marks(tokenizer: Any) -> bool:
    """Whether a tokenizer marks the language of a text."""
    return getattr(tokenizer, "src_lang", None) is not None


def marked(tokenizer: Any, language: str | None) -> Any:
    """The tokenizer, told the language of the next texts where it marks languages.

    Raises:
        SetupError: a language and no marks, marks and no language, or one that the tokenizer does not know.
    """
    marks = has_marks(tokenizer)
    if marks != (language is not None):
        raise SetupError(
            "This tokenizer marks the language of a text, and has to be told which it is."
            if marks
            else "This tokenizer has no marks of languages.",
            found=f"{type(tokenizer).__name__}, language={language!r}",
            fix='language="dan_Latn", say' if marks else "leave language out",
        )
    if marks and tokenizer.src_lang != language:
        before, known = tokenizer.src_lang, True
        try:
            tokenizer.src_lang = language
            known = getattr(tokenizer, "unk_token_id", None) not in tokenizer([""])["input_ids"][0]
        except KeyError:
            known = False
        if not known:
            tokenizer.src_lang = before
            raise SetupError(
                "The encoder's tokenizer has no mark for this language.",
                found=f"{language!r}; {type(tokenizer).__name__}",
                allowed=f"marks such as {before!r}",
                fix="in a recipe: tags of `source` and `data.test` as the tokenizer's, or adapter.source_language",
            )
    return tokenizer


def parts(text: Text) -> tuple[str, ...]:
    """A text alone, or the two of a pair."""
    return (text,) if isinstance(text, str) else tuple(text)


def _tokens(tokenizer: Any, texts: Sequence[Text], max_length: int | None, model: nn.Module) -> dict[str, Tensor]:
    columns = (list(column) for column in zip(*map(parts, texts), strict=True))
    found = tokenizer(
        *columns, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
    )
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
