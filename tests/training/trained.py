"""Short trainings of tiny models with a schedule, for the tests of the callback."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments


def rows(architecture="bert", head="sequence_classification", n=24, **more):
    batch = tiny_batch(architecture, head, batch_size=n, **more)
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()}).with_format("torch")


def adapted(architecture="bert", head="sequence_classification", layers=3, dropout=0.1, **more):
    model = tiny_model(architecture, head, num_layers=layers, dropout=dropout)
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in ("query", "value", "q", "v", "q_proj", "v_proj", "q_lin", "v_lin", "Wqkv") if n in names]
    settings = {"r": 2, "lora_dropout": dropout, "target_modules": targets or ["c_attn"], "fan_in_fan_out": not targets}
    modules = {"modules_to_save": ["classifier"]} if "classifier" in names else {}
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**settings | modules | more))


def arguments(folder, **more):
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | more)


def train(folder, model, callback, data=None, resume=None, callbacks=(), **more):
    trainer = Trainer(
        model,
        arguments(folder, **more),
        train_dataset=data if data is not None else rows(),
        callbacks=[*([callback] if callback else []), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
