"""A mix of two domains: exact share, every row once before one comes twice, the same stream after a resume."""

import datasets
import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from graftlm.errors import DataError, SetupError
from graftlm.training.mixing import DomainMix

NEW = Dataset.from_dict({"row": list(range(100, 170))})
OLD = Dataset.from_dict({"row": list(range(30))})


def stream(mix):
    return [(mix[i]["domain"], mix[i]["row"]) for i in range(len(mix))]


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.3, 0.5, 2 / 3, 0.9, 1])
@pytest.mark.parametrize("length", [1, 7, 100, 333])
def test_the_share_is_exact_over_the_run_and_near_it_in_every_part(share, length):
    if 0 < share * length < 0.5:
        with pytest.raises(SetupError, match=rf"less than half a sequence(.|\n)*share from {0.5 / length:.2g}"):
            DomainMix(NEW, OLD, share=share, length=length)
        return
    found = stream(DomainMix(NEW, OLD, share=share, length=length, seed=3))
    assert len(found) == length
    assert all((row < 100) == (domain == 0) for domain, row in found)
    old = [domain == 0 for domain, _ in found]
    assert abs(sum(old) - share * length) <= 0.5
    k = sum(old)
    for end in range(length + 1):
        assert abs(sum(old[:end]) - end * k / length) < 1 + 1e-9 + (k > 0) / length
    for domain, source in ((0, OLD), (1, NEW)):
        rows = [row for one, row in found if one == domain]
        for start in range(0, len(rows), len(source)):
            once = rows[start : start + len(source)]
            assert len(set(once)) == len(once)


def test_a_streamed_domain_is_refused_and_can_be_interleaved_as_the_error_says():
    streams = {"new": NEW.to_iterable_dataset(), "original": OLD.to_iterable_dataset()}
    for name in streams:
        with pytest.raises(DataError, match=rf"rows of the {name} domain(.|\n)*IterableDataset") as raised:
            DomainMix(**({"new": NEW, "original": OLD} | {name: streams[name]}), length=10)
        first, typed = raised.value.fix.split(", or a share that holds in the mean only: ")
        assert len(eval(first, dict(streams))) == {"new": 70, "original": 30}[name]
    rows = list(eval(typed, streams | {"datasets": datasets}))
    assert len(rows) > 20 and all((row["row"] < 100) == (row["domain"] == 0) for row in rows)


def test_new_rows_alone_need_no_original_ones():
    assert all(domain for domain, _ in stream(DomainMix(NEW, None, share=0)))
    with pytest.raises(DataError, match="no row of the original domain"):
        DomainMix(NEW, None, share=0.5)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(SetupError, match=r"seed=(.|\n)*allowed: 0, 1, 2"):
        DomainMix(NEW, OLD, seed=seed)


def test_the_seed_decides_and_nothing_else():
    first = stream(DomainMix(NEW, OLD, share=0.3, length=200, seed=1))
    assert first == stream(DomainMix(NEW, OLD, share=0.3, length=200, seed=1))
    other = stream(DomainMix(NEW, OLD, share=0.3, length=200, seed=2))
    assert [d for d, _ in first] != [d for d, _ in other]
    assert [r for d, r in first if d] != [r for d, r in other if d]
    again = DomainMix(NEW, OLD, share=0.3, length=200, seed=1)
    assert [(again[i]["domain"], again[i]["row"]) for i in range(150, 200)] == first[150:]  # no state to restore


def test_the_new_domain_is_read_once_where_no_length_is_given():
    mix = DomainMix(NEW, OLD, share=0.3)
    assert len(mix) == 100 and mix.originals == 30
    assert sorted(row for domain, row in stream(mix) if domain) == list(range(100, 170))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_stream_for_any_number_of_ranks(ranks):
    mix = DomainMix(NEW, OLD, share=0.25, length=96, seed=5)
    parts = []
    for rank in range(ranks):
        sampler = DistributedSampler(mix, num_replicas=ranks, rank=rank, shuffle=False)
        loader = DataLoader(mix, batch_size=8 // ranks, sampler=sampler)
        parts.append([list(zip(b["domain"].tolist(), b["row"].tolist(), strict=True)) for b in loader])
    steps = [sorted(pair for part in step for pair in part) for step in zip(*parts, strict=True)]
    whole = stream(mix)
    assert steps == [sorted(whole[start : start + 8]) for start in range(0, 96, 8)]


class Seen(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append((inputs.pop("domain").tolist(), inputs["input_ids"].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_trainer_resumes_in_the_middle(tmp_path):
    def rows(low):
        ids = [[low + i, low + i, 1] for i in range(20)]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    mix = DomainMix(rows(50), rows(10), share=0.25, length=32, seed=1)
    seen = []
    for resume in (False, True):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        model = tiny_model("llama", "causal_lm", num_layers=1, dropout=0.0)
        trainer = Seen(model, arguments, train_dataset=mix, data_collator=default_data_collator)
        trainer.seen = []
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        seen.append(trainer.seen)
    assert len(seen[0]) == 8 and seen[1] == seen[0][4:]
    assert sum(domains.count(0) for domains, _ in seen[0]) == 8


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.1"])
def test_a_share_that_is_none(share):
    with pytest.raises(SetupError, match="0 to 1"):
        DomainMix(NEW, OLD, share=share, length=10)


def test_other_errors():
    with pytest.raises(DataError, match="no row of the original domain, and the mix needs 1"):
        DomainMix(NEW, [], share=0.1, length=10)
    assert len(DomainMix(NEW, [], share=0, length=10)) == 10
    with pytest.raises(DataError, match="no row of the new domain"):
        DomainMix([], OLD, share=0.1, length=10)
    with pytest.raises(SetupError, match="length=0"):
        DomainMix(NEW, OLD, length=0)
    with pytest.raises(SetupError, match="alone needs a length"):
        DomainMix(NEW, OLD, share=1)
    with pytest.raises(DataError, match="none called domain"):
        DomainMix([{"domain": 1}], OLD, share=0, length=1)[0]
    with pytest.raises(DataError, match="found:   str"):
        DomainMix(["text"], OLD, share=0, length=1)[0]
