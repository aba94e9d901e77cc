"""Embedding Space Maps: what fine-tuning on a source task does to a base model's embeddings, as one linear map."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from graftlm.errors import DataError, SetupError

LINEAR, LOW_RANK, IDENTITY_LOW_RANK = "linear", "low_rank", "identity_low_rank"
ARCHITECTURES = (LINEAR, LOW_RANK, IDENTITY_LOW_RANK)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "0.2.1"  # of the hub's ESMs, as hf-dataset-selector writes it
_TENSORS = {
    LINEAR: ("model.weight", "model.bias"),
    LOW_RANK: ("model.up", "model.down", "model.bias"),
    IDENTITY_LOW_RANK: ("model.up", "model.down", "model.bias"),
}
_OLD = ("sequential.0.weight", "sequential.0.bias")  # version 0.1.0
_NAMED = {"base_model": "base_model_name", "task": "task_id"}


@dataclass(frozen=True, eq=False)
class EmbeddingSpaceMap:
    r"""A map from base embeddings to those of the model that was fine-tuned on a source task.

    .. math:: \varphi(x) = Wx + b, \qquad W \text{ any matrix},\quad W = UV^\top \quad\text{or}\quad W = I + UV^\top

    Attributes:
        base_model: hub id or name of the base model.
        task: hub id or name of the source task.
        bias: b, (d,).
        weight: W, (d, d), of a ``linear`` map, else None.
        up, down: U and V, (d, r) each, of a low-rank map, else None.
        identity: whether I is added to a low-rank map.
        details: whatever else config.json says: subset, columns, rows, seed, hyper-parameters.

    Raises:
        DataError: tensors whose shapes do not fit together, or that are not finite.

    Source: arXiv 2410.15148, Section 3.

    Differs from the paper in: maps of low rank, whose files and scores cost a fraction of those of a full matrix.

    Example:
        >>> import numpy as np
        >>> shift = EmbeddingSpaceMap("base", "task", bias=np.ones(2), weight=np.eye(2))
        >>> shift(np.array([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """

    base_model: str
    task: str
    bias: np.ndarray = field(repr=False)
    weight: np.ndarray | None = field(default=None, repr=False)
    up: np.ndarray | None = field(default=None, repr=False)
    down: np.ndarray | None = field(default=None, repr=False)
    identity: bool = False
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, value in {"base_model": self.base_model, "task": self.task}.items():
            if not isinstance(value, str) or not value:
                raise DataError(f"{name} of an Embedding Space Map is a name", found=repr(value))
        tensors = self._tensors()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self.bias.ndim != 1 or not self._fits():
            raise DataError(
                f"the tensors of the Embedding Space Map of {self.task} do not fit together",
                found=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
                allowed="weight (d, d) and bias (d,), or up (d, r), down (d, r) and bias (d,)",
            )
        for name, tensor in tensors.items():
            if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
                raise DataError(f"{name} of the Embedding Space Map of {self.task} holds NaN, infinities or no numbers")

    def _fits(self) -> bool:
        width = len(self.bias)
        if self.weight is not None:
            return self.up is None and self.down is None and not self.identity and self.weight.shape == (width, width)
        if self.up is None or self.down is None or self.up.ndim != 2:
            return False
        return self.up.shape == self.down.shape == (width, self.up.shape[1])

    def _tensors(self) -> dict[str, np.ndarray]:
        found = {"weight": self.weight, "up": self.up, "down": self.down, "bias": self.bias}
        return {f"model.{name}": tensor for name, tensor in found.items() if tensor is not None}

    @property
    def width(self) -> int:
        """d, the width of the embeddings."""
        return len(self.bias)

    @property
    def architecture(self) -> str:
        """``linear``, ``low_rank`` or ``identity_low_rank``."""
        return LINEAR if self.weight is not None else IDENTITY_LOW_RANK if self.identity else LOW_RANK

    @property
    def rank(self) -> int:
        """r of a low-rank map, else d."""
        return self.width if self.up is None else self.up.shape[1]

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings (n, d) as the fine-tuned model would give them."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise DataError(
                f"the Embedding Space Map of {self.task} takes embeddings of width {self.width}",
                found=f"shape {embeddings.shape}",
                fix=f"embed with {self.base_model}",
            )
        if self.weight is not None:
            return embeddings @ self.weight.T + self.bias
        moved = (embeddings @ self.down) @ self.up.T + self.bias  # type: ignore[union-attr]
        return embeddings + moved if self.identity else moved

    @classmethod
    def fit(
        cls,
        base: np.ndarray,
        tuned: np.ndarray,
        *,
        base_model: str,
        task: str,
        architecture: str = LINEAR,
        rank: int | None = None,
        method: str = "closed_form",
        ridge: float | None = None,
        epochs: int = 10,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> EmbeddingSpaceMap:
        r"""The map with the least squared error between φ(base) and tuned.

        Args:
            base, tuned: (n, d), embeddings of the same texts by the base and by the fine-tuned model.
            base_model, task: what the map belongs to.
            architecture: ``linear``, ``low_rank`` or ``identity_low_rank``.
            rank: r of a low-rank map.
            method: ``closed_form`` (ridge regression; reduced-rank ridge regression) or ``sgd`` (the paper's).
            ridge: of the closed form, λ in units of the mean eigenvalue of the centred :math:`X_0^\top X_0`; None: the
                one with the least generalised cross-validation error. A map with identity is shrunk to the identity.
            epochs, batch_size, learning_rate, weight_decay, seed: of ``sgd``: AdamW, linear decay, gradients clipped
                at norm 1.
            details: more for config.json.

        Raises:
            DataError: embeddings of other shapes, not finite, or fewer than two rows.
            SetupError: an unknown architecture or method, a rank that is missing or impossible.

        Source: arXiv 2410.15148, Section 3; reduced-rank ridge regression: Mukherjee and Zhu, Statistical Analysis and
        Data Mining 4 (2011), equation 4.

        Differs from the paper in: the closed form by default: the same problem, solved exactly.
        """
        from graftlm.sources import fitting

        fitting.check(base, tuned, architecture, rank, method, ridge)
        if method == "closed_form":
            tensors, chosen = fitting.closed_form(base, tuned, architecture, rank, ridge)
            record: dict[str, Any] = {"esm_optimizer": "closed_form", "esm_ridge": chosen}
        else:
            tensors = fitting.sgd(
                base, tuned, architecture, rank, epochs, batch_size, learning_rate, weight_decay, seed
            )
            record = {
                "esm_optimizer": "AdamW",
                "esm_num_epochs": epochs,
                "esm_batch_size": batch_size,
                "esm_learning_rate": learning_rate,
                "esm_weight_decay": weight_decay,
                "seed": seed,
            }
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        record = {"num_examples": len(base)} | record | dict(details or {})
        return cls(base_model, task, identity=architecture == IDENTITY_LOW_RANK, details=record, **tensors)

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        named = {"base_model_name": self.base_model, "task_id": self.task}
        shape = {"esm_architecture": self.architecture, "esm_embedding_dim": self.width, "version": FORMAT}
        if self.up is not None:
            shape["esm_rank"] = self.rank
        return dict(self.details) | named | shape

    def save(self, folder: str | Path) -> Path:
        """Writes model.safetensors and config.json into a new folder, which is there as a whole or not at all.

        A ``linear`` map is written as the hub's published ESMs are, and can be uploaded as one.

        Raises:
            SetupError: the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise SetupError("the folder exists, and is not overwritten", found=folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in self._tensors().items()}, part / WEIGHTS)
            text = json.dumps(self.config(), indent=2, ensure_ascii=False, default=list) + "\n"
            (part / CONFIG).write_text(text, encoding="utf-8")
            part.chmod(0o755)
            os.rename(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> EmbeddingSpaceMap:
        """Reads what `save` wrote, or a published ESM, current or of version 0.1.0. Nothing is unpickled.

        Raises:
            DataError: a missing or damaged file, an unknown architecture, tensors that do not fit config.json.
        """
        folder = Path(folder)
        return cls.from_files(folder / WEIGHTS, read_config(folder / CONFIG))

    @classmethod
    def from_files(cls, weights: Path, config: Mapping[str, Any]) -> EmbeddingSpaceMap:
        """The map of a weights file and what config.json says; errors as in `load`."""
        architecture = config.get("esm_architecture") or LINEAR
        if architecture not in ARCHITECTURES:
            raise DataError(f"{weights.parent}: unknown architecture", found=repr(architecture), allowed=ARCHITECTURES)
        if not weights.is_file():
            raise DataError(
                f"{weights.parent}: there is no {WEIGHTS}", fix="pickled weights are never read; convert them first"
            )
        names = _TENSORS[architecture]
        try:
            with safetensors.safe_open(weights, framework="numpy") as file:
                held = set(file.keys())
                given = _OLD if architecture == LINEAR and held == set(_OLD) else names
                if held != set(given):
                    raise DataError(f"{weights}: other tensors than those of a {architecture} map", found=sorted(held))
                tensors = {name.split(".")[-1]: file.get_tensor(key) for name, key in zip(names, given, strict=True)}
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            raise DataError(f"{weights}: damaged, or no safetensors file of floats: {error}") from error
        named: dict[str, Any] = {field: config.get(key) for field, key in _NAMED.items()}
        rest = {key: value for key, value in config.items() if key not in {*_NAMED.values(), "version"}}
        rest = {key: value for key, value in rest.items() if key not in ("esm_architecture", "esm_embedding_dim")}
        found = cls(identity=architecture == IDENTITY_LOW_RANK, details=rest, **named, **tensors)
        declared = config.get("esm_embedding_dim")
        if declared is not None and declared != found.width:
            raise DataError(f"{weights}: another width than config.json says", found=found.width, allowed=str(declared))
        return found


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary; a DataError where it is missing or damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent}: there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: not an object", found=type(config).__name__)
    return config
