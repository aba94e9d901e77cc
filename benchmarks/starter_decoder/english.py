"""The English text of the starter decoder: in the public domain or under a Creative Commons licence."""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graftlm.evaluation.leakage import EvaluationIndex

sys.path.append(str(Path(__file__).parents[1] / "starter_encoder"))
from corpus import evaluation_texts, read_rows

HELD_OUT = 500


@dataclass
class EnglishText:
    """`novels`: passages. `rest`: sentences of every other source. `held_out`: sentences of these sources, unseen."""

    novels: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)


def candidates(data: Path) -> Iterator[tuple[str, str]]:
    """(source, text), each text once."""
    parallel, seen = data / "parallel_text", set()
    for row in read_rows(data / "raw_text/eltec_eng/train.jsonl.gz"):
        yield "novels", row["text"]
    files = [("Tatoeba", path, "eng") for path in sorted((parallel / "tatoeba_eng").glob("*.jsonl.gz"))]
    files += [("NTREX-128", parallel / "ntrex128/eng.jsonl.gz", "text")]
    files += [("TICO-19", path, "eng") for path in sorted((parallel / "tico19_eng").glob("*.jsonl.gz"))]
    files += [("CLINC150", data / "classification_en/clinc150/train.jsonl.gz", "text")]
    files += [("query_wellformed", data / "classification_en/query_wellformed/train.jsonl.gz", "text")]
    for source, path, column in files:
        for row in read_rows(path):
            if row.get("split", "train") == "train" and row[column] not in seen:
                seen.add(row[column])
                yield source, row[column]


def english_text(data: Path, seed: int = 0) -> EnglishText:
    """Choose the text: none that overlaps an evaluation split of the data pack, or a held-out sentence.

    A passage of a novel overlaps where it shares eight words in a row, as a sentence does.
    """
    found, evaluation, held_out = EnglishText(), EvaluationIndex(), EvaluationIndex()
    evaluation.update(evaluation_texts(data))
    clean: list[tuple[str, str]] = []
    for source, text in candidates(data):
        overlaps = evaluation.match(text)
        (found.dropped if overlaps else found.kept)[source] += 1
        if not overlaps:
            clean.append((source, text))
    long = [text for source, text in clean if source != "novels" and len(text) > 40]
    found.held_out = random.Random(seed).sample(long, HELD_OUT)
    held_out.update(found.held_out)
    for source, text in clean:
        if held_out.match(text):
            found.kept[source] -= 1
            found.dropped[source] += 1
        else:
            (found.novels if source == "novels" else found.rest).append(text)
    return found
