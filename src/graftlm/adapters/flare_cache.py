"""Representations of a fixed set of source texts, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from graftlm.adapters.flare_encode import Encode
from graftlm.adapters.flare_text import Text, parts
from graftlm.errors import DataError

_STATES, _INDEX, _HEAD, _VERSION = "states.bin", "index.safetensors", "cache.json", 2
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SourceCache:
    r"""The source representations of a training set on disk, in place of a second forward pass at each step.

    The source is read with the adapters off, so that its representations never change while FLARE trains. A text takes
    (layers + 1) · width · bytes of the number on disk for each of its tokens, and with an `EncoderStates` its width
    alone; a text that occurs twice is kept once. Texts themselves are not kept, only their hashes.

    Made by `SourceCache.build`, or `SourceCache(folder)` for one that is there.

    Args:
        folder: where it lies.

    Raises:
        DataError: there is no cache. Called with a text that it does not hold: the text.

    Example:
        >>> states = graftlm.ModelStates(model, tokenizer, max_length=128)  # doctest: +SKIP
        >>> cache = graftlm.SourceCache.build("cache/english", states, dataset["english"])  # doctest: +SKIP
        >>> collator = graftlm.FlareCollator(  # doctest: +SKIP
        ...     tokenizer, target="danish", source="english", encode=cache
        ... )
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        try:
            head = json.loads((self.folder / _HEAD).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError("there is no source cache here", found=folder, fix="SourceCache.build") from error
        if head["version"] != _VERSION:
            raise DataError("a source cache of another version", found=head["version"], allowed=[_VERSION])
        self.layers, self.width, self.made_by = head["layers"], head["width"], head["fingerprint"]
        self.seconds: float = head["seconds"]  # that computing it took
        index = load_file(self.folder / _INDEX)
        lengths = index["lengths"].tolist()
        self._rows: dict[bytes, tuple[int, int]] = {}
        start = 0
        for digest, length in zip(index["digests"].numpy(), lengths, strict=True):
            self._rows[digest.tobytes()] = (start, length)
            start += length * self.layers * self.width
        file = self.folder / _STATES
        dtype = _DTYPES[head["dtype"]]
        if file.stat().st_size != start * dtype.itemsize:
            raise DataError("the source cache is not whole", found=file, fix="delete the folder, and build it again")
        self._states = torch.from_file(str(file), shared=False, size=start, dtype=dtype)

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}  # a worker maps the file itself

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    @property
    def bytes(self) -> int:
        """What the representations take on disk."""
        return self._states.numel() * self._states.element_size()

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(length for _, length in self._rows.values())

    def fingerprint(self) -> str:
        """That of what it was made with."""
        return self.made_by

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: Text) -> bool:
        return _digest(text) in self._rows

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """States, (batch, layers, length, width), padded on the right, and the mask of tokens, (batch, length)."""
        found = []
        for text in texts:
            place = self._rows.get(_digest(text))
            if place is None:
                raise DataError(
                    "The source cache does not hold this text.", found=repr(text), fix=f"delete {self.folder}, rebuild"
                )
            found.append(place)
        longest = max(length for _, length in found)
        states = torch.zeros(len(texts), self.layers, longest, self.width, dtype=self._states.dtype)
        mask = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, (start, length) in enumerate(found):
            flat = self._states[start : start + length * self.layers * self.width]
            states[row, :, :length] = flat.view(self.layers, length, self.width)
            mask[row, :length] = 1
        return states, mask

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        encode: Encode,
        texts: Iterable[Text],
        *,
        batch_size: int = 32,
        dtype: str = "float32",
        progress: bool = False,
    ) -> SourceCache:
        """Compute the representations of texts, or find them computed.

        Args:
            folder: a new one, or that of a cache made by the same model with the same settings, which is handed back.
            encode: a `graftlm.ModelStates` or `graftlm.EncoderStates`.
            texts: the source texts of a training set, or pairs of texts; each different one is computed once.
            batch_size: texts a forward pass.
            dtype: float32, float16 or bfloat16, of the numbers on disk.
            progress: whether a bar is shown.

        Raises:
            DataError: a folder that holds something else, a cache made by another model, or one without all texts; a
                file in its place; an unknown dtype, or one in whose numbers a representation is infinite.
        """
        folder, unique = Path(folder), list(dict.fromkeys(texts))
        if dtype not in _DTYPES:
            raise DataError("no dtype for a source cache", found=dtype, allowed=_DTYPES)
        if not unique:
            raise DataError("there is no text for a source cache", found=folder)
        if folder.exists() and not folder.is_dir():
            raise DataError("a source cache is a folder, and a file lies in its place", found=folder)
        if folder.exists() and any(folder.iterdir()):
            return cls._fitting(folder, encode, unique, dtype)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            cls._write(partial, encode, unique, batch_size, dtype, progress)
            partial.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache
            os.replace(partial, folder)
        except OSError:
            if not (folder / _HEAD).is_file():
                raise
            return cls._fitting(folder, encode, unique, dtype)  # another process was faster
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(folder)

    @classmethod
    def key(cls, encode: Encode, texts: Iterable[Text], dtype: str = "float32") -> str:
        """A name for the cache of these texts by this model: another one for other texts, weights or settings."""
        found = hashlib.blake2b(f"{_VERSION} {dtype} {encode.fingerprint()}".encode(), digest_size=16)
        for digest in sorted({_digest(text) for text in texts}):
            found.update(digest)
        return found.hexdigest()

    @staticmethod
    def _write(
        folder: Path, encode: Encode, unique: Sequence[Text], batch_size: int, dtype: str, progress: bool
    ) -> None:
        lengths, layers, width, began = [], 0, 0, time.perf_counter()
        # little padding, and what does not fit into memory fails first
        order = sorted(unique, key=lambda text: sum(map(len, parts(text))), reverse=True)
        with (folder / _STATES).open("wb") as file:
            for start in tqdm(range(0, len(order), batch_size), disable=not progress, desc="source"):
                batch = order[start : start + batch_size]
                states, mask = encode(batch)
                layers, width = states.shape[1], states.shape[3]
                for text, row, there in zip(batch, states.cpu(), mask.bool().cpu(), strict=True):
                    kept = _finite(row[:, there], dtype, text)
                    lengths.append(kept.shape[1])
                    file.write(kept.view(-1).view(torch.uint8).numpy().data)
        digests = torch.frombuffer(bytearray(b"".join(map(_digest, order))), dtype=torch.uint8).view(len(order), -1)
        save_file({"digests": digests, "lengths": torch.tensor(lengths)}, folder / _INDEX)
        head = {
            "version": _VERSION,
            "layers": layers,
            "width": width,
            "dtype": dtype,
            "fingerprint": encode.fingerprint(),
            "seconds": time.perf_counter() - began,
        }
        (folder / _HEAD).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _fitting(cls, folder: Path, encode: Encode, texts: Sequence[Text], dtype: str) -> SourceCache:
        cache = cls(folder)
        if cache._states.dtype != _DTYPES[dtype]:
            found = str(cache._states.dtype).removeprefix("torch.")
            raise DataError("The source cache holds other numbers.", found=found, allowed=[dtype], fix="another folder")
        if cache.made_by != encode.fingerprint():
            raise DataError(
                "The source cache was made by another model or tokenizer, or with another max_length or language.",
                found=folder,
                fix="another folder",
            )
        if missing := [text for text in texts if text not in cache]:
            raise DataError(
                "The source cache does not hold all of these texts.",
                found=f"{folder}: {len(missing)} of {len(texts)} are missing, such as {missing[0]!r}",
                fix="another folder, or delete this one",
            )
        return cache


def _finite(states: Tensor, dtype: str, text: Text) -> Tensor:
    kept = states.to(_DTYPES[dtype]).contiguous()
    if not kept.isfinite().all():
        raise DataError(
            "The representation of a text is not finite in the numbers of the source cache.",
            found=f"{repr(text)[:80]}: up to {float(states.abs().max()):.3g}",
            allowed=f"up to {torch.finfo(kept.dtype).max:.3g} in {dtype}",
            fix='dtype="bfloat16", which reaches as far as float32; in a recipe training.precision=bf16'
            if states.isfinite().all()
            else "a model whose hidden states are finite; these are not",
        )
    return kept


def _digest(text: Text) -> bytes:
    first, *more = parts(text)
    whole = json.dumps([first, *more]) if more else first
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
