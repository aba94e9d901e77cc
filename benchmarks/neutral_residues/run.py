"""Learning a new language against forgetting the old one: neutral residues, vanilla adapter, LoRA, fine-tuning.

    python benchmarks/neutral_residues/run.py --data DATA --stages text sweep seeds
    python benchmarks/neutral_residues/run.py --table

Every finished run is a line of rows.jsonl; started again, it goes on with what is missing. The README says what is
compared and was written first.
"""

import argparse
import functools
import json
import multiprocessing
import random
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from curves import ANCHOR, BELOW, PRIMARY, chosen, table
from torch import nn
from transformers import LlamaForCausalLM

from graftlm.evaluation.bits_per_byte import collate, windows
from graftlm.folder import load
from graftlm.recipe import load_recipe
from graftlm.run import run_recipe
from graftlm.starter import starter_model

sys.path.append(str(Path(__file__).parents[1] / "starter_decoder"))
from english import english_text, read_rows

HERE = Path(__file__).parent
WORK = HERE / "work"
LANGUAGES = {"dan": "adl_dan", "fra": "eltec_fra"}
MORE = {"deu": "eltec_deu", "ces": "eltec_ces", "por": "eltec_por"}  # exploratory, at settings that the others chose
MORE_SETTINGS = {"neutral": "lr 0.01, alpha 10", "vanilla": "lr 0.00453418"}
RATES, SETTINGS = (3e-3, 1e-2), 10  # ours: rates × alphas; as many rates for vanilla adapter and LoRA
FULL_SETTINGS = 5  # of the anchor, which has no seeds
ADAPTER_RATES, FULL_RATES = (1e-3, 3e-2), (1e-4, 3e-3)  # from, to
ALPHAS = (0.01, 0.1, 1.0, 10.0, 30.0)
VANILLA = "adapter={method: neutral_residues, gate: none, penalty_weight: 0, initialisation: he}"
EXPLORED = {  # label → overrides, on each of the two settings that the seeds have
    "no gate, L1": "adapter.gate=none",
    "sigmoid gate, cross-entropy": "adapter.gate=sigmoid",
    "ELU gate": "adapter.gate=elu",
    "He initialisation": "adapter.initialisation=he",
    "penalty stays in its layer": "adapter.penalty_through_input=false",
    "p = 0, no penalty": "mixing=null adapter.penalty_weight=0",
    "no penalty": "adapter.penalty_weight=0",
    "p = 0.5": "mixing.share=0.5",
    "1,000 new tokens": "new_tokens=1000",
    "rate 2e-2": "training.learning_rate=0.02",
}
AGAIN = ("He initialisation", "lr 0.01, alpha 10", "adapter.initialisation=he adapter.penalty_weight=10")
SWEEP_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
LENGTH = 256
LONGER = "training.max_steps=160"  # four times the tokens
STAGES = ("text", "sweep", "seeds", "below", "exploratory", "again", "more", "longer")


