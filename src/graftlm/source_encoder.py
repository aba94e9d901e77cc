"""What a recipe's FLARE reads its source with: the model itself, another encoder (FLARE MT), or a cache of either.

adapter.source_encoder    a model beside the recipe, or on the hub; frozen, and not part of the run's weights
adapter.source_cache      representations of train and dev, computed once, in the run folder or in one that runs share
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from graftlm.adapters.flare_cache import SourceCache
from graftlm.adapters.flare_encode import EncoderStates, ModelStates
from graftlm.adapters.flare_source import SourceContext
from graftlm.adapters.flare_text import has_marks
from graftlm.data import Split
from graftlm.errors import ModelError
from graftlm.recipe import Recipe
from graftlm.tasks import check_length

# precision of the training → of the numbers on disk
_KEPT_AS = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load_encoder(recipe: Recipe) -> EncoderStates | None:
    """The recipe's `adapter.source_encoder`, frozen; None where it has none.

    Raises:
        ModelError: no such model, a part of it that the checkpoint does not have, or positions for shorter texts only.
        SetupError: `adapter.source_language`, or else the language of the recipe, is none that its tokenizer marks.
    """
    chosen = recipe.adapter
    if chosen.source_encoder is None:
        return None
    where = _locate(recipe, chosen.source_encoder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model, info = transformers.AutoModel.from_pretrained(
            where, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refused(recipe, where, f"cannot be loaded: {first}") from error
    if missing := sorted(name for name in info["missing_keys"] if "pooler." not in name):
        raise _refused(recipe, where, f"would be partly random: the checkpoint has no {', '.join(missing[:4])}")
    check_length(recipe, tokenizer, model.config)
    language = chosen.source_language or (recipe.source if has_marks(tokenizer) else None)
    return EncoderStates(model, tokenizer, language, recipe.training.max_length)


def encoder_of(model: Any) -> EncoderStates | None:
    """The encoder that was attached to a FLARE MT model."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    owners = (getattr(hook, "__self__", None) for hook in bare._forward_pre_hooks.values())
    return next((owner.encoder for owner in owners if isinstance(owner, SourceContext)), None)


def cached(
    recipe: Recipe, model: Any, tokenizer: Any, splits: Sequence[Split], folder: Path, *, progress: bool
) -> SourceCache | None:
    """What the recipe's `adapter.source_cache` asks for, computed or found.

    The name of the cache follows from its texts and from all that they are read with, so that one that was made of
    other texts, by other weights or with other settings is never taken for it.

    Args:
        recipe: `training.precision` is that of the numbers on disk.
        model: with its FLARE adapter.
        tokenizer: of the model.
        splits: whose sources are read in each epoch.
        folder: where it lies with ``source_cache: true``.
        progress: whether a bar is shown.

    Returns:
        None where the recipe asks for none.
    """
    chosen = recipe.adapter.source_cache
    if not chosen:
        return None
    encode = encoder_of(model) or ModelStates(model, tokenizer, recipe.training.max_length)
    texts, dtype = [text for split in splits for text in split.sources or ()], _KEPT_AS[recipe.training.precision]
    place = folder if chosen is True else recipe.path(chosen)
    return SourceCache.build(
        place / SourceCache.key(encode, texts, dtype),
        encode,
        texts,
        batch_size=recipe.training.eval_batch_size,
        dtype=dtype,
        progress=progress,
    )


def _locate(recipe: Recipe, text: str) -> str:
    """A folder with a model, or a hub id."""
    local = recipe.path(text)
    if local.is_dir():
        return str(local)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise _refused(recipe, str(local), "is not there: no such folder")
    return text


def _refused(recipe: Recipe, found: str, reason: str) -> ModelError:
    return ModelError(
        f"{recipe.origin('adapter.source_encoder')}: the encoder {reason}",
        found=found,
        allowed="a folder with a model (relative to the recipe), or a hub id OWNER/NAME",
    )
