"""Masked and causal language modelling as tasks of a recipe."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from graftlm import raw_text
from graftlm.errors import ModelError
from graftlm.evaluation import bits_per_byte
from graftlm.measure.likelihood import IGNORED
from graftlm.task import Encoded, Prediction, Task


@contextmanager
def logits_at(model: Any, places: torch.Tensor) -> Iterator[None]:
    """Within it the output matrix is applied at some places only, and logits are (1, places, vocabulary).

    Of a masked language model's logits only those of masked tokens have a loss, 15 % of them; with a large vocabulary
    they cost as much as everything below them. What comes before the matrix is computed everywhere.

    Args:
        model: with an output matrix, `get_output_embeddings`.
        places: (batch, tokens), true where logits are wanted; in their order row by row.
    """

    def gather(_, arguments):
        return arguments[0][places][None], *arguments[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(gather, prepend=True)
    try:
        yield
    finally:
        handle.remove()


class LanguageModel(Task):
    """Raw text: learned in blocks, scored in windows; see `graftlm.raw_text` and `graftlm.evaluation.bits_per_byte`.

    A label is the bytes of a document, a prediction the nats, bytes and tokens that were scored in it.
    """

    def model_arguments(self):
        return {}

    def check_model(self, config, where):
        masked, causal = (
            type(config) in getattr(transformers, name)._model_mapping
            for name in ("AutoModelForMaskedLM", "AutoModelForCausalLM")
        )
        bidirectional = masked and not getattr(config, "is_decoder", False)  # BERT has a causal class as well
        both_sides = getattr(config, "is_encoder_decoder", False)
        fits = bidirectional if self.name == "masked_lm" else causal and not bidirectional
        if both_sides or not fits:
            other = {"masked_lm": "causal_lm", "causal_lm": "masked_lm"}[self.name]
            there = not both_sides and (bidirectional if other == "masked_lm" else causal)
            kind = "an encoder-decoder" if both_sides else "an encoder" if bidirectional else "a decoder"
            raise ModelError(
                f"task: {self.name} does not fit this model",
                found=f"{where}: {config.model_type}, {kind}",
                allowed="an encoder with a masked-LM head" if self.name == "masked_lm" else "a decoder",
                fix=f"task={other}" if there else None,
            )

    def check_split(self, split, tokenizer, training):
        for _ in self._rows(split, range(len(split)), tokenizer, training):
            pass

    def check_fresh(self, fresh, where):
        if fresh:
            raise ModelError(
                "the checkpoint has no language-model head: it would begin random, and so would its bits per byte",
                found=f"{where}: without {', '.join(fresh)}",
                allowed="a model that was saved with the head of its pretraining",
            )

    def loss(self):
        def mean_over_tokens(outputs, labels, num_items_in_batch=None):
            """Over all tokens of an optimizer step, however it is cut into batches and devices."""
            losses, _ = bits_per_byte.token_losses(self.name, outputs.logits, labels)
            return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

        return mean_over_tokens

    def keep(self, logits, labels):
        return bits_per_byte.row_nats(self.name, logits[0] if isinstance(logits, tuple | list) else logits, labels)

    def training(self, split, tokenizer, recipe, cache):
        settings = recipe.training
        documents: Any = split.texts
        table, counts = raw_text.cached_blocks(documents, tokenizer, self.name, settings.max_length, cache)
        masking = None
        if self.name == "masked_lm":
            ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
            masking = raw_text.Masking(settings.masking, tokenizer.mask_token_id, ordinary)
        examples = raw_text.Blocks(table, seed=recipe.seed, batch_size=settings.batch_size, masking=masking)
        return Encoded(examples, [], 0, counts.tokens, counts.unknown, [], counts)

    def encode(self, split, tokenizer, training):
        encoded = super().encode(split, tokenizer, training)  # counts shared tokens twice, and hidden ones not at all
        pairs = [pair for one in encoded.places for pair in zip(one.ids, one.labels, strict=True)]
        if self.name == "causal_lm":
            ids = [label for _, label in pairs if label != IGNORED]
        else:
            around = bits_per_byte.marks(tokenizer, self.name)
            ids = [token if label == IGNORED else label for token, label in pairs]
            special = set(around.before + around.after)
            ids = [token for token in ids if token not in special]
        return dataclasses.replace(encoded, tokens=len(ids), unknown=ids.count(tokenizer.unk_token_id))

    def _rows(self, split, items, tokenizer, training):
        made = bits_per_byte.windows(
            split.texts[items.start : items.stop],
            tokenizer,
            self.name,
            max_length=training.max_length,
            stride=training.stride,
            origin=split.origin,
            first=items.start,
        )
        for window in made:
            yield window.owner, {"input_ids": window.ids, "labels": window.labels}, window, False

    def collator(self, tokenizer):
        def batch_of(rows):
            batch = bits_per_byte.collate(rows, tokenizer)
            if "domain" in rows[0]:
                batch["domain"] = torch.tensor([row["domain"] for row in rows])
            return batch

        return batch_of

    def decode(self, outputs, encoded, split):
        nats = np.asarray(outputs, dtype=np.float64).reshape(-1).tolist()
        return [Prediction(value) for value in bits_per_byte.totals(encoded.places, nats, len(split))]


class MaskedLM(LanguageModel):
    """Tokens that were hidden, from those on both sides."""

    auto_class = "AutoModelForMaskedLM"
    peft_type = None  # PEFT has no type for it, and needs none: nothing is added on top


class CausalLM(LanguageModel):
    """Each token from those before it."""

    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
