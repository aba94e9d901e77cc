"""The jobs of test_flare_ddp.py in one process group: python flare_ddp.py OUT_FOLDER, alone or under torchrun."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

import graftlm
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe

WORDS = 40
TOKENIZER = tiny_tokenizer()
PAIRS = {"target": "danish", "source": "english"}


def rows() -> list[dict]:
    """Pairs of any lengths, so that the two ranks pad differently."""
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        count = int(torch.randint(1, 8, (1,), generator=generator))
        return " ".join(f"w{word}" for word in torch.randint(0, WORDS, (count,), generator=generator).tolist())

    return [{"id": n, "danish": text(), "english": text(), "label": n % 3} for n in range(16)]


def train(folder: Path, *, cache: bool = False, encoder: bool = False) -> dict[str, torch.Tensor]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=4,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        average_tokens_across_devices=False,  # or a sequence classifier's loss is multiplied by the processes
        per_device_train_batch_size=4 // processes,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    base = tiny_model("bert", dropout=0.0, dtype=torch.float64, initializer_range=0.5)
    torch.manual_seed(0)
    width = {"encoder_width": 16} if encoder else {}
    config = graftlm.FlareConfig(r=8, task_type="SEQ_CLS", **width)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(torch.float64)
    encode: object = None
    if encoder:
        reads = tiny_model("mt5", "seq2seq_lm", seed=4, dtype=torch.float64)
        encode = graftlm.EncoderStates(reads, TOKENIZER)
    if cache:
        states = encode or graftlm.ModelStates(model, TOKENIZER)
        with arguments.main_process_first():
            encode = graftlm.SourceCache.build(folder / f"cache-{encoder}", states, [row["english"] for row in rows()])
    collator = graftlm.FlareCollator(TOKENIZER, **PAIRS, encode=encode)
    Trainer(model, arguments, data_collator=collator, train_dataset=Dataset.from_list(rows())).train()
    return {name: p.detach() for name, p in model.named_parameters()}


def by_recipe(folder: Path) -> dict[str, torch.Tensor]:
    """What `graftlm train` does, with a cache that both processes ask for."""
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    overrides = [f"output.folder={folder / 'runs'}", f"training.batch_size={size}"]
    prepared = prepare(load_recipe(folder / "recipe.yaml", overrides), folder / "runs", progress=False)
    prepared.trainer.train()
    return {name: p.detach() for name, p in prepared.loaded.model.named_parameters()}


JOBS = {
    "the model reads": train,
    "from a cache": lambda folder: train(folder, cache=True),
    "MT": lambda folder: train(folder, encoder=True),
    "MT from a cache": lambda folder: train(folder, encoder=True, cache=True),
    "a recipe": by_recipe,
}


def run(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: job(folder) for name, job in JOBS.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.save(run(Path(sys.argv[1])), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
