"""The sentences of the FLARE study: folds of sib200, the same in all languages, each row with its sources."""

import gzip
import json
import os
import random
import sys
from pathlib import Path

from gloss import glossary
from plan import LANGUAGES, PARTS, SOURCE, STUDY, Scale, dev_part


def read_sentences(data: Path, code: str) -> dict[int, dict]:
    """All rows of a language by sentence id, whatever official split they are in."""
    rows = {}
    for split in ("train", "dev", "test"):
        path = data / "multilingual" / "sib200_topic" / f"{code}.{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows |= {row["id"]: row for row in map(json.loads, file)}
    return rows


def glossaries(data: Path, languages: list[str]) -> dict:
    """A glossary a language, from the training split of Tatoeba."""
    made = {}
    for tag in languages:
        with gzip.open(data / "parallel_text" / "tatoeba_eng" / f"{tag}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["split"] == "train"]
        made[tag] = glossary((row["text"], row["eng"]) for row in rows)
    return made


def write_folds(data: Path, folder: Path, scale: Scale = STUDY, *, with_gloss: bool = False) -> None:
    """Fold k: test = part k, dev = the next part, train = the other three; the parts are the same in all languages.

    Glosses are in folds of their own: a run remembers the files that it was made from.
    """
    done = folder / "done"
    if done.exists():
        return
    codes = {SOURCE: "eng_Latn"} | {tag: LANGUAGES[tag] for tag in scale.languages}
    rows = {tag: read_sentences(data, code) for tag, code in codes.items()}
    ids = sorted(rows[SOURCE])
    for tag, found in rows.items():
        if sorted(found) != ids or any(found[i]["label"] != rows[SOURCE][i]["label"] for i in ids):
            sys.exit(f"{tag} does not have the sentences and labels that {SOURCE} has")
    translate = glossaries(data, list(scale.languages)) if with_gloss else {}
    random.Random(0).shuffle(ids)
    parts = {number + 1: ids[number::PARTS] for number in range(PARTS)}
    for fold in scale.folds:
        dev = dev_part(fold)
        train = [i for other, part in parts.items() if other not in (fold, dev) for i in part]
        for split, whole in {"train": train, "dev": parts[dev], "test": parts[fold]}.items():
            most = None if scale.rows is None else scale.rows if split == "train" else scale.rows // 4
            chosen = whole[:most]
            others = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))  # the ids are in no order already
            for tag, found in rows.items():
                lines = []
                for i in chosen:
                    text = found[i]["text"]
                    line = {"id": i, "text": text, "label_name": found[i]["label_name"], "itself": text}
                    line |= {"english": rows[SOURCE][i]["text"], "shuffled": rows[SOURCE][others[i]]["text"]}
                    if tag in translate:
                        line["gloss"] = translate[tag](text)
                    lines.append(json.dumps(line, ensure_ascii=False))
                write(folder / str(fold) / f"{split}.{tag}.jsonl", "\n".join(lines) + "\n")
    done.touch()


def write(path: Path, text: str) -> None:
    """A whole file or none: other processes read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
