"""What a recipe adds to the model, and what every part of a recipe is built on."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

_LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*")


def language_tag(tag: str) -> str:
    """The tag, if it is one."""
    if not _LANGUAGE.fullmatch(tag):
        raise ValueError(f"{tag!r} is no language tag; allowed: such as eng, de, pt-BR, zho_Hans")
    return tag


Language = Annotated[str, AfterValidator(language_tag)]

FILE_TYPES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
TEXT_TYPES = (".txt", ".txt.gz")

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a recipe: frozen, of the types it says, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(Part):
    """Where one split lies; a text alone is its `path`."""

    path: str = Field(min_length=1, description="file, folder, hub id, or starter:… (shipped with graftlm)")
    config: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set or folder")
    revision: str | None = Field(None, description="commit, tag or branch of a hub data set")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        rest = {key: getattr(self, key) for key in ("config", "split", "revision")}
        rest = {key: value for key, value in rest.items() if value is not None}
        return {"path": self.path, **rest} if rest else self.path

    def is_file(self) -> bool:
        """Whether the path names a file by its ending, not a hub id or folder."""
        return self.path.endswith(FILE_TYPES + TEXT_TYPES)


class LanguageText(Part):
    """What a language adapter is trained from; instead of it: the folder or hub id of one that is there."""

    train: Source = Field(description="raw text in the language")
    test: Source = Field(description="held-out text, which says what the adapter has learned")
    dev: Source | None = Field(None, description="text that the best checkpoint is chosen on; null: the last one")


_KEYS = {
    "lora": ("r", "alpha", "dropout", "target_modules"),
    "bottleneck": (
        "kind",
        "reduction_factor",
        "bottleneck_size",
        "activation",
        "dropout",
        "scaling",
        "invertible",
        "language_adapters",
        "language_training",
    ),
    "flare": (
        "r",
        "alpha",
        "dropout",
        "target_modules",
        "fusion",
        "source_layer",
        "align",
        "source_encoder",
        "source_language",
        "source_cache",
    ),
    "neutral_residues": (
        "added_parameters",
        "counts",
        "gate",
        "penalty",
        "penalty_weight",
        "original_share",
        "penalty_through_input",
        "initialisation",
        "dropout",
        "activation",
        "layers_to_transform",
        "sparse_inference",
    ),
    "none": (),
}


class Adapter(Part):
    """What is added to the model; `method: none` is full fine-tuning."""

    method: Literal["lora", "bottleneck", "flare", "neutral_residues", "none"] = "lora"
    r: Count = Field(8, description="lora, flare: the rank")
    alpha: Count = Field(16, description="lora, flare: the scaling is alpha / r")
    dropout: Share = 0.0
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = Field(
        "auto",
        description="lora, flare; auto: the query and value projections; all-linear: all linear modules of all layers",
    )
    kind: Literal["pfeiffer", "houlsby", "parallel"] = Field("pfeiffer", description="bottleneck: its places")
    reduction_factor: Positive = Field(16.0, description="bottleneck: the model's width divided by the adapter's size")
    bottleneck_size: Count | None = Field(None, description="bottleneck: the adapter's size, in place of the factor")
    activation: str = Field(
        "auto", description="a name of transformers' ACT2FN; auto: bottleneck relu, neutral_residues silu"
    )
    scaling: Positive = Field(1.0, description="bottleneck: constant factor of the adapter's part")
    invertible: bool = Field(False, description="bottleneck: an invertible adapter at the embeddings too")
    language_adapters: dict[Language, Annotated[str, Field(min_length=1)] | LanguageText] = Field(
        default_factory=dict,
        description="bottleneck: language tag → the adapter that lies below: run folder, adapter folder, hub id, or "
        "the text that it is trained from first",
    )
    language_training: dict[str, Any] = Field(
        default_factory=dict,
        description="bottleneck: keys of the recipe language-adapter with their values, for those with a text",
    )
    fusion: Literal["add", "mul", "add_relu", "mul_relu", "cross_attention"] = Field(
        "add_relu", description="flare: what is made of source and target"
    )
    source_layer: Literal["next", "same"] = Field("next", description="flare: whether the source is one layer ahead")
    align: Literal["position", "relative", "pooled", "attention"] | None = Field(
        None, description="flare: the source of a target token; null: position, with cross_attention attention"
    )
    source_encoder: str | None = Field(
        None,
        min_length=1,
        description="flare: folder or hub id of a frozen encoder that reads the source in the model's place (FLARE "
        "MT); without data.parallel the target's own text",
    )
    source_language: str | None = Field(
        None,
        min_length=1,
        description="flare: how source_encoder's tokenizer marks the source's language, such as eng_Latn; null: as the "
        "recipe's tag of the text, where it marks languages",
    )
    source_cache: bool | Annotated[str, Field(min_length=1)] = Field(
        False,
        description="flare: compute the source of train and dev once, on disk; true: until the run is finished; or a "
        "folder that runs share",
    )
    added_parameters: Positive = Field(
        0.2, description="neutral_residues: their size as a share of the model's weights"
    )
    counts: Literal["non_embedding", "all"] = Field("non_embedding", description="neutral_residues: which weights")
    gate: Literal["relu", "elu", "sigmoid", "none"] = Field("relu", description="neutral_residues: of each block")
    penalty_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.01, description="neutral_residues: α, how much silence on the text of `mixing` counts; to be swept"
    )
    penalty: Literal["l1", "cross_entropy"] | None = Field(
        None, description="neutral_residues: null: cross_entropy with the domain for a sigmoid gate, else l1"
    )
    original_share: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] | None = Field(
        "auto",
        description="neutral_residues: the share of original tokens that l1 is a mean over; auto: that of the mix, "
        "null: that of each batch",
    )
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="neutral_residues: numbers of the layers that get a block; null: all"
    )
    penalty_through_input: bool = Field(
        True, description="neutral_residues: whether the penalty trains the layers below too"
    )
    initialisation: Literal["low_variance", "he"] = Field("low_variance", description="neutral_residues: the paper's")
    sparse_inference: bool = Field(False, description="neutral_residues: open tokens only, in evaluation")

    @property
    def language_folders(self) -> dict[str, str]:
        """The language adapters that lie somewhere already, with where."""
        return {tag: place for tag, place in self.language_adapters.items() if isinstance(place, str)}

    def how_to_make(self, language: str) -> str:
        """The command that trains a language adapter."""
        name = f"name=language-{language} source={language} adapter.kind={self.kind}"
        text = f"data.train=TEXT data.dev=null 'data.test={{{language}: HELD_OUT_TEXT}}'"
        return f"graftlm train language-adapter.yaml {name} {text}"

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = {"method", *_KEYS[self.method]} - ({"reduction_factor"} if self.bottleneck_size else {"bottleneck_size"})
        kept -= {key for key in ("language_adapters", "language_training") if not getattr(self, key)}
        return {key: value for key, value in serialize(self).items() if key in kept}

    @model_validator(mode="after")
    def _activation_of_the_method(self) -> "Adapter":
        if self.activation == "auto":  # a recipe that is written out names it
            self.__dict__["activation"] = "silu" if self.method == "neutral_residues" else "relu"
        return self

    @model_validator(mode="after")
    def _no_idle_keys(self) -> "Adapter":
        idle = sorted(self.model_fields_set - {"method", *_KEYS[self.method]})
        if idle:
            name = "none (full fine-tuning)" if self.method == "none" else self.method
            others = " or ".join(method for method, keys in _KEYS.items() if set(idle) <= set(keys))
            raise ValueError(
                f"method: {name} takes no {', '.join(idle)}; delete them"
                + (f" or write method: {others}" if others else "")
            )
        if {"reduction_factor", "bottleneck_size"} <= self.model_fields_set and self.bottleneck_size is not None:
            raise ValueError("reduction_factor and bottleneck_size say the same twice; delete one of them")
        if self.source_language is not None and self.source_encoder is None:
            raise ValueError("source_language: the model's own tokenizer marks none; it goes with source_encoder")
        return self


def relocate(values: dict[str, Any], move: Callable[..., str]) -> None:
    """Hands every path among an adapter's plain values to `move`, but those of data."""
    languages = values.get("language_adapters", {})
    languages |= {tag: move(place) for tag, place in languages.items() if isinstance(place, str)}
    if values.get("source_encoder"):
        values["source_encoder"] = move(values["source_encoder"])
    if isinstance(cache := values.get("source_cache"), str):
        values["source_cache"] = move(cache, there=True)  # or it will be