def write(name: str, texts: list[str]) -> None:
    (WORK / "text").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (WORK / "text" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def text_of(data: Path) -> None:
    """The splits. What the backbone was pretrained *like* is tested; the replay is novels alone, a proxy of it."""
    rng, english = random.Random(0), english_text(data)
    write("test.eng", english.held_out[:400])  # of the backbone's own domain, in no replay and not pretrained on
    write("replay.eng", rng.sample(english.novels, 300))
    write("test.wiki", [row["text"] for row in read_rows(data / "raw_text/wikitext2_eval/test.jsonl.gz")][:60])
    for language, name in (LANGUAGES | MORE).items():
        for split, count in (("train", 500), ("test", 40)):
            texts = [row["text"] for row in read_rows(data / f"raw_text/{name}/{split}.jsonl.gz")]
            write(f"{split}.{language}", rng.sample(texts, count))


def lora_rank() -> int:
    """The rank at which LoRA on all projections adds as many parameters as the blocks do."""
    model = LlamaForCausalLM.from_pretrained(starter_model("starter-decoder"))
    linears = [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "layers" in name]
    outside = sum(p.numel() for p in model.get_input_embeddings().parameters())
    added = 0.2 * (sum(p.numel() for p in model.parameters()) - outside)
    return max(1, round(added / sum(part.in_features + part.out_features for part in linears)))


def arms() -> dict[str, list[tuple[str, str]]]:
    """method → (label of a setting, the recipe's overrides)."""
    targets = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
    rank = lora_rank()
    lora = f"adapter={{method: lora, r: {rank}, alpha: {2 * rank}, target_modules: {targets}}}"
    finer = np.geomspace(*ADAPTER_RATES, SETTINGS).tolist()
    full = np.geomspace(*FULL_RATES, FULL_SETTINGS).tolist()
    return {
        "neutral": [
            (f"lr {lr:g}, alpha {alpha:g}", f"adapter.penalty_weight={alpha} training.learning_rate={lr}")
            for lr in RATES
            for alpha in ALPHAS
        ],
        "vanilla": [(f"lr {lr:g}", f"{VANILLA}|training.learning_rate={lr}") for lr in finer],
        "lora": [(f"lr {lr:g}", f"{lora}|training.learning_rate={lr}") for lr in finer],
        "full": [(f"lr {lr:g}", f"adapter={{method: none}}|training.learning_rate={lr}") for lr in full],
    }


@torch.no_grad()
def divergence(model: nn.Module, base: nn.Module, tokenizer, texts: list[str]) -> float | None:
    """KL(backbone ‖ adapted), nats a token of the original domain; None where the two have other tokens."""
    if len(tokenizer) > base.config.vocab_size:
        return None
    total, count = 0.0, 0
    scored = list(windows(texts, tokenizer, "causal_lm", max_length=LENGTH, stride=64))
    for start in range(0, len(scored), 16):
        batch = collate([vars(window) for window in scored[start : start + 16]], tokenizer)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        kept = batch.pop("labels")[:, 1:] != -100
        ours, theirs = (one(**batch).logits[:, :-1][kept].float().log_softmax(-1) for one in (model, base))
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += int(kept.sum())
    return total / count


class Job(NamedTuple):
    """One run of the study."""

    stage: str
    language: str
    method: str
    setting: str
    overrides: str
    seed: int

    def key(self) -> tuple:
        return self.stage, self.language, self.method, self.setting, self.seed


def jobs(stage: str, language: str, rows: list[dict]) -> Iterator[Job]:
    """The runs of a stage; those with seeds have two settings a method, read off the sweep."""
    found = arms()
    if stage == "sweep":
        for method, settings in found.items():
            yield from (Job(stage, language, method, label, overrides, SWEEP_SEED) for label, overrides in settings)
        return
    if stage in ("more", "longer"):
        method, label, overrides = AGAIN
        single = [(method, label, f"{overrides} training.learning_rate=0.01")]
        single += [
            (m, label, o) for m, settings in found.items() for label, o in settings if label == MORE_SETTINGS.get(m)
        ]
        for method, label, overrides in single:
            divided = "|" if "|" in overrides else " "
            steps = divided + LONGER if stage == "longer" else ""
            yield Job(stage, language, method, label, overrides + steps, SWEEP_SEED)
        return
    keep = {method: chosen(rows, language, method, BELOW if stage == "below" else PRIMARY) for method in found}
    if stage == "exploratory":
        for label, overrides in found["neutral"]:
            if label in keep["neutral"]:
                for name, more in EXPLORED.items():
                    yield Job(stage, language, name, label, f"{overrides} {more}", SWEEP_SEED)
        return
    if stage == "again":
        method, label, overrides = AGAIN
        yield from (Job(stage, language, method, label, f"{overrides} training.learning_rate=0.01", s) for s in SEEDS)
        return
    for seed in SEEDS:
        for method, settings in found.items():
            if method != ANCHOR:
                for label, overrides in settings:
                    if label in keep[method]:  # both levels may share runs
                        yield Job("seeds", language, method, label, overrides, seed)


@functools.cache
def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(starter_model("starter-decoder")).eval()


def perform(job: Job, more: tuple[str, ...] = ()) -> dict:
    """Trains, scores; the row of one run. `more` is set in the recipe whatever the job."""
    name = re.sub(r"[^\w.]+", "-", " ".join(map(str, job.key())))
    tests = {job.language: job.language, "eng": "eng", "eng-wiki": "wiki"}
    recipe = load_recipe(
        HERE / "recipe.yaml",
        [
            f"name={name}",
            f"source={job.language}",
            f"data.train=work/text/train.{job.language}.jsonl",
            f"data.test={json.dumps({tag: f'work/text/test.{text}.jsonl' for tag, text in tests.items()})}",
            f"output.folder={WORK / 'runs'}",
            f"seed={job.seed}",
            *(job.overrides.split("|") if "|" in job.overrides else job.overrides.split()),
            *more,
        ],
    )
    result = run_recipe(recipe, progress=False)
    changes = {score.language: score.change.value for score in result.scores}
    model, tokenizer = load(recipe.folder, tokenizer=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = (WORK / "text/test.eng.jsonl").read_text(encoding="utf-8").splitlines()
    own = [json.loads(line)["text"] for line in lines][:200]
    return {
        **dict(zip(("stage", "language", "method", "setting", "seed"), job.key(), strict=True)),
        "learned": changes[job.language],
        "forgot": -changes["eng"],
        "forgot_wiki": -changes["eng-wiki"],
        "kl": divergence(model.to(device), backbone().to(device), tokenizer, own),
        "trainable": result.cost.trainable_parameters,
        "train_seconds": round(result.cost.train_seconds, 1),
        "device": result.cost.device,
    }


def run(stage: str, path: Path, languages: list[str], workers: int, more: tuple[str, ...] = ()) -> None:
    """The runs of a stage that have no row yet, in as many processes."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(row[key] for key in ("stage", "language", "method", "setting", "seed")) for row in rows}
    left = [job for language in languages for job in jobs(stage, language, rows) if job.key() not in done]
    failed = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        began = {pool.submit(perform, job, more): job for job in left}
        for finished in as_completed(began):
            if error := finished.exception():  # the others go on
                failed.append(f"{began[finished].key()}: {error}")
                continue
            row = finished.result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(shown, flush=True)
    if failed:
        sys.exit("\n".join(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[])
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES | MORE, default=list(LANGUAGES))
    parser.add_argument("--set", nargs="+", default=[], help="training.precision=float32 on a processor without bf16")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--rows", type=Path, default=HERE / "rows.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="learning against forgetting")
    given = parser.parse_args()
    for stage in given.stages:
        if stage == "text":
            text_of(given.data)
        else:
            run(stage, given.rows, given.languages, given.workers, tuple(given.set))
    if given.table or given.picture:
        rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines()]
        if given.table:
            print(table(rows))
        if given.picture:
            from picture import picture

            given.picture.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
