"""Texts as vectors of a pretrained model: one forward pass each, pooled as the Embedding Space Maps were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.sources.device import device_of

POOLINGS = ("auto", "pooler", "cls", "mean", "last")
LENGTH = 128  # tokens, as in the paper
PAIR = " [SEP] "  # what joins the two texts of a pair into one string, as in the authors' release
_CHUNK = 1000  # texts tokenised at once


class Embedder:
    """A base model, ready to embed texts.

    Args:
        model: a folder, a hub id, or a transformers or PEFT model in memory; a task's head is left out.
        tokenizer: of a model in memory; otherwise that of the folder or id.
        pooling: ``pooler`` (BERT's pooler output), ``cls`` (the last layer's first token), ``mean`` (of the last layer
            over all tokens), ``last`` (the last layer's last token), or ``auto``: mean for sentence encoders and
            encoder-decoders (of the encoder's states), pooler for BERT where the checkpoint holds one, last for
            decoders, cls for all else.
        max_length: longer texts are cut; None: 128 tokens, or as many as the model has positions for.
        batch_size: texts in a forward pass; results depend on it by rounding only.
        dtype: of the weights, such as ``bfloat16``, where the model is loaded here.
        device: where a model that is loaded here goes; a GPU if there is one, by default.
        progress: a bar.

    Attributes:
        name: the folder or id.
        width: d.
        pooling: the one in use.

    Raises:
        ModelError: a model that cannot be loaded, has no such pooling, or fewer positions than max_length.
        SetupError: arguments that make no sense, a device that is not there.

    Source: arXiv 2410.15148 and its released code (pooling, 128 tokens, pairs in one string).

    Differs from the paper in: decoders, encoder-decoders and encoders other than BERT, RoBERTa and DistilBERT.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pooling: str = "auto",
        max_length: int | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
    ):
        if pooling not in POOLINGS:
            raise SetupError("unknown pooling", found=repr(pooling), allowed=POOLINGS)
        for what, value in {"max_length": max_length, "batch_size": batch_size}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SetupError(f"{what} is a whole number of at least 1", found=repr(value))
        fresh: set[str] = set()
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise SetupError(
                    "a model in memory needs its tokenizer", fix="tokenizer=AutoTokenizer.from_pretrained(…)"
                )
            if dtype or device:
                raise SetupError("dtype and device of a model in memory are its own", found=f"{dtype or device}")
            self.name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        else:
            self.name = str(model)
            model, tokenizer, fresh = _load(self.name, tokenizer, dtype, device)
        self._whole, self._core = model, _core(model)
        self._tokenizer = tokenizer
        config = self._core.config
        self.pooling = self._pooling(pooling, config, fresh)
        self.width = int(config.hidden_size)
        self.max_length = self._length(max_length, config)
        self._batch_size, self._progress = batch_size, progress
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = pad if pad is not None else 0

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) in float32, one row a text.

        Raises:
            DataError: no text, a text that is no string, or one in which the tokenizer finds no token.
        """
        found = self.apply(texts, self._pooled, self.width).astype(np.float32)
        if not (finite := np.isfinite(found).all(axis=1)).all():
            raise ModelError(
                f"{self.name} gives NaN or infinite embeddings",
                found=f"{(~finite).sum()} of {len(found)} texts, first {np.flatnonzero(~finite)[0]}",
                fix="dtype='float32'",
            )
        return found

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens that the model reads of each text; errors as in a call."""
        if isinstance(texts, str):
            raise DataError("texts is one string, not many", fix="[text]")
        if not len(texts):
            raise DataError("there is no text to embed")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError("a text is not a string", found=f"row {row}: {text!r}")
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            part = list(texts[start : start + _CHUNK])
            ids += self._tokenizer(part, truncation=True, max_length=self.max_length)["input_ids"]
        if (shortest := min(range(len(ids)), key=lambda row: len(ids[row]))) is not None and not ids[shortest]:
            raise DataError("a text without any token", found=f"row {shortest}: {texts[shortest]!r}")
        return ids

    def apply(self, texts: Sequence[str], function: Callable[[dict[str, Tensor]], Tensor], width: int) -> np.ndarray:
        """(n, width): what a function makes of batches of input ids and attention masks, in the order of the texts."""
        ids = self.token_ids(texts)
        found = np.empty((len(ids), width))
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)  # little is padded
        starts = range(0, len(order), self._batch_size)
        with _at_rest(self._whole), torch.inference_mode():
            for start in tqdm(starts, desc="embeddings", unit="batch", disable=not self._progress):
                rows = order[start : start + self._batch_size]
                found[rows] = function(self._batch([ids[row] for row in rows])).double().cpu().numpy()
        return found

    def _batch(self, ids: list[list[int]]) -> dict[str, Tensor]:
        device = next(self._core.parameters()).device
        tokens = torch.full((len(ids), max(map(len, ids))), self._pad)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(ids):  # on the right, whatever the tokenizer likes: positions count from the left
            tokens[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}

    def _pooled(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs, mask = self._core(**inputs), inputs["attention_mask"]
        if self.pooling == "pooler":
            return outputs.pooler_output
        states = outputs.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _pooling(self, asked: str, config, fresh: set[str]) -> str:
        has_pooler = getattr(self._core, "pooler", None) is not None
        trained = has_pooler and not any("pooler" in name.split(".") for name in fresh)
        if asked == "pooler" and not trained:
            problem = "the checkpoint holds no pooler" if has_pooler else "the model has no pooler"
            raise ModelError(problem, found=self.name, fix="pooling='cls' or 'mean'")
        if asked != "auto":
            return asked
        if _is_sentence_encoder(self.name) or config.is_encoder_decoder:
            return "mean"
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
            return "last"
        return "pooler" if config.model_type == "bert" and trained else "cls"

    def _length(self, asked: int | None, config) -> int:
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            positions -= 2  # they count from 2
        limits = [
            limit for limit in (positions, self._tokenizer.model_max_length) if isinstance(limit, int) and limit > 0
        ]
        if asked is not None and limits and asked > min(limits):
            raise ModelError(
                "max_length is more than the model has positions for", found=asked, allowed=f"at most {min(limits)}"
            )
        return asked if asked is not None else min([LENGTH, *limits])


def _load(
    name: str, tokenizer: PreTrainedTokenizerBase | None, dtype: str | None, device: str | torch.device | None
) -> tuple[nn.Module, PreTrainedTokenizerBase, set[str]]:
    place = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or "float32", None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise SetupError("no such dtype of weights", found=repr(dtype), allowed=("float32", "bfloat16", "float16"))
    try:
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = transformers.AutoModel.from_pretrained(
            name, trust_remote_code=False, dtype=kind, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the model cannot be loaded: {first}",
            found=name,
            fix="a folder or a hub id; without a connection, one that was downloaded before",
        ) from error
    missing = set(info["missing_keys"])
    if broken := sorted(key for key in missing if "pooler" not in key.split(".")):
        raise ModelError("the checkpoint does not hold all weights of the model", found=", ".join(broken[:5]))
    return model.to(place), tokenizer, missing


def _core(model: Any) -> Any:
    """The model without its task head, and of an encoder-decoder its encoder."""
    if hasattr(model, "get_base_model"):  # PEFT: its layers lie inside
        model = model.get_base_model()
    core = getattr(model, "base_model", model)
    if core.config.is_encoder_decoder:
        core = core.get_encoder()
    return core


def _is_sentence_encoder(name: str) -> bool:
    """Whether sentence-transformers' list of modules, or its name, says that tokens are averaged."""
    modules = Path(name) / "modules.json"
    if modules.is_file():
        return any("Pooling" in str(module.get("type")) for module in json.loads(modules.read_text(encoding="utf-8")))
    return name.startswith("sentence-transformers/")


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
