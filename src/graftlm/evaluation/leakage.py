"""Find training text that also stands in an evaluation set.

A training text overlaps an evaluation set when, after normalisation, it *is* one of its texts (whole-sentence hash),
or shares a run of eight consecutive words with one of them (hashes of word 8-grams). Hashes are 64-bit BLAKE2b, so an
index of a large evaluation set stays small and holds no text.

Limits: words are what white space separates, so in scripts without it (Chinese, Japanese, Thai) only whole texts are
found; an evaluation text of fewer than eight words inside a longer training text is not found; paraphrases and
translations are not found.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from sys import maxunicode

N_WORDS = 8


@cache
def _punctuation() -> dict[int, str]:
    """Map every code point of the Unicode categories P (punctuation) and S (symbols) to a space."""
    return {code: " " for code in range(maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS"}


def normalise(text: str) -> str:
    """Return `text` in NFKC, case-folded, without punctuation and symbols, with single spaces.

    >>> normalise("  Don’t PANIC — it's “fine”! ")
    'don t panic it s fine'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_punctuation()).split())


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def ngram_hashes(normalised: str, n: int = N_WORDS) -> Iterator[int]:
    """Yield the hash of every run of `n` words in a normalised text; nothing when it has fewer words."""
    words = normalised.split(" ")
    for start in range(len(words) - n + 1):
        yield _hash(" ".join(words[start : start + n]))


@dataclass(frozen=True)
class Overlap:
    """Which training texts stand in an evaluation set, as ascending positions in the training texts.

    `sentences`: the whole text is an evaluation text. `ngrams`: not that, but a run of words is shared.
    """

    n_training: int
    n_evaluation: int
    sentences: tuple[int, ...]
    ngrams: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sentences) + len(self.ngrams)

    def __contains__(self, position: int) -> bool:
        return position in self.positions

    @property
    def positions(self) -> frozenset[int]:
        return frozenset(self.sentences) | frozenset(self.ngrams)


@dataclass
class EvaluationIndex:
    """Hashes of evaluation texts, to be asked about training texts one by one.

    >>> index = EvaluationIndex()
    >>> index.add("The mayor opened the new bridge over the river on Monday morning.")
    >>> index.match("THE MAYOR opened the new bridge over the river on Monday morning")
    'sentence'
    >>> index.match("We heard that the mayor opened the new bridge over the river!")
    'ngram'
    >>> index.match("The mayor opened the new bridge.") is None
    True
    """

    n: int = N_WORDS
    size: int = 0
    _sentences: set[int] = field(default_factory=set, repr=False)
    _ngrams: set[int] = field(default_factory=set, repr=False)

    def add(self, text: str) -> None:
        """Add one evaluation text; one without letters or digits is ignored."""
        if normalised := normalise(text):
            self.size += 1
            self._sentences.add(_hash(normalised))
            self._ngrams.update(ngram_hashes(normalised, self.n))

    def update(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.add(text)

    def match(self, text: str) -> str | None:
        """Return "sentence", "ngram" or None for one training text."""
        normalised = normalise(text)
        if not normalised:
            return None
        if _hash(normalised) in self._sentences:
            return "sentence"
        return "ngram" if any(h in self._ngrams for h in ngram_hashes(normalised, self.n)) else None


def find_overlap(training_texts: Iterable[str], evaluation_texts: Iterable[str], *, n: int = N_WORDS) -> Overlap:
    """Find the training texts that stand in the evaluation texts, whole or by a shared run of `n` words.

    For pairs, pass each side and drop the pair when either is found.

    >>> find_overlap(["Good morning!", "Good night."], ["good morning"]).sentences
    (0,)
    """
    index = EvaluationIndex(n)
    index.update(evaluation_texts)
    found: dict[str, list[int]] = {"sentence": [], "ngram": []}
    n_training = 0
    for position, text in enumerate(training_texts):
        n_training += 1
        if kind := index.match(text):
            found[kind].append(position)
    return Overlap(n_training, index.size, tuple(found["sentence"]), tuple(found["ngram"]))
