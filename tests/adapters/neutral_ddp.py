"""The jobs of test_neutral_ddp.py in one process group: python neutral_ddp.py OUT_FOLDER, alone or under torchrun."""

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from adapters.neutrals import adapted, randomised
from datasets import Dataset
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments, default_data_collator

import graftlm
from graftlm.adapters.injected_loss import Call, domains_of
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# of four rows each: two ranks hold (2, 0), (1, 0), (0, 1), (2, 1) of the original domain; alternately dealt (1, 1), …
DOMAINS = [0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0]


def train(folder: Path, *, parts: int = 1, checkpointing: bool = False, **settings: object) -> dict:
    """Four steps of four rows; alone the rows of a step are never cut up."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=4,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        per_device_train_batch_size=4 if PROCESSES == 1 else 4 // PROCESSES // parts,
        gradient_accumulation_steps=1 if PROCESSES == 1 else parts,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=not checkpointing,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    base = tiny_model("llama", "causal_lm", dropout=0.0, dtype=torch.float64)
    model = adapted("llama", base=base, **{"penalty_weight": 3.0, "original_share": 0.4, **settings}).double()
    batch = tiny_batch("llama", "causal_lm", batch_size=16)
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch.items()} | {"domain": DOMAINS})
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[graftlm.PenaltyLog()],
    )
    trainer.train()
    return {"weights": _trained(model), "log": _penalties(trainer)}


def by_recipe(folder: Path) -> dict:
    """What `graftlm train` does, with a share of the old language in the text."""
    parts = 4 // PROCESSES  # of 2 each: a recipe's order goes by the size of its batches
    override = f"training.gradient_accumulation_steps={parts}"
    prepared = prepare(load_recipe(folder / "recipe.yaml", [override]), folder / "run", progress=False)
    randomised(prepared.loaded.model)
    prepared.trainer.train()
    return {"weights": _trained(prepared.loaded.model), "log": _penalties(prepared.trainer)}


def gates(folder: Path) -> list[str]:
    """The warnings of a step in which one gate is open on the last rank only, and one on none."""
    model, log, state = adapted("llama"), graftlm.PenaltyLog(), SimpleNamespace(global_step=1, log_history=[{}])
    here = int(os.environ.get("RANK", "0")) == PROCESSES - 1
    opened = {"open": torch.tensor(True), "elsewhere": torch.tensor(here), "closed": torch.tensor(False)}
    tokens = {"layer": torch.ones(1, 2, dtype=torch.bool)}
    domains_of(model).call = Call(torch.tensor([True]), tokens, layers=3, opened=opened)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log.on_step_end(None, state, None, model=model)
        log.on_log(None, state, None, logs={"loss": 1.0}, model=model)
    return [str(one.message) for one in seen]


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _penalties(trainer: Trainer) -> list[tuple[float, float]]:
    return [(row["penalty"], row["original_share"]) for row in trainer.state.log_history if "penalty" in row]


JOBS = {
    "a batch each": train,
    "accumulated": lambda folder: train(folder, parts=2),
    "checkpointing": lambda folder: train(folder, parts=2, checkpointing=True),
    "kept from the layers below": lambda folder: train(folder, penalty_through_input=False),
    "no penalty": lambda folder: train(folder, penalty_weight=0.0),
    "a recipe": by_recipe,
    "gates": gates,
}


def run(folder: Path) -> dict[str, object]:
    return {name: job(folder) for name, job in JOBS.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.save(run(Path(sys.argv[1])), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
