"""A task whose label stands in the source sentence alone: FLARE learns it from there; without a source it is LoRA."""

import pytest
import torch
from adapters.flares import outputs, pair, target_of
from peft import LoraConfig, get_peft_model
from tiny import BOS, EOS, FIRST_WORD, VOCABULARY, tiny_model

import graftlm

RED, BLUE = FIRST_WORD, FIRST_WORD + 6  # six words each; targets are made of the words after them
TRAIN, TEST = 160, 200


def sentences(count, seed):
    """Targets that say nothing, sources of red or blue words, and which of the two they are."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    labels = integers(0, 2, count)
    sources = integers(0, 6, count, 6) + torch.tensor([RED, BLUE])[labels][:, None]
    found = {"input_ids": integers(BLUE + 6, VOCABULARY, count, 6), "source_input_ids": sources}
    for name, ids in found.items():
        ids[:, 0], ids[:, -1] = BOS, EOS
        found[name] = ids
    return found | {"labels": labels}


def shuffled(batch, seed):
    order = torch.randperm(len(batch["labels"]), generator=torch.Generator().manual_seed(seed))
    return batch | {"source_input_ids": batch["source_input_ids"][order]}


def without(batch):
    return {name: ids for name, ids in batch.items() if name != "source_input_ids"}


def trained(architecture, batch, steps=60):
    base = tiny_model(architecture, num_layers=2, num_labels=2, dropout=0.0, initializer_range=0.3)
    torch.manual_seed(0)
    model = get_peft_model(base, graftlm.FlareConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(steps):
        rows = torch.arange(32 * step, 32 * step + 32) % TRAIN
        model(**{name: ids[rows] for name, ids in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def accuracy(model, batch):
    return (outputs(model, batch).argmax(-1) == batch["labels"]).double().mean().item()


# chance is one half, and four standard errors of 200 sentences are .14
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_what_only_the_source_says_is_learned_from_it_and_from_nothing_else(architecture):
    train, test = sentences(TRAIN, 0), sentences(TEST, 1)
    model = trained(architecture, train)
    assert accuracy(model, test) > 0.95
    assert abs(accuracy(model, shuffled(test, 2)) - 0.5) < 0.14, "it reads the source at test time"
    assert abs(accuracy(model, without(test)) - 0.5) < 0.14
    for change in (lambda batch: shuffled(batch, 3), without):
        assert abs(accuracy(trained(architecture, change(train)), change(test)) - 0.5) < 0.14


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_trained_without_a_source_it_is_pefts_lora_bit_for_bit(architecture):
    """Same start, same random numbers: every weight and logit of both after three steps, dropout included."""
    batch, found = target_of(pair(architecture)), []
    for config in (graftlm.FlareConfig, LoraConfig):
        base = tiny_model(architecture, dropout=0.1)
        torch.manual_seed(0)
        names = {"t5": ["q", "v"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[architecture]
        settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.2, "target_modules": names, "task_type": "SEQ_CLS"}
        model = get_peft_model(base, config(**settings)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((dict(model.named_parameters()), outputs(model, batch)))
    (flare, logits), (lora, theirs) = found
    assert flare.keys() == lora.keys() and torch.equal(logits, theirs)
    assert all(torch.equal(flare[name], lora[name]) for name in flare)
    assert any(tensor.abs().sum() > 0 for name, tensor in flare.items() if "lora_B" in name)
