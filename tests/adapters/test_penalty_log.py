"""What a Trainer's logs say of the penalty: to trackers too, and of a share that is not the one meant."""

import re
import warnings

import pytest
from adapters.neutrals import adapted
from datasets import Dataset
from tiny import tiny_batch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import graftlm


class Tracker(TrainerCallback):
    """Stands in for TensorBoard's."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def trained(path, domains, *, first=False, **settings):
    """A run over as many sequences, four a step; the trainer, what a tracker saw, and the warnings."""
    batch = tiny_batch("llama", "causal_lm", batch_size=len(domains))
    batch = {name: value.tolist() for name, value in batch.items()}
    arguments = TrainingArguments(
        output_dir=str(path),
        num_train_epochs=1,
        logging_steps=1,
        learning_rate=1e-6,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    tracker, log = Tracker(), graftlm.PenaltyLog()
    trainer = Trainer(
        adapted("llama", **{"penalty_weight": 1.0, **settings}),
        arguments,
        train_dataset=Dataset.from_dict(batch | {"domain": domains}),
        data_collator=default_data_collator,
        callbacks=[tracker] if first else [tracker, log],
    )
    if first:
        assert log.first_in(trainer) is log
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in seen if "of the original domain" in str(one.message)]
    said += [str(one.message) for one in seen if "original-domain tokens is" in str(one.message)]
    return trainer, tracker.seen, said


def test_trackers_see_the_penalty_where_it_is_logged_before_them(tmp_path):
    for first in (True, False):
        trainer, seen, _ = trained(tmp_path, [0, 1] * 4, first=first, original_share=0.5)
        logged = [row for row in trainer.state.log_history if "loss" in row]
        assert len(logged) == 2 and all("penalty" in row and "original_share" in row for row in logged)
        for row, other in zip(logged, seen, strict=False):
            assert ("penalty" in other) == first and (not first or other["penalty"] == row["penalty"])


@pytest.mark.parametrize(
    ("domains", "settings", "says"),
    [
        # of rows of 7, 5, 7, 3, 7, 3, … tokens all but the first are predicted: 24 of 34 in the first two steps
        ([0, 1] * 20, {}, "step 2: the share of original-domain tokens is 0.71, and original_share=0.1"),
        ([0, 1] * 20, {"original_share": 0.4}, None),
        ([0, 1] * 20, {"original_share": None}, None),
        ([0] + [1] * 9, {}, None),
        ([1] * 8, {}, "step 2: no token of the original domain has come yet"),
        ([1] * 8, {"original_share": None}, "step 2: no token of the original domain"),
        ([1] * 8, {"penalty_weight": 0}, None),
        ([0, 1, 1, 1] + [1] * 396, {}, "step [0-9]+: the share of original-domain tokens is 0.0"),
    ],
)
def test_a_share_that_is_not_the_one_meant_is_said_once(domains, settings, says, tmp_path):
    _, _, said = trained(tmp_path, domains, **settings)
    assert len(said) == (says is not None)
    if says is not None:
        assert re.match(says, said[0]), said
