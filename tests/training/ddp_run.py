"""The jobs of test_ddp.py in one process group: python ddp_run.py OUT_FOLDER [fsdp2], alone or under torchrun."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from graftlm import ScheduledUnfreezing
from graftlm.errors import SetupError

JOBS = {
    "gradual": ("gradual", {}),
    "fisher": ("fisher", {}),
    "fisher-full": ("fisher", {"full": True}),
    "fisher-accumulation": ("fisher", {"gradient_accumulation_steps": 2}),
}
FSDP2 = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
REFUSED = {
    "no-unused": {"ddp_find_unused_parameters": False},
    "checkpointing": {"full": True, "activation_checkpointing": True},
    "static-graph": {"ddp_static_graph": True},
}


def train(folder: Path, schedule: str, *, full: bool = False, **more: object) -> dict:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=10,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        # transformers 5.23 multiplies a sequence classifier's loss by the number of processes otherwise
        average_tokens_across_devices=False,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    model = tiny_model("bert", dropout=0.0, dtype=torch.float64)
    torch.manual_seed(0)
    if not full:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2), autocast_adapter_dtype=False)
        model.to(torch.float64)
    batch = tiny_batch("bert", batch_size=24)
    data = Dataset.from_dict({name: value.tolist() for name, value in batch.items()}).with_format("torch")
    callback = ScheduledUnfreezing(schedule, every_n_steps=2, trace_examples=8, log_path=folder / f"{schedule}.jsonl")
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {"weights": {n: p.detach() for n, p in weights.items()}, "history": callback.history}


def main(folder: Path, sharding: str | None = None) -> None:
    warnings.simplefilter("ignore")
    results: dict[str, object] = {}
    for name, (schedule, more) in JOBS.items():
        results[name] = train(folder, schedule, **more, **(FSDP2 if sharding else {}))
    if os.environ.get("WORLD_SIZE", "1") != "1" and not sharding:
        for name, more in REFUSED.items():
            try:
                results[name] = train(folder, "gradual", **more)
            except SetupError as error:
                results[name] = str(error)
    torch.save(results, folder / f"{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
