"""Predictions belong to their items, whatever the order in which training reads its own."""

import json
import random

import pytest
import torch
from small import small_folder, small_recipe, write_rows

from graftlm.folder import load
from graftlm.run import evaluate, run_recipe


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_each_prediction_is_that_of_its_own_item(tmp_path, sampling):
    folder = small_folder(tmp_path, train=32)
    rng = random.Random(0)
    for name in ("test.eng", "test.deu", "dev"):  # texts of very different lengths
        rows = [
            {"id": f"{n}", "text": " ".join(f"w{rng.randrange(40)}" for _ in range(1 + (7 * n) % 20)), "label": colour}
            for n, colour in enumerate(["red", "blue"] * 16)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    recipe = small_recipe(
        folder,
        f"training.arguments={{train_sampling_strategy: {sampling}}}",
        "training.eval_batch_size=4",
        "training.epochs=2",
        "data.id=id",
    )
    result = run_recipe(recipe, progress=False)
    model, tokenizer = load(recipe.folder, tokenizer=True)
    texts = {row["id"]: row["text"] for row in map(json.loads, (folder / "test.deu.jsonl").read_text().splitlines())}
    rows = [json.loads(line) for line in (recipe.folder / "predictions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["language"] == "deu"]
    assert [row["id"] for row in rows] == list(texts)
    first = [row["scores"][0] for row in rows]
    assert max(first) - min(first) > 0.003, "else the order could not be seen"
    for row in rows:
        with torch.no_grad():
            alone = model(**tokenizer(texts[row["id"]], return_tensors="pt")).logits.softmax(-1)[0]
        assert row["scores"] == pytest.approx(alone.tolist(), abs=2e-5)
    assert evaluate(recipe.folder, progress=False).scores == result.scores
    # the dev score that the checkpoint was chosen by is in order too
    dev = evaluate(recipe.folder, {"eng": str(folder / "dev.jsonl")}, progress=False)
    log = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    best = max(row["eval_accuracy"] for row in log if "eval_accuracy" in row)
    assert dev.scores[0].metrics["accuracy"].value == pytest.approx(best)
