"""Language models with the head that they were pretrained with, and how a head that was not is noticed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from graftlm.architectures import describe
from graftlm.errors import ModelError, SetupError
from graftlm.training.dropout.sites import backbone_of
from graftlm.training.dropout.texts import discriminator

_AUTO = {
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}


def load_with_head(
    name: str | os.PathLike[str], tokenizer: Any = None, device: str | torch.device | None = None
) -> tuple[nn.Module, Any]:
    """Loads a model with its language-model head: (model, tokenizer).

    Args:
        name: folder or hub id.
        tokenizer: None: the one beside the model.
        device: None: a CUDA device if there is one, else the CPU.

    Raises:
        ModelError: the checkpoint was saved without the head, which transformers would fill with random numbers.
        SetupError: no such device.
    """
    name = os.fspath(name)
    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise SetupError("no such device", found=f"device={str(device)!r}", allowed=there) from error
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    for auto in _AUTO.values():
        kind = getattr(transformers, auto)
        # BERT's causal head exists for encoder-decoder pairs only, so the masked form comes first
        if type(config) in kind._model_mapping:
            break
    else:
        raise ModelError("transformers has no language-model head for this family", found=config.model_type)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, info = kind.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing and config.model_type == "electra" and "ElectraForMaskedLM" not in (config.architectures or ()):
        raise discriminator(f"{name}: {', '.join(config.architectures or ['no generator head'])}")
    if missing:
        raise _fresh_head(name, missing)
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.to(place), tokenizer


def fresh_parameters(model: nn.Module) -> list[str]:
    """Parameters that `from_pretrained` did not find in the checkpoint; empty where the model was made another way.

    transformers marks every parameter that it has loaded. Without any mark in the backbone (a model made from a
    configuration, or copied) nothing is known.
    """
    backbone = {id(p) for p in backbone_of(model).parameters() if getattr(p, "_is_hf_initialized", False)}
    if not backbone:
        return []
    return [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]


def check_head(model: Any, loss: float, targets: Counter[int], text: Counter[int]) -> None:
    """A pretrained head predicts better than word frequencies do; a random one is no better than chance.

    Args:
        model: for the names in the message.
        loss: mean cross-entropy a predicted token, in nats.
        targets: how often each token was predicted.
        text: how often each token stands in the texts.

    Raises:
        ModelError: the loss is at or above that of word frequencies.
    """
    chance = by_frequency(targets, text, model.config.get_text_config().vocab_size)
    if loss < chance:
        return
    names = fresh_parameters(model) or _head_names(model)
    raise _fresh_head(
        type(model).__name__, names, f"; its loss is {loss:.2f} nats a token, word frequencies alone give {chance:.2f}"
    )


def by_frequency(targets: Counter[int], text: Counter[int], vocabulary: int) -> float:
    """Cross-entropy of the targets under the frequencies of all *other* tokens of the texts, one added to each count.

    At most log(vocabulary), up to the one token that is left out.
    """
    total = sum(text.values()) + vocabulary - 1
    return -sum(n * math.log(max(text[token], 1) / total) for token, n in targets.items()) / sum(targets.values())


def _head_names(model: nn.Module) -> list[str]:
    names = [name for name in describe(model).head if "pooler" not in name and "norm" not in name.rpartition(".")[2]]
    return names or ["the output matrix, tied to the embeddings"]


def _fresh_head(where: str, names: Sequence[str], why: str = "") -> ModelError:
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return ModelError(
        "the language-model head is freshly initialised, so the Fisher information of its loss would be noise",
        found=f"{where}: {shown}{why}",
        allowed="a checkpoint that was saved with its head, on texts in a language that it knows",
        fix="train the head on the frozen model first; or check_head=False if the texts are the reason",
    )
