"""A word-by-word gloss in English: IBM model 1 on a few thousand sentence pairs, in place of machine translation.

    translate = glossary(pairs)                 # pairs of (foreign, English) sentences
    translate("En kat sover .")                 # "a cat sleeps ."

t(e | f) by expectation maximisation over all alignments (Brown et al., Computational Linguistics 19 (1993), model 1,
with an empty word). Each foreign word is replaced by its likeliest English word; one that never occurred stays as it
is, as a name would, and one whose likeliest partner belongs more to the empty word is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

NOTHING = ""
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and punctuation."""
    return _WORD.findall(text.lower())


def model_1(pairs: Iterable[tuple[str, str]], rounds: int = 8) -> dict[str, dict[str, float]]:
    """t(e | f) after some rounds of expectation maximisation, f → e → probability; f may be `NOTHING`."""
    corpus = [([NOTHING, *words(foreign)], words(english)) for foreign, english in pairs]
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for foreign, english in corpus:
        for f in foreign:
            for e in english:
                table[f][e] = 1.0
    for _ in range(rounds):
        counts: dict[str, dict[str, float]] = {f: dict.fromkeys(found, 0.0) for f, found in table.items()}
        for foreign, english in corpus:
            for e in english:
                total = sum(table[f][e] for f in foreign)
                for f in foreign:
                    counts[f][e] += table[f][e] / total
        for f, found in counts.items():
            mass = sum(found.values())
            table[f] = {e: count / mass for e, count in found.items()}
    return table


def glossary(pairs: Iterable[tuple[str, str]], rounds: int = 8) -> Callable[[str], str]:
    """What turns a foreign sentence into its gloss."""
    table = model_1(pairs, rounds)
    best = {f: max(found, key=found.__getitem__) for f, found in table.items() if f != NOTHING}
    empty = table.get(NOTHING, {})

    for f, e in best.items():
        if table[f][e] < empty.get(e, 0.0):
            best[f] = NOTHING

    def translate(text: str) -> str:
        return " ".join(filter(None, (best.get(f, f) for f in words(text)))) or text

    return translate
