"""The rankers of the study: name → {source: score} for one target."""

from pathlib import Path

import numpy as np
from plan import Plan
from tasks import Trainer, read

from graftlm.measure.logme import logme, targets_of
from graftlm.measure.transferability import cosine, jaccard
from graftlm.sources.baselines import frozen_transfer
from graftlm.sources.embed import Embedder
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.rank import rank_maps
from graftlm.sources.target import Target


def score_all(plan: Plan, data: Path, work: Path, target: str, count: int) -> dict[str, dict[str, float]]:
    """Every ranker's scores; higher is better."""
    rows = read(data, target, "train", max(plan.target_rows), seed=1).head(count)
    same = {"pooling": "mean", "max_length": 64}
    base = Embedder(plan.model_folder(), device="cpu", **same)
    features = base(rows.texts)
    sources = [source for source in plan.usable(target) if (work / "maps" / "linear" / source).is_dir()]
    task = Target(rows.texts, rows.labels, "classification", targets_of(rows.labels, "classification", count))
    found: dict[str, dict[str, float]] = {}
    for kind in plan.maps:
        maps = [EmbeddingSpaceMap.load(work / "maps" / kind / source) for source in sources]
        name = "esm-logme" if kind == "linear" else f"esm-logme, {kind}"
        found[name] = {one.name: one.score for one in rank_maps(maps, features, task, threads=1).sources}
        if kind == "linear":
            found["esm-logme, as released"] = {
                esm.task: released_logme(esm(features), task.columns) for esm in maps
            }  # fmt: skip
    own_words = {token for ids in base.token_ids(rows.texts) for token in ids}
    trainer = Trainer(plan.model_folder())
    for name in ("textemb", "vocabulary overlap", "size", "logme on source models", "frozen transfer"):
        found[name] = {}
    for source in sources:
        texts = np.load(work / "texts" / f"{source}.npz")
        found["textemb"][source] = cosine(features.mean(axis=0), texts["mean"])
        found["vocabulary overlap"][source] = jaccard(own_words, set(texts["words"].tolist()))
        found["size"][source] = float(texts["rows"])
        tuned = Embedder(trainer.encoder(work / "lora" / source), tokenizer=trainer.tokenizer, **same)(rows.texts)
        found["logme on source models"][source] = logme(tuned, rows.labels)
        found["frozen transfer"][source] = frozen_transfer(tuned.astype(float), task)
    return found


def released_logme(features: np.ndarray, columns: np.ndarray) -> float:
    """The released fixed point and its evidence, with d/2·log α for any n: wrong for n < d, and kept to be shown."""
    rows, width = features.shape
    features = features.astype(float)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    values, scores = singular**2, []
    for y in columns.T:
        squares = (left.T @ y) ** 2
        rest = max(float(y @ y - squares.sum()), 0.0)
        alpha = beta = 1.0
        t = alpha / beta
        for _ in range(11):
            gamma = (values / (values + t)).sum()
            size = (values * squares / (t + values) ** 2).sum()
            residual = (squares / (1 + values / t) ** 2).sum() + rest
            alpha, beta = gamma / (size + 1e-5), (rows - gamma) / (residual + 1e-5)
            old, t = t, alpha / beta
            if abs(t - old) / old <= 1e-3:
                break
        log_det = np.log(alpha + beta * values).sum()
        evidence = width / 2 * np.log(alpha) + rows / 2 * np.log(beta) - log_det / 2 - beta / 2 * residual
        scores.append((evidence - alpha / 2 * size - rows / 2 * np.log(2 * np.pi)) / rows)
    return float(np.mean(scores))
