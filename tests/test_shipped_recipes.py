"""Each shipped recipe, run on tiny data and a tiny model."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from lms import save_language_model
from small import read_rows, run, save_model, small_recipe, words, write_rows
from tiny import tiny_model, tiny_tokenizer

from graftlm.folder import load
from graftlm.recipe import LANGUAGE_MODELLING, Recipe, load_recipe, shipped
from graftlm.run import evaluate


def _write_task_data(folder: Path, recipe: Recipe) -> None:
    """Small files under the names that a shipped recipe gives its splits."""
    rng = random.Random(0)

    def row(number: int) -> dict:
        if recipe.task in LANGUAGE_MODELLING:
            return {"text": " ".join(words(rng, "red", 20))}
        colour = ("red", "blue")[number % 2]
        tokens = words(rng, colour, 5)
        context = words(rng, "green", 4) + words(rng, "red", 2) + words(rng, "green", 4)
        start = len(" ".join(context[:4])) + 1
        found = {"text": [" ".join(context[4:6])], "answer_start": [start]}
        return {
            "classification": {
                "text": " ".join(tokens),
                "label": colour,
                "category": colour,
                "id": f"i{number}",
                "index_id": number,
            },
            "multi_label": {"text": " ".join(tokens), "labels": f"{colour}|all" if number % 4 else colour},
            "regression": {"sentence1": " ".join(tokens), "sentence2": "w1", "score": float(number % 2)},
            "token_classification": {
                "tokens": (mixed := [rng.choice(words(rng, one, 1)) for one in ("red", "blue", "blue", "red")]),
                "tags": ["B-RED" if int(word[1:]) < 20 else "O" for word in mixed],
            },
            "question_answering": {
                "id": f"q{number}",
                "question": "w55",
                "context": " ".join(context),
                "answers": found,
            },
        }[recipe.task]

    sources = {"train": recipe.data.train} | ({"dev": recipe.data.dev} if recipe.data.dev else {}) | recipe.data.test
    if parallel := recipe.data.parallel:
        sources |= {"source of train": parallel.train} | {f"source of {key}": one for key, one in parallel.test.items()}
    sources |= {"mixing": recipe.mixing.data} if recipe.mixing else {}
    for number, (split, source) in enumerate(sources.items()):
        if source.is_file():
            count = 96 if split.endswith("train") else 16
            write_rows(folder / source.path.removeprefix("starter:"), [row(i) for i in range(count)])
        else:  # a hub data set, as the folder of its repository
            for name in ("train", "validation", "test"):
                write_rows(
                    folder / source.path / (source.config or "") / f"{name}.jsonl",
                    [row(i) for i in range(16 if name == "test" else 96)],
                )
        assert number < 20


@pytest.mark.filterwarnings("ignore:.*gates that no token")  # of a random model, with the penalty of another one
@pytest.mark.parametrize("name", sorted(shipped()))
def test_each_shipped_recipe_runs(name, tmp_path):
    text = shipped()[name].read_text(encoding="utf-8").replace("starter:", "")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    original = load_recipe(tmp_path / "recipe.yaml")
    _write_task_data(tmp_path, original)
    hub = original.data.train.config is not None
    raw = original.task in LANGUAGE_MODELLING
    starter = original.adapter.method == "bottleneck" and not raw  # a random model's attention hardly mixes tokens
    if hub:  # the repository's card, which says where each configuration lies
        parts = filter(None, (original.data, original.data.parallel))
        configs = {source.config for part in parts for source in (part.train, *part.test.values())}
        card = "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - {{split: {part}, path: {config}/{part}.jsonl}}\n" for part in ("train", "validation", "test")
            )
            for config in sorted(configs)
        )
        (tmp_path / original.data.train.path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    if original.dropout:  # measured on a language model, which has to have learned something
        texts = [row["text"] for row in read_rows(tmp_path / original.data.train.path.removeprefix("starter:"))]
        save_language_model(tmp_path / "model", texts)
    elif raw:
        architecture = {"masked_lm": "bert", "causal_lm": "llama"}[original.task]
        tiny_model(architecture, original.task).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    else:
        save_model(tmp_path / "model", max_position_embeddings=64)
    languages = original.adapter.language_adapters.values()
    for path in (source.path for text in languages for source in (text.train, text.test)):
        write_rows(tmp_path / path, [{"text": "Hier steht ein Satz."}, {"text": "Here is a sentence."}])
    recipe = small_recipe(
        tmp_path,
        "model=starter" if starter else "model=./model",
        "training.max_length=24",
        "training.stride=6",
        "training.batch_size=8",
        "training.epochs=3",
        "training.learning_rate=1e-2" if starter else "training.learning_rate=3e-2",
        *(["adapter.language_training={training.max_steps: 1, training.max_length: 24}"] if languages else []),
    )
    result = run(recipe)
    folder = recipe.folder
    assert (folder / ("model" if recipe.adapter.method == "none" else "adapter")).is_dir()
    assert [score.language for score in result.scores] == list(recipe.data.test)
    wanted = recipe.references.standard is not None
    assert all((score.gain is not None) == wanted for score in result.scores)
    said = read_rows(folder / "predictions.jsonl")
    assert len(said) == 16 * len(recipe.data.test)
    source = result.scores[0]
    if recipe.task == "question_answering":
        contexts = [row["context"] for row in _gzip_rows(tmp_path / recipe.data.test["eng"].path)]
        assert all(row["prediction"] in context for row, context in zip(said, contexts, strict=False))
        assert source.metrics["f1"].value is not None
    elif recipe.task == "regression":
        gold, guess = ([row[key] for row in said[:16]] for key in ("label", "prediction"))
        by_torch = torch.corrcoef(torch.tensor([gold, guess]))[0, 1]
        assert source.metrics["pearson"].value == pytest.approx(float(by_torch), abs=1e-4)
    elif recipe.task in LANGUAGE_MODELLING:
        assert source.change.low > 0, "twenty words are enough for all texts"
        assert set(result.forgetting or ()) == set(recipe.data.old)
    else:
        assert result.primary(source).value > (source.majority or 0), "words tell the classes apart"
    loaded = load(folder)
    assert not loaded.training
    again = evaluate(folder, progress=False)
    assert [one.metrics for one in again.scores] == [one.metrics for one in result.scores]


def _gzip_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
