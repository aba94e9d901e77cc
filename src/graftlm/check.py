"""Everything but the training: what a recipe would do, before it costs anything."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from graftlm.adapters.flare_places import places_of
from graftlm.data import Split
from graftlm.evaluation.table import language_name
from graftlm.language_runs import unfinished
from graftlm.measure.likelihood import IGNORED
from graftlm.neutral_run import PenaltySize, penalty_size
from graftlm.prepare import Prepared, prepare
from graftlm.recipe import Recipe
from graftlm.tasks import Encoded
from graftlm.training.layers import trainable_layers
from graftlm.training.unfreezing import plan

_MB = 1e6
_FAR = 10.0  # of the penalty's gradient from the loss's
_MORE = 1.5  # tokens a word for one of the old language's
_SLOWER = 2.0  # a product of matrices in half precision than in float32


@dataclass(frozen=True)
class TextCheck:
    """How a tokenizer takes one split's text.

    Attributes:
        items: items in the split.
        tokens_per_word: tokens for each word between spaces; of little use in scripts without spaces. Text that two
            windows share counts twice.
        characters_per_token: the same the other way round, for every script.
        unknown: share of tokens that are the unknown token.
        truncated: share of items that lose text.
        windows: model inputs that the items become.
    """

    split: str
    language: str
    items: int
    tokens_per_word: float
    characters_per_token: float
    unknown: float
    truncated: float
    windows: int


@dataclass(frozen=True)
class Check:
    """What `graftlm check` shows.

    Attributes:
        recipe: the resolved recipe, with where each value came from.
        layers: trainable parameters by layer, bottom first; then those of the head.
        fresh: modules that the checkpoint does not have: they begin random, are trained and saved.
        targets: modules that carry LoRA.
        texts: one row for each split and language.
        example: the first training item as the model reads it; for FLARE its source too.
        label: its label; in language modelling the tokens that are to be predicted.
        step_seconds: forward and backward of one batch, all layers open.
        steps: optimizer steps of the run.
        train_seconds: `step_seconds` × forward passes; an estimate without evaluation and Fisher passes.
        every_n_steps: the interval of the schedule, where there is one.
        openings: when which layers open; None where tr(F) decides.
        memory: estimates in MB: parameters, gradients, optimizer states (two of Adam's for each trainable parameter).
            What activations need comes on top and depends on the length of the texts.
        size: of neutral residues: hidden units of a block, added parameters and what they are a share of; else None.
        penalty: of neutral residues: the penalty beside the loss; None without one.
        source_cache_bytes: of FLARE with a source cache: what it will take on disk. The step above is one without it.
        advice: what the figures above suggest to type next.
        language_adapters: of MAD-X: language → the check of its own run, for those that are trained first. The rest is
            then that of the task adapter without any below it.
    """

    recipe: str
    layers: dict[str, int]
    fresh: tuple[str, ...]
    targets: tuple[str, ...]
    total_parameters: int
    texts: tuple[TextCheck, ...]
    example: str
    label: Any
    loss: float
    step_seconds: float
    steps: int
    train_seconds: float
    every_n_steps: int | None
    openings: tuple[tuple[int, tuple[str, ...] | None], ...]
    memory: dict[str, float]
    size: dict[str, Any] | None = None
    penalty: PenaltySize | None = None
    source_cache_bytes: int | None = None
    advice: tuple[str, ...] = ()
    language_adapters: dict[str, "Check"] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def check(recipe: Recipe) -> Check:
    """Reads the data, loads the model and takes one step; writes nothing.

    Raises:
        GraftError: whatever would stop the run.
    """
    bare = recipe.changed("adapter.source_cache=false") if recipe.adapter.source_cache else recipe
    first = {language: check(one) for language, one in unfinished(recipe).items()}
    if first:
        bare = bare.changed("adapter.language_adapters={}")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(bare, Path(folder), progress=False)
        loss, seconds = _one_step(prepared)
        penalty = penalty_size(prepared.trainer, recipe)
    model: Any = prepared.loaded.model
    groups = trainable_layers(model)
    layers = {name: sum(p.numel() for _, p in groups.parameters[name]) for name in groups.names}
    layers["head"] = sum(p.numel() for _, p in groups.head)
    passes = prepared.steps * recipe.training.gradient_accumulation_steps
    unfreezing = recipe.unfreezing
    openings = (
        plan(groups.names, unfreezing.schedule, prepared.every_n_steps, unfreezing.order, recipe.seed)
        if unfreezing and prepared.every_n_steps
        else []
    )
    texts = _texts(prepared)
    return Check(
        recipe=recipe.resolved(),
        layers=layers,
        fresh=prepared.loaded.fresh,
        targets=prepared.loaded.targets,
        total_parameters=sum(p.numel() for p in model.parameters()),
        texts=texts,
        example=_example(prepared),
        label=_label(prepared),
        loss=loss,
        step_seconds=seconds,
        steps=prepared.steps,
        train_seconds=seconds * passes,
        every_n_steps=prepared.every_n_steps,
        openings=tuple(openings),
        memory=_memory(model),
        size=model.active_peft_config.size if recipe.adapter.method == "neutral_residues" else None,
        penalty=penalty,
        source_cache_bytes=_source_cache_bytes(recipe, prepared) if recipe.adapter.source_cache else None,
        advice=(*_advice(recipe, texts, penalty), *_precision_advice(recipe, next(model.parameters()).device)),
        language_adapters=first,
    )


def _advice(recipe: Recipe, texts: tuple[TextCheck, ...], penalty: PenaltySize | None) -> Iterator[str]:
    if penalty and penalty.even_weight and not 1 / _FAR <= penalty.gradients <= _FAR:
        what = "hardly counts beside the loss" if penalty.gradients < 1 else "outweighs the loss"
        yield f"the penalty {what}; they are even with adapter.penalty_weight={penalty.even_weight:g}: sweep around it"
    if recipe.mixing and not recipe.data.old:
        known = [tag for tag in recipe.data.test if tag != recipe.source]
        name = f"data.old=[{', '.join(known)}]" if known else "data.test.TAG=HELD_OUT_TEXT data.old=[TAG]"
        yield f"what is forgotten of the old language is not measured; to measure it: {name}"
    new, old = texts[0], [row for row in texts[1:] if row.split == "mixing" or row.language in recipe.data.old]
    can_have = recipe.task == "causal_lm" and recipe.adapter.method in ("neutral_residues", "lora")
    if old and recipe.new_tokens is None and can_have:
        usual = max(row.tokens_per_word for row in old)
        if new.tokens_per_word > _MORE * usual:
            yield (
                f"{language_name(new.language)} takes {new.tokens_per_word:.2f} tokens a word, the old language "
                f"{usual:.2f}; tokens of its own: new_tokens=1000"
            )


def _precision_advice(recipe: Recipe, device: torch.device) -> Iterator[str]:
    precision = recipe.training.precision
    if device.type == "cpu" and precision != "float32":
        factor = _times_float32(torch.bfloat16 if precision == "bf16" else torch.float16)
        if factor > _SLOWER:
            yield (
                f"on this processor a product of matrices takes {factor:.0f} times as long in {precision} as in "
                "float32: training.precision=float32"
            )


def _times_float32(dtype: torch.dtype, size: int = 128) -> float:
    """How many times as long as in float32 a product of matrices takes; far above 1 without the instructions for it."""
    ones = {kind: torch.ones(size, size, dtype=kind) for kind in (torch.float32, dtype)}
    timers = {kind: Timer("one @ one", globals={"one": one}) for kind, one in ones.items()}
    seconds = {kind: timer.blocked_autorange(min_run_time=0.05).median for kind, timer in timers.items()}
    return seconds[dtype] / seconds[torch.float32]


def _source_cache_bytes(recipe: Recipe, prepared: Prepared) -> int:
    encoder = prepared.task.source_encoder
    model: Any = prepared.loaded.model
    numbers = encoder.width if encoder else (len(places_of(model.get_base_model())) + 1) * model.config.hidden_size
    pairs = [(prepared.splits.train, prepared.train), (prepared.splits.dev, prepared.dev)]
    lengths = {
        text: len(ids)
        for split, encoded in pairs
        if split is not None and encoded is not None
        for text, ids in zip(split.sources or (), encoded.features["source_input_ids"], strict=True)
    }
    return sum(lengths.values()) * numbers * (4 if recipe.training.precision == "float32" else 2)


def _example(prepared: Prepared) -> str:
    first, own, encoder = prepared.train.features[0], prepared.tokenizer, prepared.task.source_encoder
    readers = {"input_ids": own, "source_input_ids": encoder.tokenizer if encoder else own}
    return "  |  ".join(reader.decode(first[key]) for key, reader in readers.items() if key in first)


def _label(prepared: Prepared) -> Any:
    if prepared.train.counts is None:
        return prepared.task.plain(prepared.splits.train.labels[0])
    labels = prepared.train.features[0]["labels"]
    return " ".join(prepared.tokenizer.convert_ids_to_tokens([one for one in labels if one != IGNORED]))


def _texts(prepared: Prepared) -> tuple[TextCheck, ...]:
    recipe, splits = prepared.recipe, prepared.splits
    rows = [_text_check("train", recipe.source, splits.train, prepared.train)]
    if splits.original is not None and prepared.original is not None:
        rows.append(_text_check("mixing", ", ".join(recipe.data.old), splits.original, prepared.original))
    if splits.dev and prepared.dev:
        rows.append(_text_check("dev", recipe.source, splits.dev, prepared.dev))
    for language, split in splits.test.items():
        encoded = prepared.task.encode(split, prepared.tokenizer, recipe.training)
        rows.append(_text_check("test", language, split, encoded))
    return tuple(rows)


def _text_check(name: str, language: str, split: Split, encoded: Encoded) -> TextCheck:
    items, windows = len(split), len(encoded.owners)
    if encoded.counts is not None:
        items, windows = encoded.counts.documents, len(encoded.features)
        words, characters = encoded.counts.words, encoded.counts.characters
    else:
        flat = [" ".join(text) if isinstance(text, list) else text for text in [*split.texts, *(split.texts_b or ())]]
        words, characters = sum(len(text.split()) for text in flat), sum(map(len, flat))
    return TextCheck(
        split=name,
        language=language,
        items=items,
        tokens_per_word=encoded.tokens / max(1, words),
        characters_per_token=characters / max(1, encoded.tokens),
        unknown=encoded.unknown / max(1, encoded.tokens),
        truncated=encoded.truncated / items,
        windows=windows,
    )


def _one_step(prepared: Prepared) -> tuple[float, float]:
    """Loss and seconds of forward and backward on the first batch; the second of two, since the first one warms up."""
    trainer = prepared.trainer
    model = trainer.model.to(trainer.args.device).train()
    inputs = {key: value.to(trainer.args.device) for key, value in next(iter(trainer.get_train_dataloader())).items()}
    for _ in range(2):
        began = time.perf_counter()
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, dict(inputs))  # Trainer takes the labels out
        loss.backward()
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        model.zero_grad()
    return float(loss.detach()), seconds


def _memory(model: torch.nn.Module) -> dict[str, float]:
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / _MB
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / _MB
    return {"parameters_mb": parameters, "gradients_mb": trainable, "optimizer_mb": 2 * trainable}
