"""What one call of a FLARE model says: the keywords of its source, and the tokens of the target that are fused."""

from __future__ import annotations

import difflib
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import DataError, SetupError

KEYWORDS = ("source_input_ids", "source_states", "source_attention_mask", "source_token_type_ids", "fusion_mask")


def taken(arguments: dict[str, Any], known: Container[str] = ()) -> dict[str, Tensor | None]:
    """Take FLARE's keywords out of the arguments of a call; the model's own forward never sees them.

    Args:
        arguments: of the call, by name.
        known: those that are the model's own.

    Raises:
        DataError: an argument that is named like one of FLARE's and is none: many models take any name, and would do
            without a source.
    """
    given = {name: arguments.pop(name, None) for name in KEYWORDS}
    if strange := [name for name in arguments if name.startswith(("source", "fusion")) and name not in known]:
        (close,) = difflib.get_close_matches(strange[0], KEYWORDS, n=1, cutoff=0)
        raise DataError(
            "FLARE has no argument of this name.", found=", ".join(strange), allowed=KEYWORDS, fix=f"{close}=…"
        )
    return given


def has_source(given: dict[str, Any]) -> bool:
    """Whether a call has a source, read or given."""
    return given["source_input_ids"] is not None or given["source_states"] is not None


def tokens_of(inputs: dict[str, Any]) -> Tensor | None:
    """The target: ids, or the vectors in their place."""
    tokens = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if tokens is None else tokens


def cached(inputs: dict[str, Any]) -> int:
    """How many tokens of the target are in the KV cache, and not computed again."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_cached(inputs: dict[str, Any]) -> None:
    """Raise where a call would fuse later tokens with the beginning of the source.

    Raises:
        DataError: tokens before those of this call are in the KV cache.
    """
    if before := cached(inputs):
        raise DataError(
            "A source belongs to a whole prompt, and a part of the target is in the KV cache already.",
            found=f"{before} tokens in past_key_values",
            allowed="the source together with the whole prompt; tokens that are written after it need none",
            fix="leave the source out of this call, or use model.generate(…, source_input_ids=…)",
        )


def fused_tokens(
    model: nn.Module, inputs: dict[str, Any], fusion_mask: Tensor | None, is_encoder_decoder: bool
) -> Tensor:
    """Which tokens of the target are fused, (batch, length)."""
    tokens = tokens_of(inputs)
    if tokens is None:
        raise DataError("A source was given, and no target to fuse it into.", fix="model(input_ids=…, …)")
    shape = tuple(tokens.shape[:2])
    labels = inputs.get("labels")
    writes = not is_encoder_decoder and "ForCausalLM" in type(model).__name__
    if fusion_mask is None and writes and labels is not None:
        raise SetupError(
            "Training a decoder to write needs to know which tokens are the prompt: only these are fused, in training "
            "and in generate() alike.",
            found="labels, and no fusion_mask",
            fix="fusion_mask=…, (batch, length), 1 at the prompt and 0 at the answer; graftlm.FlareCollator makes it",
        )
    mask = inputs.get("attention_mask")
    if mask is not None and tuple(mask.shape) != shape:
        raise DataError(
            "FLARE needs a mask of the target's tokens.",
            found=f"attention_mask {tuple(mask.shape)}",
            allowed=str(shape),
        )
    real = torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    if fusion_mask is None:
        return real
    if tuple(fusion_mask.shape) != shape:
        raise DataError(
            "The fusion_mask is not as large as the target.",
            found=str(tuple(fusion_mask.shape)),
            allowed=str(shape),
        )
    if is_encoder_decoder and _answer_within(tokens, labels, fusion_mask.bool()):
        raise DataError(
            "The encoder of an encoder-decoder would read the answer that its decoder has to write.",
            found="labels that repeat the input_ids outside of the fusion_mask, as for a decoder alone",
            allowed="input_ids of the prompt alone, and labels of the answer alone",
            fix="graftlm.FlareCollator(…, answer=…, encoder_decoder=True)",
        )
    return real & fusion_mask.bool()


def _answer_within(tokens: Tensor, labels: Tensor | None, fused: Tensor) -> bool:
    if labels is None or labels.shape != tokens.shape:
        return False
    written = labels != -100
    return bool(written.any() and not (written & fused).any() and (labels == tokens)[written].all())
